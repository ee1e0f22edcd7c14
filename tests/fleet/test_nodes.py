"""Nodes: adding them with a probe, taking them out of service, and what is placed where."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import text, update

from awan.catalogue import engines
from awan.catalogue.models import Tier
from awan.engines.registry import sim_store
from awan.errors import NotFound
from awan.fleet import NodeState, endpoint
from awan.fleet.models import Node
from awan.fleet.service import node_with_engines
from awan.kit.database import get_engine, transaction
from tests.support.changed_settings import changed_settings
from tests.support.simulated_cloud import SimulatedCloud


def add(cloud: SimulatedCloud, **changes: Any) -> httpx.Response:
    """Asks for a third node."""
    body = {
        "location_id": cloud.location_id,
        "name": "n3",
        "libvirt_uri": "fake://n3/",
        "tier_ids": [cloud.tier_id],
    }
    return cloud.admin.post("/admin/nodes", json={**body, **changes})


def node_of(instance: str) -> str:
    """The node an instance was placed on."""
    with get_engine().connect() as connection:
        query = text("SELECT node_id FROM placement WHERE instance_id = :id")
        return str(connection.scalar(query, {"id": instance}))


@pytest.mark.usefixtures("worker")
def test_a_probe_finds_what_the_node_has_and_the_caps_lower_it(cloud: SimulatedCloud) -> None:
    answer = add(cloud, cpu_threads_cap=4, memory_mib_cap=999_999, disk_gib_cap=10)
    assert answer.status_code == 201, answer.text
    node = answer.json()["data"]
    assert (node["state"], node["tier_ids"]) == ("active", [cloud.tier_id])
    assert (node["cpu_threads"], node["memory_mib"], node["disk_gib"]) == (4, 65536, 10)
    assert node["facts"]["memory_mib"] == 65536
    assert node["host_uuid"]
    assert node["ovn_system_id"]
    shown = cloud.admin.get(f"/admin/nodes/{node['uuid']}").json()["data"]
    assert shown == node
    probed = cloud.admin.post(f"/admin/nodes/{node['uuid']}/probe").json()["data"]
    assert {**probed, "probed_at": None} == {**node, "probed_at": None}


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"libvirt_uri": "fake://n1/"}, 409),  # the same host under another name
        ({"name": "n1"}, 409),
        ({"ovn_system_id": "nobody"}, 409),
        ({"location_id": 2**40}, 422),
        ({"tier_ids": [2**40]}, 422),
        ({"tier_ids": []}, 422),
        ({"libvirt_uri": "http://x/"}, 422),
        ({"name": "Not A Name"}, 422),
    ],
)
def test_what_is_no_node_is_not_kept(
    cloud: SimulatedCloud, changes: dict[str, Any], status: int
) -> None:
    answer = add(cloud, **changes)
    assert answer.status_code == status, answer.text
    assert len(cloud.admin.get("/admin/nodes").json()["data"]) == 2


@pytest.mark.usefixtures("worker")
def test_a_host_that_was_exchanged_is_refused(cloud: SimulatedCloud) -> None:
    node = cloud.node_ids[0]
    with transaction() as session:
        session.execute(update(Node).where(Node.node_id == node).values(libvirt_host_uuid=uuid4()))
    assert cloud.admin.post(f"/admin/nodes/{node}/probe").status_code == 409


def test_instances_of_an_account_are_kept_apart(cloud: SimulatedCloud) -> None:
    placed = [node_of(cloud.create()["data"]["uuid"]) for _ in range(4)]
    assert sorted(placed.count(node) for node in cloud.node_ids) == [2, 2]


def test_a_cordoned_node_gets_nothing_new(cloud: SimulatedCloud) -> None:
    first, second = cloud.node_ids
    assert cloud.admin.post(f"/admin/nodes/{first}/cordon").json()["data"]["state"] == "cordoned"
    assert {node_of(cloud.create()["data"]["uuid"]) for _ in range(3)} == {second}
    assert cloud.admin.post(f"/admin/nodes/{second}/cordon").is_success
    refused = cloud.customer.http.post("/instances", json=cloud.order())
    assert (refused.status_code, refused.json()["type"]) == (503, "NO_CAPACITY")
    assert cloud.admin.post(f"/admin/nodes/{first}/uncordon").json()["data"]["state"] == "active"
    assert node_of(cloud.create()["data"]["uuid"]) == first


@pytest.mark.usefixtures("worker")
def test_a_node_goes_when_it_is_empty(cloud: SimulatedCloud) -> None:
    uuid = cloud.create()["data"]["uuid"]
    full = node_of(uuid)
    empty = next(node for node in cloud.node_ids if node != full)
    assert cloud.admin.delete(f"/admin/nodes/{full}").status_code == 409
    assert cloud.admin.delete(f"/admin/nodes/{empty}").json()["data"]["state"] == "removed"
    assert cloud.admin.delete(f"/admin/nodes/{empty}").status_code == 404
    assert cloud.admin.get(f"/admin/nodes/{empty}").status_code == 404
    assert len(cloud.admin.get("/admin/nodes").json()["data"]) == 1


@pytest.mark.parametrize(
    ("limit", "node_values", "order"),
    [
        ("memory", {"memory_mib": 1536}, {"memory": 1}),
        ("disk", {"disk_gib": 30}, {"storage": 20}),
        ("cpu", {"cpu_threads": 1}, {"cpu": 4}),
        ("cpu", {"cpu_threads": 1}, {"cpu": 1, "use_dedicated_cpu": True}),
    ],
)
def test_each_limit_holds(
    cloud: SimulatedCloud, limit: str, node_values: dict[str, int], order: dict[str, Any]
) -> None:
    """One instance fits on each node, a third on none; the refusal names the limit."""
    with transaction() as session:
        session.execute(update(Node).values(**node_values))
    for _ in cloud.node_ids:
        cloud.create(**order)
    refused = cloud.customer.http.post("/instances", json=cloud.order(**order))
    assert refused.status_code == 503, refused.text
    assert limit in refused.json()["message"].lower()


def test_dedicated_threads_are_never_shared(cloud: SimulatedCloud) -> None:
    """Four threads at 400 %: two dedicated leave room for eight shared vCPUs, and no more."""
    first = cloud.node_ids[0]
    assert cloud.admin.post(f"/admin/nodes/{cloud.node_ids[1]}/cordon").is_success
    with transaction() as session:
        session.execute(update(Node).where(Node.node_id == first).values(cpu_threads=4))
    cloud.create(cpu=2, use_dedicated_cpu=True)
    cloud.create(cpu=8)
    for order in ({"cpu": 1}, {"cpu": 1, "use_dedicated_cpu": True}):
        refused = cloud.customer.http.post("/instances", json=cloud.order(**order))
        assert refused.status_code == 503, refused.text
    node = cloud.admin.get(f"/admin/nodes/{first}").json()["data"]
    assert (node["vcpus_used"], node["dedicated_threads_used"]) == (8, 2)


def test_over_commitment_is_the_tiers(cloud: SimulatedCloud) -> None:
    with transaction() as session:
        session.execute(update(Node).values(memory_mib=1024))
        session.execute(update(Tier).values(memory_overcommit_percent=200))
    for _ in range(4):
        cloud.create()
    assert cloud.customer.http.post("/instances", json=cloud.order()).status_code == 503


def test_capacity_is_what_can_still_be_ordered(cloud: SimulatedCloud) -> None:
    cloud.create(cpu=2, memory=4, storage=100)
    assert cloud.admin.post(f"/admin/nodes/{cloud.node_ids[1]}/cordon").is_success
    (row,) = cloud.admin.get("/admin/capacity").json()["data"]
    on_first = node_of(cloud.customer.http.get("/instances").json()["data"]["data"][0]["uuid"])
    used = on_first == cloud.node_ids[0]
    assert row == {
        "location_id": cloud.location_id,
        "tier_id": cloud.tier_id,
        "tier": "Cloud Compute",
        "nodes_active": 1,
        "nodes_out_of_service": 1,
        "vcpus_free": 64 - 2 * used,
        "memory_mib_free": 65536 - 4096 * used,
        "disk_gib_free": 2000 - 100 * used,
    }


@pytest.mark.usefixtures("worker")
def test_a_node_that_does_not_answer_is_asked_on(cloud: SimulatedCloud) -> None:
    """The call does not wait for ever: 202, and the operation tells the rest."""
    sim_store().execute(
        "INSERT INTO sim.hypervisor_node SELECT location, node_id, false FROM sim.pool"
    )
    with changed_settings(operation_wait_s="0.3"):
        answer = cloud.admin.post(f"/admin/nodes/{cloud.node_ids[0]}/probe")
    assert answer.status_code == 202, answer.text
    assert answer.json()["operation"]["status"] == "running"
    sim_store().execute("UPDATE sim.hypervisor_node SET is_available = true")
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"


@pytest.mark.usefixtures("worker")
def test_a_node_is_read_with_its_engines(cloud: SimulatedCloud) -> None:
    """As they are when they are asked for by themselves, their secrets too; no more once it is removed."""
    node_id = UUID(cloud.node_ids[0])
    answer = cloud.admin.put(
        f"/admin/locations/{cloud.location_id}/engines/nameserver",
        json={
            "driver": "rfc2136",
            "options": {
                "server": "10.0.0.1",
                "forward_zone": "jkt1.awan.example",
                "reverse_zones": ["100.51.198.in-addr.arpa"],
                "key_name": "awan",
                "key_secret": "c2VjcmV0LXNlY3JldC1zZWNyZXQ=",
            },
        },
    )
    assert answer.status_code == 200, answer.text
    with transaction() as session:
        found = node_with_engines(session, node_id)
        assert found.endpoint == endpoint(session.get_one(Node, node_id))
        assert (found.state, found.location_id) == (NodeState.ACTIVE, cloud.location_id)
        # Options that differ in anything would have had them opened anew.
        assert found.engines is engines(session, cloud.location_id)
        assert set(found.engines.drivers.values()) == {"fake", "rfc2136"}
    assert cloud.admin.delete(f"/admin/nodes/{node_id}").status_code == 200
    for gone in (node_id, uuid4()):
        with transaction() as session, pytest.raises(NotFound):
            node_with_engines(session, gone)
