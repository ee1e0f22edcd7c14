"""A worker that is frozen in one call of an engine, taken for dead, and woken after the instance is long gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from uuid import UUID

import pytest
from sqlalchemy import select, text

from awan.engines.registry import sim_store
from awan.kit.database import get_engine, transaction
from awan.operations import Operation, durable
from awan.reconcile.locations import check_location
from tests.support.guests import create_ready
from tests.support.held_call import held
from tests.support.holdings import assert_counts, engine_state
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud

REMOVE = {"remove_ip": True, "remove_block_storage": False}
# Step -> the engines' verb in it, and where what it makes is seen.
CALLS = {
    "volume": ("create_from_image", "files"),
    "seed": ("ensure_seed", "files"),
    "port": ("ensure_port", "ports"),
    "domain": ("ensure_defined", "domains"),
}


@pytest.fixture
def frozen_worker(cloud: SimulatedCloud, worker: InProcessWorker) -> Iterator[FrozenWorker]:
    """The running worker, and the hand that freezes it."""
    with ExitStack() as stack:
        yield FrozenWorker(stack)


class FrozenWorker:
    """Freezes the worker in its next call of a verb, before the effect; the process goes on as another worker."""

    def __init__(self, stack: ExitStack) -> None:
        """The end of the `stack` wakes the worker at the latest."""
        self._stack = stack

    def freeze_at(self, verb: str) -> None:
        """The next call of the verb lasts until `wait_until_awake`; later ones do not."""
        self._call = self._stack.enter_context(held(verb))

    def wait_for_call(self) -> None:
        """Returns when the worker is in the call."""
        assert self._call.entered.wait(20), "the verb is not called"

    def hand_over(self, operation: str) -> None:
        """The operation goes to another worker, as after a takeover."""
        self.wait_for_call()
        with get_engine().connect() as connection:
            executor = connection.scalar(
                text("SELECT executor_id FROM dbos.workflow_status WHERE workflow_uuid = :id"),
                {"id": operation},
            )
        assert durable.recover([str(executor)]) >= 1

    def assert_still_frozen(self) -> None:
        """The late call has yet to come."""
        assert not self._call.left.is_set()

    def wait_until_awake(self) -> None:
        """The late call has taken effect."""
        self._call.let_go.set()
        assert self._call.left.wait(20), "the late call does not end"

    def wait_until(self, is_cleared_up: Callable[[], bool]) -> None:
        """Returns once that holds."""
        deadline = time.monotonic() + 15
        while not is_cleared_up():
            assert time.monotonic() < deadline, "what came late stays"
            time.sleep(0.05)


def count_repairs() -> int:
    """How many repairs have been begun."""
    with transaction() as session:
        kinds = session.scalars(select(Operation.kind))
        return sum(kind == "instance.repair" for kind in kinds)


@pytest.mark.parametrize("step", CALLS)
def test_what_it_makes_of_a_deleted_instance_does_not_stay(
    cloud: SimulatedCloud, frozen_worker: FrozenWorker, step: str
) -> None:
    verb, seen_in = CALLS[step]
    frozen_worker.freeze_at(verb)
    created = cloud.create()
    uuid, creation = created["data"]["uuid"], created["operation"]["uuid"]
    frozen_worker.hand_over(creation)
    assert cloud.wait(creation)["status"] == "succeeded"
    answer = cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=REMOVE)
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    assert_counts(cloud, 0)
    frozen_worker.assert_still_frozen()
    frozen_worker.wait_until_awake()
    frozen_worker.wait_until(lambda: engine_state(cloud)[seen_in] == [])
    assert_counts(cloud, 0)


@pytest.mark.parametrize("step", ["domain", "port"])
def test_an_instance_that_lives_keeps_everything(
    cloud: SimulatedCloud, frozen_worker: FrozenWorker, step: str
) -> None:
    verb, _ = CALLS[step]
    frozen_worker.freeze_at(verb)
    created = cloud.create()
    uuid, creation = created["data"]["uuid"], created["operation"]["uuid"]
    frozen_worker.hand_over(creation)
    assert cloud.wait(creation)["status"] == "succeeded"
    before = engine_state(cloud)["domains"]
    frozen_worker.assert_still_frozen()
    frozen_worker.wait_until_awake()
    # What the late call did may be long out of date: everything is looked at once more.
    frozen_worker.wait_until(lambda: count_repairs() == 1)
    wait_until_idle()
    assert engine_state(cloud)["domains"] == before == [(UUID(uuid), "running")]
    assert_counts(cloud, 1)


def test_what_it_makes_of_a_cancelled_creation_does_not_stay(
    cloud: SimulatedCloud, frozen_worker: FrozenWorker
) -> None:
    """The other worker undoes the creation before the frozen one has done its part of it."""
    frozen_worker.freeze_at("ensure_defined")
    created = cloud.create()
    uuid, creation = created["data"]["uuid"], created["operation"]["uuid"]
    frozen_worker.wait_for_call()
    answer = cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=REMOVE)
    frozen_worker.hand_over(creation)
    assert cloud.wait(creation)["status"] == "cancelled"
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    assert_counts(cloud, 0)
    frozen_worker.assert_still_frozen()
    frozen_worker.wait_until_awake()
    frozen_worker.wait_until(lambda: not any(engine_state(cloud).values()))
    assert_counts(cloud, 0)


def test_what_a_change_makes_of_a_deleted_instance_does_not_stay(
    cloud: SimulatedCloud, frozen_worker: FrozenWorker
) -> None:
    """A worker is frozen while it puts a seed back; another one ends the repair, and the instance is deleted."""
    uuid = create_ready(cloud)
    sim_store().execute("DELETE FROM sim.volume WHERE starts_with(name, 'seed-')")
    frozen_worker.freeze_at("ensure_seed")
    check_location(cloud.location_id)
    with transaction() as session:
        repair = session.scalars(
            select(Operation.operation_id).where(Operation.kind == "instance.repair")
        ).one()
    frozen_worker.hand_over(str(repair))
    assert cloud.wait(str(repair))["status"] == "succeeded"
    answer = cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=REMOVE)
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    assert_counts(cloud, 0)
    frozen_worker.assert_still_frozen()
    frozen_worker.wait_until_awake()
    frozen_worker.wait_until(lambda: engine_state(cloud)["files"] == [])
    assert_counts(cloud, 0)
