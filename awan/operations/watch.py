"""Waiting for the end of an operation without holding a database connection of the pool.

One thread per process listens on the channel that workers notify; who waits sleeps on an event of its own. A lost
notification or a lost listener costs at most `RECHECK_S`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from uuid import UUID

import psycopg
import structlog
from sqlalchemy import text
from sqlalchemy.orm import Session

from awan.errors import Conflict, Unavailable
from awan.kit.database import transaction
from awan.operations.models import FINAL, Operation, OperationStatus
from awan.settings import get_settings

CHANNEL = "awan_operation"
RECHECK_S = 1.0
RECONNECT_S = 1.0

T = TypeVar("T")

log = structlog.get_logger(__name__)


def notify(session: Session, key: UUID) -> None:
    """Wakes who waits for this operation, or for anything else under its id, when the transaction commits."""
    session.execute(
        text("SELECT pg_notify(:channel, :payload)"),
        {"channel": CHANNEL, "payload": str(key)},
    )


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
    with _listener.woken_by(key) as woken:
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


def _url() -> str:
    return get_settings().database_url.replace("postgresql+psycopg://", "postgresql://", 1)


def _read(operation_id: UUID) -> Operation:
    with transaction() as session:
        operation = session.get(Operation, operation_id)
    if operation is None:
        raise LookupError(f"operation {operation_id}")
    return operation


class _Listener:
    """The process's listening thread; it lives while somebody waits and a little longer."""

    IDLE_S = 30.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, list[threading.Event]] = {}
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def woken_by(self, wanted: UUID) -> Iterator[threading.Event]:
        """An event that is set at each notification of this key."""
        key, event = str(wanted), threading.Event()
        with self._lock:
            self._waiting.setdefault(key, []).append(event)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._listen, name="operation-listener", daemon=True
                )
                self._thread.start()
        try:
            yield event
        finally:
            with self._lock:
                self._waiting[key].remove(event)
                if not self._waiting[key]:
                    del self._waiting[key]

    def _listen(self) -> None:
        while True:
            url = _url()
            try:
                with psycopg.connect(
                    url, autocommit=True, connect_timeout=5, application_name="awan-listener"
                ) as connection:
                    connection.execute(f'LISTEN "{CHANNEL}"')
                    self._wake_all()
                    if self._follow(connection, url):
                        return
            except psycopg.Error as err:
                if self._ends_when_idle():
                    return
                log.warning("operation listener lost its connection", error=str(err))
                time.sleep(RECONNECT_S)

    def _follow(self, connection: psycopg.Connection, url: str) -> bool:
        """Passes notifications on. True: nobody waits any more; False: the database has another URL now."""
        idle_since = time.monotonic()
        while True:
            for notification in connection.notifies(timeout=1.0):
                self._wake(notification.payload)
            if _url() != url:
                return self._ends_when_idle()
            with self._lock:
                is_idle = not self._waiting
            if not is_idle:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > self.IDLE_S and self._ends_when_idle():
                return True

    def _ends_when_idle(self) -> bool:
        with self._lock:
            if self._waiting:
                return False
            self._thread = None
            return True

    def _wake(self, key: str) -> None:
        with self._lock:
            for event in self._waiting.get(key, []):
                event.set()

    def _wake_all(self) -> None:
        with self._lock:
            for events in self._waiting.values():
                for event in events:
                    event.set()


_listener = _Listener()
