"""One throw-away PostgreSQL for a test run, and a database for each test process.

The server belongs to the process that runs pytest (the controller, with xdist) and dies with it, however that ends.
Test databases are copies of one migrated template.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.errors import DeadlockDetected

from awan.cli.migrate_command import migrate
from awan.runtime.postgres import SUPERUSER, EmbeddedPostgres

TEMPLATE = "awan_template"


class DatabaseServer:
    """A running server with a migrated template database."""

    def __init__(self) -> None:
        # In /tmp, where the server's own user may enter and a socket's path is short enough.
        self.place = Path(tempfile.mkdtemp(prefix="awan-test-", dir="/tmp"))
        self.place.chmod(0o755)
        self._postgres = EmbeddedPostgres(
            self.place / "pg", self.place / "run", database=TEMPLATE, is_durable=False
        )
        self._postgres.init()
        self._postgres.start(dies_with_parent=True)
        migrate(self._postgres.url())

    @property
    def address(self) -> str:
        """Where the server's socket is; `ServerAddress` takes it."""
        return str(self._postgres.socket_dir)

    def stop(self) -> None:
        """Ends the server and removes its data."""
        self._postgres.stop()
        shutil.rmtree(self.place, ignore_errors=True)


class ServerAddress:
    """Makes and drops databases on a server that another process may own."""

    def __init__(self, socket_dir: str) -> None:
        self._socket_dir = socket_dir

    def url(self, database: str, role: str = "awan") -> str:
        """The libpq URL of a database of the server."""
        return f"postgresql://{role}@/{database}?host={self._socket_dir}&port=5432"

    def create(self, database: str, template: str = TEMPLATE) -> str:
        """A new database, a copy of the template; gives its URL."""
        # WAL_LOG copies no more than the template holds and forces no checkpoint, unlike FILE_COPY.
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", database)
        self._execute("CREATE DATABASE {} TEMPLATE {} OWNER awan", database, template)
        return self.url(database)

    def create_empty(self, database: str) -> str:
        """A new database without anything of ours; gives its URL."""
        return self.create(database, "template0")

    def drop(self, database: str) -> None:
        """The database is gone, with whoever was connected."""
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", database)

    def _execute(self, statement: str, *names: str) -> None:
        with psycopg.connect(self.url("postgres", SUPERUSER), autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


TRIES = 5
# What tests may not change: `empty` leaves these alone.
KEPT = (
    "public.alembic_version",
    "dbos.dbos_migrations",
    "dbos.queues",
    "dbos.application_versions",
)
TABLES = f"""
SELECT nspname || '.' || relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind = 'r' AND nspname IN ('public', 'dbos', 'sim') AND nspname || '.' || relname NOT IN {KEPT}
"""


def empty(database_url: str) -> None:
    """Removes all rows that tests made. Fails after 10 s when somebody still holds a transaction open."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        names = [row[0] for row in connection.execute(TABLES)]
        union = " UNION ALL ".join(
            f"(SELECT '{name}' WHERE EXISTS (SELECT FROM {name}))" for name in names
        )
        filled = [row[0] for row in connection.execute(union)]
        if filled:
            connection.execute("SET lock_timeout = '10s'")
            # Tests make few rows: deleting them takes a tenth of the time of TRUNCATE, which makes new files. In one
            # statement, because foreign keys are looked at when it ends.
            deletions = ", ".join(
                f"emptied_{number} AS (DELETE FROM {name})" for number, name in enumerate(filled)
            )
            for tries_left in reversed(range(TRIES)):
                try:
                    with connection.transaction():
                        tables = ", ".join(filled)
                        connection.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE")
                        connection.execute(f"WITH {deletions} SELECT")
                    return
                except DeadlockDetected:
                    # Whoever reads several tables at this moment can wait for us as we do for him.
                    if not tries_left:
                        raise
