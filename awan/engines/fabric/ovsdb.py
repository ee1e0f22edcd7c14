"""One OVSDB database, seen through ovsdbapp's connection thread.

`Database` keeps an in-memory replica of a few tables, reconnects by itself, and offers three things: `change`
(one transaction), `read` (a look at the replica) and `wait_for` (sleeps until a row changes; nothing is polled).

Guarantees that ovsdbapp alone does not give:
- Every answer is at least as new as the call: before a read, and before "there is nothing to change" is believed,
  the server is asked once (about 1 ms). A replica may be old without knowing it when a connection hangs half-open.
- Every call ends within its time, also when the server is frozen, and an expired transaction is never sent later.
- Errors are told apart by where they happen: no answer is `EngineUnavailable`, a refusal of the server is
  `EngineRejected`.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from uuid import UUID

from ovs import jsonrpc, poller, stream
from ovs.db import data, idl, types
from ovsdbapp import exceptions
from ovsdbapp.backend.ovs_idl import connection, transaction

from awan.engines.fabric.tls import TlsKeys, private_remote
from awan.errors import EngineError, EngineRejected, EngineUnavailable

T = TypeVar("T")

# An OVSDB row and the mapping of table names to tables: the library has no types for them.
Row = Any
Tables = Any

ENGINE = "fabric"
PROBE_INTERVAL_MS = 2000  # a silent server is dropped after twice this time
RECONNECT_MIN_MS = 1000
RECONNECT_MAX_MS = 2000
COMMIT_GRACE_S = 1.0  # the connection thread ends an expired transaction itself; this is its slack

# The library reports each failure with a traceback of its own; errors are raised here instead.
logging.getLogger("ovsdbapp").setLevel(logging.CRITICAL)


class Replica(connection.OvsdbIdl):  # type: ignore[misc]
    """The copy of the database, which wakes the waiting threads whenever a row changes."""

    changed: threading.Condition | None = None

    def __init__(self, remote: str, helper: Any) -> None:
        super().__init__(remote, helper, probe_interval=PROBE_INTERVAL_MS)
        # The library's pauses between attempts grow to 8 s, longer than a call may take.
        self._session.reconnect.set_backoff(RECONNECT_MIN_MS, RECONNECT_MAX_MS)

    def notify(self, event: str, row: Row, updates: Row | None = None) -> None:
        """Called under the connection's lock for every row that the server reports."""
        if self.changed is not None:
            self.changed.notify_all()


