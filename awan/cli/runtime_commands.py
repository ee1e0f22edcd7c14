"""`awan up|down|status|logs|api|worker`: the processes of the control plane on this machine."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from awan.cli.screen import console, one_line, say_error, styled
from awan.runtime.control_plane import ControlPlane
from awan.runtime.environment import state_dir
from awan.runtime.log_reader import LogLine, follow_lines, read_lines
from awan.runtime.process import PROCESSES

LEVEL_STYLES = {"warning": "yellow", "error": "red", "critical": "bold red", "debug": "dim"}


def report_step(name: str, elapsed_s: float) -> None:
    """Prints one line for a step that is done."""
    console.print(f"  {name:<34} {elapsed_s:6.1f} s")


def up(
    port: Annotated[
        int | None, typer.Option(help="Port of the API (default: the last one, or a free one).")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address the API listens on.")] = None,
) -> None:
    """Start database, API and worker here, and wait until the API is healthy."""
    overrides = {}
    if port is not None:
        overrides["AWAN_LISTEN_PORT"] = str(port)
    if host is not None:
        overrides["AWAN_LISTEN_HOST"] = host
    plane = ControlPlane(state_dir())
    plane.up(report_step, overrides)
    console.print(f"Awan is up: {plane.api_url}")


def down() -> None:
    """End what `awan up` started here. Data are kept."""
    began_at = time.monotonic()
    if ControlPlane(state_dir()).down():
        report_step("control plane ended", time.monotonic() - began_at)
    else:
        console.print("Nothing is running here.")


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show the processes and the API's health. Exit status 1 unless all is well."""
    plane = ControlPlane(state_dir())
    statuses = plane.statuses()
    health = plane.health() if statuses else None
    is_well = health == "ok" and all(row.is_running for row in statuses.values())
    if as_json:
        rows = [
            {
                "name": row.name,
                "state": row.state,
                "pid": row.pid or None,
                "started_at": row.started_at,
            }
            for row in statuses.values()
        ]
        print(json.dumps({"api_url": plane.api_url, "health": health, "processes": rows}))
    elif not statuses:
        console.print("Awan is not running here.")
    else:
        table = Table("process", "state", "pid", "", box=None, pad_edge=False)
        for row in sorted(statuses.values(), key=lambda row: row.name):
            style = "green" if row.is_running else "red"
            table.add_row(row.name, Text(row.state, style), str(row.pid or ""), row.description)
        console.print(table)
        console.print(f"{plane.api_url}  health: {health or 'no answer'}")
    raise typer.Exit(0 if is_well else 1)


def logs(
    names: Annotated[
        list[str] | None, typer.Argument(help="api, worker, postgres, supervisord. Default: all.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new lines.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the past.")] = 50,
    operation: Annotated[
        str | None, typer.Option(help="Only lines of this operation or workflow, all of its past.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show the logs of the processes, merged by time. Exit status 1 when there is nothing to show."""
    log_dir = ControlPlane(state_dir()).log_dir

    def is_wanted(line: LogLine) -> bool:
        return operation is None or line.belongs_to(operation)

    past = read_lines(log_dir, names or [], with_rotated=operation is not None)
    found = [line for line in past if is_wanted(line)]
    for line in found if operation is not None else found[-lines:] if lines else []:
        print_line(line, as_json=as_json)
    if follow:
        try:
            for line in follow_lines(log_dir, names or []):
                if is_wanted(line):
                    print_line(line, as_json=as_json)
        except KeyboardInterrupt:
            return
    elif not found:
        say_error(f"No such lines in {log_dir}.")
        raise typer.Exit(1)


def print_line(line: LogLine, *, as_json: bool) -> None:
    """Prints one log line for a person or a program."""
    if as_json:
        head = {
            "at": line.at,
            "process": line.process,
            "level": line.level,
            "message": line.message,
        }
        print(json.dumps(head | line.fields), flush=True)
        return
    exception = line.fields.pop("exception", None)
    fields = " ".join(
        f"{name}={value}" for name, value in line.fields.items() if name not in {"logger"}
    )
    text = Text.assemble(
        (line.at[:23].replace("T", " "), "dim"),
        (f" {line.process:<11} ", "cyan"),
        (one_line(line.message), LEVEL_STYLES.get(line.level, "")),
        (f"  {one_line(fields)}" if fields else "", "dim"),
    )
    console.print(text, soft_wrap=True)
    if exception:
        console.print(styled(str(exception), "red"), soft_wrap=True)


def api() -> None:
    """Run the API in the foreground (what the supervisor or systemd runs)."""
    PROCESSES["api"]()


def worker() -> None:
    """Run a worker in the foreground (what the supervisor or systemd runs)."""
    PROCESSES["worker"]()


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    for command in (up, down, status, logs, api, worker):
        app.command()(command)
