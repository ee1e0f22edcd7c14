"""What a database holds, kept in memory and put back within milliseconds."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

from tests.support.database_server import TABLES


class Snapshot:
    """The rows of all tables at the moment it was taken.

    `url` is a superuser's: only one may switch foreign keys off, so that tables can be filled in any order.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        with psycopg.connect(url, autocommit=True) as connection:
            self._rows = {
                name: rows
                for (name,) in connection.execute(TABLES).fetchall()
                if (rows := _copy_out(connection, name))
            }

    def put_back(self) -> None:
        """Fills the tables again; they must be empty (see `database_server.empty`)."""
        with psycopg.connect(self._url) as connection:
            connection.execute("SET LOCAL session_replication_role = replica")
            for name, rows in self._rows.items():
                statement = sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(_table(name))
                with connection.cursor().copy(statement) as copy:
                    copy.write(rows)


def _copy_out(connection: psycopg.Connection[Any], name: str) -> bytes:
    """The rows of a table; nothing when it has none."""
    table = _table(name)
    found = connection.execute(sql.SQL("SELECT EXISTS (SELECT FROM {})").format(table)).fetchone()
    if found is None or not found[0]:
        return b""
    statement = sql.SQL("COPY {} TO STDOUT (FORMAT binary)").format(table)
    with connection.cursor().copy(statement) as copy:
        return b"".join(bytes(part) for part in copy)


def _table(name: str) -> sql.Identifier:
    return sql.Identifier(*name.split(".", 1))
