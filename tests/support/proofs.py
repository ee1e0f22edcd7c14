"""The generic proofs of durable work. A room describes one operation as a `Case`; each proof runs it many times.

    case = Case(
        settings=settings, faults=store.faults,
        prepare=make_world,             # rows and engines before the operation; gives the world
        begin=begin_create,             # (world) -> the operation's uuid, committed
        succeeded=assert_all_there,     # (world) -> asserts the end state after success
        undone=assert_nothing_left,     # (world) -> asserts that nothing is left over after a failure
    )
    survives_death_at_each_call(case)

Calls are counted from `begin` on, on the fakes of this process. `calls` names the ones to try: a list these alone, None
three at random, `first_middle_last` these three; with `--full` both of the latter mean every call. A death is tried
before and after the effect of its call. About a second for each death, less for a failure.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar
from uuid import UUID

from sqlalchemy import select, text

from awan.engines.sim import SimFaults
from awan.errors import EngineRejected, EngineUnavailable
from awan.events import Event
from awan.kit.database import transaction
from awan.operations import Operation, durable, wait_for_end
from awan.operations.models import FINAL, OperationStatus
from awan.settings import Settings
from tests.support import sampling
from tests.support.in_process_worker import InProcessWorker

W = TypeVar("W")
T = TypeVar("T")
Calls = Sequence[int] | Callable[[int], Sequence[int]] | None
When = Literal["before", "after"]

END_S = 20.0
SAMPLE = 3


@dataclass(frozen=True)
class Case(Generic[W]):
    """One operation under proof; `W` is whatever `prepare` wants to hand on."""

    settings: Settings
    faults: SimFaults
    prepare: Callable[[], W]
    begin: Callable[[W], UUID]
    succeeded: Callable[[W], None]
    undone: Callable[[W], None]


def first_middle_last(count: int) -> list[int]:
    """Three of `count` calls, for operations that are not proved call by call."""
    return sorted({1, (count + 1) // 2, count})


def runs_twice_once(case: Case[W]) -> None:
    """Every step runs, all checkpoints are lost, every step runs again: one effect."""
    with _worker(case) as worker:
        count = _count_calls(case)
        world, operation_id = _begin(case, lambda: case.faults.die_at(count, "after"))
        _revive(case, worker, operation_id, lost="%")
        _expect(operation_id, OperationStatus.SUCCEEDED, f"all {count} calls twice")
        case.succeeded(world)


def unwinds_from_failure_at_each_call(case: Case[W], calls: Calls = None) -> None:
    """A call is refused for good: the operation fails, nothing is left over."""
    with _worker(case):
        for k in _chosen(calls, _count_calls(case)):
            world, operation_id = _begin(case, lambda k=k: case.faults.fail_at(k, EngineRejected))
            _expect(operation_id, OperationStatus.FAILED, f"call {k} refused")
            case.undone(world)


def survives_outage_at_each_call(case: Case[W], calls: Calls = None) -> None:
    """A call fails in a way that may pass: it is tried again and the operation succeeds."""
    with _worker(case):
        for k in _chosen(calls, _count_calls(case)):
            world, operation_id = _begin(
                case, lambda k=k: case.faults.fail_at(k, EngineUnavailable)
            )
            _expect(operation_id, OperationStatus.SUCCEEDED, f"outage at call {k}")
            case.succeeded(world)


def survives_death_at_each_call(
    case: Case[W], calls: Calls = None, whens: Sequence[When] = ("before", "after")
) -> None:
    """The worker dies around a call and comes back: the same end state as without."""
    with _worker(case) as worker:
        for k, when in _chosen_deaths(calls, _count_calls(case), whens):
            world, operation_id = _begin(case, lambda k=k, w=when: case.faults.die_at(k, w))
            _revive(case, worker, operation_id)
            _expect(operation_id, OperationStatus.SUCCEEDED, f"death {when} call {k}")
            case.succeeded(world)


def survives_death_while_undoing(
    case: Case[W], calls: Calls = None, whens: Sequence[When] = ("before", "after")
) -> None:
    """The last call is refused, and the worker dies around a call of the undo: nothing is left over.

    Here `calls` counts the calls of the undo. At the end every undo has also run twice.
    """
    with _worker(case) as worker:
        last = _count_calls(case)

        def refuse_last() -> None:
            case.faults.fail_at(last, EngineRejected)

        world, operation_id = _begin(case, refuse_last)
        _expect(operation_id, OperationStatus.FAILED, "last call refused")
        case.undone(world)
        undo_count = len(case.faults.calls) - last
        very_end: tuple[int, When] = (undo_count, "after")
        deaths = _chosen_deaths(calls, undo_count, whens)
        for k, when in deaths if very_end in deaths else [*deaths, very_end]:

            def refuse_and_die(k: int = k, when: When = when) -> None:
                refuse_last()
                case.faults.die_at(last + k, when)

            world, operation_id = _begin(case, refuse_and_die)
            _revive(case, worker, operation_id, lost="undo_%" if (k, when) == very_end else None)
            _expect(operation_id, OperationStatus.FAILED, f"death {when} undo call {k}")
            case.undone(world)


@contextmanager
def _worker(case: Case[W]) -> Iterator[InProcessWorker]:
    """A worker of operations alone: a waiting workflow beside it would make calls of its own."""
    with InProcessWorker(case.settings, queues=[durable.OPERATIONS_QUEUE]) as worker:
        try:
            yield worker
        finally:
            case.faults.clear()


def _chosen(calls: Calls, count: int) -> Sequence[int]:
    return _chosen_of(calls, count, range(1, count + 1), lambda k: [k])


def _chosen_deaths(calls: Calls, count: int, whens: Sequence[When]) -> Sequence[tuple[int, When]]:
    every = list(itertools.product(range(1, count + 1), whens))
    return _chosen_of(calls, count, every, lambda k: [(k, when) for when in whens])


def _chosen_of(
    calls: Calls, count: int, every: Sequence[T], cases_of: Callable[[int], Sequence[T]]
) -> Sequence[T]:
    """The cases to try out of `every`; `cases_of` gives those of one call."""
    if calls is None:
        return sampling.sample(every, SAMPLE)
    if callable(calls):
        if sampling.is_full():
            return every
        calls = calls(count)
    return [case for k in calls for case in cases_of(k)]


def _begin(case: Case[W], plan: Callable[[], None]) -> tuple[W, UUID]:
    case.faults.clear()
    world = case.prepare()
    case.faults.clear()
    plan()
    return world, case.begin(world)


def _count_calls(case: Case[W]) -> int:
    """The undisturbed run, which must succeed; gives the number of its calls."""
    world, operation_id = _begin(case, lambda: None)
    _expect(operation_id, OperationStatus.SUCCEEDED, "undisturbed")
    case.succeeded(world)
    count = len(case.faults.calls)
    assert count > 0, "the operation made no call of a fake"
    return count


def _revive(
    case: Case[W], worker: InProcessWorker, operation_id: UUID, lost: str | None = None
) -> None:
    """Waits for the planned death and restarts the worker, which forgets the checkpoints named like `lost`."""
    deadline = time.monotonic() + END_S
    while not case.faults.is_dead:
        assert time.monotonic() < deadline, "the planned death did not happen"
        time.sleep(0.01)
    worker.stop()
    if lost is not None:
        with transaction() as session:
            session.execute(
                text(
                    "DELETE FROM dbos.operation_outputs"
                    " WHERE workflow_uuid = :id AND function_name LIKE :names"
                ),
                {"id": str(operation_id), "names": lost},
            )
    case.faults.clear()
    worker.start()


def _expect(operation_id: UUID, status: OperationStatus, what: str) -> None:
    operation = wait_for_end(operation_id, END_S)
    assert OperationStatus(operation.status) in FINAL, f"{what}: still {_describe(operation)}"
    assert operation.status == status, f"{what}: {_describe(operation)}"
    with transaction() as session:
        alarms = session.scalars(
            select(Event.data).where(
                Event.operation_id == operation_id, Event.kind == "operation.undo_failed"
            )
        ).all()
    assert not alarms, f"{what}: {alarms}"


def _describe(operation: Operation) -> str:
    return (
        f"{operation.status} at {operation.step}: {operation.error_type} {operation.error_detail}"
    )
