"""Connections to the libvirt daemons of the nodes: one per node, shared by all engines that speak
libvirt.

Three things make a plain libvirt connection unfit for a service, and are answered here:

- A frozen daemon blocks a call forever. Keepalive ends such a connection, and every call has a
  deadline of its own.
- A stopped QEMU blocks only the calls on its domain, but each of them holds one of the few requests
  that the daemon serves at once per connection. So at most one call per key (a domain, a volume) is
  in flight, a call past its deadline is left behind in its thread, and a connection that has
  collected several of those is replaced.
- Events are lost while disconnected. Listeners are told to look again (`on_resync`) after every
  reconnect.

libvirt requires its event loop to exist before the first connection is opened; one daemon thread of
the process runs it.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar
from uuid import UUID

import libvirt
import structlog
from lxml import etree

from awan.engines.hypervisor import NodeEndpoint
from awan.errors import EngineError, EngineRejected, EngineUnavailable

ENGINE = "libvirt"

KEEPALIVE_INTERVAL_S = 3
KEEPALIVE_COUNT = 3
CALLS_PER_NODE = 16
"""Calls of one node that run at once. libvirtd serves `max_client_requests` of them (5 unless
configured), the rest wait.
"""
OVERDUE_PER_CONNECTION = 3
"""A connection with so many calls past their deadline is replaced: below libvirtd's default of 5
requests per client.
"""
OVERDUE_PER_NODE = 64
"""Threads left behind on one node; with so many, calls are refused at once until some have come
back.
"""
OPEN_PATIENCE_S = 10.0
OPEN_PATIENCE_MAX_S = 300.0
"""After how long an attempt to connect is left behind: doubled with each one that is still pending.
"""
RECONNECT_DELAYS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

T = TypeVar("T")
Connection: TypeAlias = Any
"""A `libvirt.virConnect`; the package has no type information."""

log = structlog.get_logger(__name__)

_TRANSIENT_CODES = frozenset(
    {
        # QEMU or the daemon died, refused for lack of memory, or said nothing more exact than
        # "internal error".
        libvirt.VIR_ERR_INTERNAL_ERROR,
        libvirt.VIR_ERR_NO_MEMORY,
        libvirt.VIR_ERR_OPERATION_FAILED,
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_GNUTLS_ERROR,
        libvirt.VIR_ERR_SSH,
        libvirt.VIR_ERR_LIBSSH,
        libvirt.VIR_ERR_OPERATION_TIMEOUT,
        libvirt.VIR_ERR_OPERATION_ABORTED,
        libvirt.VIR_ERR_RESOURCE_BUSY,
        libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
        libvirt.VIR_ERR_AGENT_UNSYNCED,
    }
)
_LASTING_ERRNOS = frozenset(
    {
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EINVAL,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
    }
)


def translate(err: Exception, call: str) -> EngineError:
    """The error of our own tree for a `libvirtError` (decided by its code, never by its text)."""
    words = str(err)
    code = err.get_error_code() if isinstance(err, libvirt.libvirtError) else None
    if code is None or code in _TRANSIENT_CODES:
        return EngineUnavailable(ENGINE, call, words)
    if code == libvirt.VIR_ERR_SYSTEM_ERROR:
        lasting = isinstance(err, libvirt.libvirtError) and err.get_int1() in _LASTING_ERRNOS
        return (
            EngineRejected(ENGINE, call, words)
            if lasting
            else EngineUnavailable(ENGINE, call, words)
        )
    return EngineRejected(ENGINE, call, words)


def has_code(err: Exception, *codes: int) -> bool:
    """Is `err` a libvirt error with one of these `VIR_ERR_*` codes?"""
    return isinstance(err, libvirt.libvirtError) and err.get_error_code() in codes


@dataclass(frozen=True)
class LifecycleEvent:
    """A lifecycle event as libvirt sends it: `event` is VIR_DOMAIN_EVENT_*, `detail` its
    sub-reason.
    """

    domain_uuid: UUID
    event: int
    detail: int


@dataclass(frozen=True, eq=False)
class Watcher:
    """A listener of one node's lifecycle events.

    `on_event` runs in the event loop's thread: it must only enqueue; so does `on_device`, which is
    given the domain whose guest has let go of a device. `on_resync` says that events may have been
    missed (a new connection); it runs in a thread of its own and may make calls.
    """

    on_event: Callable[[LifecycleEvent], None]
    on_resync: Callable[[], None]
    on_device: Callable[[UUID], None] | None = None


_event_loop_lock = threading.Lock()
_event_loop_thread: threading.Thread | None = None


def _ensure_event_loop() -> None:
    """Registers libvirt's event loop and runs it in a daemon thread; once per process, before the
    first open.
    """
    global _event_loop_thread
    with _event_loop_lock:
        if _event_loop_thread is not None:
            return
        # libvirt prints every error to stderr unless a handler is set; errors are raised as
        # exceptions anyway.
        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()
        _event_loop_thread = threading.Thread(
            target=_run_event_loop, name="libvirt-events", daemon=True
        )
        _event_loop_thread.start()


def _run_event_loop() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as err:
            # A poll that fails would fail again at once: this bounds the rate, the loop must
            # outlive everything.
            log.error("libvirt_event_loop_failed", error=str(err))
            time.sleep(0.1)


class _Call(Generic[T]):
    """One call handed to a thread: its outcome, and whether the caller has given up on it."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: T | None = None
        self.error: BaseException | None = None
        self.link: _Link | None = None
        self.is_overdue = False


