"""Cards that a domain lacks, or has though it should not: put back within a look, and told when the guest holds one."""

from __future__ import annotations

from uuid import uuid4

import pytest
from psycopg.types.json import Jsonb

from awan.engines.registry import sim_store
from awan.instances.recover import CARD_HELD
from awan.reconcile import run_audit
from awan.reconcile.locations import check_location
from tests.support.changed_settings import changed_settings
from tests.support.guests import create_settled
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.watched_guests import Guest, find_guest

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture
def guest(cloud: SimulatedCloud, worker: InProcessWorker) -> Guest:
    """An instance that runs, its first boot over, with a card in a private network besides its public one."""
    guest = find_guest(cloud, create_settled(cloud))
    http = cloud.customer.http
    where = {"name": "backend", "location_id": cloud.location_id}
    made = http.post("/networks/private", json=where).json()
    assert cloud.wait(made["operation"]["uuid"])["status"] == "succeeded"
    joined = http.put(
        f"/instances/{guest.uuid}/private-network", json={"vswitch": made["data"]["uuid"]}
    )
    assert joined.status_code == 200, joined.text
    return guest


def ports(guest: Guest) -> tuple[list[str], list[str] | None]:
    """The cards of its definition and those that it has while it runs."""
    (row,) = sim_store().fetch_all(
        "SELECT config -> 'port_ids' AS config, live -> 'port_ids' AS live FROM sim.domain"
        " WHERE uuid = %s",
        [guest.id],
    )
    return sorted(row["config"]), sorted(row["live"]) if row["live"] is not None else None


def tamper(guest: Guest, cards: list[str]) -> None:
    """Somebody changes the cards of the domain on its node."""
    sim_store().execute(
        "UPDATE sim.domain SET config = jsonb_set(config, '{port_ids}', %s),"
        " live = jsonb_set(live, '{port_ids}', %s) WHERE uuid = %s",
        [Jsonb(cards), Jsonb(cards), guest.id],
    )


def look(guest: Guest) -> None:
    """One look at the location, and the end of what it begins."""
    check_location(guest.cloud.location_id)
    wait_until_idle()


@pytest.mark.parametrize(
    ("fault", "is_running"), [("missing", True), ("extra", True), ("exchanged", False)]
)
def test_wrong_cards_are_put_right(guest: Guest, fault: str, is_running: bool) -> None:
    if not is_running:
        stopped = guest.cloud.customer.http.post(f"/instances/{guest.uuid}/stop", json={})
        guest.cloud.wait(stopped.json()["operation"]["uuid"])
    right = ports(guest)
    stranger = str(uuid4())
    cards = right[0]
    tamper(
        guest,
        {
            "missing": cards[:1],
            "extra": [*cards, stranger],
            "exchanged": [cards[0], stranger],
        }[fault],
    )
    assert [finding.kind for finding in run_audit()] == ["domain.cards"]
    look(guest)
    assert ports(guest) == right
    assert guest.power() == ("running" if is_running else "stopped")
    assert guest.count("instance.repair") == 1
    assert guest.show()["status_reason"] is None
    assert run_audit() == []


def test_a_card_that_the_guest_holds_is_told(guest: Guest) -> None:
    """What it lacks comes all the same; what it holds is tried again later, and gone with its next start."""
    right = ports(guest)
    stranger = str(uuid4())
    tamper(guest, [right[0][0], stranger])
    guest.hypervisor.set_holds_nics(guest.node, guest.id, True)
    look(guest)
    shown = guest.show()
    assert (shown["status"], shown["status_reason"]) == ("Running", CARD_HELD)
    assert ports(guest) == (right[0], sorted([*right[0], stranger]))
    assert [finding.kind for finding in run_audit()] == ["domain.cards"]
    look(guest)
    assert guest.count("instance.repair") == 1, "it is not asked again at once"
    restarted = guest.cloud.customer.http.post(
        f"/instances/{guest.uuid}/restart", json={"force": True}
    )
    guest.cloud.wait(restarted.json()["operation"]["uuid"])
    assert ports(guest) == right
    assert guest.show()["status_reason"] is None
    assert run_audit() == []


def test_nothing_is_done_while_cards_are_being_changed(
    guest: Guest, worker: InProcessWorker
) -> None:
    worker.stop()
    path = f"/instances/{guest.uuid}/private-network"
    with changed_settings(operation_wait_s="0"):
        begun = guest.cloud.customer.http.put(path, json={"vswitch": ""})
    assert begun.status_code == 202, begun.text
    tamper(guest, [])
    check_location(guest.cloud.location_id)
    worker.start()
    assert guest.cloud.wait(begun.json()["operation"]["uuid"])["status"] == "succeeded"
    wait_until_idle()
    assert guest.count("instance.repair") == 0
    assert ports(guest) == ([str(guest.port_id)], [str(guest.port_id)])
    assert run_audit() == []
