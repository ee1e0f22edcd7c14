"""A worker inside the test's own process, which can die and come back within a second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self
from uuid import UUID

from sqlalchemy import select, text

from awan.kit.database import get_engine, transaction
from awan.operations import Operation, durable
from awan.operations.models import OperationStatus
from awan.settings import Settings

UNFINISHED = [OperationStatus.QUEUED, OperationStatus.RUNNING]


class InProcessWorker:
    """The workflow engine, launched as the worker process does it, without its periodic tasks.

    `queues` restricts it to some queues: a proof about an operation wants no waiting workflow beside it.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        executor_id: str | None = None,
        queues: Sequence[str] | None = None,
    ) -> None:
        self._settings = settings
        self._executor_id = executor_id
        self._queues = queues

    def start(self) -> None:
        """Takes work. All workflows of the rooms are known."""
        from awan import assembly

        assembly.import_workflows()
        durable.launch(self._settings, executor_id=self._executor_id, queues=self._queues)

    def stop(self) -> None:
        """Takes no more work. A workflow in the middle of a step is abandoned, as a dead worker's."""
        durable.stop()

    def restart(self) -> None:
        """What a supervisor does after a death: the same executor, resuming what it left."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def unfinished() -> list[str]:
    """The operations that have not ended, one line each."""
    with transaction() as session:
        rows = session.scalars(select(Operation).where(Operation.status.in_(UNFINISHED))).all()
    return [f"{row.kind} {row.operation_id}: {row.status} at {row.step}" for row in rows]


def wait_until_idle(timeout_s: float = 20.0) -> None:
    """Returns when no operation is unfinished. Raises: AssertionError naming those that are."""
    deadline = time.monotonic() + timeout_s
    while left := unfinished():
        assert time.monotonic() < deadline, f"not finished after {timeout_s} s: {left}"
        time.sleep(0.02)


def workflow_state(workflow_id: UUID | str) -> str | None:
    """The state the engine has for a workflow (ENQUEUED, PENDING, SUCCESS, ERROR), or None when there is none."""
    with get_engine().connect() as connection:
        return connection.scalar(
            text("SELECT status FROM dbos.workflow_status WHERE workflow_uuid = :id"),
            {"id": str(workflow_id)},
        )
