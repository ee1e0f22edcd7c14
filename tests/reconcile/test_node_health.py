"""A node that stops answering: marked after a while, nothing placed on it, its instances unknown; and back again."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import select, update

from awan.engines.registry import sim_store
from awan.events import Event
from awan.fleet import Node
from awan.fleet.service import note_silence
from awan.instances.rules import NODE_UNREACHABLE
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.ledger.models import UsageSpan
from awan.networks import Address
from awan.operations import Operation
from awan.reconcile import run_audit
from awan.reconcile.locations import check_location
from awan.reconcile.nodes import NodeWatch
from tests.support.changed_settings import changed_settings
from tests.support.guests import create_settled
from tests.support.in_process_worker import wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.watched_guests import Guest, find_guest

pytestmark = pytest.mark.usefixtures("worker")

SILENCE_S = 0.05
PASSWORD = "Brave-Donkey-8"


@pytest.fixture
def short_silence() -> Iterator[None]:
    """A node counts as unreachable almost at once."""
    with changed_settings(node_silence_s=str(SILENCE_S)):
        yield


@pytest.fixture
def guest(cloud: SimulatedCloud, short_silence: None) -> Guest:
    """An instance that runs."""
    return find_guest(cloud, create_settled(cloud))


def silence(guest: Guest) -> NodeWatch:
    """The guest's node does not answer any more, for longer than it may; the watch that has noticed."""
    watch = guest.watch()
    watch.look()
    guest.hypervisor.set_node_available(guest.node, False)
    # However long this look takes, it is not the silence that is too long.
    with changed_settings(node_silence_s="3600"):
        watch.look()
    assert health_of(guest)["health"] == "reachable", "one missing answer is not enough"
    until_late = now() + timedelta(seconds=SILENCE_S)
    while now() <= until_late:
        pass
    watch.look()
    return watch


def health_of(guest: Guest) -> dict[str, Any]:
    """The node as the operator sees it."""
    return dict(guest.cloud.admin.get(f"/admin/nodes/{guest.node.node_id}").json()["data"])


def operator_events(kind: str) -> list[dict[str, Any]]:
    """Data of the operator's events of this kind."""
    with transaction() as session:
        return list(session.scalars(select(Event.data).where(Event.kind == kind)))


def test_a_silent_node_is_marked_and_its_instances_are_unknown(guest: Guest) -> None:
    silence(guest)
    shown = health_of(guest)
    assert (shown["health"], shown["state"]) == ("unreachable", "active")
    assert "does not answer" in shown["health_reason"]
    assert shown["seen_at"] <= shown["health_since"]
    instance = guest.show()
    assert (instance["status"], instance["status_reason"]) == ("Unknown", NODE_UNREACHABLE)
    listed = guest.cloud.customer.http.get("/instances?statuses=unknown").json()["data"]["data"]
    assert [(row["uuid"], row["state"]) for row in listed] == [(guest.uuid, "unknown")]
    assert (
        guest.cloud.customer.http.get("/instances?statuses=running").json()["data"]["page"]["total"]
        == 0
    )
    assert guest.count("instance.unreachable") == 1
    (event,) = operator_events("node.unreachable")
    assert event["node"] == str(guest.node.node_id)


@pytest.mark.parametrize("verb", ["start", "stop", "restart"])
def test_power_is_not_changed_while_nobody_knows_it(guest: Guest, verb: str) -> None:
    silence(guest)
    refused = guest.cloud.customer.http.post(f"/instances/{guest.uuid}/{verb}")
    assert (refused.status_code, refused.json()["message"]) == (409, NODE_UNREACHABLE)
    assert int(refused.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("verb", "path", "body"),
    [
        ("PUT", "password", {"password": PASSWORD, "password_confirmation": PASSWORD}),
        ("PUT", "hostname", {"hostname": "web-2"}),
        ("POST", "vnc", {}),
    ],
)
def test_what_needs_the_node_is_refused_at_once(
    guest: Guest, verb: str, path: str, body: dict[str, str]
) -> None:
    silence(guest)
    kinds = guest.kinds()
    refused = guest.cloud.customer.http.request(verb, f"/instances/{guest.uuid}/{path}", json=body)
    assert (refused.status_code, refused.json()["message"]) == (409, NODE_UNREACHABLE)
    assert int(refused.headers["retry-after"]) > 0
    assert guest.kinds() == kinds


