"""`awan audit`, `awan quarantine`, `awan trace`: is all as it should be, and what happened to one thing.

They speak HTTP with the operator's key, like any other client.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NoReturn
from uuid import UUID

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from awan.cli.http_client import OperatorClient
from awan.cli.screen import console, printable, say_error, styled

GREEN, FINDINGS, NOT_RUN = 0, 1, 2
POLL_S = 0.5
UNFINISHED = frozenset({"queued", "running"})
STATUS_STYLES = {
    "succeeded": "green",
    "SUCCESS": "green",
    "failed": "red",
    "ERROR": "red",
    "cancelled": "yellow",
}


def audit(
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the audit's end.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Compare nodes, networks and disks with the database, and the database with itself. Changes nothing.

    Exit status 0: all is well. 1: there are findings. 2: the audit could not be run.
    """
    try:
        shown = _run_audit(OperatorClient(), timeout)
    except typer.Exit as err:
        # Whatever the client has said: nothing is known of the cloud, and 1 would mean findings.
        raise typer.Exit(NOT_RUN) from err
    if as_json:
        print(json.dumps(shown, indent=2))
    else:
        _print_audit(shown)
    raise typer.Exit(GREEN if shown["is_green"] else FINDINGS)


def _run_audit(client: OperatorClient, timeout_s: float) -> dict[str, Any]:
    """The audit that has succeeded. Raises: typer.Exit, with the reason printed, when there is none."""
    deadline = time.monotonic() + timeout_s
    shown: dict[str, Any] = client.call("POST", "/admin/audit")["data"]
    while shown["status"] in UNFINISHED:
        if time.monotonic() > deadline:
            _give_up(f"audit {shown['uuid']} is still {shown['status']} after {timeout_s:g} s")
        time.sleep(POLL_S)
        shown = client.get(f"/admin/audit/{shown['uuid']}")
    if shown["is_green"] is None:
        _give_up(f"audit {shown['uuid']} {shown['status']}: {shown['error']}")
    return shown


def _give_up(reason: str) -> NoReturn:
    say_error(reason)
    raise typer.Exit(NOT_RUN)


def _print_audit(shown: Mapping[str, Any]) -> None:
    findings = shown["findings"]
    if not findings:
        console.print(styled("Green:", "green"), f"no findings.  {shown['uuid']}")
        return
    console.print(_findings_table(findings))
    number = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}"
    console.print(styled(f"{number}.", "red"), f" {shown['uuid']}")


def _findings_table(findings: Iterable[Mapping[str, Any]]) -> Table:
    table = Table("kind", "location", "what is wrong", box=None, pad_edge=False, show_lines=False)
    for finding in findings:
        table.add_row(
            styled(finding["kind"], "red"), finding["location"] or "", finding["sentence"]
        )
    return table


def quarantine() -> None:
    """Show domains, ports and files that no row explains. They are reported, and never touched."""
    rows = OperatorClient().get("/admin/quarantine")
    if not rows:
        console.print("Nothing is in quarantine.")
        return
    table = Table("kind", "since", "what it is", box=None, pad_edge=False)
    for row in rows:
        table.add_row(styled(row["kind"], "red"), row["found_at"], row["sentence"])
    console.print(table)


def trace(
    uuid: Annotated[
        UUID, typer.Argument(help="Of an instance, address, operation, node, disk, ...")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show all that is known of one thing: rows, history, operations and their steps, findings of the last audit."""
    shown: dict[str, Any] = OperatorClient().get(f"/admin/trace/{uuid}")
    if as_json:
        print(json.dumps(shown, indent=2))
        return
    console.print(styled(shown["title"], "bold"), f" {shown['uuid']}")
    _print_rows(shown["rows"])
    _print_operations(shown["operations"])
    if shown["waits"]:
        _heading("Waiting workflows")
        for workflow in shown["waits"]:
            _print_workflow(workflow)
    _print_events(shown["events"])
    _print_last_audit(shown["last_audit"])


def _heading(text: str) -> None:
    console.print()
    console.print(styled(text, "bold"))


def _print_rows(rows: Iterable[Mapping[str, Any]]) -> None:
    """One paragraph for each row, those of a table together."""
    table = None
    for row in rows:
        if row["table"] != table:
            table = row["table"]
            _heading(table)
        pairs = (
            Text.assemble(
                (f"{name}=", "dim"),
                printable(value if isinstance(value, str) else json.dumps(value)),
            )
            for name, value in row["columns"].items()
        )
        console.print(Padding(Text("  ").join(pairs), (0, 0, 0, 2), expand=False))


def _print_operations(operations: Iterable[Mapping[str, Any]]) -> None:
    for operation in operations:
        _heading(f"operation {operation['kind']}  {operation['uuid']}")
        line = [
            f"  {operation['created_at']} ",
            _status(operation["status"]),
            f" by {operation['actor']}",
        ]
        if operation["status"] in UNFINISHED:
            line.append(
                f" at {operation['step']}, {operation['percent']} %, until {operation['deadline_at']}"
            )
        if operation["finished_at"]:
            line.append(f" ended {operation['finished_at']}")
        if operation["alarmed_at"]:
            line.append(styled(f" alarm {operation['alarmed_at']}", "red"))
        console.print(*line, soft_wrap=True)
        if operation["error"]:
            console.print(styled(f"  {operation['error']}", "red"), soft_wrap=True)
        if operation["workflow"] is not None:
            _print_workflow(operation["workflow"])
        else:
            console.print(styled("  its workflow is not stored any more", "yellow"))


def _print_workflow(workflow: Mapping[str, Any]) -> None:
    console.print(
        f"  {workflow['name']} ",
        _status(workflow["status"]),
        f" on {workflow['worker'] or 'no worker'}  attempts {workflow['attempts']}  {workflow['uuid']}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    for step in workflow["steps"]:
        duration = f"{step['duration_s']:.3f} s" if step["duration_s"] is not None else ""
        # The times of steps that share a checkpoint follow line by line.
        outcome = step["error"] or step["failure"] or ("" if step["parts"] else step["result"])
        table.add_row(f"    {step['name']}", step["started_at"] or "", duration, outcome or "")
        for part in step["parts"]:
            table.add_row(f"      {part['name']}", "", f"{part['duration_s']:.3f} s", "")
    console.print(table)


def _print_events(events: Iterable[Mapping[str, Any]]) -> None:
    _heading("Events")
    table = Table(box=None, pad_edge=False, show_header=False)
    for event in events:
        data = json.dumps(event["data"]) if event["data"] else ""
        table.add_row(f"  {event['at']}", event["kind"], event["actor"], data)
    console.print(table)


def _print_last_audit(last: Mapping[str, Any] | None) -> None:
    _heading("Last audit")
    if last is None:
        console.print("  none has been run yet")
    elif last["is_earlier"]:
        console.print(f"  none since it is there; the last one was {last['at']}")
    elif not last["findings"]:
        console.print(f"  {last['at']}: nothing wrong with it")
    else:
        console.print(f"  {last['at']}")
        console.print(_findings_table(last["findings"]))


def _status(status: str) -> Text:
    return styled(status, STATUS_STYLES.get(status, ""))


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command()(audit)
    app.command()(quarantine)
    app.command()(trace)
