"""The generic proofs of durable work on create, delete, start, stop and restart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import pytest

from awan.engines.registry import sim_store
from awan.instances.models import Instance
from awan.kit.database import transaction
from awan.settings import Settings
from tests.support import proofs
from tests.support.holdings import assert_counts, engine_state
from tests.support.simulated_cloud import SimulatedCloud

REMOVE = {"remove_ip": True, "remove_block_storage": False}


@dataclass
class World:
    """A cloud, and the instance under proof (None until it is created)."""

    cloud: SimulatedCloud
    uuid: str = ""


def start_create(world: World) -> UUID:
    """Begins a creation."""
    answer = world.cloud.create()
    world.uuid = answer["data"]["uuid"]
    return UUID(answer["operation"]["uuid"])


def is_created(world: World) -> None:
    """Exactly the created instance exists, and runs."""
    assert_counts(world.cloud, 1)
    shown = world.cloud.customer.http.get(f"/instances/{world.uuid}").json()["data"]
    assert shown["status"] == "Running"


def is_not_created(world: World) -> None:
    """Nothing is held; the instance stays, in error, with a reason."""
    assert_counts(world.cloud, 0)
    shown = world.cloud.customer.http.get(f"/instances/{world.uuid}").json()["data"]
    assert shown["status"] == "Error"
    assert shown["status_reason"]


def remove(world: World) -> None:
    """Deletes the instance through the API."""
    answer = world.cloud.customer.http.request("DELETE", f"/instances/{world.uuid}", json=REMOVE)
    assert answer.status_code == 202, answer.text
    ended = world.cloud.wait(answer.json()["operation"]["uuid"])
    assert ended["status"] == "succeeded", ended


def fresh(cloud: SimulatedCloud) -> World:
    """The cloud without the instances of the case before."""
    for row in cloud.customer.http.get("/instances").json()["data"]["data"]:
        remove(World(cloud, row["uuid"]))
    assert_counts(cloud, 0)
    return World(cloud)


def create_case(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[World]:
    """Creation."""
    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=lambda: fresh(cloud),
        begin=start_create,
        succeeded=is_created,
        undone=is_not_created,
    )


def existing(cloud: SimulatedCloud, power: str) -> World:
    """An instance that runs, or is stopped."""
    world = fresh(cloud)
    world.uuid = cloud.create_running()["uuid"]
    if power == "stopped":
        change(world, "stop")
    return world


def change(world: World, verb: str) -> None:
    """A power change, waited for."""
    answer = world.cloud.customer.http.post(f"/instances/{world.uuid}/{verb}")
    assert answer.status_code == 202, answer.text
    assert world.cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"


def power_case(
    settings: Settings, cloud: SimulatedCloud, verb: str, before: str, after: str
) -> proofs.Case[World]:
    """A power change from one state to another."""

    def begin(world: World) -> UUID:
        answer = world.cloud.customer.http.post(f"/instances/{world.uuid}/{verb}")
        assert answer.status_code == 202, answer.text
        return UUID(answer.json()["operation"]["uuid"])

    def shows_truth(world: World) -> None:
        """Status and engine agree, whatever happened; nothing was doubled or lost."""
        shown = world.cloud.customer.http.get(f"/instances/{world.uuid}").json()["data"]
        power = dict(engine_state(world.cloud)["domains"])[UUID(world.uuid)]
        assert shown["status"] == ("Running" if power == "running" else "Stopped")
        assert shown["active_operation"] is None
        assert_counts(world.cloud, 1)

    def succeeded(world: World) -> None:
        shown = world.cloud.customer.http.get(f"/instances/{world.uuid}").json()["data"]
        assert shown["status"] == after
        shows_truth(world)

    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=lambda: existing(cloud, before),
        begin=begin,
        succeeded=succeeded,
        undone=shows_truth,
    )


def delete_case(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[World]:
    """Deletion. When a call is refused for good it fails; asked again, it ends."""

    def begin(world: World) -> UUID:
        answer = world.cloud.customer.http.request(
            "DELETE", f"/instances/{world.uuid}", json=REMOVE
        )
        assert answer.status_code == 202, answer.text
        return UUID(answer.json()["operation"]["uuid"])

    def gone(world: World) -> None:
        assert_counts(world.cloud, 0)
        assert world.cloud.customer.http.get(f"/instances/{world.uuid}").status_code == 404
        with transaction() as session:
            instance = session.get_one(Instance, UUID(world.uuid))
            assert instance.password_secret_id is None

    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=lambda: existing(cloud, "running"),
        begin=begin,
        succeeded=gone,
        undone=remove,
    )


Proof = Callable[..., None]


@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_outage_at_each_call,
        proofs.survives_death_at_each_call,
        proofs.survives_death_while_undoing,
    ],
)
def test_create(settings: Settings, cloud: SimulatedCloud, proof: Proof) -> None:
    proof(create_case(settings, cloud))


@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_outage_at_each_call,
        proofs.survives_death_at_each_call,
    ],
)
def test_delete(settings: Settings, cloud: SimulatedCloud, proof: Proof) -> None:
    proof(delete_case(settings, cloud))


@pytest.mark.parametrize(
    ("verb", "before", "after"),
    [
        ("start", "stopped", "Running"),
        ("stop", "running", "Stopped"),
        ("restart", "running", "Running"),
    ],
)
@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_death_at_each_call,
    ],
)
def test_power(
    settings: Settings, cloud: SimulatedCloud, proof: Proof, verb: str, before: str, after: str
) -> None:
    case = power_case(settings, cloud, verb, before, after)
    if proof is proofs.runs_twice_once:
        proof(case)
    else:
        proof(case, proofs.first_middle_last)
