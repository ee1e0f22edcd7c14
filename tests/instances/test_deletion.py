"""Deleting an instance, from whatever state it is in, and what is left of it."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import update

from awan.engines.registry import sim_store
from awan.fleet import Node, NodeHealth
from awan.instances.models import Instance
from awan.kit.database import transaction
from awan.ledger import spans_of
from awan.reconcile.locations import check_location
from awan.resources import Resource
from awan.settings import get_settings
from tests.support import sampling
from tests.support.changed_settings import changed_settings
from tests.support.held_call import held
from tests.support.holdings import assert_counts, engine_state
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud

REMOVE = {"remove_ip": True, "remove_block_storage": False}
# How many steps are tried without --full.
STEPS_SAMPLED = 3
# Step of the creation -> the engines' verb that it waits for.
VERB_OF_STEP = {
    "image": "ensure_image",
    "volume": "create_from_image",
    "seed": "ensure_seed",
    "port": "ensure_port",
    "domain": "ensure_defined",
    "power": "ensure_running",
    "port_up": "wait_port_up",
}


def delete(cloud: SimulatedCloud, uuid: str, **changes: Any) -> httpx.Response:
    """Asks for the deletion."""
    return cloud.customer.http.request("DELETE", f"/instances/{uuid}", json={**REMOVE, **changes})


def assert_deleted(cloud: SimulatedCloud, uuid: str, operation: str) -> None:
    """The deletion ended well, nothing is held, and nothing was charged beyond now."""
    assert cloud.wait(operation)["status"] == "succeeded"
    assert cloud.customer.http.get(f"/instances/{uuid}").status_code == 404
    assert cloud.customer.http.get("/instances").json()["data"]["page"]["total"] == 0
    assert_counts(cloud, 0)
    with transaction() as session:
        instance = session.get_one(Instance, UUID(uuid))
        assert (instance.observed_state, instance.holds_quota) == ("deleted", False)
        assert instance.password_secret_id is instance.user_data_secret_id is None
        assert all(span.closed_at is not None for span in spans_of(session, UUID(uuid)))


def wait_for_step(cloud: SimulatedCloud, operation: str, step: str) -> None:
    """Returns while the operation is in the step."""
    deadline = time.monotonic() + 15
    while cloud.admin.get(f"/operations/{operation}").json()["data"]["step"] != step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("worker")
def test_while_it_is_created_at_every_step(cloud: SimulatedCloud) -> None:
    """The creation stops at its next step, undoes what it did, and the deletion follows."""
    for step, verb in sampling.sample(list(VERB_OF_STEP.items()), STEPS_SAMPLED):
        with held(verb) as call:
            created = cloud.create()
            uuid, creation = created["data"]["uuid"], created["operation"]["uuid"]
            assert call.entered.wait(20), step
            wait_for_step(cloud, creation, step)
            answer = delete(cloud, uuid)
            assert answer.status_code == 202, answer.text
            shown = cloud.customer.http.get(f"/instances/{uuid}").json()["data"]
            assert shown["status"] == "Terminating"
            assert shown["active_operation"]["kind"] == "instance.delete"
            assert not call.left.is_set()
        assert_deleted(cloud, uuid, answer.json()["operation"]["uuid"])
        ended = cloud.wait(creation)["status"]
        # In the last step there is no boundary left at which it could stop.
        assert ended == ("succeeded" if step == "port_up" else "cancelled"), step
        with transaction() as session:
            assert list(spans_of(session, UUID(uuid))) == []


def test_while_its_creation_still_waits(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    worker.stop()
    created = cloud.create()
    answer = delete(cloud, created["data"]["uuid"])
    worker.start()
    assert_deleted(cloud, created["data"]["uuid"], answer.json()["operation"]["uuid"])
    assert cloud.wait(created["operation"]["uuid"])["status"] == "cancelled"


def accept_deletion(cloud: SimulatedCloud, uuid: str, state: str) -> str:
    """Asks for the deletion of an instance that is shown in the state; the operation."""
    shown = cloud.customer.http.get(f"/instances/{uuid}").json()["data"]["state"]
    assert shown == state
    answer = delete(cloud, uuid)
    assert answer.status_code == 202, answer.text
    assert answer.json()["message"] == "Virtual machine is on terminating process"
    assert answer.json()["data"] == []
    return str(answer.json()["operation"]["uuid"])


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("state", ["running", "stopped", "error"])
def test_from_every_state(cloud: SimulatedCloud, state: str) -> None:
    if state == "error":
        sim_store().faults.fail_at(4)
        created = cloud.create()
        assert cloud.wait(created["operation"]["uuid"])["status"] == "failed"
        sim_store().faults.clear()
        uuid = created["data"]["uuid"]
    else:
        uuid = cloud.create_running()["uuid"]
    if state == "stopped":
        stop = cloud.customer.http.post(f"/instances/{uuid}/stop").json()
        cloud.wait(stop["operation"]["uuid"])
    assert_deleted(cloud, uuid, accept_deletion(cloud, uuid, state))


@pytest.mark.usefixtures("worker")
def test_while_it_is_stopping(cloud: SimulatedCloud) -> None:
    uuid = cloud.create_running()["uuid"]
    with held("ensure_stopped") as call:
        stop = cloud.customer.http.post(f"/instances/{uuid}/stop").json()
        assert call.entered.wait(20)
        wait_for_step(cloud, stop["operation"]["uuid"], "power")
        operation = accept_deletion(cloud, uuid, "stopping")
        assert not call.left.is_set()
    assert_deleted(cloud, uuid, operation)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("verb", ["stop", "restart"])
def test_does_not_wait_for_the_grace_of_a_stop(cloud: SimulatedCloud, verb: str) -> None:
    """The guest does not hear the power button, and would be given a minute."""
    uuid = cloud.create_running()["uuid"]
    sim_store().execute("UPDATE sim.domain SET hears_power = false")
    change = cloud.customer.http.post(f"/instances/{uuid}/{verb}").json()["operation"]["uuid"]
    wait_for_step(cloud, change, "power" if verb == "stop" else "power_off")
    began_at = time.monotonic()
    answer = delete(cloud, uuid)
    assert_deleted(cloud, uuid, answer.json()["operation"]["uuid"])
    assert time.monotonic() - began_at < get_settings().stop_grace_s / 3
    assert cloud.wait(change)["status"] == "cancelled"


def test_twice_and_in_both_forms(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    uuid = cloud.create_running()["uuid"]
    worker.stop()
    form = {"_method": "delete", "remove_ip": "1", "remove_block_storage": "0"}
    first = cloud.customer.http.post(f"/instances/{uuid}", data=form)
    assert first.status_code == 202, first.text
    second = cloud.customer.http.request("DELETE", f"/instances/{uuid}", params=REMOVE)
    assert (second.status_code, second.json()["type"]) == (409, "INVALID_OPERATION")
    worker.start()
    assert_deleted(cloud, uuid, first.json()["operation"]["uuid"])
    third = cloud.customer.http.request("DELETE", f"/instances/{uuid}", params=REMOVE)
    unknown = cloud.customer.http.request("DELETE", f"/instances/{uuid4()}", params=REMOVE)
    assert third.status_code == 404
    assert third.content == unknown.content


def test_a_protected_instance_stays(cloud: SimulatedCloud) -> None:
    uuid = cloud.create()["data"]["uuid"]
    with transaction() as session:
        session.execute(update(Resource).values(is_protected=True))
    refused = delete(cloud, uuid)
    assert (refused.status_code, refused.json()["type"]) == (409, "PROTECTED")
    assert "protected" in refused.json()["message"]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, {"remove_ip", "remove_block_storage"}),
        ({"remove_ip": True}, {"remove_block_storage"}),
        ({"remove_ip": "maybe", "remove_block_storage": True}, {"remove_ip"}),
        ({**REMOVE, "now": True}, {"now"}),
    ],
)
def test_both_flags_are_wanted(cloud: SimulatedCloud, body: Any, fields: set[str]) -> None:
    uuid = cloud.create()["data"]["uuid"]
    for answer in (
        cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=body),
        cloud.customer.http.post(f"/instances/{uuid}", json={**body, "_method": "DELETE"}),
    ):
        assert answer.status_code == 422, answer.text
        assert set(answer.json()["errors"]) == fields
    no_method = cloud.customer.http.post(f"/instances/{uuid}", json=REMOVE)
    assert set(no_method.json()["errors"]) == {"_method"}


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("remove_ip", [True, False])
def test_the_address_goes_or_stays(cloud: SimulatedCloud, remove_ip: bool) -> None:
    """A kept address is free, still the customer's, and still billed."""
    http, running = cloud.customer.http, cloud.create_running()
    answer = delete(cloud, running["uuid"], remove_ip=remove_ip)
    cloud.wait(answer.json()["operation"]["uuid"])
    rows = http.get("/networks/public").json()["data"]["data"]
    used = http.get("/account").json()["data"]["quotas"]
    assert used["instances"]["used"] == 0
    assert used["public_ips"]["used"] == (0 if remove_ip else 1)
    address = UUID(running["public_network"]["uuid"])
    with transaction() as session:
        open_spans = [span for span in spans_of(session, address) if span.closed_at is None]
    if remove_ip:
        assert rows == []
        assert open_spans == []
    else:
        assert [(row["uuid"], row["status"], row["instance"]) for row in rows] == [
            (str(address), "free", None)
        ]
        assert [span.component for span in open_spans] == ["public_ip"]
        again = cloud.create_running(public_network=str(address))
        assert again["ip_address"] == running["ip_address"]


