"""Being woken by PostgreSQL's NOTIFY: one listening connection and one thread per process, for all channels.

    changes = Channel("awan_thing")                       # at import
    changes.notify(session, thing_id)                     # wakes when the transaction commits
    with changes.woken_by(thing_id, event.set): ...       # `event.set` is called at each notification of the thing

A notification only wakes: who is woken reads what there is. After a lost connection everybody is woken, so a reader
that reads from where it stopped misses nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import structlog
from sqlalchemy import text
from sqlalchemy.orm import Session

from awan.settings import get_settings

RECONNECT_S = 1.0
IDLE_S = 30.0

Wake = Callable[[], None]

log = structlog.get_logger(__name__)


class Channel:
    """A NOTIFY channel whose payloads are the keys of what changed. Make it at import, once per name."""

    def __init__(self, name: str) -> None:
        self.name = name
        _listener.channels.add(name)

    def notify(self, session: Session, key: object) -> None:
        """Wakes who waits for this key, when the transaction commits."""
        session.execute(
            text("SELECT pg_notify(:channel, :payload)"),
            {"channel": self.name, "payload": str(key)},
        )

    @contextlib.contextmanager
    def woken_by(self, key: object, wake: Wake) -> Iterator[None]:
        """Calls `wake` at each notification of this key while the block runs.

        It is called in the listening thread and must neither block nor raise.
        """
        with _listener.subscribed((self.name, str(key)), wake):
            yield


def _url() -> str:
    return get_settings().database_url.replace("postgresql+psycopg://", "postgresql://", 1)


class _Listener:
    """The process's listening thread; it lives while somebody waits and a little longer."""

    def __init__(self) -> None:
        self.channels: set[str] = set()
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, str], list[Wake]] = {}
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def subscribed(self, key: tuple[str, str], wake: Wake) -> Iterator[None]:
        with self._lock:
            self._waiting.setdefault(key, []).append(wake)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._listen, name="notification-listener", daemon=True
                )
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._waiting[key].remove(wake)
                if not self._waiting[key]:
                    del self._waiting[key]

    def _listen(self) -> None:
        while True:
            url = _url()
            try:
                with psycopg.connect(
                    url, autocommit=True, connect_timeout=5, application_name="awan-listener"
                ) as connection:
                    for channel in sorted(self.channels):
                        connection.execute(f'LISTEN "{channel}"')
                    self._wake_all()
                    if self._follow(connection, url):
                        return
            except psycopg.Error as err:
                if self._ends_when_idle():
                    return
                log.warning("listener lost its connection", error=str(err))
                time.sleep(RECONNECT_S)

    def _follow(self, connection: psycopg.Connection, url: str) -> bool:
        """Passes notifications on. True: nobody waits any more; False: the database has another URL now."""
        idle_since = time.monotonic()
        while True:
            for notification in connection.notifies(timeout=1.0):
                self._wake((notification.channel, notification.payload))
            if _url() != url:
                return self._ends_when_idle()
            with self._lock:
                is_idle = not self._waiting
            if not is_idle:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > IDLE_S and self._ends_when_idle():
                return True

    def _ends_when_idle(self) -> bool:
        with self._lock:
            if self._waiting:
                return False
            self._thread = None
            return True

    def _wake(self, key: tuple[str, str]) -> None:
        with self._lock:
            for wake in self._waiting.get(key, []):
                wake()

    def _wake_all(self) -> None:
        with self._lock:
            for wakes in self._waiting.values():
                for wake in wakes:
                    wake()


_listener = _Listener()
