"""Writes a revision; see the package's text."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from awan.kit.database import sqlalchemy_url
from awan.migrations import alembic_config
from awan.runtime.postgres import EmbeddedPostgres

VERSIONS = Path(__file__).parent / "versions"


def write_revision(message: str, *, replace: bool) -> Path:
    """Writes the file that brings the newest revision to what the models say, and gives its path."""
    if replace:
        for path in VERSIONS.glob("[0-9]*.py"):
            path.unlink()
    # Under /tmp the server's own user can enter.
    with tempfile.TemporaryDirectory(prefix="awan-migrations-", dir="/tmp") as place:
        Path(place).chmod(0o755)
        postgres = EmbeddedPostgres(Path(place, "pg"), Path(place, "run"), is_durable=False)
        postgres.init()
        with postgres.running():
            engine = create_engine(sqlalchemy_url(postgres.url()))
            with engine.begin() as connection:
                config = alembic_config(connection)
                command.upgrade(config, "head")
                count = len(list(ScriptDirectory.from_config(config).walk_revisions()))
                script = command.revision(
                    config, message, autogenerate=True, rev_id=f"{count + 1:04d}"
                )
            engine.dispose()
    assert script is not None
    assert not isinstance(script, list)
    path = Path(script.path)
    for tool in (["check", "--fix", "--quiet"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *tool, str(path)], check=False)
    return path


def main() -> None:
    """Entry of `python -m awan.migrations`."""
    parser = argparse.ArgumentParser(prog="python -m awan.migrations", description=__doc__)
    parser.add_argument("message", help="what the revision does, a few words")
    parser.add_argument("--replace", action="store_true", help="forget all revisions, write one")
    arguments = parser.parse_args()
    sys.stdout.write(f"{write_revision(arguments.message, replace=arguments.replace)}\n")


if __name__ == "__main__":
    main()
