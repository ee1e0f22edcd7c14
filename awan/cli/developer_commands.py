"""`awan openapi|map|shell`: for those who work on Awan or with its API."""

from __future__ import annotations

import code
import json

import typer
from rich.table import Table

from awan.cli.screen import console


def openapi() -> None:
    """Print the OpenAPI document, as it is served at /openapi.json."""
    from awan.api import create_app

    print(json.dumps(create_app().openapi(), indent=2, ensure_ascii=False))


def show_map() -> None:
    """Show what Awan is made of: routes, tables, workflows."""
    from awan import assembly
    from awan.api import create_app
    from awan.kit.database import Base
    from awan.operations.plans import registered_plans

    assembly.import_workflows()
    routes = Table("method", "path", "operation", title="Routes", box=None, title_justify="left")
    for path, methods in create_app().openapi()["paths"].items():
        for method, described in methods.items():
            routes.add_row(method.upper(), path, described.get("operationId", ""))
    tables = Table("table", "columns", title="Tables", box=None, title_justify="left")
    for table in sorted(Base.metadata.tables.values(), key=lambda row: row.name):
        tables.add_row(table.name, str(len(table.columns)))
    plans = Table("workflow", "steps", title="Workflows", box=None, title_justify="left")
    for plan in registered_plans():
        plans.add_row(plan.workflow, " -> ".join(step.name for step in plan.steps))
    for shown in (routes, tables, plans):
        console.print(shown)
        console.print()


def shell() -> None:
    """Open Python with a session and the rooms' services at hand. What is not committed is rolled back."""
    from sqlalchemy.orm import Session

    import awan.accounts.service
    import awan.catalogue.service
    import awan.fleet.service
    import awan.instances.service
    import awan.networks.addresses
    from awan.kit.database import get_engine

    with Session(get_engine()) as session:
        names = {
            "session": session,
            "accounts": awan.accounts.service,
            "catalogue": awan.catalogue.service,
            "fleet": awan.fleet.service,
            "instances": awan.instances.service,
            "networks": awan.networks.addresses,
        }
        code.interact(
            banner=f"At hand: {', '.join(names)}. session.commit() keeps a change.", local=names
        )


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command()(openapi)
    app.command("map")(show_map)
    app.command()(shell)
