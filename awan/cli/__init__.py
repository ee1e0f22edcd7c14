"""The command `awan`.

Commands live in modules named `*_commands.py` of this package. Each has one function

    def register(app: typer.Typer) -> None:
        app.command("audit")(audit)                      # awan audit
        nodes = typer.Typer(help="Hypervisors.")
        app.add_typer(nodes, name="node")                # awan node add|list|...

and is found by its name; nothing else has to be edited. Before a command runs, the settings of the control plane
started here are in the environment (`AWAN_...`), and for commands that speak HTTP also `AWAN_API_URL`,
`AWAN_ADMIN_KEY` and `AWAN_API_KEY`. An `AwanError` or a failure of the runtime ends a command with its sentence on
stderr and status 1.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import typer

from awan.cli.screen import say_error
from awan.errors import AwanError
from awan.runtime.control_plane import ControlPlaneError
from awan.runtime.environment import load_environment
from awan.runtime.postgres import PostgresError
from awan.runtime.service_user import ServiceUserError
from awan.runtime.supervisor import SupervisorError

EXPECTED = (AwanError, ControlPlaneError, PostgresError, ServiceUserError, SupervisorError)


def build_app() -> typer.Typer:
    """The application with the commands of every `*_commands` module, in the order of the modules' names."""
    app = typer.Typer(
        name="awan",
        help="Awan, a self-hostable VPS cloud.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,  # locals may hold secrets
    )
    names = sorted(
        module.name
        for module in pkgutil.iter_modules(__path__)
        if module.name.endswith("_commands")
    )
    for name in names:
        importlib.import_module(f"{__name__}.{name}").register(app)
    return app


def main() -> None:
    """Entry point of the console script."""
    load_environment(with_keys=True)
    try:
        build_app()()
    except EXPECTED as err:
        say_error(str(err))
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output is gone (`awan logs | head`): not an error, and nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
