"""One way to talk to PostgreSQL: a synchronous SQLAlchemy session whose transaction ends at the edge.

Services take a `Session` and never commit. Routes, workflow steps and the CLI open one with `transaction()`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar, TypeVar
from uuid import UUID

import psycopg
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    CursorResult,
    DateTime,
    Engine,
    Executable,
    MetaData,
    Text,
    Uuid,
    create_engine,
    event,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    InternalError,
    InvalidatePoolError,
    OperationalError,
)
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from awan.errors import Unavailable
from awan.settings import get_settings

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Base of all tables. `str` is text, `datetime` is timestamptz, `dict` is jsonb."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text,
        int: BigInteger,
        datetime: DateTime(timezone=True),
        UUID: Uuid,
        dict[str, Any]: JSONB,
        dict[str, str]: JSONB,
        list[str]: JSONB,
    }


def one_of(column: str, values: type[StrEnum]) -> CheckConstraint:
    """A CHECK that the text column holds one of the enum's values."""
    listed = ", ".join(f"'{value.value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


S = TypeVar("S", bound=StrEnum)


def hold_to_moves(column: Any, moves: Mapping[S, Collection[S]]) -> None:
    """Every assignment to the mapped column follows the table `moves` (state -> those that may come next).

    Assigning the present state is no move. A bulk UPDATE passes by this: it names the states that it starts from.
    Raises, at the assignment: ValueError, because a wrong move is a bug.
    """

    def check(row: object, new: Any, old: Any, initiator: object) -> None:
        if old in moves and new != old and new not in moves[old]:
            raise ValueError(f"{column}: {old} cannot become {new}")

    # With its history the present state is read when the row has expired.
    event.listen(column, "set", check, active_history=True)


def sqlalchemy_url(database_url: str) -> str:
    """A libpq URL as SQLAlchemy wants it, with psycopg 3 as driver."""
    scheme, separator, rest = database_url.partition("://")
    if not separator:
        raise ValueError(f"not a database URL: {database_url!r}")
    return f"postgresql+psycopg://{rest}" if scheme in {"postgresql", "postgres"} else database_url


# A process that is frozen in the middle of a transaction keeps its locks no longer than this: less than a statement
# of the one that takes its work over may wait for them.
IDLE_TRANSACTION_MAX_S = 20
IDLE_TRANSACTION_ENDED = "25P03"
# Serialization failure, deadlock: two waited for each other.
DEADLOCK_STATES = frozenset({"40001", "40P01"})
# Those, lock timeout, statement timeout: another one was in the way.
LOST_STATES = DEADLOCK_STATES | {"55P03", "57014"}

# A connection that has rested for longer is asked whether it still lives before it is used. One that was lost within
# this time fails once, with which the pool gives up all that it has.
REST_MAX_S = 1.0

PREPARED_AFTER, PREPARED_MAX = 2, 1000

_lock = threading.Lock()
_engine: Engine | None = None
_sessions: sessionmaker[Session] | None = None
_single_statements: Engine | None = None


def get_engine() -> Engine:
    """The process's engine: one pool, connections that rested checked before use, statements bounded to 30 s.

    The pool keeps all connections that it opens: one opened for a moment costs the server more than all it is used for.

    A transaction in which nothing happens for `IDLE_TRANSACTION_MAX_S` is ended by the server.
    """
    global _engine, _sessions, _single_statements
    with _lock:
        if _engine is None:
            settings = get_settings()
            _engine = create_engine(
                sqlalchemy_url(settings.database_url),
                pool_size=settings.database_pool_size,
                max_overflow=0,
                pool_timeout=10,
                # Those used last know the most statements, and the rest can rest.
                pool_use_lifo=True,
                # An error must not carry values of rows into a log.
                hide_parameters=True,
                connect_args={
                    "options": "-c statement_timeout=30000 -c timezone=UTC"
                    f" -c idle_in_transaction_session_timeout={IDLE_TRANSACTION_MAX_S * 1000}",
                    "connect_timeout": 5,
                },
            )
            _sessions = sessionmaker(_engine, expire_on_commit=False)
            _single_statements = _engine.execution_options(isolation_level="AUTOCOMMIT")
        return _engine


def dispose_engine() -> None:
    """Closes all connections; the next use opens a new pool (tests that change databases, forked processes)."""
    global _engine, _sessions, _single_statements
    with _lock:
        if _engine is not None:
            _engine.dispose()
        _engine = _sessions = _single_statements = None


@event.listens_for(Pool, "connect")
def _prepare_statements(connection: object, _entry: ConnectionPoolEntry) -> None:
    """The few hundred statements of a process are planned once a connection: planning costs more than most of them.

    With psycopg's own bound of 100, each use of one displaces another that is used as often. A rollback forgets all.
    """
    assert isinstance(connection, psycopg.Connection)
    connection.prepare_threshold = PREPARED_AFTER
    connection.prepared_max = PREPARED_MAX


@event.listens_for(Pool, "checkin")
def _note_rest(_connection: object, entry: ConnectionPoolEntry) -> None:
    entry.info["rests_since"] = time.monotonic()


@event.listens_for(Pool, "checkout")
def _ask_rested(connection: object, entry: ConnectionPoolEntry, _proxy: object) -> None:
    """As `pool_pre_ping`, without a round trip for each transaction of a busy process.

    Raises: InvalidatePoolError, with which the pool gives up the connections it has and opens another.
    """
    rests_since = entry.info.get("rests_since")
    if rests_since is None or time.monotonic() - rests_since < REST_MAX_S:
        return
    assert isinstance(connection, psycopg.Connection)
    try:
        connection.autocommit = True
        try:
            connection.execute("")
        finally:
            connection.autocommit = False
    except psycopg.Error as err:
        raise InvalidatePoolError(str(err)) from err


@contextmanager
def transaction() -> Iterator[Session]:
    """A session in one transaction: commits when the block ends, rolls back when it raises.

    Raises: Unavailable when the database cannot be reached.
    """
    get_engine()
    assert _sessions is not None
    with _unavailable_when_lost(), _sessions.begin() as session:
        yield session


@contextmanager
def single_statements() -> Iterator[Session]:
    """A session whose every statement is a transaction of its own: for a read, or one statement that changes.

    A transaction around a single statement costs a worker two round trips more. Rows can be read through it, but not
    be changed by assignment: nothing flushes them. Locks end with their statement.
    Raises: Unavailable when the database cannot be reached.
    """
    get_engine()
    with (
        _unavailable_when_lost(),
        Session(_single_statements, autoflush=False, expire_on_commit=False) as session,
    ):
        yield session


def execute_directly(
    session: Session, statement: Executable, parameters: Mapping[str, Any] | list[dict[str, Any]]
) -> CursorResult[*tuple[Any, ...]]:
    """One statement of plain columns, past the ORM, which builds most that change rows anew at each execution.

    It takes half the time, for the statements that a process sends most. Nothing is flushed before, and objects that
    were read before keep what they have.
    """
    return session.connection().execute(statement, parameters)


@contextmanager
def _unavailable_when_lost() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, InternalError) as err:
        if is_connection_error(err):
            raise Unavailable(
                "The database is not reachable at the moment. Please try again."
            ) from err
        raise


def sqlstate_of(err: DBAPIError) -> str | None:
    """PostgreSQL's code of the error; None when it did not answer."""
    state: str | None = getattr(err.orig, "sqlstate", None)
    return state


def is_deadlock(err: DBAPIError) -> bool:
    """Whether PostgreSQL ended the transaction because it and another waited for each other: tried again it passes."""
    return sqlstate_of(err) in DEADLOCK_STATES


def is_connection_error(err: DBAPIError) -> bool:
    """Whether the connection is lost or the server away (SQLSTATE class 08, 57P0x, 25P03, or no SQLSTATE at all)."""
    state = sqlstate_of(err)
    return (
        err.connection_invalidated
        or state is None
        or state.startswith(("08", "57P", IDLE_TRANSACTION_ENDED))
    )
