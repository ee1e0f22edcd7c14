"""Carries a plan out: steps in order, retries within their bounds, on failure the undos in reverse, one end.

    each step   one checkpointed call: look whether to stop, write the progress, run (with retries), look whether
                another worker has taken over meanwhile (then what came late must not stay). A plan may have one call
                for all its steps and the end: each step then looks as it writes its progress, the end as it is written
    on failure  each undo, from the step that failed back to the first, one checkpointed call each
    the end     one transaction: what the room says (`succeed` or `fail`), the operation's status, the resource
                is free again, the event, the notification

An execution takes a number when it begins, and only the newest one goes on: a worker that was frozen and taken for dead
waits at its next look for the end that the other one writes, and records nothing.

Whatever a step raises is turned into a small stored result inside the checkpoint, so that a worker that takes over
sees the same outcome. Only `Exception` is caught: the death of a worker and the workflow engine's own signals are
`BaseException` and must pass.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar
from uuid import UUID

import structlog
from dbos import DBOS
from sqlalchemy import bindparam, func, or_, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from awan.errors import (
    EngineError,
    EngineUnavailable,
    OperationCancelled,
    Refused,
    Unavailable,
)
from awan.events import record
from awan.kit.clock import now
from awan.kit.database import (
    LOST_STATES,
    execute_directly,
    is_connection_error,
    single_statements,
    sqlstate_of,
    transaction,
)
from awan.operations.durable import RECOVERIES_MAX
from awan.operations.models import FINAL, Operation, OperationStatus
from awan.operations.plans import Failure, Plan, Step, Target
from awan.operations.watch import notify, wait_for_end
from awan.resources.models import Resource

RETRY_FIRST_S = 0.2
RETRY_MAX_S = 5.0
# While the database is away nothing can be undone either: wait for it, but not for ever.
DATABASE_AWAY_MAX_S = 3600.0
# An undo that is refused or hits a bug is tried this often before an operator is called.
UNDO_ATTEMPTS_MAX = 3

# Whoever took an operation over may itself be taken over; its deadline alarms long before this.
OVERTAKEN_WAIT_MAX_S = 86400.0
OVERTAKEN_ROUND_S = 60.0

T = TypeVar("T")

# Every step of every operation asks these; built once, because building them takes longer than sending them.
_CLAIM = (
    update(Operation)
    .where(Operation.operation_id == bindparam("operation"))
    .values(execution=Operation.execution + 1)
    .returning(Operation.execution, Operation.status, Operation.step)
)
_LOOK = select(Operation.status, Operation.execution).where(
    Operation.operation_id == bindparam("operation")
)
_HELD = (
    select(Resource)
    .where(
        or_(
            Resource.resource_id
            == select(Operation.resource_id)
            .where(Operation.operation_id == bindparam("operation"))
            .scalar_subquery(),
            Resource.active_operation_id == bindparam("operation"),
        )
    )
    .order_by(Resource.resource_id)
    .with_for_update(key_share=True)
)
_ENTER = (
    update(Operation)
    .where(
        Operation.operation_id == bindparam("operation"),
        Operation.execution == bindparam("of"),
        # Not IN, whose list is written into the text anew each time.
        or_(
            Operation.status == OperationStatus.QUEUED.value,
            Operation.status == OperationStatus.RUNNING.value,
        ),
    )
    .values(
        status=OperationStatus.RUNNING.value,
        started_at=func.coalesce(Operation.started_at, func.now()),
        step=bindparam("name"),
        percent=bindparam("done"),
    )
    .returning(Operation.cancel_requested_at)
)

log = structlog.get_logger(__name__)


class StoredFailure(TypedDict):
    """A `Failure` as it is kept in a checkpoint."""

    type: str
    message: str
    detail: str
    cancelled: bool


class StoredOutcome(TypedDict):
    """What came of steps that share a checkpoint.

    `begun`: how many were, from the first; `failure`: why the last of these is not done; `took_s`: seconds by step.
    """

    begun: int
    failure: StoredFailure | None
    took_s: dict[str, float]


def outcome_of(result: str | None) -> StoredOutcome | None:
    """What a stored result says of the steps that share its checkpoint; None of any other result."""
    stored = json.loads(result) if result else None
    if not isinstance(stored, dict) or stored.keys() != StoredOutcome.__annotations__.keys():
        return None
    outcome: StoredOutcome = stored  # type: ignore[assignment]
    return outcome


class _Overtaken(Exception):
    """Another execution has the operation now, or has ended it."""


def make_workflow(plan: Plan) -> None:
    """Registers the durable workflow of a plan under its versioned name."""

    def run_plan(operation_id: str, subject_id: str) -> str:
        target = Target(UUID(operation_id), UUID(subject_id))
        with structlog.contextvars.bound_contextvars(
            workflow=plan.workflow, operation=operation_id, subject=subject_id
        ):
            return _run(plan, target)

    run_plan.__name__ = run_plan.__qualname__ = plan.workflow.replace(".", "_")
    DBOS.workflow(name=plan.workflow, max_recovery_attempts=RECOVERIES_MAX)(run_plan)


def _run(plan: Plan, target: Target) -> str:
    turn, status = _claim(target)
    if status in FINAL:
        # The worker died after the end was written, before the workflow's own was.
        return status.value
    begun, failure = _carry_out(plan, turn)
    if failure is None:
        return OperationStatus.SUCCEEDED.value
    undo_failures = []
    for step in reversed(plan.steps[:begun]):
        if step.undo is not None:
            trouble = DBOS.run_step({"name": f"undo_{step.name}"}, _undo_step, step, turn)
            if trouble is not None:
                undo_failures.append(trouble)
    return DBOS.run_step({"name": "end_failed"}, _fail, plan, turn, failure, undo_failures)


def _carry_out(plan: Plan, turn: _Turn) -> tuple[int, StoredFailure | None]:
    """All steps and the good end: how many steps were begun, and the failure that has to be unwound."""
    if plan.is_one_checkpoint:
        outcome = DBOS.run_step({"name": "steps"}, _do_all, plan, turn)
        return outcome["begun"], outcome["failure"]
    for number, step in enumerate(plan.steps, 1):
        failure = DBOS.run_step({"name": step.name}, _do_step, plan, step, turn)
        if failure is not None:
            return number, failure
    return len(plan.steps), DBOS.run_step({"name": "end"}, _succeed, plan, turn)


@dataclass(frozen=True)
class _Turn:
    """One execution of an operation. `execution` is its number: only the newest may go on.

    `reached` names the step that the execution before it had begun last.
    """

    target: Target
    execution: int
    reached: str | None = None


def _claim(target: Target) -> tuple[_Turn, OperationStatus]:
    """Makes this the execution that acts, and tells how the operation stands.

    One that was taken for dead stops at its next look.
    """
    wanted = {"operation": target.operation_id}
    row = _patiently(
        single_statements, lambda session: execute_directly(session, _CLAIM, wanted).one()
    )
    return _Turn(target, row.execution, row.step), OperationStatus(row.status)


def _is_ours(turn: _Turn) -> bool:
    """Whether the operation goes on and this execution is the one that carries it out."""

    wanted = {"operation": turn.target.operation_id}
    row = _patiently(
        single_statements, lambda session: execute_directly(session, _LOOK, wanted).one()
    )
    return OperationStatus(row.status) not in FINAL and row.execution == turn.execution


def _leave_to_others(turn: _Turn) -> None:
    """Returns when the operation has been ended by whoever took it over: until then nothing may be recorded here.

    Raises: TimeoutError after a day.
    """
    deadline = time.monotonic() + OVERTAKEN_WAIT_MAX_S
    while time.monotonic() < deadline:
        try:
            ended = wait_for_end(turn.target.operation_id, OVERTAKEN_ROUND_S)
        except Unavailable:
            continue
        if OperationStatus(ended.status) in FINAL:
            return
    raise TimeoutError(f"operation {turn.target.operation_id} was taken over and never ended")


def _patiently(
    open_session: Callable[[], AbstractContextManager[Session]], work: Callable[[Session], T]
) -> T:
    """`work` in a session of its own, as soon as the database lets it."""
    patience = _Patience(60.0)
    while True:
        try:
            with open_session() as session:
                return work(session)
        except Exception as err:
            delay_s = patience.delay_s(err)
            if delay_s is None:
                raise
            time.sleep(delay_s)


def _do_step(plan: Plan, step: Step, turn: _Turn) -> StoredFailure | None:
    """Runs one step; None when it is done, else why it is not."""
    return _do_steps(plan, [step], turn)["failure"]


def _do_all(plan: Plan, turn: _Turn) -> StoredOutcome:
    """All steps and the good end in one checkpoint."""
    outcome = _do_steps(plan, plan.steps, turn, then=_end_well)
    outcome["begun"] = max(outcome["begun"], _begun_before(plan, turn))
    return outcome


def _begun_before(plan: Plan, turn: _Turn) -> int:
    """How many steps an earlier execution may have begun before its worker died: what they made is undone as well."""
    if turn.execution <= 1 or turn.reached is None:
        return 0
    # The second execution has written over how far the first one came.
    names = [step.name for step in plan.steps]
    return names.index(turn.reached) + 1 if turn.execution == 2 else len(names)


def _do_steps(
    plan: Plan,
    steps: Sequence[Step],
    turn: _Turn,
    then: Callable[[Plan, _Turn], StoredFailure | None] | None = None,
) -> StoredOutcome:
    """Runs steps that share a checkpoint, up to the first that fails; `then` when none did, which looks as it writes.

    Where this worker was frozen in a step and another one has the operation now, what the step did may have come
    after everything that the other one did and undid: once that has ended, the room clears up after it.
    """
    outcome = StoredOutcome(begun=0, failure=None, took_s={})
    late = steps[0]
    try:
        for step in steps:
            outcome["begun"] += 1
            began = time.monotonic()
            outcome["failure"] = _attempt_step(step, turn)
            outcome["took_s"][step.name] = round(time.monotonic() - began, 3)
            late = step
            if outcome["failure"] is not None:
                break
        if then is not None and outcome["failure"] is None:
            outcome["failure"] = then(plan, turn)
            if outcome["failure"] is None:
                return outcome
        if not _is_ours(turn):
            raise _Overtaken
    except _Overtaken:
        log.warning("step was overtaken", step=late.name)
        _leave_to_others(turn)
        if plan.overtaken is not None:
            _insist(f"clearing up after late {late.name}", plan.overtaken, late, turn.target)
    return outcome


def _attempt_step(step: Step, turn: _Turn) -> StoredFailure | None:
    """None when the step is done, else why it is not. Raises: _Overtaken before it was begun."""
    try:
        _with_retries(step, turn)
    except _Overtaken:
        raise
    except OperationCancelled:
        return {
            "type": "CANCELLED",
            "message": "The operation was cancelled on request.",
            "detail": f"cancelled before or during step {step.name}",
            "cancelled": True,
        }
    except Exception as err:  # noqa: BLE001 - whatever went wrong, what was done must be undone
        return _failure_of(step, err)
    return None


def _with_retries(step: Step, turn: _Turn) -> None:
    """One step until it succeeds, fails for good, or its time is over.

    Raises: what the step raised last; OperationCancelled; _Overtaken.
    """
    patience = _Patience(step.timeout_s)
    while True:
        try:
            _enter(step, turn)
            step.run(turn.target)
            return
        except Exception as err:
            delay_s = patience.delay_s(err)
            if delay_s is None:
                raise
            log.warning("step is tried again", step=step.name, error=str(err), delay_s=delay_s)
            turn.target.kept.clear()
            time.sleep(delay_s)


class _Patience:
    """How long to go on retrying: engines within the step's bound, the database within its own."""

    def __init__(self, timeout_s: float) -> None:
        self._engine_until = time.monotonic() + timeout_s
        self._database_until = time.monotonic() + DATABASE_AWAY_MAX_S
        self._next_s = RETRY_FIRST_S

    def delay_s(self, err: Exception) -> float | None:
        """The pause before the next attempt, or None when this error is not retried (any more)."""
        if is_database_away(err):
            until = self._database_until
        elif isinstance(err, EngineUnavailable) or is_lock_trouble(err):
            until = self._engine_until
        else:
            return None
        delay_s, self._next_s = self._next_s, min(self._next_s * 2, RETRY_MAX_S)
        return delay_s if time.monotonic() + delay_s < until else None


