"""`awan node ...`, `awan capacity`: the operator's hypervisors."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from awan.cli.http_client import OperatorClient
from awan.cli.screen import console, say_error, styled

nodes = typer.Typer(help="Hypervisors.", no_args_is_help=True)

NodeName = Annotated[str, typer.Argument(help="Name or uuid of the node.")]


@nodes.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Name of the node.")],
    uri: Annotated[str, typer.Option(help="libvirt URI, such as qemu+tls://host/system.")],
    location: Annotated[int, typer.Option(help="Id of the location.")],
    tier: Annotated[list[int], typer.Option(help="Id of a tier it serves; may be repeated.")],
    system_id: Annotated[str | None, typer.Option(help="OVN system-id; else by host name.")] = None,
    cpu_threads: Annotated[int | None, typer.Option(help="Cap: hardware threads.")] = None,
    memory_mib: Annotated[int | None, typer.Option(help="Cap: MiB.")] = None,
    disk_gib: Annotated[int | None, typer.Option(help="Cap: GiB.")] = None,
) -> None:
    """Probe a hypervisor (libvirt, chassis, pool) and take it into service."""
    client = OperatorClient()
    body = {
        "name": name,
        "libvirt_uri": uri,
        "location_id": location,
        "tier_ids": tier,
        "ovn_system_id": system_id,
        "cpu_threads_cap": cpu_threads,
        "memory_mib_cap": memory_mib,
        "disk_gib_cap": disk_gib,
    }
    answer = client.call("POST", "/admin/nodes", {k: v for k, v in body.items() if v is not None})
    client.follow(answer["operation"])
    show(answer["data"]["uuid"])


@nodes.command("list")
def list_nodes() -> None:
    """List nodes and what of them is used."""
    table = Table(
        "name", "state", "health", "location", "vCPU", "memory MiB", "disk GiB", "uuid", box=None
    )
    for row in OperatorClient().get("/admin/nodes"):
        table.add_row(
            row["name"],
            row["state"],
            _health(row),
            str(row["location_id"]),
            f"{row['vcpus_used'] + row['dedicated_threads_used']} on {row['cpu_threads']} threads",
            f"{row['memory_mib_used']}/{row['memory_mib']}",
            f"{row['disk_gib_used']}/{row['disk_gib']}",
            row["uuid"],
        )
    console.print(table)


@nodes.command("show")
def show(node: NodeName) -> None:
    """Show a node: what it is, whether it answers (`seen at`: its last answer), and what of it is used."""
    client = OperatorClient()
    row = client.get(f"/admin/nodes/{find_node(client, node)}")
    table = Table(show_header=False, box=None)
    for key, value in row.items():
        if key == "facts":
            for fact, found in value.items():
                table.add_row(f"probe: {fact}", str(found))
        else:
            table.add_row(key.replace("_", " "), str(value))
    console.print(table)


@nodes.command("probe")
def probe(node: NodeName) -> None:
    """Ask a node again what it is, and store its capacity."""
    client = OperatorClient()
    answer = client.call("POST", f"/admin/nodes/{find_node(client, node)}/probe", {})
    client.follow(answer["operation"])
    show(answer["data"]["uuid"])


@nodes.command("cordon")
def cordon(node: NodeName) -> None:
    """Place nothing new on a node."""
    _act(node, "cordon")


@nodes.command("uncordon")
def uncordon(node: NodeName) -> None:
    """Place instances on a node again."""
    _act(node, "uncordon")


@nodes.command("remove")
def remove(
    node: NodeName,
    lost: Annotated[
        bool, typer.Option("--lost", help="It will never answer again: forget it as it is.")
    ] = False,
) -> None:
    """Remove a node on which nothing is placed, and the copies of template images on it."""
    client = OperatorClient()
    answer = client.call("DELETE", f"/admin/nodes/{find_node(client, node)}", {"lost": lost})
    if operation := answer.get("operation"):
        client.follow(operation)
    console.print(answer["message"])


@nodes.command("abandon")
def abandon(node: NodeName) -> None:
    """Give up a node that will not come back: its instances are deleted. Asks for its name."""
    client = OperatorClient()
    node_id = find_node(client, node)
    console.print("Its instances are deleted, and it must be switched off. This cannot be undone.")
    confirmed = typer.prompt("Name of the node")
    answer = client.call("POST", f"/admin/nodes/{node_id}/abandon", {"confirm": confirmed})
    console.print(answer["message"])


def _health(row: dict[str, Any]) -> str | Text:
    """`reachable`, or since when a node is not."""
    if row["health"] == "reachable":
        return "reachable"
    return styled(f"{row['health']} since {row['health_since']}", "red")


def _act(node: str, verb: str) -> None:
    client = OperatorClient()
    console.print(
        client.call("POST", f"/admin/nodes/{find_node(client, node)}/{verb}", {})["message"]
    )


def find_node(client: OperatorClient, wanted: str) -> str:
    """The uuid of a node given by name or uuid. One that is neither ends the command with status 1."""
    for row in client.get("/admin/nodes"):
        if wanted == row["name"] or wanted.lower() == row["uuid"]:
            return str(row["uuid"])
    say_error(f'There is no node "{wanted}"; `awan node list` shows those there are.')
    raise typer.Exit(1)


def capacity() -> None:
    """Show what each location can still take in each tier."""
    table = Table(
        "location", "tier", "nodes", "vCPU free", "memory MiB free", "disk GiB free", box=None
    )
    for row in OperatorClient().get("/admin/capacity"):
        table.add_row(
            str(row["location_id"]),
            row["tier"],
            f"{row['nodes_active']} in service, {row['nodes_out_of_service']} out",
            str(row["vcpus_free"]),
            str(row["memory_mib_free"]),
            str(row["disk_gib_free"]),
        )
    console.print(table)


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.add_typer(nodes, name="node")
    app.command()(capacity)