@dataclass(eq=False)
class _Link:
    """One open connection. `overdue` counts the calls left behind on it."""

    conn: Connection
    lifecycle_id: int = -1
    device_id: int = -1
    overdue: int = 0
    is_lost: bool = False


class _Node:
    """The connection, the calls and the watchers of one node."""

    def __init__(self, endpoint: NodeEndpoint, calls_max: int, overdue_per_connection: int) -> None:
        self.endpoint = endpoint
        self.calls_max = calls_max
        self.overdue_per_connection = overdue_per_connection
        self.changed = threading.Condition()
        self.running = 0
        self.overdue = 0
        self.busy_keys: set[str] = set()
        self.watchers: list[Watcher] = []
        self.link: _Link | None = None
        self.links_opened = 0
        self.is_closed = False
        self.is_reconnecting = False
        self.opens_pending = 0
        self.next_open_at = 0.0

    def is_at(self, endpoint: NodeEndpoint) -> bool:
        """Is `endpoint` the address and host that this connection is for?"""
        return (self.endpoint.uri, self.endpoint.host_uuid) == (endpoint.uri, endpoint.host_uuid)

    # Calls

    def call(
        self, name: str, fn: Callable[[Connection], T], timeout_s: float, key: str | None
    ) -> T:
        deadline = time.monotonic() + timeout_s
        what = f"{name} on {self.endpoint.name}" + (f" for {key}" if key else "")
        self._enter(what, key, deadline)
        call: _Call[T] = _Call()
        threading.Thread(
            target=self._run,
            args=(call, fn, key, deadline),
            name=f"libvirt-{self.endpoint.name}-{name}",
            daemon=True,
        ).start()
        if not call.done.wait(max(0.0, deadline - time.monotonic())) and self._give_up(call):
            raise EngineUnavailable(ENGINE, what, f"no answer within {timeout_s:g} s")
        if call.error is None:
            return call.result  # type: ignore[return-value]
        if isinstance(call.error, libvirt.libvirtError):
            raise translate(call.error, what) from call.error
        raise call.error

    def _enter(self, what: str, key: str | None, deadline: float) -> None:
        """Takes one of the node's slots and the key; waits for both until the deadline."""
        with self.changed:
            if self.overdue >= OVERDUE_PER_NODE:
                raise EngineUnavailable(
                    ENGINE, what, f"{self.overdue} earlier calls have not returned"
                )
            free = self.changed.wait_for(
                lambda: (
                    self.is_closed or (self.running < self.calls_max and key not in self.busy_keys)
                ),
                max(0.0, deadline - time.monotonic()),
            )
            if self.is_closed:
                raise EngineUnavailable(ENGINE, what, "the connection was closed by us")
            if not free:
                raise EngineUnavailable(ENGINE, what, "an earlier call has not returned")
            self.running += 1
            if key is not None:
                self.busy_keys.add(key)

    def _run(
        self, call: _Call[T], fn: Callable[[Connection], T], key: str | None, deadline: float
    ) -> None:
        try:
            link, conn = self._connected(deadline)
            with self.changed:
                call.link = link
                if call.is_overdue:
                    self._leave_behind_on(link)
            call.result = fn(conn)
        except BaseException as err:  # noqa: BLE001 - handed to the caller's thread as it is
            call.error = err
        finally:
            with self.changed:
                if call.is_overdue:
                    self.overdue -= 1
                    if call.link is not None:
                        call.link.overdue -= 1
                else:
                    self.running -= 1
                if key is not None:
                    self.busy_keys.discard(key)
                call.done.set()
                self.changed.notify_all()

    def _give_up(self, call: _Call[T]) -> bool:
        """Leaves the call to its thread: it frees its slot but keeps its key. False when it ended
        meanwhile.
        """
        with self.changed:
            if call.done.is_set():
                return False
            call.is_overdue = True
            self.running -= 1
            self.overdue += 1
            # One that has no connection yet is counted when it gets one.
            if call.link is not None:
                self._leave_behind_on(call.link)
            self.changed.notify_all()
            return True

    def _leave_behind_on(self, link: _Link) -> None:
        """One more call that nobody waits for is on this connection: too many, and the node gets another. Holds
        `changed`.
        """
        link.overdue += 1
        if link is self.link and link.overdue >= self.overdue_per_connection:
            log.warning(
                "libvirt_connection_replaced", node=self.endpoint.name, overdue=link.overdue
            )
            self._drop(link)

    # Connection

    def _connected(self, deadline: float) -> tuple[_Link, Connection]:
        """The open connection; opens one when there is none. Runs in a call's thread, for open may
        block.

        One thread opens, the others wait for it. `libvirt.open` has no time limit (a frozen daemon
        accepts and never answers): an attempt that takes too long is left behind, and the next may
        start, each time later.
        """
        with self.changed:
            while True:
                if self.is_closed:
                    raise EngineUnavailable(
                        ENGINE, f"connect to {self.endpoint.name}", "closed by us"
                    )
                link = self.link
                conn = link.conn if link is not None else None
                if link is not None and conn is not None and conn.isAlive():
                    return link, conn
                if link is not None:
                    self._drop(link)
                now = time.monotonic()
                if self.opens_pending == 0 or now >= self.next_open_at:
                    break
                if now >= deadline:
                    raise EngineUnavailable(
                        ENGINE,
                        f"connect to {self.endpoint.name}",
                        "an earlier attempt has not returned",
                    )
                self.changed.wait(max(0.0, min(deadline, self.next_open_at) - now))
            self.opens_pending += 1
            self.next_open_at = now + min(
                OPEN_PATIENCE_S * 2 ** (self.opens_pending - 1), OPEN_PATIENCE_MAX_S
            )
        try:
            link = self._open()
        finally:
            with self.changed:
                self.opens_pending -= 1
                self.changed.notify_all()
        return self._install(link)

    def _install(self, link: _Link) -> tuple[_Link, Connection]:
        """Makes a new connection the node's, and tells the watchers when it is not the first."""
        conn = link.conn
        with self.changed:
            if self.is_closed or self.link is not None:
                # Another attempt was faster: this connection serves the one call that opened it,
                # without events.
                link.is_lost = True
                _dispose_soon(link)
                return link, conn
            self.link = link
            self.links_opened += 1
            watchers = list(self.watchers) if self.links_opened > 1 else []
            self.changed.notify_all()
        if self.links_opened > 1:
            log.info("libvirt_reconnected", node=self.endpoint.name)
        for watcher in watchers:
            threading.Thread(target=watcher.on_resync, name="libvirt-resync", daemon=True).start()
        return link, conn

    def _open(self) -> _Link:
        what = f"connect to {self.endpoint.name} ({self.endpoint.uri})"
        try:
            conn = libvirt.open(self.endpoint.uri)
            if self.endpoint.host_uuid is not None:
                self._check_host(conn, what)
            link = _Link(conn)
            if self.endpoint.uri.partition("://")[0] != "test":
                conn.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
            conn.registerCloseCallback(self._on_close, link)
            link.lifecycle_id = conn.domainEventRegisterAny(
                None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, link
            )
            link.device_id = conn.domainEventRegisterAny(
                None, libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, self._on_device_removed, link
            )
            return link
        except libvirt.libvirtError as err:
            if has_code(err, libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_INVALID_ARG):
                raise EngineRejected(ENGINE, what, str(err)) from err
            raise EngineUnavailable(ENGINE, what, str(err)) from err

    def _check_host(self, conn: Connection, what: str) -> None:
        found = read_host_uuid(conn)
        if found != self.endpoint.host_uuid:
            raise EngineRejected(
                ENGINE, what, f"the host's uuid is {found}, expected {self.endpoint.host_uuid}"
            )

    def _drop(self, link: _Link) -> None:
        """Forgets a connection that is lost or stuck. Holds `changed`."""
        link.is_lost = True
        if self.link is link:
            self.link = None
        _dispose_soon(link)
        if self.watchers:
            self._reconnect_soon()

    def _on_close(self, _conn: Connection, reason: int, link: _Link) -> None:
        with self.changed:
            if link.is_lost or self.is_closed:
                return
            log.warning("libvirt_connection_lost", node=self.endpoint.name, reason=reason)
            self._drop(link)

    def _on_lifecycle(
        self, _conn: Connection, domain: Any, event: int, detail: int, link: _Link
    ) -> None:
        if link.is_lost:
            return
        seen = LifecycleEvent(UUID(bytes=domain.UUID()), event, detail)
        self._tell(lambda watcher: watcher.on_event(seen))

    def _on_device_removed(self, _conn: Connection, domain: Any, _alias: str, link: _Link) -> None:
        if link.is_lost:
            return
        domain_uuid = UUID(bytes=domain.UUID())
        self._tell(
            lambda watcher: (
                watcher.on_device(domain_uuid) if watcher.on_device is not None else None
            )
        )

    def _tell(self, tell: Callable[[Watcher], None]) -> None:
        with self.changed:
            watchers = list(self.watchers)
        for watcher in watchers:
            try:
                tell(watcher)
            except Exception:
                log.exception("libvirt_listener_failed", node=self.endpoint.name)

    def _reconnect_soon(self) -> None:
        """Starts the thread that reopens the connection for the watchers' sake. Holds `changed`."""
        if not self.is_reconnecting and not self.is_closed:
            self.is_reconnecting = True
            threading.Thread(target=self._reconnect, name="libvirt-reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        attempt = 0
        while True:
            with self.changed:
                if self.is_closed or not self.watchers or self.link is not None:
                    self.is_reconnecting = False
                    return
            try:
                self._connected(time.monotonic() + 60)
            except EngineError as err:
                if attempt == 0:
                    log.warning("libvirt_connect_failed", node=self.endpoint.name, error=str(err))
            with self.changed:
                delay_s = RECONNECT_DELAYS_S[min(attempt, len(RECONNECT_DELAYS_S) - 1)]
                self.changed.wait_for(lambda: self.is_closed or self.link is not None, delay_s)
            attempt += 1

    # Watchers

    def watch(self, watcher: Watcher) -> None:
        with self.changed:
            self.watchers.append(watcher)
            if self.link is None:
                self._reconnect_soon()

    def unwatch(self, watcher: Watcher) -> None:
        with self.changed:
            if watcher in self.watchers:
                self.watchers.remove(watcher)

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.watchers.clear()
            link, self.link = self.link, None
            if link is not None:
                link.is_lost = True
            self.changed.notify_all()
        if link is not None:
            _dispose_soon(link).join(2.0)


def _dispose_soon(link: _Link) -> threading.Thread:
    """Ends a connection in a thread: it speaks to the daemon and may block."""
    thread = threading.Thread(target=_dispose, args=(link,), name="libvirt-close", daemon=True)
    thread.start()
    return thread


def _dispose(link: _Link) -> None:
    """Ends a connection as far as the daemon lets us; never raises.

    The connection is only let go of, not closed: closing it below a call that is left behind would
    free memory in use. It closes itself with the last call that holds it.
    """
    conn, link.conn = link.conn, None
    try:
        conn.unregisterCloseCallback()
        conn.domainEventDeregisterAny(link.lifecycle_id)
        conn.domainEventDeregisterAny(link.device_id)
    except libvirt.libvirtError as err:
        log.debug("libvirt_close_failed", error=str(err))


def read_host_uuid(conn: Connection) -> UUID:
    """The uuid of the host behind a connection. Raises EngineRejected when it tells none."""
    text = etree.fromstring(conn.getCapabilities()).findtext("host/uuid")
    try:
        return UUID(text or "")
    except ValueError as err:
        raise EngineRejected(ENGINE, "read the host's uuid", f"no uuid in {text!r}") from err


class LibvirtNodes:
    """All nodes of a process. Thread-safe; one object may serve several engines."""

    def __init__(
        self,
        *,
        calls_per_node: int = CALLS_PER_NODE,
        overdue_per_connection: int = OVERDUE_PER_CONNECTION,
    ) -> None:
        _ensure_event_loop()
        self._calls_per_node = calls_per_node
        self._overdue_per_connection = overdue_per_connection
        self._lock = threading.Lock()
        self._nodes: dict[UUID, _Node] = {}
        self._is_closed = False

    def call(
        self,
        node: NodeEndpoint,
        name: str,
        fn: Callable[[Connection], T],
        *,
        timeout_s: float,
        key: str | None = None,
    ) -> T:
        """Runs `fn(connection)` for the node in a thread and gives its result; blocks at most
        `timeout_s` seconds.

        `name` says in errors what was attempted. Calls with the same `key` never run at once; one
        that is past its deadline keeps its key until it really returns. `fn` must not wait for
        anything but libvirt. An error that `fn` raises is passed on; a `libvirtError` becomes
        EngineUnavailable or EngineRejected.
        Raises EngineUnavailable: no connection, no answer in time, or an earlier call of the key
        still runs.
        Raises EngineRejected: refused by libvirt, or the host's uuid is not the node's.
        """
        return self._node(node).call(name, fn, timeout_s, key)

    def watch(self, node: NodeEndpoint, watcher: Watcher) -> Callable[[], None]:
        """Registers a watcher; the connection is held open (and reopened) for it. Returns the
        function that ends it.
        """
        state = self._node(node)
        state.watch(watcher)
        return lambda: state.unwatch(watcher)

    def close(self) -> None:
        """Ends all connections. Calls in flight fail or are left behind."""
        with self._lock:
            self._is_closed = True
            nodes, self._nodes = list(self._nodes.values()), {}
        for node in nodes:
            node.close()

    def _node(self, endpoint: NodeEndpoint) -> _Node:
        with self._lock:
            if self._is_closed:
                raise EngineUnavailable(
                    ENGINE, f"use {endpoint.name}", "the connections are closed"
                )
            state = self._nodes.get(endpoint.node_id)
            if state is not None and not state.is_at(endpoint):
                moved, state = state, None
                threading.Thread(target=moved.close, name="libvirt-close", daemon=True).start()
            if state is None:
                state = self._nodes[endpoint.node_id] = _Node(
                    endpoint, self._calls_per_node, self._overdue_per_connection
                )
            return state