def is_database_away(err: Exception) -> bool:
    """Whether the error says that PostgreSQL cannot be reached or has no connection left."""
    if isinstance(err, Unavailable | PoolTimeout):
        return True
    return isinstance(err, DBAPIError) and is_connection_error(err)


def is_lock_trouble(err: Exception) -> bool:
    """Whether the transaction lost against another one and may win the next time."""
    return isinstance(err, DBAPIError) and sqlstate_of(err) in LOST_STATES


def _enter(step: Step, turn: _Turn) -> None:
    """Writes that the step begins.

    Raises: _Overtaken when it is not ours to do, because another worker has taken over; OperationCancelled when that
    was asked for and is still possible.
    """
    target = turn.target
    with single_statements() as session:
        row = execute_directly(
            session,
            _ENTER,
            {
                "operation": target.operation_id,
                "of": turn.execution,
                "name": step.name,
                "done": step.percent,
            },
        ).one_or_none()
    if row is None:
        raise _Overtaken
    if row.cancel_requested_at is not None and step.cancellable:
        raise OperationCancelled(step.name)


def _failure_of(step: Step, err: Exception) -> StoredFailure:
    """The two texts of a failure: a sentence for the customer, the exact words for the operator."""
    detail = f"{step.name}: {type(err).__name__}: {err}"
    if isinstance(err, Refused):
        # Where single fields are wrong, their sentences are the reason; the message only says that some are.
        reasons = [sentence for sentences in (err.errors or {}).values() for sentence in sentences]
        type_, message = err.type, " ".join(reasons) or err.message
        detail = f"{step.name}: {getattr(err, 'detail', None) or message}"
    elif isinstance(err, EngineUnavailable):
        type_ = "UNAVAILABLE"
        message = "The infrastructure did not answer in time. Please try again later."
    elif isinstance(err, EngineError):
        type_ = "ENGINE_ERROR"
        message = (
            "The infrastructure refused a part of the operation. Please try again later; if it fails again, tell"
            " the operator the uuid of the operation."
        )
    else:
        type_ = "INTERNAL"
        message = "An internal error ended the operation. The operator has been informed."
        log.exception("bug in a step", step=step.name)
    log.warning("step failed", step=step.name, type=type_, detail=detail)
    return {"type": type_, "message": message, "detail": detail, "cancelled": False}