class Database:
    """A connection to one database, opened at the first call. Thread-safe.

    `columns` names what is replicated; `root` is the table of exactly one row that holds the counter `nb_cfg`.
    """

    def __init__(
        self,
        remote: str,
        schema: str,
        columns: Mapping[str, Sequence[str]],
        *,
        root: str,
        indexes: Mapping[str, str],
        timeout_s: float,
        keys: TlsKeys | None = None,
    ) -> None:
        """`indexes` maps a table to the column it is searched by (see `find_row`). `keys` are for `ssl:` remotes."""
        self._remote = remote
        self._keys = keys
        self._schema = schema
        self._columns = columns
        self._root = root
        self._indexes = indexes
        self._timeout_s = timeout_s
        self._opening = threading.Lock()
        self._connection: connection.Connection | None = None

    @property
    def idl(self) -> Any:
        """The replica; ovsdbapp's transaction asks for it by this name."""
        assert self._connection is not None
        return self._connection.idl

    def change(
        self, call: str, edit: Callable[[Tables, Any], None], *, counts: bool = True
    ) -> bool:
        """Runs `edit(tables, txn)` and commits what it wrote as one transaction; whether that was anything.

        `edit` looks at the tables and writes only what differs. It may run more than once: again on newer rows
        whenever the server refuses what older ones led to. It must not keep rows. With `counts` the transaction
        also raises `nb_cfg`, if it changes anything.
        Raises: EngineUnavailable, EngineRejected, and what `edit` raises.
        """
        return self._run(call, edit, counts=counts, is_read=False)[1]

    def read(self, call: str, look: Callable[[Tables], T]) -> T:
        """Gives `look(tables)` on rows that are at least as new as this call. Raises: EngineUnavailable."""
        return self._run(call, lambda tables, _txn: look(tables), counts=False, is_read=True)[0]

    def wait_for(self, call: str, predicate: Callable[[Tables], bool], *, timeout_s: float) -> bool:
        """Sleeps until `predicate(tables)` holds; False after `timeout_s`. Woken by each change of a row.

        Raises: EngineUnavailable when the server does not answer at the begin or at the end of the wait.
        """
        deadline = time.monotonic() + timeout_s
        if self.read(call, predicate):
            return True
        replica = self._open(call).idl
        with replica.changed:
            holds = replica.changed.wait_for(
                lambda: predicate(replica.tables), max(0.0, deadline - time.monotonic())
            )
        # Silence may also mean that the connection was lost meanwhile; then nobody knows.
        return bool(holds) or self.read(call, predicate)

    def close(self) -> None:
        """Ends the connection and its thread. A later call opens it again."""
        with self._opening:
            if self._connection is not None:
                self._connection.stop(self._timeout_s)
                self._connection = None

    def _run(
        self, call: str, edit: Callable[[Tables, Any], T], *, counts: bool, is_read: bool
    ) -> tuple[T, bool]:
        """What `edit` returned, and whether it changed anything."""
        link = self._open(call)
        commit = _Commit(self, link, edit, root=self._root, counts=counts, is_read=is_read)
        try:
            result: tuple[T, bool] = commit.commit()
        except EngineError:
            raise
        except _Refused as err:
            raise EngineRejected(ENGINE, call, str(err)) from err
        except (_Silent, exceptions.TimeoutException) as err:
            raise EngineUnavailable(ENGINE, call, f"no answer from {self._remote}") from err
        return result

    def _open(self, call: str) -> connection.Connection:
        # Whoever waited its time for another's attempt does not start one of its own.
        if not self._opening.acquire(timeout=self._timeout_s):
            raise EngineUnavailable(ENGINE, call, f"cannot reach {self._remote}")
        try:
            if self._connection is None:
                self._check_keys(call)
                self._connection = self._connect()
            return self._connection
        except (_Silent, exceptions.TimeoutException) as err:
            raise EngineUnavailable(ENGINE, call, f"cannot reach {self._remote}") from err
        finally:
            self._opening.release()

    def _check_keys(self, call: str) -> None:
        """Raises: EngineRejected when the files of the keys are no keys: waiting does not help."""
        if self._keys is None:
            return
        try:
            self._keys.check()
        except OSError as err:
            words = f"the TLS keys for {self._remote} cannot be used: {err}"
            raise EngineRejected(ENGINE, call, words) from err

    def _connect(self) -> connection.Connection:
        remote = private_remote(self._remote, self._keys)
        helper = idl.SchemaHelper(None, _fetch_schema(remote, self._schema, self._timeout_s))
        for table, columns in self._columns.items():
            helper.register_columns(table, list(columns))
        replica = Replica(remote, helper)
        for table, column in self._indexes.items():
            replica.index_create(table, column).add_column(column)
        link = connection.Connection(replica, self._timeout_s)
        replica.changed = threading.Condition(link.lock)
        try:
            link.start()
        except BaseException:
            replica.close()
            raise
        return link


def find_row(tables: Tables, table: str, column: str, value: str) -> Row | None:
    """The row whose indexed column has this value, or None."""
    rows = tables[table].rows
    entry = rows.IndexEntry(**{column: value})
    return next(iter(rows.indexes[column].irange(entry, entry)), None)


def set_columns(row: Row, **columns: Any) -> None:
    """Writes the columns that differ; leaves the others out of the transaction. A new row has no value yet."""
    for name, value in columns.items():
        if not hasattr(row, name) or getattr(row, name) != value:
            setattr(row, name, value)


def referenced(row: Row, column: str) -> list[UUID]:
    """UUIDs of the rows that a stored row's column refers to, in no order.

    Reading the column itself builds and sorts row objects: 20 ms for 1,500 members, with the connection locked.
    """
    return [atom.value for atom in row._data[column].values]


def refers_to(row: Row, column: str, other: Row) -> bool:
    """Whether a row's column holds `other`, as it is stored; as cheap for large sets as for small ones."""
    return row._data is not None and data.Atom(types.UuidType, other.uuid) in row._data[column]


class _Silent(Exception):
    """The server did not answer in time."""


class _Refused(Exception):
    """The server refused the transaction; carries its words."""


