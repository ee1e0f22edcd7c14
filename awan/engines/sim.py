"""State, latency and faults of the fake engines.

The fakes keep what a real engine would keep (domains, ports, files) in the schema `sim` of the
product's own PostgreSQL, on autocommit connections of their own: a worker that is killed in the
middle of a transaction leaves the fake cloud as it would leave a real one, and an audit can compare
it with the rows.

    store = SimStore(database_url)
    store.ensure_table("CREATE TABLE IF NOT EXISTS sim.domain (location text, uuid uuid, ...)")

    def ensure_running(self, node, instance_id):
        with store.call("hypervisor", "ensure_running", str(instance_id)):
            store.execute("UPDATE sim.domain SET power = 'running' WHERE uuid = %s", [instance_id])

- Every table belongs to the fake that declares it and has a column `location` (text), so that
  several fake locations live side by side. `wipe(location)` empties one of them.
- Every verb runs inside `store.call(...)`. It waits for the configured latency, records the call
  and applies the faults that a test has planned in `store.faults` (of this process only):

    store.faults.fail_at(3)                     # the third call from now raises EngineRejected
    store.faults.fail_at(3, EngineUnavailable)  # ... an error that may pass
    store.faults.die_at(3, "after")             # the third call takes effect, the worker dies
    store.faults.clear()                        # no plan, count 0, no record, alive again

  A dead worker stays dead: each later call raises WorkerDied too, as a killed process does nothing
  any more, until `clear()`.
- Latency in seconds comes from the constructor or from rows of `sim.setting`, the most specific
  first: `latency_s.<engine>.<verb>`, `latency_s.<engine>`, `latency_s`. Rows are read again after
  SETTING_TTL_S.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, LiteralString, NamedTuple
from weakref import WeakKeyDictionary

import psycopg
import psycopg.sql
from psycopg.rows import DictRow, dict_row
from psycopg_pool import ConnectionPool

from awan.errors import EngineError, EngineRejected, EngineUnavailable
from awan.kit.database import REST_MAX_S

SETTING_TTL_S = 1.0
CONNECTIONS_MAX = 20
# Serialises DDL of processes that start together: IF NOT EXISTS alone is not safe against a race.
DDL_LOCK_ID = 0x6177616E51

SETTING_DDL: LiteralString = (
    "CREATE TABLE IF NOT EXISTS sim.setting (key text PRIMARY KEY, value double precision NOT NULL)"
)

Parameters = Sequence[Any] | Mapping[str, Any] | None


class WorkerDied(BaseException):
    """The process ends here, as by `kill -9`.

    Not an Exception, so that no step handles or retries it.
    """


class Call(NamedTuple):
    """One call of a fake's verb."""

    engine: str
    verb: str
    target: str


class SimFaults:
    """Faults planned for the fakes of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forgets the plan and the recorded calls; a dead worker lives again."""
        with self._lock:
            self.calls: list[Call] = []
            self._errors: dict[int, type[EngineError]] = {}
            self._deaths: dict[int, Literal["before", "after"]] = {}
            self._is_dead = False

    @property
    def is_dead(self) -> bool:
        """Whether a planned death has happened."""
        return self._is_dead

    def fail_at(self, k: int, error: type[EngineError] = EngineRejected) -> None:
        """The `k`-th call from now raises `error` and has no effect."""
        with self._lock:
            self._errors[len(self.calls) + k] = error

    def die_at(self, k: int, when: Literal["before", "after"]) -> None:
        """The worker dies before or after the effect of the `k`-th call from now."""
        with self._lock:
            self._deaths[len(self.calls) + k] = when

    def enter(self, call: Call) -> int:
        """Records the call, gives its number; raises the fault planned before it."""
        with self._lock:
            self._raise_if_dead()
            self.calls.append(call)
            number = len(self.calls)
            if self._deaths.get(number) == "before":
                self._is_dead = True
            self._raise_if_dead()
            error = self._errors.get(number)
        if error is not None:
            raise error(
                call.engine, f"{call.verb} {call.target}", f"planned fault at call {number}"
            )
        return number

    def leave(self, number: int) -> None:
        """Raises the fault planned after the call's effect."""
        with self._lock:
            if self._deaths.get(number) == "after":
                self._is_dead = True
            self._raise_if_dead()

    def _raise_if_dead(self) -> None:
        if self._is_dead:
            raise WorkerDied(f"died at call {len(self.calls)}")


