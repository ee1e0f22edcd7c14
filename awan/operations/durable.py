"""The only code that knows the workflow engine (DBOS Transact): names, queues, enqueueing, starting, taking over.

DBOS keeps its state in the schema `dbos` of the product's own database, so a row and its workflow commit together.
Enqueueing needs no running engine: API processes only ever use the client. Arguments and results are stored as
readable JSON: ids and small values, never secrets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import ParamSpec, TypeVar
from uuid import UUID

from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer, EnqueueOptions
from sqlalchemy import Engine, ExceptionContext, event
from sqlalchemy.orm import Session

from awan.kit.database import IDLE_TRANSACTION_MAX_S, get_engine, sqlalchemy_url
from awan.operations import waits
from awan.settings import Settings

APPLICATION = "awan"
# Constant: recovery only sees work of its own version, and a deploy must not orphan running workflows.
# Compatibility lives in the workflows' names (`instance.create.v1`).
APPLICATION_VERSION = "awan"
SCHEMA = "dbos"

OPERATIONS_QUEUE = "operations"
WAITS_QUEUE = "waits"
# A waiting workflow holds a thread; a bound keeps them from taking those of the operations.
WAITS_POLLING_FACTOR = 10
WAITS_CONCURRENCY = 1000
# From the request to stop until waits have let go: they look at it several times a second.
WAITS_STOP_S = 2.0
# A workflow that ended its worker this often is not started again; its operation's deadline alarms.
RECOVERIES_MAX = 50

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.Lock()
_client: tuple[Engine, DBOSClient] | None = None


@event.listens_for(Engine, "handle_error")
def _mark_lost_connection(context: ExceptionContext) -> None:
    """Marks each failure to connect as what it is, whatever libpq says of it.

    DBOS repeats what fails for want of a connection until the database is back, but knows such a failure by its
    words, and not all of them: without this mark a refused connection ends a workflow in the middle of its plan.
    """
    if context.connection is None:
        context.is_disconnect = True


def client() -> DBOSClient:
    """The process's client; it shares the pool of `kit.database`."""
    global _client
    engine = get_engine()
    with _lock:
        if _client is None or _client[0] is not engine:
            _client = (
                engine,
                DBOSClient(
                    system_database_engine=engine,
                    dbos_system_schema=SCHEMA,
                    serializer=DBOSPortableJSONSerializer(),
                    application_name=APPLICATION,
                    lazy=True,
                    retry_connection_errors=False,
                ),
            )
        return _client[1]


def enqueue_operation(
    session: Session, workflow: str, operation_id: UUID, subject_id: UUID, partition_key: UUID
) -> None:
    """Puts the workflow of an operation behind the others of its partition, when the transaction commits."""
    if not partition_key:
        # The engine would accept it and never run it.
        raise ValueError("an operation needs a partition key")
    options: EnqueueOptions = {
        "workflow_name": workflow,
        "queue_name": OPERATIONS_QUEUE,
        "workflow_id": str(operation_id),
        "app_version": APPLICATION_VERSION,
        "queue_partition_key": str(partition_key),
    }
    client().enqueue_in_transaction(session, options, str(operation_id), str(subject_id))


def enqueue_prompt(
    session: Session, workflow: str, workflow_id: str, partition_key: UUID, *args: object
) -> None:
    """Starts a waiting workflow that a caller waits for: beside the operations, behind the others of its partition.

    It may last as long as an operation's step, no longer: it holds one of the operations' places.
    """
    options: EnqueueOptions = {
        "workflow_name": workflow,
        "queue_name": OPERATIONS_QUEUE,
        "workflow_id": workflow_id,
        "app_version": APPLICATION_VERSION,
        "queue_partition_key": str(partition_key),
    }
    client().enqueue_in_transaction(
        session, options, *[str(arg) if isinstance(arg, UUID) else arg for arg in args]
    )


