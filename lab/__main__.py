"""Command line of the lab: `python -m lab up|down|status|info|exec --slot K`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys

from lab.errors import LabError
from lab.layout import LabInfo
from lab.location import Lab, acquire_free_slot
from lab.requirements import check_requirements, require_root


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        require_root()
        result: int = options.run(options)
    except LabError as err:
        print(f"lab: {err}", file=sys.stderr)
        return 1
    return result


def up(options: argparse.Namespace) -> int:
    check_requirements()
    is_auto = options.slot == "auto"
    slot = acquire_free_slot(outlives_caller=True) if is_auto else _slot(options.slot)
    info = Lab(slot).up(lambda step, seconds: print(f"  {step}  {seconds:.1f} s", flush=True))
    print(f"slot {slot} is up: {', '.join(node.libvirt_uri for node in info.nodes)}")
    return 0


def down(options: argparse.Namespace) -> int:
    slot = _slot(options.slot)
    Lab(slot).down(keep=options.keep)
    print(f"slot {slot} is down" + (", its data is kept" if options.keep else ""))
    return 0


def status(options: argparse.Namespace) -> int:
    """Exit code 0 if all of the location runs, 3 otherwise (as of service status programs)."""
    found = Lab(_slot(options.slot)).status()
    print(f"slot {found.slot}: {found.owner or 'free'}")
    for process in found.processes:
        print(f"  {'up  ' if process.alive else 'DEAD'}  {process.name}  {process.pid}")
    for name in found.missing:
        print(f"  down  {name}")
    return 0 if found.is_up else 3


def info(options: argparse.Namespace) -> int:
    found: LabInfo = Lab(_slot(options.slot)).info
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if field.name == "nodes":
            for node in found.nodes:
                print(f"{node.name}: {node.libvirt_uri}, host {node.host_uuid}")
        else:
            print(f"{field.name}: {', '.join(value) if isinstance(value, tuple) else value}")
    return 0


def execute(options: argparse.Namespace) -> int:
    """Becomes the command, so that it has the terminal."""
    lab = Lab(_slot(options.slot))
    machine = f"aw{options.slot}-{options.machine.removeprefix(f'aw{options.slot}-')}"
    argv = lab.machine_argv(machine, options.command)
    os.execvp(argv[0], argv)  # noqa: S606  arguments as a list


def _slot(text: str) -> int:
    if not text.isdigit():
        raise LabError(f"a slot is a number, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab", description="A whole Awan location on one machine."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    slot = argparse.ArgumentParser(add_help=False)
    slot.add_argument("--slot", default="0", help="number of the location on this machine")

    add = commands.add_parser("up", parents=[slot], help="start it, or what of it has died")
    add.description = "SLOT may be `auto`: the first free one from 1."
    add.set_defaults(run=up)
    remove = commands.add_parser("down", parents=[slot], help="end it and remove all of it")
    remove.add_argument("--keep", action="store_true", help="keep disks, definitions, OVN data")
    remove.set_defaults(run=down)
    show = commands.add_parser("status", parents=[slot], help="list its processes")
    show.set_defaults(run=status)
    tell = commands.add_parser("info", parents=[slot], help="print its addresses")
    tell.add_argument("--json", action="store_true")
    tell.set_defaults(run=info)
    inside = commands.add_parser("exec", parents=[slot], help="run a command in n1, n2 or up")
    inside.add_argument("machine")
    inside.add_argument("command", nargs=argparse.REMAINDER)
    inside.set_defaults(run=execute)
    return parser


if __name__ == "__main__":
    sys.exit(main())