def _undo_step(step: Step, turn: _Turn) -> str | None:
    """Runs one undo; None when it is done (by others, if they took over), else (never silently) what is left over."""
    assert step.undo is not None
    if not _is_ours(turn):
        _leave_to_others(turn)
        return None
    return _insist(f"undo of {step.name}", step.undo, step, turn.target)


def _insist(what: str, act: Callable[[Target], None], step: Step, target: Target) -> str | None:
    """Does what must not be left undone, within the step's time; None, or an alarm and why it could not be done."""
    patience = _Patience(step.timeout_s)
    attempts = 0
    while True:
        try:
            # An undo changes rows that the step has read.
            target.kept.clear()
            act(target)
            return None
        except Exception as err:
            delay_s = patience.delay_s(err)
            if delay_s is None:
                attempts += 1
                delay_s = RETRY_FIRST_S * attempts
            if attempts >= UNDO_ATTEMPTS_MAX:
                log.exception(f"{what} failed", step=step.name, alarm=True)
                return f"{what}: {type(err).__name__}: {err}"
            log.warning(f"{what} is tried again", error=str(err), delay_s=delay_s)
            time.sleep(delay_s)


def _succeed(plan: Plan, turn: _Turn) -> StoredFailure | None:
    """As `_end_well`, where nothing that is done before it can have come late."""
    try:
        return _end_well(plan, turn)
    except _Overtaken:
        _leave_to_others(turn)
        return None


