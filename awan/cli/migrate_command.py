"""`awan migrate`: brings the database to what this version of Awan needs."""

from __future__ import annotations

import logging
import time

import structlog
from alembic import command
from dbos import DBOS
from sqlalchemy import create_engine, text

from awan.kit.database import sqlalchemy_url
from awan.migrations import alembic_config
from awan.operations.durable import SCHEMA

log = structlog.get_logger(__name__)

# Two processes that migrate at once wait for each other.
_LOCK = text("SELECT pg_advisory_lock(hashtext('awan.migrate'))")


def migrate(database_url: str) -> None:
    """Creates or upgrades the workflow engine's schema and ours. Safe to repeat; blocks until done, seconds at most.

    An operation cannot be enqueued before this has run.
    """
    started = time.monotonic()
    url = sqlalchemy_url(database_url)
    for name in ("dbos", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    engine = create_engine(url)
    try:
        with engine.connect() as locked:
            locked.execute(_LOCK)
            DBOS.migrate(url, schema=SCHEMA)
            with engine.begin() as connection:
                command.upgrade(alembic_config(connection), "head")
    finally:
        engine.dispose()
    log.info("database migrated", took_s=round(time.monotonic() - started, 2))
