"""The generic proofs of durable work on repair and recovery: what a failed one leaves, the next one puts right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from uuid import UUID

import pytest
from sqlalchemy import select

from awan.engines.registry import sim_store
from awan.instances.recover import Reason
from awan.kit.database import transaction
from awan.operations import Operation
from awan.reconcile.power import Verdict
from awan.reconcile.repairs import act, find_known
from awan.settings import Settings
from tests.instances.test_workflow_proofs import World, existing
from tests.support import proofs
from tests.support.changed_settings import changed_settings
from tests.support.holdings import assert_counts
from tests.support.in_process_worker import wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.watched_guests import Guest, find_guest

Proof = Callable[..., None]


@pytest.fixture
def at_once(settings: Settings) -> Iterator[Settings]:
    """A repair that failed may be tried again at once."""
    with changed_settings(repair_retry_s="0") as changed:
        yield changed


def take_away(guest: Guest) -> None:
    """The definition (the guest runs on), the port and the seed are gone."""
    guest.undefine()
    sim_store().execute("DELETE FROM sim.fabric_port")
    sim_store().execute("DELETE FROM sim.volume WHERE name LIKE 'seed-%%'")


def reset(guest: Guest) -> None:
    """The node was reset, and has lost the definition as well."""
    guest.hypervisor.ensure_absent(guest.node, guest.id)
    sim_store().execute("DELETE FROM sim.fabric_port")


def domain_of(guest: Guest) -> tuple[str | None, bool]:
    """Power, and whether it has a definition. Not by a call of the engine: those are counted here."""
    row = sim_store().find_one(
        "SELECT power, is_persistent FROM sim.domain WHERE uuid = %s", [guest.id]
    )
    return (None, False) if row is None else (row["power"], row["is_persistent"])


def case_of(
    settings: Settings, cloud: SimulatedCloud, verdict: Verdict, harm: Callable[[Guest], None]
) -> proofs.Case[World]:
    """Harm that is done to a running guest, and the operation that follows from the verdict on it."""

    def prepare() -> World:
        world = existing(cloud, "running")
        harm(find_guest(cloud, world.uuid))
        return world

    def begin(world: World) -> UUID:
        guest = find_guest(cloud, world.uuid)
        with transaction() as session:
            known = find_known(session, guest.node.node_id, guest.id)
        assert known is not None
        assert act(known, verdict, Reason.OTHER, "proof")
        with transaction() as session:
            newest = select(Operation.operation_id).where(Operation.resource_id == guest.id)
            return session.scalars(newest.order_by(Operation.created_at.desc()).limit(1)).one()

    def is_whole(world: World) -> None:
        guest = find_guest(cloud, world.uuid)
        assert_counts(cloud, 1)
        assert domain_of(guest) == ("running", True)
        shown = guest.show()
        assert (shown["status"], shown["active_operation"]) == ("Running", None)

    def shows_truth(world: World) -> None:
        guest = find_guest(cloud, world.uuid)
        shown = guest.show()
        assert shown["active_operation"] is None
        assert shown["status"] == ("Running" if domain_of(guest)[0] == "running" else "Stopped")
        begin(world)
        wait_until_idle()
        is_whole(world)

    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=prepare,
        begin=begin,
        succeeded=is_whole,
        undone=shows_truth,
    )


@pytest.mark.parametrize(
    ("verdict", "harm"),
    [(Verdict.REPAIR, take_away), (Verdict.RECOVER, reset)],
    ids=["repair", "recover"],
)
@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_outage_at_each_call,
        proofs.survives_death_at_each_call,
    ],
)
def test_repairs(
    at_once: Settings,
    cloud: SimulatedCloud,
    proof: Proof,
    verdict: Verdict,
    harm: Callable[[Guest], None],
) -> None:
    proof(case_of(at_once, cloud, verdict, harm))
