"""What no row explains is reported once, shown, and left exactly as it is."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from awan.engines.registry import sim_store
from awan.events import Event
from awan.fleet.models import Node, NodeState
from awan.kit.database import transaction
from awan.reconcile.locations import check_location
from tests.support.guests import create_settled
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.watched_guests import Guest, find_guest

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture
def guest(cloud: SimulatedCloud) -> Guest:
    """An instance that runs and is ready."""
    return find_guest(cloud, create_settled(cloud))


def quarantine(cloud: SimulatedCloud) -> list[dict[str, Any]]:
    """What the operator is shown."""
    return list(cloud.admin.get("/admin/quarantine").json()["data"])


def events(kind: str) -> list[str]:
    """Subjects of the operator's events of this kind."""
    with transaction() as session:
        rows = session.scalars(
            select(Event.data).where(Event.kind == kind).order_by(Event.event_id)
        )
        return [row["subject"] for row in rows]


def plant(guest: Guest) -> dict[str, str]:
    """A domain, a port and two files without rows; kind -> subject."""
    store, location, node = sim_store(), str(guest.cloud.location_id), guest.node.node_id
    domain, port, disk = uuid4(), uuid4(), f"vol-{uuid4()}.qcow2"
    (row,) = store.fetch_all("SELECT name FROM sim.volume WHERE name LIKE 'vol-%%'")
    original = row["name"]
    store.execute(
        "INSERT INTO sim.domain (location, node_id, uuid, power, config)"
        " SELECT location, node_id, %s, 'running', config FROM sim.domain WHERE uuid = %s",
        [domain, guest.id],
    )
    store.execute(
        "INSERT INTO sim.fabric_port (location, name, switch, address_line, security_line,"
        " hostname, dhcp_families, instance_id) SELECT location, %s, switch, address_line,"
        " security_line, hostname, dhcp_families, %s FROM sim.fabric_port WHERE name = %s",
        [str(port), uuid4(), str(guest.port_id)],
    )
    for name in (disk, "notes.txt"):
        store.execute(
            "INSERT INTO sim.volume SELECT (jsonb_populate_record(volume, jsonb_build_object("
            "'name', %s::text))).* FROM sim.volume AS volume"
            " WHERE location = %s AND node_id = %s AND name = %s",
            [name, location, node, original],
        )
    return {"domain": str(domain), "port": str(port), "file": disk}


def everything() -> list[object]:
    """All that the simulated engines hold."""
    store = sim_store()
    return [
        store.fetch_all("SELECT * FROM sim.domain ORDER BY uuid"),
        store.fetch_all("SELECT * FROM sim.fabric_port ORDER BY name"),
        store.fetch_all("SELECT * FROM sim.volume ORDER BY name"),
    ]


def test_strays_are_reported_once_and_never_touched(guest: Guest) -> None:
    cloud = guest.cloud
    check_location(cloud.location_id)
    assert quarantine(cloud) == []
    planted = plant(guest)
    before = everything()
    for _ in range(3):
        check_location(cloud.location_id)
        guest.watch().look()
    assert everything() == before
    shown = quarantine(cloud)
    wanted = sorted([*planted.items(), ("file", "notes.txt")])
    assert sorted((row["kind"], row["subject"]) for row in shown) == wanted
    for row in shown:
        expected = None if row["kind"] == "port" else str(guest.node.node_id)
        assert row["node_uuid"] == expected
        assert row["subject"] in row["sentence"]
        assert row["seen_at"] >= row["found_at"]
    assert sorted(events("quarantine.entered")) == sorted(subject for _, subject in wanted)


def test_what_is_gone_leaves_the_quarantine(guest: Guest) -> None:
    cloud = guest.cloud
    planted = plant(guest)
    check_location(cloud.location_id)
    assert len(quarantine(cloud)) == 4
    sim_store().execute("DELETE FROM sim.domain WHERE uuid <> %s", [guest.id])
    sim_store().execute("DELETE FROM sim.volume WHERE name = 'notes.txt'")
    # Files are not read every time: what was not read is not gone.
    check_location(cloud.location_id, with_files=False)
    assert events("quarantine.left") == [planted["domain"]]
    # Nor is what lies on a node that does not answer.
    guest.hypervisor.set_node_available(guest.node, False)
    sim_store().execute("DELETE FROM sim.volume WHERE name = %s", [planted["file"]])
    check_location(cloud.location_id, with_files=False)
    assert events("quarantine.left") == [planted["domain"]]
    guest.hypervisor.set_node_available(guest.node, True)
    check_location(cloud.location_id)
    assert sorted(events("quarantine.left")) == sorted(
        [planted["domain"], planted["file"], "notes.txt"]
    )
    assert [row["subject"] for row in quarantine(cloud)] == [planted["port"]]


def test_the_marks_of_a_removed_node_end(guest: Guest) -> None:
    cloud = guest.cloud
    with transaction() as session:
        node_ids = session.scalars(
            select(Node.node_id).where(Node.location_id == cloud.location_id)
        ).all()
        other_id = next(it for it in node_ids if it != guest.node.node_id)
        location = str(cloud.location_id)
    sim_store().execute(
        "INSERT INTO sim.volume (location, node_id, name, capacity_bytes, allocation_bytes)"
        " VALUES (%s, %s, 'notes.txt', 1, 1)",
        [location, other_id],
    )
    planted = plant(guest)
    check_location(cloud.location_id)
    assert len(quarantine(cloud)) == 5
    with transaction() as session:
        session.get_one(Node, other_id).state = NodeState.REMOVED
    for _ in range(2):
        check_location(cloud.location_id)
    left = [(row["kind"], row["subject"], row["node_uuid"]) for row in quarantine(cloud)]
    here = str(guest.node.node_id)
    wanted = [
        *((kind, name, None if kind == "port" else here) for kind, name in planted.items()),
        ("file", "notes.txt", here),
    ]
    assert sorted(left) == sorted(wanted)
    assert events("quarantine.left") == ["notes.txt"]


def test_only_the_operator_sees_it(cloud: SimulatedCloud) -> None:
    assert cloud.customer.http.get("/admin/quarantine").status_code == 404