def test_a_node_that_returns_empty_lets_its_instances_be_deleted(guest: Guest) -> None:
    """A machine that was set up anew in its place: then nothing is left, and the node can be removed."""
    watch = silence(guest)
    admin, node = guest.cloud.admin, f"/admin/nodes/{guest.node.node_id}"
    refused = admin.delete(f"{node}?lost=true")
    assert refused.status_code == 409, refused.text
    guest.hypervisor.set_node_available(guest.node, True)
    sim_store().execute("DELETE FROM sim.domain")
    sim_store().execute("DELETE FROM sim.volume")
    watch.look()
    wait_until_idle()
    shown = guest.show()
    assert shown["status"] == "Stopped"
    assert "disk of the instance is missing" in shown["status_reason"]
    gone = guest.cloud.customer.http.request(
        "DELETE", f"/instances/{guest.uuid}", json={"remove_ip": True, "remove_block_storage": True}
    )
    assert guest.cloud.wait(gone.json()["operation"]["uuid"])["status"] == "succeeded"
    removed = admin.delete(f"{node}?lost=true")
    assert removed.is_success, removed.text


def test_nothing_is_placed_on_a_silent_node(guest: Guest) -> None:
    cloud = guest.cloud
    (capacity,) = cloud.admin.get("/admin/capacity").json()["data"]
    assert (capacity["nodes_active"], capacity["nodes_out_of_service"]) == (2, 0)
    silence(guest)
    (capacity,) = cloud.admin.get("/admin/capacity").json()["data"]
    assert (capacity["nodes_active"], capacity["nodes_out_of_service"]) == (1, 1)
    for _ in range(3):
        other = find_guest(cloud, create_settled(cloud))
        assert other.node.node_id != guest.node.node_id
    silence(other)
    refused = cloud.customer.http.post("/instances", json=cloud.order())
    assert (refused.status_code, refused.json()["type"]) == (503, "NO_CAPACITY")
    assert "no server in service" in refused.json()["message"]


@pytest.mark.parametrize(
    ("happened", "status"),
    [("nothing", "Running"), ("shut down", "Stopped"), ("reset", "Running")],
)
def test_a_node_that_returns_tells_the_truth(guest: Guest, happened: str, status: str) -> None:
    watch = silence(guest)
    guest.hypervisor.set_node_available(guest.node, True)
    if happened == "shut down":
        guest.shut_down()
    elif happened == "reset":
        guest.hypervisor.lose_power(guest.node)
    assert guest.show()["status"] == "Unknown"
    watch.look()
    wait_until_idle()
    assert guest.show()["status"] == status
    assert guest.power() == status.lower()
    shown = health_of(guest)
    assert (shown["health"], shown["health_reason"]) == ("reachable", None)
    assert guest.count("instance.reachable") == 1
    assert len(operator_events("node.reachable")) == 1
    assert run_audit() == []


def test_a_watcher_that_was_frozen_marks_nothing(guest: Guest) -> None:
    """It has heard nothing for long, but another one has."""
    late = silence(guest)
    guest.hypervisor.set_node_available(guest.node, True)
    guest.watch().look()
    guest.hypervisor.set_node_available(guest.node, False)
    with transaction() as session:
        assert not note_silence(session, guest.node.node_id, 3600.0, "nothing")
    late.look()
    with transaction() as session:
        session.execute(
            update(Node)
            .where(Node.node_id == guest.node.node_id)
            .values(seen_at=now() + timedelta(hours=1))
        )
    late.look()
    guest.hypervisor.set_node_available(guest.node, True)
    late.look()
    assert health_of(guest)["health"] == "reachable"


