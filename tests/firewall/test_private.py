"""Firewalls that stand before private cards too, through the API, over the simulated fabric."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select, update

from awan.engines.registry import sim_store
from awan.firewall.models import FirewallTrial
from awan.firewall.trial import end_trials
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.networks.models import Nic
from awan.reconcile.audit import run_audit
from awan.reconcile.locations import check_location
from tests.firewall.conftest import Guarded, fabric_of
from tests.support.in_process_worker import wait_until_idle


@pytest.fixture
def network(guarded: Guarded) -> str:
    """A private network."""
    body = {"name": "backend", "location_id": guarded.cloud.location_id}
    made = guarded.cloud.customer.http.post("/networks/private", json=body).json()
    wait_until_idle()
    return str(made["data"]["uuid"])


def attach(guarded: Guarded, network: str) -> None:
    """The running instance gets a card of the network."""
    path = f"/instances/{guarded.uuid}/private-network"
    assert guarded.cloud.customer.http.put(path, json={"vswitch": network}).is_success
    wait_until_idle()


def cards(guarded: Guarded, *roles: str) -> set[UUID]:
    """The instance's cards of these roles."""
    query = select(Nic.nic_id).where(
        Nic.instance_id == UUID(guarded.uuid), Nic.role.in_(roles), Nic.deleted_at.is_(None)
    )
    with transaction() as session:
        return set(session.scalars(query))


def behind(guarded: Guarded) -> set[UUID]:
    """The cards that the firewall stands before."""
    facts = guarded.in_fabric()
    assert facts is not None
    return set(facts.port_ids)


def set_policy(guarded: Guarded, **changes: Any) -> dict[str, Any]:
    return dict(guarded.do("PUT", action="DROP", **changes))


def test_private_cards_are_left_alone_unless_it_is_said(guarded: Guarded, network: str) -> None:
    attach(guarded, network)
    assert not set_policy(guarded)["apply_to_private"]
    assert behind(guarded) == cards(guarded, "public")
    assert set_policy(guarded, apply_to_private="true")["apply_to_private"]
    assert behind(guarded) == cards(guarded, "public", "private")
    assert len(behind(guarded)) == 2
    # Left out, it stays as it is.
    assert set_policy(guarded)["apply_to_private"]
    assert list(run_audit()) == []
    assert not set_policy(guarded, apply_to_private="0")["apply_to_private"]
    assert behind(guarded) == cards(guarded, "public")
    assert guarded.do("GET")["sync_status"] == "applied"
    assert list(run_audit()) == []


def test_a_card_that_is_plugged_in_later_is_behind_it(guarded: Guarded, network: str) -> None:
    set_policy(guarded, apply_to_private="true")
    attach(guarded, network)
    assert behind(guarded) == cards(guarded, "public", "private")
    assert list(run_audit()) == []
    path = f"/instances/{guarded.uuid}/private-network/{network}"
    assert guarded.cloud.customer.http.delete(path).is_success
    assert behind(guarded) == cards(guarded, "public")
    assert list(run_audit()) == []


def test_it_stays_before_private_cards_without_a_public_one(guarded: Guarded, network: str) -> None:
    set_policy(guarded, apply_to_private="true")
    attach(guarded, network)
    path = f"/instances/{guarded.uuid}/public-network"
    answer = guarded.cloud.customer.http.put(path, json={"public_network": None})
    assert answer.is_success, answer.text
    assert behind(guarded) == cards(guarded, "private")
    assert list(run_audit()) == []


def test_a_trial_takes_it_back(guarded: Guarded, network: str) -> None:
    attach(guarded, network)
    guarded.do("POST", "/trial")
    set_policy(guarded, apply_to_private="true")
    assert behind(guarded) == cards(guarded, "public", "private")
    with transaction() as session:
        session.execute(update(FirewallTrial).values(ends_at=now()))
    end_trials()
    assert behind(guarded) == cards(guarded, "public")
    assert not guarded.do("GET")["apply_to_private"]


def test_a_private_card_that_got_out_is_put_back(guarded: Guarded, network: str) -> None:
    attach(guarded, network)
    set_policy(guarded, apply_to_private="true")
    expected = behind(guarded)
    (private,) = cards(guarded, "private")
    sim_store().execute(
        "UPDATE sim.fabric_port SET firewall_id = NULL WHERE name = %s", [str(private)]
    )
    assert [str(it.kind) for it in run_audit()] == ["port.wrong"]
    check_location(guarded.cloud.location_id)
    assert behind(guarded) == expected
    found = fabric_of(guarded.cloud).find_port(private)
    assert found is not None
    assert len(found.firewall_ids) == 1
    assert list(run_audit()) == []