def _end_well(plan: Plan, turn: _Turn) -> StoredFailure | None:
    """Ends the operation well. None, or why the room's own end could not be written (then the plan unwinds).

    Raises: _Overtaken when the end is another worker's to write.
    """

    def write(session: Session) -> None:
        plan.succeed(session, turn.target)
        if plan.then is not None:
            plan.then(session, turn.target)

    try:
        _end(turn, _Ending(OperationStatus.SUCCEEDED, None), write)
    except _Overtaken:
        raise
    except Exception as err:
        log.exception("bug at the end of a plan")
        return {
            "type": "INTERNAL",
            "message": "An internal error ended the operation. The operator has been informed.",
            "detail": f"end: {type(err).__name__}: {err}",
            "cancelled": False,
        }
    return None


def _fail(plan: Plan, turn: _Turn, stored: StoredFailure, undo_failures: list[str]) -> str:
    """Ends the operation after its unwinding, whatever happens in the room's own `fail`. Gives the status."""
    failure = Failure(**stored)
    if undo_failures:
        failure = Failure(
            failure.type,
            failure.message,
            "; ".join([failure.detail, *undo_failures]),
            cancelled=False,
            left_over=True,
        )
    status = OperationStatus.CANCELLED if failure.cancelled else OperationStatus.FAILED
    ending = _Ending(status, failure, tuple(undo_failures))
    try:
        _end_or_leave(turn, ending, lambda session: plan.fail(session, turn.target, failure))
    except Exception as err:
        log.exception("bug in the failure of a plan")
        trouble = f"fail: {type(err).__name__}: {err}"
        failure = Failure(failure.type, failure.message, f"{failure.detail}; {trouble}", False)
        ending = _Ending(OperationStatus.FAILED, failure, (*undo_failures, trouble))
        _end_or_leave(turn, ending, lambda session: None)
    return ending.status.value


