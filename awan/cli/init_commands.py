"""`awan init`: the first operator key of a new cloud."""

from __future__ import annotations

import typer
from psycopg.errors import UndefinedTable
from sqlalchemy.exc import ProgrammingError

from awan.accounts import init_operator
from awan.cli.screen import say_error
from awan.kit.database import transaction
from awan.kit.secrets import create_key_file
from awan.settings import get_settings


def init() -> None:
    """Make the operator's account and print its first API key: this once, keep it safe.

    The key alone goes to stdout. Also makes the file with the keys that encrypt stored secrets, if absent.
    """
    create_key_file(get_settings().secret_key_file)
    try:
        with transaction() as session:
            key = init_operator(session)
    except ProgrammingError as err:
        if not isinstance(err.orig, UndefinedTable):
            raise
        say_error("The database is empty: give `awan up` or `awan migrate` first.")
        raise typer.Exit(1) from err
    typer.echo("The operator's API key, shown this once:", err=True)
    typer.echo(key)


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command()(init)
