"""`awan instance ...`: customers' instances, as an operator sees and helps them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.table import Table

from awan.cli.fleet_commands import find_node
from awan.cli.http_client import OperatorClient
from awan.cli.screen import console, say_error, styled

instances = typer.Typer(help="Instances of all customers.", no_args_is_help=True)
notes = typer.Typer(help="Operators' notes; customers never see them.", no_args_is_help=True)

InstanceId = Annotated[UUID, typer.Argument(help="Uuid of the instance.")]


@instances.command("list")
def list_instances(
    customer: Annotated[UUID | None, typer.Option(help="Uuid of the account.")] = None,
    node: Annotated[str | None, typer.Option(help="Name or uuid of the node.")] = None,
    status: Annotated[
        str | None, typer.Option(help="Statuses joined by commas, such as running,error.")
    ] = None,
    search: Annotated[str | None, typer.Option(help="Part of the hostname.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Labels such as env:prod, or keys, joined by commas.")
    ] = None,
    page: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """List the instances of all customers, newest first."""
    client = OperatorClient()
    found = client.get(
        "/admin/instances",
        account_uuid=customer,
        node_uuid=find_node(client, node) if node is not None else None,
        statuses=status,
        search=search,
        label=label,
        page=page,
        limit=100,
    )
    table = Table(
        "hostname", "status", "address", "customer", "node", "location", "tier", "created", "uuid",
        box=None,
    )  # fmt: skip
    for row in found["data"]:
        table.add_row(
            row["hostname"],
            row["status"],
            row["ip_address"] or "none",
            row["account"],
            row["node"] or "none",
            row["location"],
            row["tier"],
            row["created_at_iso"],
            row["uuid"],
        )
    console.print(table)
    where = found["page"]
    console.print(
        f"page {where['current_page']} of {where['total_pages']}, {where['total']} instances"
    )


@instances.command("show")
def show(instance: InstanceId) -> None:
    """Show an instance."""
    row = OperatorClient().get(f"/instances/{instance}")
    table = Table(show_header=False, box=None)
    for name in ("uuid", "hostname", "status", "status_reason", "ip_address", "cpu", "memory", "storage",
                 "location", "tier", "username", "created_at_iso", "ready_at"):  # fmt: skip
        table.add_row(name.replace("_", " "), str(row[name]))
    table.add_row("labels", _labels(row))
    table.add_row("protected", "yes" if row["is_protected"] else "no")
    console.print(table)


@instances.command("password")
def set_password(instance: InstanceId) -> None:
    """Set the password of the instance's account; it is asked for, and never an argument."""
    password = typer.prompt("New password", hide_input=True, confirmation_prompt=True)
    body = {"password": password, "password_confirmation": password}
    _finish(OperatorClient(), "PUT", f"/instances/{instance}/password", body)


@instances.command("hostname")
def rename(
    instance: InstanceId, hostname: Annotated[str, typer.Argument(help="The new name.")]
) -> None:
    """Give the instance another name, and say when its guest has it."""
    client = OperatorClient()
    _finish(client, "PUT", f"/instances/{instance}/hostname", {"hostname": hostname})


@instances.command("reset")
def reset(instance: InstanceId) -> None:
    """Press the reset button of a running instance."""
    _finish(OperatorClient(), "POST", f"/instances/{instance}/reset", {})


@instances.command("label")
def set_labels(
    instance: InstanceId,
    labels: Annotated[
        list[str] | None, typer.Argument(help="All its labels, such as env=prod; none: no labels.")
    ] = None,
) -> None:
    """Replace the labels of an instance."""
    wanted = dict(_pair(text) for text in labels or [])
    row = OperatorClient().call("PUT", f"/instances/{instance}/labels", {"labels": wanted})["data"]
    console.print(_labels(row))


@instances.command("protect")
def protect(instance: InstanceId) -> None:
    """Refuse the deletion of an instance."""
    _protect(instance, True)


