"""Deletion works from every state on real engines, and nothing is left on either node."""

from __future__ import annotations

import time

import pytest

from tests.support import lab_inspection
from tests.support.lab_cloud import STOP_GRACE_S, LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def assert_gone(cloud: LabCloud, uuid: str, deletion: str) -> None:
    """The deletion ended well and no trace of the instance is left."""
    ended = cloud.wait(deletion)
    assert ended["status"] == "succeeded", ended
    assert cloud.is_gone(uuid)
    holdings = lab_inspection.read_holdings(cloud.lab)
    assert not holdings, holdings


@pytest.mark.parametrize("delay_s", [0.0, 0.3, 0.7, 1.2, 2.0])
def test_during_create(cloud: LabCloud, delay_s: float) -> None:
    answer = cloud.create()
    uuid, creation = answer["data"]["uuid"], answer["operation"]["uuid"]
    time.sleep(delay_s)
    deletion = cloud.delete(uuid)
    assert_gone(cloud, uuid, deletion)
    # It was stopped at a step boundary and unwound, or had just been finished.
    assert cloud.wait(creation)["status"] in ("cancelled", "succeeded")


@pytest.mark.parametrize("step", ["seed", "domain", "power", "port_up"])
def test_at_a_step_of_create(cloud: LabCloud, step: str) -> None:
    answer = cloud.create()
    uuid, creation = answer["data"]["uuid"], answer["operation"]["uuid"]
    order = ["image", "volume", "seed", "port", "domain", "power", "port_up"]
    reached = order[order.index(step) :]

    def is_there() -> bool:
        shown = cloud.operation(creation)
        return shown is not None and (
            shown["step"] in reached or shown["status"] not in ("queued", "running")
        )

    until(is_there, 60, f"step {step} is not reached")
    assert_gone(cloud, uuid, cloud.delete(uuid))


def test_running_and_twice(cloud: LabCloud) -> None:
    uuid = cloud.create_instance()["uuid"]
    deletion = cloud.delete(uuid)
    second = cloud.client.request(
        "DELETE", f"/instances/{uuid}", json={"remove_ip": True, "remove_block_storage": True}
    )
    assert second.status_code in (404, 409), second.text
    assert_gone(cloud, uuid, deletion)


def test_stopped(cloud: LabCloud) -> None:
    uuid = cloud.create_instance()["uuid"]
    cloud.change(uuid, "stop", force=True)
    assert_gone(cloud, uuid, cloud.delete(uuid))


@pytest.mark.parametrize("verb", ["start", "stop", "restart"])
def test_while_it_changes(cloud: LabCloud, verb: str) -> None:
    uuid = cloud.create_instance()["uuid"]
    if verb == "start":
        cloud.change(uuid, "stop", force=True)
    assert cloud.client.post(f"/instances/{uuid}/{verb}", json={}).status_code == 202
    assert_gone(cloud, uuid, cloud.delete(uuid))


def test_while_a_deaf_guest_has_its_grace(cloud: LabCloud) -> None:
    shown = cloud.create_instance()
    uuid = shown["uuid"]
    cloud.wait_ready(uuid)
    # A stopped init starts nothing: the guest does not hear the power button.
    cloud.ssh_when_up(shown["ip_address"], "sudo kill -TSTP 1; sudo killall acpid")
    stop = cloud.client.post(f"/instances/{uuid}/stop", json={}).json()["operation"]["uuid"]
    until(lambda: (cloud.operation(stop) or {}).get("step") == "power", 30, "the stop waits")
    began_at = time.monotonic()
    assert_gone(cloud, uuid, cloud.delete(uuid))
    assert time.monotonic() - began_at < STOP_GRACE_S / 2
    assert cloud.wait(stop)["status"] == "cancelled"


def test_after_a_failed_create(cloud: LabCloud) -> None:
    """A node whose pool is gone refuses; the customer reads one sentence, and the instance can be deleted."""
    for node in cloud.info.nodes:
        lab_inspection.virsh(cloud.lab, node.name, "pool-destroy", lab_inspection.POOL_NAME)
        lab_inspection.virsh(cloud.lab, node.name, "pool-undefine", lab_inspection.POOL_NAME)
    try:
        answer = cloud.create()
        ended = cloud.wait(answer["operation"]["uuid"])
    finally:
        # What an operator does: the probe makes the pool again.
        for row in cloud.admin.get("/admin/nodes").json()["data"]:
            probed = cloud.admin.post(f"/admin/nodes/{row['uuid']}/probe")
            assert probed.is_success, probed.text
    assert ended["status"] == "failed"
    assert ended["error"]["type"] == "ENGINE_ERROR"
    assert "pool" not in ended["error"]["message"]
    shown = cloud.show(answer["data"]["uuid"])
    assert (shown["status"], shown["status_reason"]) == ("Error", ended["error"]["message"])
    cloud.assert_nothing_left()
    cloud.assert_green()
    assert_gone(cloud, shown["uuid"], cloud.delete(shown["uuid"]))


def test_the_address_stays_when_it_is_not_removed(cloud: LabCloud) -> None:
    shown = cloud.create_instance()
    network = shown["public_network"]
    assert cloud.delete_instance(shown["uuid"], remove_ip=False)["status"] == "succeeded"
    cloud.assert_nothing_left()
    cloud.assert_green()
    options = cloud.client.get(f"/networks/public/options?location_id={cloud.location_id}")
    assert network["uuid"] in [row["uuid"] for row in options.json()["data"]]
    again = cloud.create_instance(public_network=network["uuid"])
    assert again["ip_address"] == shown["ip_address"]
    assert cloud.delete_instance(again["uuid"], remove_ip=True)["status"] == "succeeded"
    rows = cloud.client.get("/networks/public").json()["data"]["data"]
    assert network["uuid"] not in [row["uuid"] for row in rows]
