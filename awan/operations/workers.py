"""Who works: heartbeats of worker processes, taking over the work of dead ones, and the alarm of late operations.

All ages are measured by the database's clock.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import structlog
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from awan.events import record
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.operations import durable
from awan.operations.models import Operation, OperationStatus, Worker

log = structlog.get_logger(__name__)

OVERDUE_BATCH = 100
# Long enough to look into what went wrong; steps and results of a workflow are of no other use once it has ended.
HISTORY_DAYS = 14
HISTORY_BATCH = 500
ACTOR = "operator"

# Held by a worker that says it is alive, and by another one while it takes over: never both.
_LOCK_WORKER = text("SELECT pg_advisory_xact_lock(hashtext('awan.worker'), hashtext(:executor_id))")
_SUSPECTS = text(
    """
    SELECT executor_id FROM dbos.workflow_status
    WHERE status = 'PENDING' AND application_version = :version AND executor_id <> :me
    UNION
    SELECT executor_id FROM worker WHERE executor_id <> :me
    """
)
_IS_DEAD = text(
    """
    SELECT NOT EXISTS (
        SELECT FROM worker
        WHERE executor_id = :executor_id AND seen_at > now() - make_interval(secs => :lease_s)
    )
    """
)


def beat(executor_id: str) -> None:
    """Says that this worker is alive. Once before it starts working, then several times a lease."""
    with transaction() as session:
        session.execute(_LOCK_WORKER, {"executor_id": executor_id})
        row = insert(Worker).values(
            executor_id=executor_id,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            started_at=func.now(),
            seen_at=func.now(),
        )
        session.execute(
            row.on_conflict_do_update(
                index_elements=[Worker.executor_id],
                set_={
                    "seen_at": func.now(),
                    "hostname": row.excluded.hostname,
                    "pid": row.excluded.pid,
                },
            )
        )


def count_alive(session: Session, lease_s: float) -> int:
    """How many workers have been heard of within a lease."""
    alive = text(
        "SELECT count(*) FROM worker WHERE seen_at > now() - make_interval(secs => :lease_s)"
    )
    return int(session.scalar(alive, {"lease_s": lease_s}) or 0)


def take_over_dead(executor_id: str, lease_s: float) -> list[str]:
    """Requeues the work of every worker that has been silent for a lease; gives their names.

    Also of executors that hold work and have no heartbeat row at all. A dead worker's row is forgotten.
    """
    with transaction() as session:
        suspects = session.scalars(
            _SUSPECTS, {"version": durable.APPLICATION_VERSION, "me": executor_id}
        ).all()
    return [suspect for suspect in suspects if _take_over(suspect, lease_s)]


def _take_over(executor_id: str, lease_s: float) -> bool:
    with transaction() as session:
        session.execute(_LOCK_WORKER, {"executor_id": executor_id})
        if not session.scalar(_IS_DEAD, {"executor_id": executor_id, "lease_s": lease_s}):
            return False
        # While we hold the lock, the worker cannot come back and resume the same work beside us.
        workflows = durable.recover([executor_id])
        session.execute(delete(Worker).where(Worker.executor_id == executor_id))
    log.warning("took over from a dead worker", dead=executor_id, workflows=workflows)
    return True


def alarm_overdue() -> int:
    """Marks operations past their deadline, once each, with an event for the operator; gives their number.

    The work goes on: what it waits for may still come, and killing it would leave things half done.
    """
    with transaction() as session:
        overdue = session.scalars(
            select(Operation)
            .where(
                Operation.status.in_([OperationStatus.QUEUED, OperationStatus.RUNNING]),
                Operation.deadline_at < func.now(),
                Operation.alarmed_at.is_(None),
            )
            .limit(OVERDUE_BATCH)
            .with_for_update(skip_locked=True)
        ).all()
        for operation in overdue:
            _alarm(session, operation)
        return len(overdue)


def _alarm(session: Session, operation: Operation) -> None:
    session.execute(
        update(Operation)
        .where(Operation.operation_id == operation.operation_id)
        .values(alarmed_at=func.now())
    )
    record(
        session,
        kind="operation.overdue",
        actor=ACTOR,
        account_id=None,  # an alarm of the operator's; the customer sees the operation itself
        resource_id=operation.resource_id,
        operation_id=operation.operation_id,
        data={"kind": operation.kind, "step": operation.step},
    )
    log.error(
        "operation is overdue",
        alarm=True,
        operation=str(operation.operation_id),
        kind=operation.kind,
        step=operation.step,
    )


def forget_history() -> int:
    """Deletes what the workflow engine keeps of long ended work; the operations themselves stay. Gives the number."""
    before = now() - timedelta(days=HISTORY_DAYS)
    forgotten = 0
    while count := durable.forget_finished(before, HISTORY_BATCH):
        forgotten += count
    return forgotten
