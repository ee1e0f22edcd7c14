"""The operator's nodes over their life: cordoned, probed, refused, removed and added again; and a full location."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from awan.engines.hypervisor.domain_xml import parse_cpuset
from tests.support import lab_inspection
from tests.support.lab_cloud import LabCloud

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


def nodes_of(cloud: LabCloud) -> list[dict[str, Any]]:
    """The nodes by name."""
    rows = cloud.admin.get("/admin/nodes").json()["data"]
    return sorted(rows, key=lambda row: str(row["name"]))


@contextmanager
def cordoned(cloud: LabCloud, *nodes: dict[str, Any]) -> Iterator[None]:
    """Inside, nothing is placed on these nodes."""
    for node in nodes:
        answer = cloud.admin.post(f"/admin/nodes/{node['uuid']}/cordon")
        assert answer.json()["data"]["state"] == "cordoned", answer.text
    try:
        yield
    finally:
        for node in nodes:
            answer = cloud.admin.post(f"/admin/nodes/{node['uuid']}/uncordon")
            assert answer.json()["data"]["state"] == "active", answer.text


def place_of(cloud: LabCloud, shown: dict[str, Any]) -> str:
    """The node that really has the instance."""
    return lab_inspection.node_of(cloud.lab, shown["uuid"])


def threads_of(uuid: str) -> set[str]:
    """Where the kernel lets the vCPUs of a guest run."""
    pid = lab_inspection.qemu_pid(uuid)
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().startswith("CPU "):
            found.add(lab_inspection.process_status(int(task.name))["Cpus_allowed_list"])
    return found


def test_a_dedicated_thread_is_left_by_all_others(cloud: LabCloud) -> None:
    first, second = nodes_of(cloud)
    threads = first["facts"]["cpu_threads"]
    if len(threads) < 2:
        pytest.skip("the node has one thread")
    tier = next(
        row for row in cloud.admin.get("/admin/tiers").json()["data"] if row["offers_dedicated"]
    )
    with cordoned(cloud, second):
        shared = cloud.create_instance()["uuid"]
        before = threads_of(shared)
        dedicated = cloud.create_instance(tier_id=tier["id"], use_dedicated_cpu=True)["uuid"]
        later = cloud.create_instance()["uuid"]
    own = threads_of(dedicated)
    assert own == {str(threads[-1])}
    rest = threads_of(shared)
    assert rest == threads_of(later) != before
    assert not own & parse_cpusets(rest)
    cloud.change(shared, "restart", force=True)
    assert threads_of(shared) == rest
    cloud.assert_green()
    assert cloud.delete_instance(dedicated)["status"] == "succeeded"
    assert parse_cpusets(threads_of(shared)) == {str(number) for number in threads}


def parse_cpusets(texts: set[str]) -> set[str]:
    return {str(number) for text in texts for number in parse_cpuset(text)}


def test_cordon_and_uncordon(cloud: LabCloud) -> None:
    first, second = nodes_of(cloud)
    with cordoned(cloud, first):
        placed = [place_of(cloud, cloud.create_instance()) for _ in range(2)]
        assert placed == [second["name"]] * 2
        # A cordoned node goes on serving what it has.
        with cordoned(cloud, second):
            refused = cloud.client.post("/instances", json=cloud.order())
            assert (refused.status_code, refused.json()["type"]) == (503, "NO_CAPACITY")
            assert "no server in service" in refused.json()["message"]
            assert int(refused.headers["retry-after"]) > 0
            cloud.change(
                cloud.client.get("/instances").json()["data"]["data"][0]["uuid"],
                "restart",
                force=True,
            )
    assert place_of(cloud, cloud.create_instance()) == first["name"]


def test_a_full_location_says_so_coarsely_and_tells_the_operator_exactly(cloud: LabCloud) -> None:
    answer = cloud.client.post("/instances", json=cloud.order(memory=16))
    assert (answer.status_code, answer.json()["type"]) == (503, "NO_CAPACITY")
    message = answer.json()["message"]
    assert "memory" in message
    for exact in ("16384", "6144", *(node["name"] for node in nodes_of(cloud))):
        assert exact not in message
    log = (cloud.plane.log_dir / "api.log").read_text().splitlines()
    (line,) = [
        line for line in log if answer.headers["x-request-id"] in line and "no_capacity" in line
    ]
    assert "16384 MiB" in line
    assert "memory on 2" in line
    assert cloud.client.get("/instances").json()["data"]["data"] == []


def test_probe_tells_what_the_node_is(cloud: LabCloud) -> None:
    for node, wanted in zip(nodes_of(cloud), cloud.info.nodes, strict=True):
        answer = cloud.admin.post(f"/admin/nodes/{node['uuid']}/probe")
        assert answer.status_code == 200, answer.text
        found = answer.json()["data"]
        assert (found["host_uuid"], found["ovn_system_id"]) == (wanted.host_uuid, wanted.system_id)
        assert found["memory_mib"] == 6144
        assert found["disk_gib"] == 100
        assert found["facts"]["hostname"] == wanted.name
        assert found["facts"]["pool_capacity_gib"] > 0
        assert found["cpu_model"]


def test_the_same_host_is_not_added_twice(cloud: LabCloud) -> None:
    first, _ = nodes_of(cloud)
    body = {
        "location_id": cloud.location_id,
        "tier_ids": [cloud.tier_id],
        "libvirt_uri": first["libvirt_uri"],
        "ovn_system_id": first["ovn_system_id"],
    }
    for name in ("again", first["name"]):
        answer = cloud.admin.post("/admin/nodes", json={**body, "name": name})
        assert (answer.status_code, answer.json()["type"]) == (409, "INVALID_OPERATION")
    unknown = cloud.admin.post(
        "/admin/nodes", json={**body, "name": "new", "ovn_system_id": "nobody"}
    )
    assert unknown.status_code == 409
    assert "nobody" in unknown.json()["message"]
    assert len(nodes_of(cloud)) == 2


def test_another_host_behind_a_known_address_is_refused(cloud: LabCloud) -> None:
    first, _ = nodes_of(cloud)
    plant = "UPDATE node SET libvirt_host_uuid = %s WHERE node_id = %s RETURNING node_id"
    cloud.query(plant, str(uuid4()), first["uuid"])
    try:
        answer = cloud.admin.post(f"/admin/nodes/{first['uuid']}/probe")
        assert (answer.status_code, answer.json()["type"]) == (409, "INVALID_OPERATION")
    finally:
        cloud.query(plant, first["host_uuid"], first["uuid"])
    assert cloud.admin.post(f"/admin/nodes/{first['uuid']}/probe").status_code == 200


def test_remove_and_add_again(cloud: LabCloud) -> None:
    first, second = nodes_of(cloud)
    with cordoned(cloud, first):
        shown = cloud.create_instance()
    refused = cloud.admin.delete(f"/admin/nodes/{second['uuid']}")
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    assert cloud.delete_instance(shown["uuid"])["status"] == "succeeded"

    assert cloud.admin.delete(f"/admin/nodes/{second['uuid']}").is_success
    assert [node["name"] for node in nodes_of(cloud)] == [first["name"]]
    with cordoned(cloud, first):
        assert cloud.client.post("/instances", json=cloud.order()).status_code == 503
    added = cloud.admin.post(
        "/admin/nodes",
        json={
            "location_id": cloud.location_id,
            "name": second["name"],
            "tier_ids": second["tier_ids"],
            "libvirt_uri": second["libvirt_uri"],
            "memory_mib_cap": 6144,
            "disk_gib_cap": 100,
        },
    )
    assert added.status_code == 201, added.text
    fresh = added.json()["data"]
    assert fresh["ovn_system_id"] == second["ovn_system_id"], "found by its host name"
    assert (fresh["state"], fresh["memory_mib"]) == ("active", 6144)
    with cordoned(cloud, first):
        assert place_of(cloud, cloud.create_instance()) == second["name"]
    cloud.assert_green()
