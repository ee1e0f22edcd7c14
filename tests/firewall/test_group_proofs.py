"""The generic proofs of durable work on firewall_group.apply. It has no undo: it only goes forward."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from uuid import UUID

import pytest

from awan.engines.registry import sim_store
from awan.firewall.models import FirewallGroup
from awan.kit.database import transaction
from awan.settings import Settings
from tests.firewall.conftest import fabric_of
from tests.support import proofs
from tests.support.simulated_cloud import SimulatedCloud


@dataclass
class World:
    """A group that a running instance is behind, and the port that it shall let in."""

    cloud: SimulatedCloud
    uuid: str
    port: int


@pytest.fixture
def case(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[World]:
    """One change of its rules; the group is the same for all of them."""
    made: list[str] = []
    ports = count(1)

    def prepare() -> World:
        if not made:
            made.append(_make_group(cloud))
        return World(cloud, made[0], next(ports))

    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=prepare,
        begin=begin,
        succeeded=is_in_force,
        undone=is_wanted,
    )


def _make_group(cloud: SimulatedCloud) -> str:
    instance, http = cloud.create_running()["uuid"], cloud.customer.http
    made = http.post("/firewall-groups", json={"name": "web", "location_id": cloud.location_id})
    uuid = str(made.json()["data"]["uuid"])
    answer = http.put(f"/instances/{instance}/firewall/groups", json={"groups": [uuid]})
    assert answer.is_success, answer.text
    cloud.wait(answer.json()["operation"]["uuid"])
    return uuid


def begin(world: World) -> UUID:
    """A change of the rules."""
    rule = {"protocol": "tcp", "destination_port": world.port, "action": "ACCEPT"}
    path = f"/firewall-groups/{world.uuid}/rules"
    answer = world.cloud.customer.http.put(path, json={"rules": [rule]})
    assert answer.status_code == 200, answer.text
    return UUID(answer.json()["operation"]["uuid"])


def is_in_force(world: World) -> None:
    """The fabric has it, and the row says so."""
    row = is_wanted(world)
    assert row.applied_revision == row.pushed_revision == row.wanted_revision
    sim_store().faults.clear()
    (facts,) = fabric_of(world.cloud).list_firewall_groups()
    assert facts.revision == row.wanted_revision
    assert f"tcp.dst == {world.port} " in facts.lines[0]


def is_wanted(world: World) -> FirewallGroup:
    """The change stays wanted, whatever became of its operation."""
    with transaction() as session:
        row = session.get_one(FirewallGroup, UUID(world.uuid))
    assert row.rules[0]["ports"] == [world.port, world.port]
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