def test_a_silent_node_does_not_hold_up_its_location(guest: Guest) -> None:
    other = find_guest(guest.cloud, create_settled(guest.cloud))
    assert other.node.node_id != guest.node.node_id
    silence(guest)
    other.fabric.forget_dhcp(other.port_id)
    check_location(guest.cloud.location_id)
    wait_until_idle()
    port = other.fabric.find_port(other.port_id)
    assert port is not None
    assert port.dhcp_families == (4, 6)


def abandon(guest: Guest, name: str) -> httpx.Response:
    """The operator gives the guest's node up."""
    path = f"/admin/nodes/{guest.node.node_id}/abandon"
    return guest.cloud.admin.post(path, json={"confirm": name})


def add_again(guest: Guest) -> httpx.Response:
    """The same host is added under another name."""
    body = {
        "location_id": guest.cloud.location_id,
        "name": "phoenix",
        "libvirt_uri": guest.node.uri,
        "tier_ids": [guest.cloud.tier_id],
    }
    return guest.cloud.admin.post("/admin/nodes", json=body)


def test_a_node_that_is_given_up(guest: Guest) -> None:
    cloud, node = guest.cloud, f"/admin/nodes/{guest.node.node_id}"
    four = guest.show()["public_network"]["uuid"]
    assert cloud.customer.http.put(
        f"/instances/{guest.uuid}/protection", json={"is_protected": True}
    ).is_success
    assert abandon(guest, guest.node.name).status_code == 409, "it answers"
    watch = silence(guest)
    assert abandon(guest, "another").status_code == 422
    given_up = abandon(guest, guest.node.name)
    assert (given_up.status_code, given_up.json()["data"]["state"]) == (200, "lost")
    wait_until_idle()
    # Its instances end without an answer of the node; charging ended when it was given up.
    assert cloud.customer.http.get(f"/instances/{guest.uuid}").status_code == 404
    assert guest.count("instance.lost") == 1
    with transaction() as session:
        spans = session.scalars(select(UsageSpan).where(UsageSpan.resource_id == guest.id)).all()
        deletion = session.scalars(
            select(Operation).where(
                Operation.resource_id == guest.id, Operation.kind == "instance.delete"
            )
        ).one()
        assert spans
        for span in spans:
            assert span.closed_at is not None
            assert abs(span.closed_at - deletion.created_at) < timedelta(seconds=30)
        address = session.scalars(select(Address).where(Address.resource_id == UUID(four))).one()
        assert (address.state, address.account_id) == ("free", cloud.customer.account_id)
    assert (health_of(guest)["vcpus_used"], health_of(guest)["memory_mib_used"]) == (0, 0)
    for verb in ("cordon", "uncordon", "abandon"):
        body = {"confirm": guest.node.name} if verb == "abandon" else {}
        assert cloud.admin.post(f"{node}/{verb}", json=body).status_code == 409
    assert cloud.admin.delete(node).status_code == 409
    assert run_audit() == []

    # It comes back: what ran on it is stopped and kept, and it gets no work.
    guest.hypervisor.set_node_available(guest.node, True)
    assert guest.power() == "running"
    for _ in range(2):
        watch.look()
    wait_until_idle()
    assert guest.power() == "stopped"
    watch.look()
    assert len(operator_events("node.fenced")) == 1
    check_location(cloud.location_id, with_files=True)
    strays = {row["subject"] for row in cloud.admin.get("/admin/quarantine").json()["data"]}
    assert guest.uuid in strays
    assert guest.power() == "stopped"
    assert cloud.admin.post(f"{node}/probe").status_code == 409
    for _ in range(2):
        refused = add_again(guest)
        assert refused.status_code == 409
        assert "abandoned" in refused.json()["message"]
        # Also when it is forgotten.
        assert cloud.admin.delete(node, params={"lost": True}).status_code in (200, 404)
