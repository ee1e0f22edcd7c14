"""`awan migrate`."""

from __future__ import annotations

import psycopg
import typer
from sqlalchemy.exc import OperationalError

from awan.cli.migrate_command import migrate as migrate_database
from awan.cli.screen import say_error
from awan.settings import get_settings


def migrate() -> None:
    """Bring the database to what this version needs. Safe to repeat."""
    try:
        migrate_database(get_settings().database_url)
    except OperationalError as err:
        # What the server says has a state; without one there was no server that said anything.
        if not isinstance(err.orig, psycopg.OperationalError) or err.orig.sqlstate is not None:
            raise
        reason = str(err.orig).splitlines()[0]
        say_error(
            f"No database: {reason}. `awan up` starts one here; AWAN_DATABASE_URL names one of your own."
        )
        raise typer.Exit(1) from err


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command()(migrate)
