"""The generic proofs of durable work on firewall.apply. It has no undo: it only goes forward."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from uuid import UUID

import pytest

from awan.engines.registry import sim_store
from awan.firewall import Firewall, firewall_id_of
from awan.kit.database import transaction
from awan.settings import Settings
from tests.firewall.conftest import fabric_of
from tests.support import proofs
from tests.support.simulated_cloud import SimulatedCloud


@dataclass
class World:
    """A running instance, and the policy that its firewall gets."""

    cloud: SimulatedCloud
    uuid: str
    policy: str


@pytest.fixture
def case(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[World]:
    """One change; the instance is the same for all of them."""
    made: list[str] = []
    numbers = count()

    def prepare() -> World:
        if not made:
            made.append(cloud.create_running()["uuid"])
        return World(cloud, made[0], ("DROP", "REJECT")[next(numbers) % 2])

    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=prepare,
        begin=begin,
        succeeded=is_in_force,
        undone=is_wanted,
    )


def begin(world: World) -> UUID:
    """A change of the policy."""
    path = f"/instances/{world.uuid}/firewall"
    answer = world.cloud.customer.http.put(path, json={"action": world.policy})
    assert answer.status_code == 200, answer.text
    return UUID(answer.json()["operation"]["uuid"])


def is_in_force(world: World) -> None:
    """The fabric has it, and the row says so."""
    row = is_wanted(world)
    assert row.applied_revision == row.pushed_revision == row.wanted_revision
    sim_store().faults.clear()
    (facts,) = fabric_of(world.cloud).list_firewalls()
    assert facts.revision == row.wanted_revision
    assert facts.lines[0].endswith(world.policy.lower())


def is_wanted(world: World) -> Firewall:
    """The change stays wanted, whatever became of its operation."""
    with transaction() as session:
        row = session.get_one(Firewall, firewall_id_of(UUID(world.uuid)))
    assert row.policy == world.policy
    return row


@pytest.mark.timeout(180)
def test_every_step_twice_is_once(case: proofs.Case[World]) -> None:
    proofs.runs_twice_once(case)


@pytest.mark.timeout(180)
def test_a_refused_call_leaves_it_wanted(case: proofs.Case[World]) -> None:
    proofs.unwinds_from_failure_at_each_call(case)


@pytest.mark.timeout(180)
def test_outages_are_waited_out(case: proofs.Case[World]) -> None:
    proofs.survives_outage_at_each_call(case)


@pytest.mark.timeout(180)
def test_a_dead_worker_is_taken_over(case: proofs.Case[World]) -> None:
    proofs.survives_death_at_each_call(case)