class _Commit(transaction.Transaction):  # type: ignore[misc]
    """One call, carried out by the connection's thread.

    Replaces the library's own commit loop, which has no bound against a frozen server, tells failures apart only by
    text, and answers from the replica when there is nothing to write.
    """

    def __init__(
        self,
        database: Database,
        link: connection.Connection,
        edit: Callable[[Tables, Any], Any],
        *,
        root: str,
        counts: bool,
        is_read: bool,
    ) -> None:
        super().__init__(database, link, check_error=True, log_errors=False)
        self._edit = edit
        self._root = root
        self._counts = counts
        self._is_read = is_read
        self._deadline = time.monotonic() + link.timeout
        self.timeout = link.timeout + COMMIT_GRACE_S

    def do_commit(self) -> Any:
        """Runs `edit` until its outcome is certain: committed, or nothing to do on fresh rows."""
        replica = self.api.idl
        is_fresh = False
        was_refused = False
        if self._is_read:
            self._refresh(replica)
            is_fresh = True
        while True:
            seqno = self._until_connected(replica)
            txn = idl.Transaction(replica)
            try:
                result = self._edit(replica.tables, txn)
                if self._counts:
                    self._root_row(replica).increment("nb_cfg")
            except BaseException:
                txn.abort()
                raise
            status = self._drive(replica, txn)
            if status == txn.SUCCESS or (status == txn.UNCHANGED and is_fresh):
                return result, status == txn.SUCCESS
            if status == txn.TRY_AGAIN:
                is_fresh = False
                self._until_changed(replica, seqno)
                continue
            if status == txn.ERROR and was_refused:
                raise _Refused(txn.get_error())
            # A refusal may come from rows that another writer has changed meanwhile: look once more.
            was_refused = was_refused or status == txn.ERROR
            self._refresh(replica)
            is_fresh = True

    def _refresh(self, replica: Any) -> None:
        """After this the replica has everything that was committed before: the server sends its updates first."""
        while True:
            seqno = self._until_connected(replica)
            txn = idl.Transaction(replica)
            self._root_row(replica).fetch("nb_cfg")
            if self._drive(replica, txn) == txn.SUCCESS:
                return
            self._until_changed(replica, seqno)

    def _root_row(self, replica: Any) -> Row:
        row = next(iter(replica.tables[self._root].rows.values()), None)
        if row is None:
            raise _Refused(f"the database has no row in {self._root}")
        return row

    def _drive(self, replica: Any, txn: Any) -> str:
        """Sends the transaction and waits for its status, within the deadline."""
        status: str = txn.commit()
        while status == txn.INCOMPLETE:
            waiter = poller.Poller()
            replica.wait(waiter)
            txn.wait(waiter)
            try:
                self._block(waiter)
            except _Silent:
                txn.abort()
                replica.force_reconnect()
                raise
            replica.run()
            status = txn.commit()
        return status

    def _until_connected(self, replica: Any) -> int:
        """Gives the replica's sequence number once it is in step with a server."""
        self._check_time()
        while replica.state != idl.Idl.IDL_S_MONITORING:
            self._step(replica)
        seqno: int = replica.change_seqno
        return seqno

    def _until_changed(self, replica: Any, seqno: int) -> None:
        while replica.change_seqno == seqno:
            self._step(replica)

    def _step(self, replica: Any) -> None:
        waiter = poller.Poller()
        replica.wait(waiter)
        self._block(waiter)
        replica.run()

    def _block(self, waiter: Any) -> None:
        waiter.timer_wait(_remaining_ms(self._deadline))
        waiter.block()
        self._check_time()

    def _check_time(self) -> None:
        if time.monotonic() >= self._deadline:
            raise _Silent


def _fetch_schema(remote: str, schema: str, timeout_s: float) -> Any:
    """The schema as the server has it, from the first of the (comma-separated) servers that answers."""
    deadline = time.monotonic() + timeout_s
    reason = "no server named"
    for one in remote.split(","):
        error, opened = stream.Stream.open_block(stream.Stream.open(one), _remaining_ms(deadline))
        if error:
            reason = os.strerror(error)
            continue
        rpc = jsonrpc.Connection(opened)
        try:
            reply = _ask(rpc, jsonrpc.Message.create_request("get_schema", [schema]), deadline)
        finally:
            rpc.close()
        if reply is not None and reply.error is None:
            return reply.result
        reason = "no answer to get_schema" if reply is None else str(reply.error)
    raise _Silent(reason)


def _ask(rpc: Any, request: Any, deadline: float) -> Any | None:
    """The reply to `request`; None when the connection breaks or the time is up."""
    if rpc.send(request):
        return None
    while time.monotonic() < deadline:
        rpc.run()
        error, reply = rpc.recv()
        if reply is not None and reply.id == request.id:
            return reply
        if error and reply is None and rpc.get_status():
            return None
        waiter = poller.Poller()
        rpc.wait(waiter)
        rpc.recv_wait(waiter)
        waiter.timer_wait(_remaining_ms(deadline))
        waiter.block()
    return None


def _remaining_ms(deadline: float) -> int:
    """Time until `deadline` (of the monotonic clock), rounded up so that a wait does not end just before it."""
    return max(0, math.ceil((deadline - time.monotonic()) * 1000))