@instances.command("unprotect")
def unprotect(instance: InstanceId) -> None:
    """Allow the deletion of an instance again."""
    _protect(instance, False)


@instances.command("power")
def act(
    action: Annotated[str, typer.Argument(help="start, stop, restart or reset.")],
    chosen: Annotated[list[str], typer.Argument(metavar="INSTANCE...", help="Uuids.")],
    force: Annotated[bool, typer.Option(help="Cut the power at once.")] = False,
) -> None:
    """Start, stop, restart or reset many instances; each has its own result."""
    body = {"action": action, "uuids": chosen, "force": force}
    table = Table("instance", "operation", "error", box=None)
    results: list[dict[str, Any]] = OperatorClient().call("POST", "/instances/actions", body)[
        "data"
    ]
    for row in results:
        operation, error = row["operation"], row["error"]
        table.add_row(
            row["uuid"],
            operation["uuid"] if operation else "",
            error["message"] if error else "",
        )
    console.print(table)
    if any(row["error"] for row in results):
        raise typer.Exit(1)


@instances.command("screenshot")
def take_screenshot(
    instance: InstanceId,
    file: Annotated[Path, typer.Argument(help="Where the PNG is written.", dir_okay=False)],
) -> None:
    """Write what the screen of a running instance shows to a file."""
    file.write_bytes(OperatorClient().download(f"/instances/{instance}/screenshot"))
    console.print(str(file))


@instances.command("log")
def read_serial_log(
    instance: InstanceId,
    kib: Annotated[int, typer.Option(help="How much of its end, in KiB.")] = 64,
) -> None:
    """Print what the instance has printed last on its serial console; control characters are taken out."""
    content = OperatorClient().download(f"/instances/{instance}/console/log?kib={kib}")
    typer.echo(content.decode())


@notes.command("list")
def list_notes(instance: InstanceId) -> None:
    """List the notes about an instance."""
    table = Table("id", "when", "who", "note", box=None)
    for row in OperatorClient().get(f"/admin/instances/{instance}/notes"):
        table.add_row(str(row["id"]), row["created_at"], row["actor"], row["text"])
    console.print(table)


@notes.command("add")
def add_note(
    instance: InstanceId, text: Annotated[str, typer.Argument(help="What others should know.")]
) -> None:
    """Write a note about an instance."""
    path = f"/admin/instances/{instance}/notes"
    console.print(f"note {OperatorClient().call('POST', path, {'text': text})['data']['id']}")


@notes.command("remove")
def remove_note(
    instance: InstanceId, note: Annotated[int, typer.Argument(help="Id of the note.")]
) -> None:
    """Delete a note."""
    path = f"/admin/instances/{instance}/notes/{note}"
    console.print(OperatorClient().call("DELETE", path)["message"])


def _finish(client: OperatorClient, method: str, path: str, body: dict[str, Any]) -> None:
    """Makes a change, follows it to its end, and says what there is to say about it."""
    answer = client.call(method, path, body)
    client.follow(answer["operation"])
    console.print(answer["message"])
    applied = (answer["data"] or {}).get("applied")
    if applied == "next_boot":
        console.print("The guest has the name at its next boot.")
    for warning in answer.get("warnings") or []:
        console.print(styled(warning, "yellow"))


def _protect(instance: UUID, is_protected: bool) -> None:
    body = {"is_protected": is_protected}
    answer = OperatorClient().call("PUT", f"/instances/{instance}/protection", body)
    console.print(answer["message"])


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        say_error(f"{text!r} is not KEY=VALUE.")
        raise typer.Exit(1)
    return key, value


def _labels(row: dict[str, Any]) -> str:
    pairs = sorted(row["labels"].items())
    return ", ".join(f"{key}={value}" for key, value in pairs) or "none"


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    instances.add_typer(notes, name="note")
    app.add_typer(instances, name="instance")
