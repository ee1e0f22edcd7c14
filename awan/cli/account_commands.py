"""`awan customer ...`: accounts and their keys."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer
from rich.table import Table

from awan.cli.http_client import OperatorClient
from awan.cli.screen import console, printable, say_error

customers = typer.Typer(help="Customers and their API keys.", no_args_is_help=True)

AccountId = Annotated[UUID, typer.Argument(help="Uuid of the account.")]


@customers.command("list")
def list_customers(
    search: Annotated[str | None, typer.Option(help="Part of the name.")] = None,
    page: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """List accounts."""
    found = OperatorClient().get("/admin/accounts", search=search, page=page, limit=100)
    table = Table("name", "kind", "state", "currency", "uuid", box=None)
    for row in found["data"]:
        table.add_row(row["name"], row["kind"], row["state"], row["currency"], row["uuid"])
    console.print(table)
    where = found["page"]
    console.print(
        f"page {where['current_page']} of {where['total_pages']}, {where['total']} accounts"
    )


@customers.command("add")
def add_customer(
    name: Annotated[str, typer.Argument(help="Name of the customer.")],
    currency: Annotated[str, typer.Option(help="Currency of the account.")] = "IDR",
) -> None:
    """Add a customer's account."""
    body = {"name": name, "currency": currency}
    console.print(OperatorClient().call("POST", "/admin/accounts", body)["data"]["uuid"])


@customers.command("show")
def show_customer(account: AccountId) -> None:
    """Show an account and its limits."""
    row = OperatorClient().get(f"/admin/accounts/{account}")
    console.print(f"{row['name']}  {row['state']}  {row['currency']}  {row['uuid']}")
    table = Table("limit", "used", "of", box=None)
    for limit, value in row["quotas"].items():
        table.add_row(limit.replace("_", " "), str(value["used"]), str(value["max"]))
    console.print(table)


@customers.command("set")
def change_customer(
    account: AccountId,
    state: Annotated[str | None, typer.Option(help="active, suspended or closed.")] = None,
    quota: Annotated[
        list[str] | None, typer.Option(help="A limit, such as instances=50; may be repeated.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Close it without asking.")] = False,
) -> None:
    """Change an account's state or limits. Closing one asks first: its keys stop working at once."""
    body: dict[str, object] = {} if state is None else {"state": state}
    for text in quota or []:
        limit, _, most = text.partition("=")
        if not most.isdecimal():
            say_error(f"{text!r} is not LIMIT=NUMBER.")
            raise typer.Exit(1)
        body[f"{limit}_max"] = int(most)
    client = OperatorClient()
    if state == "closed" and not yes:
        name = printable(client.get(f"/admin/accounts/{account}")["name"])
        typer.confirm(f"Close the account of {name}? Its keys stop working at once", abort=True)
    client.call("PATCH", f"/admin/accounts/{account}", body)
    show_customer(account)


@customers.command("key")
def add_key(
    account: AccountId,
    name: Annotated[str, typer.Option(help="Name of the key.")],
    scope: Annotated[str, typer.Option(help="read, read_write or billing.")] = "read_write",
) -> None:
    """Make an API key and print it, this once."""
    body = {"name": name, "scope": scope}
    row = OperatorClient().call("POST", f"/admin/accounts/{account}/api-keys", body)["data"]
    console.print(row["key"])


@customers.command("keys")
def list_keys(account: AccountId) -> None:
    """List an account's API keys."""
    table = Table("id", "name", "scope", "last used", "expires", "revoked", box=None)
    for row in OperatorClient().get(f"/admin/accounts/{account}/api-keys"):
        table.add_row(
            row["id"],
            row["name"],
            row["scope"],
            row["last_used_at"] or "never",
            row["expires_at"] or "never",
            row["revoked_at"] or "",
        )
    console.print(table)


@customers.command("revoke")
def revoke_key(
    account: AccountId, key: Annotated[str, typer.Argument(help="Id of the key.")]
) -> None:
    """Revoke an API key."""
    path = f"/admin/accounts/{account}/api-keys/{key}"
    console.print(OperatorClient().call("DELETE", path)["message"])


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.add_typer(customers, name="customer")