@dataclass(frozen=True)
class _Ending:
    """How an operation ends. `left_over` names what an operator must look at."""

    status: OperationStatus
    failure: Failure | None
    left_over: tuple[str, ...] = ()


def _end(turn: _Turn, ending: _Ending, write: Callable[[Session], None]) -> None:
    """The last transaction of an operation; exactly once, also when this is run again.

    Raises: _Overtaken when the end is another worker's to write; what `write` raises, after retries while the database
    is away.
    """
    if not _patiently(transaction, lambda session: _end_in(session, turn, ending, write)):
        raise _Overtaken


def _end_or_leave(turn: _Turn, ending: _Ending, write: Callable[[Session], None]) -> None:
    """As `_end`; where it is another worker's to write, returns once that one has."""
    try:
        _end(turn, ending, write)
    except _Overtaken:
        _leave_to_others(turn)


def _end_in(
    session: Session, turn: _Turn, ending: _Ending, write: Callable[[Session], None]
) -> bool:
    """False when the end is another worker's to write. Ended by this execution already: no effect."""
    target = turn.target
    # The same order of locks as everywhere: the resources first, by their ids, then the operation.
    held = session.scalars(_HELD, {"operation": target.operation_id}).all()
    operation = session.get_one(Operation, target.operation_id, with_for_update=True)
    if operation.execution != turn.execution:
        return False
    if OperationStatus(operation.status) in FINAL:
        return True
    write(session)
    operation.status = ending.status.value
    operation.finished_at = now()
    if ending.status is OperationStatus.SUCCEEDED:
        operation.percent = 100
    if ending.failure is not None:
        operation.error_type = ending.failure.type
        operation.error_message = ending.failure.message
        operation.error_detail = ending.failure.detail
    for resource in held:
        if resource.active_operation_id == operation.operation_id:
            resource.active_operation_id = None
    _record(session, operation, operation.account_id, f"operation.{ending.status.value}", {})
    if ending.left_over:
        operation.alarmed_at = operation.alarmed_at or now()
        # The operator's own event: an engine's words are not for the customer.
        left_over = list(ending.left_over)
        _record(session, operation, None, "operation.undo_failed", {"left_over": left_over})
    notify(session, operation.operation_id)
    return True


def _record(
    session: Session,
    operation: Operation,
    account_id: UUID | None,
    kind: str,
    data: dict[str, Any],
) -> None:
    record(
        session,
        kind=kind,
        actor=f"operation:{operation.operation_id}",
        account_id=account_id,
        resource_id=operation.resource_id,
        operation_id=operation.operation_id,
        data={"kind": operation.kind, **data},
    )
