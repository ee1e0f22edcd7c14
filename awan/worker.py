"""The worker process: carries out operations, takes over from dead workers, runs the periodic tasks.

It may be killed at any moment: what it left is resumed by itself after a restart (same `worker_id`), or by another
worker when its heartbeat is older than the lease. SIGTERM ends it within `STOP_MAX_S`; what runs is left to recovery.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog
from sqlalchemy import text

from awan.errors import Unavailable
from awan.kit.database import get_engine, transaction
from awan.operations import durable, workers
from awan.settings import Settings, get_settings

STOP_MAX_S = 4.0
# Short workflows get this long to end by themselves at SIGTERM.
STOP_COMPLETION_S = 1
DATABASE_WAIT_S = 30.0
ALARM_INTERVAL_S = 10.0
HISTORY_INTERVAL_S = 3600.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class PeriodicTask:
    """`function` runs every `interval_s`, in one worker at a time; it must bear being run again at once.

    With `is_alone` false it runs in every worker, and shares the work by itself.
    """

    name: str
    interval_s: float
    function: Callable[[], object]
    is_alone: bool = True


def main() -> None:
    """Runs until SIGTERM or SIGINT, then ends the process."""
    settings = get_settings()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())

    # Imported here, as it pulls in all rooms.
    from awan import assembly

    assembly.import_workflows()
    if not _wait_for_database(stopping):
        return
    # The heartbeat comes first: it waits for a takeover of our own work that is under way.
    workers.beat(settings.worker_id)
    durable.launch(settings)
    log.info("worker started", worker=settings.worker_id)
    tasks = [
        PeriodicTask("operations.alarm_overdue", ALARM_INTERVAL_S, workers.alarm_overdue),
        PeriodicTask("operations.forget_history", HISTORY_INTERVAL_S, workers.forget_history),
    ]
    tasks += [PeriodicTask(*task) for task in assembly.WORKER_TASKS]
    tasks += [PeriodicTask(*task, is_alone=False) for task in assembly.SHARED_TASKS]
    start_tasks(tasks, stopping)
    for name, serve in assembly.WORKER_SERVICES:
        threading.Thread(target=serve, args=(stopping,), name=name, daemon=True).start()
    keep_alive(settings, stopping)
    _end_process()


def keep_alive(settings: Settings, stopping: threading.Event) -> None:
    """Heartbeats and takeovers, four times a lease, until told to stop.

    Others are only judged after our own heart has beaten for a whole lease without a gap: after an outage of the
    database everybody looks dead for a moment.
    """
    lease_s = settings.worker_lease_s
    beating_since = last_beat = time.monotonic()
    while not stopping.wait(lease_s / 4):
        try:
            workers.beat(settings.worker_id)
            moment = time.monotonic()
            if moment - last_beat >= lease_s:
                beating_since = moment
            last_beat = moment
            if moment - beating_since >= lease_s:
                workers.take_over_dead(settings.worker_id, lease_s)
        except Exception as err:  # noqa: BLE001 - a worker without a database waits for it
            log.warning("heartbeat failed", error=str(err))


def start_tasks(tasks: Iterable[PeriodicTask], stopping: threading.Event) -> None:
    """One thread for each task, until told to stop. Failures are logged and the task goes on."""
    for task in tasks:
        threading.Thread(
            target=_repeat, args=(task, stopping), name=f"task-{task.name}", daemon=True
        ).start()


def _repeat(task: PeriodicTask, stopping: threading.Event) -> None:
    while not stopping.is_set():
        started = time.monotonic()
        try:
            if task.is_alone:
                run_alone(task)
            else:
                task.function()
        except Unavailable as err:
            log.warning("periodic task waits for the database", task=task.name, error=str(err))
        except Exception:
            log.exception("periodic task failed", task=task.name)
        stopping.wait(max(0.0, task.interval_s - (time.monotonic() - started)))


def run_alone(task: PeriodicTask) -> bool:
    """Runs the task unless another worker is at it now; gives whether it ran."""
    with get_engine().connect() as connection:
        # Bound to this transaction: the lock ends with the connection, however this process ends. The transaction
        # is idle for as long as the task runs.
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        is_ours = connection.scalar(
            text("SELECT pg_try_advisory_xact_lock(hashtext('awan.task'), hashtext(:name))"),
            {"name": task.name},
        )
        if is_ours:
            task.function()
        # A rollback would make the connection forget all statements that it has prepared.
        connection.commit()
        return bool(is_ours)


def _wait_for_database(stopping: threading.Event) -> bool:
    """Whether the database answers; False when told to stop first. Raises: Unavailable after `DATABASE_WAIT_S`."""
    deadline = time.monotonic() + DATABASE_WAIT_S
    while not stopping.is_set():
        try:
            with transaction() as session:
                session.execute(text("SELECT 1"))
            return True
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            stopping.wait(0.2)
    return False


def _end_process() -> None:
    """Ends the process now. Threads in the middle of a step cannot be joined in time: recovery has them."""
    log.info("worker stops")
    giving_up = threading.Timer(STOP_MAX_S, os._exit, (0,))
    giving_up.daemon = True
    giving_up.start()
    durable.stop(completion_timeout_s=STOP_COMPLETION_S)
    os._exit(0)
