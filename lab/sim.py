"""The whole control plane with simulated engines: for work on API and panel, without root.

    python -m lab.sim up             start, then show the logs until Ctrl-C, which ends it
    python -m lab.sim up --detach    start and return
    python -m lab.sim down           end it; data are kept in var/sim

Nodes, disks and networks are simulated in PostgreSQL; API, worker, operations, prices and quotas are the real ones.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from awan.cli.runtime_commands import print_line
from awan.cli.screen import Screen
from awan.runtime.control_plane import ControlPlane, ControlPlaneError, free_port
from awan.runtime.environment import read_env_file, state_dir, write_env_file
from awan.runtime.log_reader import follow_lines
from awan.runtime.postgres import PostgresError
from awan.runtime.service_user import ServiceUserError
from awan.runtime.supervisor import SupervisorError
from lab.demo import Clock
from lab.http_api import Api, ApiError, OperationFailed
from lab.seed_catalogue import (
    Engine,
    SeedLocation,
    SeedNode,
    SeedPool,
    SeedPrefixPool,
    SeedTemplate,
    create_customer_key,
    ensure_customer,
    seed_location,
    seed_template,
)

FIRST_PORT = 8180
IMAGE_GIB = 1
EXPECTED = (
    ApiError,
    ControlPlaneError,
    OperationFailed,
    PostgresError,
    ServiceUserError,
    SupervisorError,
)

LOCATION = SeedLocation(
    name="Simulation 1",
    code="sim1",
    country="ID",
    engines={kind: Engine("fake") for kind in ("hypervisor", "volumes", "fabric")}
    | {
        "nameserver": Engine(
            "fake",
            {
                "forward_zone": "sim1.awan.example",
                "reverse_zones": [
                    "250.18.198.in-addr.arpa",
                    "1.0.0.0.0.5.2.0.8.b.d.0.1.0.0.2.ip6.arpa",
                ],
            },
        )
    },
    nodes=[SeedNode(name, f"fake://{name}") for name in ("sim-n1", "sim-n2")],
    # 198.18.0.0/15 and 2001:db8::/32 are set aside for tests and examples.
    pools=[
        SeedPool("198.18.250.0/24", "198.18.250.1", ["198.18.250.1"]),
        SeedPool("2001:db8:250:1::/64", "2001:db8:250:1::1", ["2001:db8:250:1::1"]),
    ],
    prefix_pools=[SeedPrefixPool("2001:db8:250:100::/56", "2001:db8:250:1::2")],
)


def up(*, detach: bool) -> None:
    """Starts the simulation, fills it once, prints how to use it."""
    console = Screen()
    clock = Clock(console)
    plane = ControlPlane(state_dir() / "sim")
    port = plane.environment().get("AWAN_LISTEN_PORT") or str(free_port("127.0.0.1", FIRST_PORT))
    plane.up(clock.done, {"AWAN_LISTEN_PORT": port})
    keys = read_env_file(plane.keys_file)
    if "AWAN_API_KEY" not in keys:
        with clock.step("keys"):
            keys = {"AWAN_API_URL": plane.api_url, **keys}
            if "AWAN_ADMIN_KEY" not in keys:
                keys["AWAN_ADMIN_KEY"] = plane.run_command("init").split()[-1]
                write_env_file(plane.keys_file, keys)
            with Api(plane.api_url, keys["AWAN_ADMIN_KEY"]) as operator:
                account = ensure_customer(operator, "Simulated Customer")
                keys["AWAN_API_KEY"] = create_customer_key(operator, account, "sim")
            write_env_file(plane.keys_file, keys)
    with (
        clock.step("location, catalogue, nodes"),
        Api(plane.api_url, keys["AWAN_ADMIN_KEY"]) as api,
    ):
        seed_location(api, LOCATION)
        seed_template(api, _template(plane.state_dir), plane.state_dir / "images.json")
    console.print(
        f"\nAwan with simulated engines: {plane.api_url}   ({clock.total_s:.1f} s)\n"
        f"  API pages   {plane.api_url.removesuffix('/api/v1')}/docs\n"
        f"  customer    curl -H 'x-apikey: {keys['AWAN_API_KEY']}' {plane.api_url}/instances\n"
        f"  operator    curl -H 'x-apikey: {keys['AWAN_ADMIN_KEY']}' {plane.api_url}/admin/nodes\n"
        f"  keys in     {plane.keys_file}\n"
        f"  awan        export AWAN_STATE_DIR={shlex.quote(str(plane.state_dir))}; .venv/bin/awan status",
        soft_wrap=True,
    )
    if detach:
        console.print("`make sim-down` ends it.")
        return
    console.print("Ctrl-C ends it.\n")
    # A closed terminal or a plain kill ends it too: nobody could end it by Ctrl-C any more.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        for line in follow_lines(plane.log_dir, ["api", "worker"]):
            print_line(line, as_json=False)
    except KeyboardInterrupt:
        console.print()
        with clock.step("ended"):
            plane.down()


def down() -> None:
    """Ends the simulation, data kept."""
    Screen().print(
        "Down." if ControlPlane(state_dir() / "sim").down() else "Nothing is running here."
    )


def _template(directory: Path) -> SeedTemplate:
    """An empty disk image: no simulated guest ever reads it, but the import checks it like any other."""
    path = directory / "template.qcow2"
    if not path.exists():
        if shutil.which("qemu-img") is None:
            sys.exit("sim: qemu-img is needed to check images: install Debian's qemu-utils")
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{IMAGE_GIB}G"], check=True
        )
    return SeedTemplate(
        name="Debian",
        version="12",
        family="linux",
        default_username="debian",
        min_memory_mib=512,
        min_storage_gib=IMAGE_GIB,
        has_agent=True,
        path=path,
        identity=path.name,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.sim")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    start = commands.add_parser("up", help="start it")
    start.add_argument("--detach", action="store_true", help="return when it is up")
    commands.add_parser("down", help="end it")
    options = parser.parse_args()
    try:
        if options.command == "up":
            up(detach=options.detach or "DETACH" in os.environ)
        else:
            down()
    except EXPECTED as err:
        sys.exit(f"sim: {err}")


if __name__ == "__main__":
    main()
