"""The generic proofs of durable work on console.open, for a console that nobody comes for."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import pytest
from sqlalchemy import select

from awan.console import service, workflows
from awan.console.models import Console
from awan.console.rules import read_ticket
from awan.engines.registry import sim_store
from awan.kit.database import transaction
from awan.operations import Operation
from awan.settings import Settings
from tests.support import proofs
from tests.support.simulated_cloud import SimulatedCloud


@dataclass
class World:
    """A running instance, and the console under proof."""

    cloud: SimulatedCloud
    uuid: str
    console_id: UUID | None = None


@pytest.fixture
def case(
    settings: Settings, cloud: SimulatedCloud, monkeypatch: pytest.MonkeyPatch
) -> proofs.Case[World]:
    """One opening; the instance is the same for all of them."""
    monkeypatch.setattr(workflows, "CONNECT_TIMEOUT_S", 0.1)
    made: list[str] = []

    def prepare() -> World:
        if not made:
            made.append(cloud.create_running()["uuid"])
        return World(cloud, made[0])

    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=prepare,
        begin=begin,
        succeeded=lambda world: is_over(world, "nobody came for it"),
        undone=lambda world: is_over(world, None),
    )


def begin(world: World) -> UUID:
    """A ticket is used; no relay follows."""
    answer = world.cloud.customer.http.post(f"/instances/{world.uuid}/vnc")
    assert answer.status_code == 200, answer.text
    world.console_id = read_ticket(answer.json()["data"]["token"])
    with transaction() as session:
        service.use_ticket(session, world.console_id, "proof")
    with transaction() as session:
        newest = select(Operation.operation_id).order_by(Operation.created_at.desc()).limit(1)
        return UUID(str(session.scalar(newest)))


def is_over(world: World, reason: str | None) -> None:
    """No password opens the screen, and the row says that it is over."""
    row = sim_store().find_one(
        "SELECT password FROM sim.console WHERE uuid = %s", [UUID(world.uuid)]
    )
    assert row is None or row["password"] is None
    with transaction() as session:
        console = session.get_one(Console, world.console_id)
    assert console.state == "closed"
    assert console.closed_reason
    assert reason is None or console.closed_reason == reason


@pytest.mark.timeout(180)
def test_every_step_twice_is_once(case: proofs.Case[World]) -> None:
    proofs.runs_twice_once(case)


@pytest.mark.timeout(180)
def test_a_refused_call_leaves_it_locked(case: proofs.Case[World]) -> None:
    proofs.unwinds_from_failure_at_each_call(case)


@pytest.mark.timeout(180)
def test_outages_are_waited_out(case: proofs.Case[World]) -> None:
    proofs.survives_outage_at_each_call(case)


@pytest.mark.timeout(180)
def test_a_dead_worker_leaves_it_locked(case: proofs.Case[World]) -> None:
    proofs.survives_death_at_each_call(case)


@pytest.mark.timeout(180)
def test_a_death_while_undoing_leaves_it_locked(case: proofs.Case[World]) -> None:
    proofs.survives_death_while_undoing(case)
