"""Waiting for the end of an operation without holding a database connection of the pool.

Who waits sleeps until workers notify. A lost notification or a lost listener costs at most `RECHECK_S`.
"""

from __future__ import annotations

import threading
import time
from uuid import UUID

from sqlalchemy.orm import Session

from awan.errors import Conflict, Unavailable
from awan.kit.database import transaction
from awan.kit.notifications import Channel
from awan.operations.models import FINAL, Operation, OperationStatus

RECHECK_S = 1.0

_channel = Channel("awan_operation")


def notify(session: Session, operation_id: UUID) -> None:
    """Wakes who waits for this operation, when the transaction commits."""
    _channel.notify(session, operation_id)


def wait_for_end(operation_id: UUID, timeout_s: float) -> Operation:
    """The operation when it has ended, or as it stands after `timeout_s`. Blocks; call it outside transactions.

    An outage of the database is waited out: the change has been accepted, and it goes on.
    Raises: LookupError when there is no such operation; Unavailable when the database is away at the end.
    """
    deadline = time.monotonic() + timeout_s
    woken = threading.Event()
    with _channel.woken_by(operation_id, woken.set):
        while True:
            woken.clear()
            try:
                operation = _read(operation_id)
                if OperationStatus(operation.status) in FINAL or time.monotonic() >= deadline:
                    return operation
            except Unavailable:
                if time.monotonic() >= deadline:
                    raise
            woken.wait(min(max(0.0, deadline - time.monotonic()), RECHECK_S))


def wait_for_success(operation_id: UUID, timeout_s: float) -> Operation:
    """As `wait_for_end`, for the operator. Raises: Conflict, with the engine's own words, when it failed."""
    ended = wait_for_end(operation_id, timeout_s)
    if ended.status in (OperationStatus.FAILED, OperationStatus.CANCELLED):
        raise Conflict(f"{ended.error_message} {ended.error_detail or ''}".strip())
    return ended


def _read(operation_id: UUID) -> Operation:
    with transaction() as session:
        operation = session.get(Operation, operation_id)
    if operation is None:
        raise LookupError(f"operation {operation_id}")
    return operation
