"""The revisions and the models say the same, and a fresh database is ready in seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from awan.cli.migrate_command import migrate
from awan.kit.database import sqlalchemy_url
from awan.migrations import alembic_config, load_metadata
from tests.support.database_server import ServerAddress

SHAPES = {
    "columns": """
        SELECT table_name, column_name, data_type, udt_name, is_nullable, column_default, is_identity
        FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version'
    """,
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'
    """,
    "indexes": """
        SELECT tablename, indexname, indexdef FROM pg_indexes
        WHERE schemaname = 'public' AND tablename <> 'alembic_version'
    """,
}


@pytest.fixture
def fresh_database(database_server: ServerAddress) -> Iterator[str]:
    name = f"awan_fresh_{os.getpid()}"
    yield database_server.create_empty(name)
    database_server.drop(name)


@pytest.fixture
def modelled_database(database_server: ServerAddress) -> Iterator[str]:
    name = f"awan_modelled_{os.getpid()}"
    url = database_server.create_empty(name)
    engine = create_engine(sqlalchemy_url(url))
    load_metadata().create_all(engine)
    engine.dispose()
    yield url
    database_server.drop(name)


def shapes(url: str) -> dict[str, list[tuple[object, ...]]]:
    with psycopg.connect(url) as connection:
        return {
            name: sorted(connection.execute(query).fetchall(), key=repr)  # type: ignore[call-overload]
            for name, query in SHAPES.items()
        }


def test_models_and_revisions_agree(fresh_database: str, modelled_database: str) -> None:
    """Columns, defaults, keys, CHECKs and indexes: what the revisions make is what the models describe."""
    migrate(fresh_database)
    migrated, modelled = shapes(fresh_database), shapes(modelled_database)
    for what in SHAPES:
        assert migrated[what] == modelled[what], f"{what} differ: python -m awan.migrations"
    engine = create_engine(sqlalchemy_url(fresh_database))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), load_metadata()) == []
    engine.dispose()


def test_migrating_twice_is_once(fresh_database: str) -> None:
    started = time.monotonic()
    migrate(fresh_database)
    took_s = time.monotonic() - started
    before = shapes(fresh_database)
    migrate(fresh_database)
    assert shapes(fresh_database) == before
    assert took_s < 10  # about one second on an idle machine


def test_other_schemas_are_left_alone(fresh_database: str) -> None:
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA sim")
        connection.execute("CREATE TABLE sim.domain (location text)")
    migrate(fresh_database)
    engine = create_engine(sqlalchemy_url(fresh_database))
    with engine.begin() as connection:
        command.downgrade(alembic_config(connection), "base")
    engine.dispose()
    with psycopg.connect(fresh_database) as connection:
        rows = connection.execute(
            "SELECT DISTINCT schemaname FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema', 'public')"
        ).fetchall()
    assert sorted(row[0] for row in rows) == ["dbos", "sim"]
