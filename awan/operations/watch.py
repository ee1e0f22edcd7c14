"""Waiting for the end of an operation without holding a database connection of the pool.

Who waits sleeps until workers notify. A lost notification or a lost listener costs at most `RECHECK_S`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar
from uuid import UUID

from sqlalchemy.orm import Session

from awan.errors import Conflict, Unavailable
from awan.kit.database import transaction
from awan.kit.notifications import Channel
from awan.operations.models import FINAL, Operation, OperationStatus

RECHECK_S = 1.0

T = TypeVar("T")

_channel = Channel("awan_operation")


def notify(session: Session, key: UUID) -> None:
    """Wakes who waits for this operation, or for anything else under its id, when the transaction commits."""
    _channel.notify(session, key)


def wait_for_end(operation_id: UUID, timeout_s: float) -> Operation:
    """The operation when it has ended, or as it stands after `timeout_s`. Blocks; call it outside transactions.

    An outage of the database is waited out: the change has been accepted, and it goes on.
    Raises: LookupError when there is no such operation; Unavailable when the database is away at the end.
    """

    def ended() -> Operation | None:
        operation = _read(operation_id)
        return operation if OperationStatus(operation.status) in FINAL else None

    return wait_until(operation_id, ended, timeout_s) or _read(operation_id)


def wait_until(key: UUID, look: Callable[[], T | None], timeout_s: float) -> T | None:
    """What `look` gives once it gives something, or None after `timeout_s`; looked at after each `notify` of the key.

    Blocks; call it outside transactions, and let `look` open its own.
    Raises: what `look` raises; Unavailable only when the database is away at the end.
    """
    deadline = time.monotonic() + timeout_s
    woken = threading.Event()
    with _channel.woken_by(key, woken.set):
        while True:
            woken.clear()
            try:
                found = look()
                if found is not None or time.monotonic() >= deadline:
                    return found
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