class SimStore:
    """Where the fakes keep their state. One per process, for all fake locations; close it at the end."""

    def __init__(self, database_url: str, *, location: str = "", latency_s: float = 0.0) -> None:
        """`database_url` is the product's (`postgresql://` or `postgresql+psycopg://`).

        `location` is what fakes use that are not told one of their own.
        """
        self.location = location
        self.faults = SimFaults()
        self._latency_s = latency_s
        self._settings: dict[str, float] = {}
        self._settings_until = 0.0
        self._tables: set[str] = set()
        self._lock = threading.Lock()
        self._held = threading.local()
        self._rests_since: WeakKeyDictionary[psycopg.Connection[DictRow], float] = (
            WeakKeyDictionary()
        )
        self._pool: ConnectionPool[psycopg.Connection[DictRow]] = ConnectionPool(
            database_url.replace("postgresql+psycopg://", "postgresql://", 1),
            connection_class=psycopg.Connection[DictRow],
            kwargs={"autocommit": True, "row_factory": dict_row, "application_name": "awan-sim"},
            min_size=1,
            max_size=CONNECTIONS_MAX,
            check=self._check,
            open=True,
            name="awan-sim",
        )
        self.ensure_schema()

    def close(self) -> None:
        """Ends the connections."""
        self._pool.close()

    def _check(self, connection: psycopg.Connection[DictRow]) -> None:
        """Asks one that has rested whether it lives. Raises: psycopg.OperationalError when it is lost."""
        if time.monotonic() - self._rests_since.get(connection, 0.0) < REST_MAX_S:
            return
        try:
            ConnectionPool.check_connection(connection)
        except psycopg.OperationalError:
            # After a restart of the server all are lost, and the pool waits longer after each that it finds.
            self._pool.check()
            raise

    def ensure_schema(self) -> None:
        """The schema `sim` and its settings exist."""
        self.ensure_table(SETTING_DDL)

    def ensure_table(self, ddl: LiteralString) -> None:
        """Runs an idempotent statement (`CREATE TABLE IF NOT EXISTS sim. ...`), once a process."""
        with self._lock:
            if ddl in self._tables:
                return
            with self.connection() as connection, connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", [DDL_LOCK_ID])
                connection.execute("CREATE SCHEMA IF NOT EXISTS sim")
                connection.execute(ddl)
            self._tables.add(ddl)

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[DictRow]]:
        """An autocommit connection; `connection.transaction()` makes several statements one.

        Within a verb, or within another such block of the thread, it is the same one.
        """
        held: psycopg.Connection[DictRow] | None = getattr(self._held, "connection", None)
        if held is not None:
            yield held
            return
        with self._pool.connection() as connection:
            self._held.connection = connection
            try:
                yield connection
            finally:
                self._held.connection = None
                self._rests_since[connection] = time.monotonic()

    def execute(self, statement: LiteralString, parameters: Parameters = None) -> int:
        """Runs one statement, committed at once; gives the number of rows."""
        with self.connection() as connection:
            return connection.execute(statement, parameters).rowcount

    def fetch_all(self, query: LiteralString, parameters: Parameters = None) -> list[DictRow]:
        """All rows of the query (also of `... RETURNING`), as dicts."""
        with self.connection() as connection:
            return connection.execute(query, parameters).fetchall()

    def find_one(self, query: LiteralString, parameters: Parameters = None) -> DictRow | None:
        """The first row of the query, or None."""
        with self.connection() as connection:
            return connection.execute(query, parameters).fetchone()

    def set_latency(
        self, latency_s: float, *, engine: str | None = None, verb: str | None = None
    ) -> None:
        """Sets the latency of all verbs, of one engine, or of one verb of it, for all processes."""
        key = ".".join(["latency_s", *(part for part in (engine, verb) if part)])
        self.execute(
            "INSERT INTO sim.setting (key, value) VALUES (%s, %s)"
            " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            [key, latency_s],
        )
        self.forget_settings()

    def forget_settings(self) -> None:
        """The latencies are read anew at the next call, and not only after a while."""
        self._settings_until = 0.0

    def wipe(self, location: str) -> None:
        """Removes everything that the fakes of this location have, in whatever tables."""
        tables = self.fetch_all(
            "SELECT table_name FROM information_schema.columns"
            " WHERE table_schema = 'sim' AND column_name = 'location' ORDER BY 1"
        )
        with self.connection() as connection, connection.transaction():
            for row in tables:
                table = psycopg.sql.Identifier("sim", row["table_name"])
                connection.execute(
                    psycopg.sql.SQL("DELETE FROM {} WHERE location = %s").format(table), [location]
                )

    @contextmanager
    def call(self, engine: str, verb: str, target: str, *, is_long: bool = False) -> Iterator[None]:
        """Goes around the effect of one verb: planned faults, latency, the record of calls.

        The statements of a verb share a connection, unless it `is_long`: one that waits for a guest keeps none.
        Raises: EngineUnavailable when the fake cannot reach its state, as an engine that was restarted.
        """
        number = self.faults.enter(Call(engine, verb, target))
        try:
            latency_s = self._read_latency_s(engine, verb)
            if latency_s > 0:
                time.sleep(latency_s)
            with nullcontext() if is_long else self.connection():
                yield
        except psycopg.OperationalError as err:
            # Other connections of the pool are lost as well then.
            self._pool.check()
            raise EngineUnavailable(
                engine, f"{verb} {target}", "its state is out of reach"
            ) from err
        self.faults.leave(number)

    def _read_latency_s(self, engine: str, verb: str) -> float:
        if time.monotonic() >= self._settings_until:
            rows = self.fetch_all("SELECT key, value FROM sim.setting")
            self._settings = {row["key"]: row["value"] for row in rows}
            self._settings_until = time.monotonic() + SETTING_TTL_S
        for key in (f"latency_s.{engine}.{verb}", f"latency_s.{engine}", "latency_s"):
            if key in self._settings:
                return self._settings[key]
        return self._latency_s
