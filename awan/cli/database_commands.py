"""`awan migrate`."""

from __future__ import annotations

import typer

from awan.cli.migrate_command import migrate as migrate_database
from awan.settings import get_settings


def migrate() -> None:
    """Bring the database to what this version needs. Safe to repeat."""
    migrate_database(get_settings().database_url)


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command()(migrate)
