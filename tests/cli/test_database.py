"""Commands that speak to the database say in a sentence what is missing."""

from __future__ import annotations

from typer.testing import CliRunner

from awan.cli import build_app
from awan.kit.database import dispose_engine
from awan.settings import Settings
from tests.support.changed_settings import changed_settings
from tests.support.database_server import ServerAddress


def test_migrate_without_a_database(settings: Settings) -> None:
    with changed_settings(database_url="postgresql://awan:hidden-word@127.0.0.1:1/awan"):
        done = CliRunner().invoke(build_app(), ["migrate"])
    assert done.exit_code == 1
    assert len(done.output.splitlines()) == 1
    assert "AWAN_DATABASE_URL" in done.output
    assert "hidden-word" not in done.output


def test_init_before_migrate(settings: Settings, database_server: ServerAddress) -> None:
    dispose_engine()
    try:
        with changed_settings(database_url=database_server.create_empty("awan_empty")):
            done = CliRunner().invoke(build_app(), ["init"])
            dispose_engine()
    finally:
        database_server.drop("awan_empty")
    assert done.exit_code == 1
    assert "awan migrate" in done.output
    assert len(done.output.splitlines()) == 1
