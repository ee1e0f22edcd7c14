"""`awan init`: the first operator key of a new cloud."""

from __future__ import annotations

import typer

from awan.accounts import init_operator
from awan.kit.database import transaction
from awan.kit.secrets import create_key_file
from awan.settings import get_settings


def init() -> None:
    """Make the operator's account and print its first API key: this once, keep it safe.

    The key alone goes to stdout. Also makes the file with the keys that encrypt stored secrets, if absent.
    """
    create_key_file(get_settings().secret_key_file)
    with transaction() as session:
        key = init_operator(session)
    typer.echo("The operator's API key, shown this once:", err=True)
    typer.echo(key)


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command()(init)