def fail_to_delete(cloud: SimulatedCloud, uuid: str) -> dict[str, Any]:
    """How a deletion ended that the hypervisors could not do."""
    sim_store().execute("ALTER TABLE sim.domain RENAME TO domain_away")
    try:
        answer = delete(cloud, uuid)
        return cloud.wait(answer.json()["operation"]["uuid"])
    finally:
        sim_store().execute("ALTER TABLE sim.domain_away RENAME TO domain")


@pytest.mark.usefixtures("worker")
def test_a_deletion_that_fails_is_begun_anew_once_its_node_answers(cloud: SimulatedCloud) -> None:
    uuid = cloud.create_running()["uuid"]
    assert fail_to_delete(cloud, uuid)["status"] == "failed"

    def look_with(health: NodeHealth, retry_s: str) -> None:
        with transaction() as session:
            session.execute(update(Node).values(health=health))
        with changed_settings(repair_retry_s=retry_s):
            check_location(cloud.location_id)
        wait_until_idle()

    look_with(NodeHealth.UNREACHABLE, "0")
    look_with(NodeHealth.REACHABLE, "3600")
    assert cloud.customer.http.get(f"/instances/{uuid}").json()["data"]["state"] == "error"
    look_with(NodeHealth.REACHABLE, "0")
    assert cloud.customer.http.get(f"/instances/{uuid}").status_code == 404
    assert_counts(cloud, 0)
    assert engine_state(cloud)["files"] == []
    assert cloud.customer.http.get("/networks/public").json()["data"]["data"] == []


@pytest.mark.usefixtures("worker")
def test_a_deletion_that_fails_can_be_asked_for_again(cloud: SimulatedCloud) -> None:
    uuid = cloud.create_running()["uuid"]
    ended = fail_to_delete(cloud, uuid)
    assert ended["status"] == "failed"
    assert ended["error"]["type"] == "INTERNAL"
    shown = cloud.customer.http.get(f"/instances/{uuid}").json()["data"]
    assert (shown["status"], shown["status_reason"]) == ("Error", ended["error"]["message"])
    assert cloud.customer.http.post(f"/instances/{uuid}/start").status_code == 409
    answer = delete(cloud, uuid)
    assert_deleted(cloud, uuid, answer.json()["operation"]["uuid"])
    assert engine_state(cloud)["files"] == []