def enqueue_waiting(session: Session, workflow: str, workflow_id: str, *args: object) -> None:
    """Starts a waiting workflow when the transaction commits. Arguments: uuids, texts and numbers."""
    options: EnqueueOptions = {
        "workflow_name": workflow,
        "queue_name": WAITS_QUEUE,
        "workflow_id": workflow_id,
        "app_version": APPLICATION_VERSION,
    }
    client().enqueue_in_transaction(
        session, options, *[str(arg) if isinstance(arg, UUID) else arg for arg in args]
    )


def waiting_workflow(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a workflow of the queue `waits`: one that waits for something outside and has no operation row.

    `name` is versioned (`instance.first_boot.v1`). The function must do the same things in the same order when it
    is run again: everything that looks at the world goes through `DBOS.run_step`, every pause is `DBOS.sleep`.
    Ids arrive as texts.
    """
    return DBOS.workflow(name=name, max_recovery_attempts=None)


def launch(
    settings: Settings, *, executor_id: str | None = None, queues: Sequence[str] | None = None
) -> None:
    """Starts carrying out workflows in this process; workflows must be imported before.

    Work that this executor left behind is resumed by itself. `queues` restricts to some of the queues.
    """
    DBOS(
        config={
            "name": APPLICATION,
            "system_database_url": sqlalchemy_url(settings.database_url),
            "dbos_system_schema": SCHEMA,
            "application_version": APPLICATION_VERSION,
            "executor_id": executor_id or settings.worker_id,
            "run_migrations": False,
            "serializer": DBOSPortableJSONSerializer(),
            "log_level": "WARNING",
            "enable_otlp": False,
            "max_executor_threads": settings.workflow_concurrency + WAITS_CONCURRENCY + 8,
            "sys_db_pool_size": settings.database_pool_size // 2,
            # `kit.database` asks those connections that have rested.
            "db_engine_kwargs": {"pool_pre_ping": False, "pool_use_lifo": True},
            "sys_db_idle_transaction_timeout_sec": IDLE_TRANSACTION_MAX_S,
            "notification_listener_polling_interval_sec": 0.05,
        }
    )
    waits.begin_waiting()
    if queues is not None:
        DBOS.listen_queues(list(queues))
    DBOS.launch()
    DBOS.register_queue(
        OPERATIONS_QUEUE,
        partition_concurrency=1,
        worker_concurrency=settings.workflow_concurrency,
        polling_interval_sec=settings.queue_polling_s,
        on_conflict="always_update",
    )
    DBOS.register_queue(
        WAITS_QUEUE,
        worker_concurrency=WAITS_CONCURRENCY,
        # Nobody waits for the begin of a wait; each look costs several queries.
        polling_interval_sec=WAITS_POLLING_FACTOR * settings.queue_polling_s,
        on_conflict="always_update",
    )


def stop(completion_timeout_s: int = 0) -> None:
    """Takes no more work, ends waits, gives operations so long to finish, and leaves the rest to recovery."""
    waits.stop_waiting(WAITS_STOP_S)
    DBOS.destroy(workflow_completion_timeout_sec=completion_timeout_s)


def recover(executor_ids: Sequence[str]) -> int:
    """Puts the unfinished workflows of dead executors back into their queues; gives their number.

    Through the queue a workflow keeps its place and its partition stays one at a time. DBOS offers this to its own
    control plane only, hence the private name; its public `resume_workflows` starts workflows beside the queue, so
    that two of one partition would run at once. `tests/operations/test_workers.py` holds this to what we rely on.
    """
    return len(DBOS._recover_pending_workflows(list(executor_ids)))


def forget_finished(before: datetime, limit: int, *, name: str | None = None) -> int:
    """Deletes inputs, checkpoints and results of workflows that ended before then, at most `limit`; their number.

    Only of the workflow `name`, if given.
    """
    finished = client().list_workflows(
        status=["SUCCESS", "ERROR", "CANCELLED"],
        completed_before=before.isoformat(),
        name=name,
        limit=limit,
        load_input=False,
        load_output=False,
    )
    client().delete_workflows([workflow.workflow_id for workflow in finished])
    return len(finished)
