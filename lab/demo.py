"""The main job, end to end: a location with two hypervisors, a catalogue, and a VPS reached by SSH.

    python -m lab.demo up       everything, from nothing; again: what is there is used
    python -m lab.demo start    what `down` ended, with its data
    python -m lab.demo down     ends what was started here; data are kept

Everything after the API's start goes through HTTP: as the operator for the catalogue, as a customer for the VPS.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from awan.cli.screen import Screen
from awan.runtime.control_plane import ControlPlane, ControlPlaneError
from awan.runtime.environment import read_env_file, state_dir, write_env_file
from awan.runtime.postgres import PostgresError
from awan.runtime.service_user import ServiceUserError
from awan.runtime.supervisor import SupervisorError
from lab import Lab, LabError, LabInfo, SlotTaken, acquire_free_slot
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
from lab.templates import TemplateBuildError, TemplateFile, TemplateKind, cached

HOSTNAME = "demo"
USERNAME = "awan"
TIER = "Cloud Compute AMD Epyc"
CUSTOMER = "Demo"
CPU, MEMORY_GIB, STORAGE_GIB = 1, 1, 20
# A node of the lab shares the machine with the other one and with us.
NODE_THREADS, NODE_MEMORY_MIB, NODE_DISK_GIB = 8, 6144, 100
TEMPLATES: tuple[TemplateKind, ...] = ("debian-12", "tiny-1")
READY_TIMEOUT_S = 900.0
LOGIN_TIMEOUT_S = 300.0

EXPECTED = (
    ApiError,
    ControlPlaneError,
    LabError,
    OperationFailed,
    PostgresError,
    ServiceUserError,
    SupervisorError,
    TemplateBuildError,
)


class DemoError(Exception):
    """The demo cannot go on; the text says why and what to do."""


class Clock:
    """Prints one line for each finished step; may be used from several threads."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lock = threading.Lock()
        self._began_at = time.monotonic()

    def done(self, name: str, elapsed_s: float, note: str = "") -> None:
        """A finished step and its seconds."""
        with self._lock:
            self.console.print(f"  {name:<46} {elapsed_s:7.1f} s  {note}".rstrip(), soft_wrap=True)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a block."""
        began_at = time.monotonic()
        yield
        self.done(name, time.monotonic() - began_at)

    @property
    def total_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began_at


class Demo:
    """The demo of one checkout: its state is in `var`, its lab slot in `var/demo/slot`."""

    def __init__(self) -> None:
        self.console = Screen()
        self.clock = Clock(self.console)
        self.plane = ControlPlane(state_dir())
        self.dir = self.plane.state_dir / "demo"
        self.key_path = self.dir / "id_ed25519"
        self.known_hosts = self.dir / "known_hosts"
        self.stopped_path = self.dir / "stopped.json"
        self.slot_path = self.dir / "slot"

    # --- the three commands

    def up(self) -> None:
        """From nothing to a login."""
        if os.geteuid() != 0:
            raise DemoError("the demo needs root, for the lab's networks; `make sim` does not")
        self.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Building templates, starting the lab and starting the control plane do not need each other.
        with ThreadPoolExecutor(max_workers=3) as pool:
            templates = pool.submit(self._build_templates)
            location = pool.submit(self._bring_up_lab)
            plane = pool.submit(self._bring_up_plane)
            for future in (plane, location, templates):
                future.result()
        keys = self._operator_key()
        with Api(self.plane.api_url, keys["AWAN_ADMIN_KEY"]) as operator:
            with self.clock.step("location, catalogue, nodes"):
                location_id = seed_location(operator, describe_location(location.result()))
            template_ids = self._seed_templates(operator, templates.result())
            self._customer_key(operator, keys)
        with Api(self.plane.api_url, keys["AWAN_API_KEY"]) as customer:
            instance = self._order(customer, location_id, template_ids["debian-12"])
            greeting = self._log_in(instance)
        self._say_goodbye(instance, keys["AWAN_API_KEY"], greeting)

    def start(self) -> None:
        """What down() ended runs again."""
        if not self.plane.keys_file.exists():
            raise DemoError("there is nothing to start yet: run `make demo` first")
        with ThreadPoolExecutor(max_workers=2) as pool:
            for future in (pool.submit(self._bring_up_lab), pool.submit(self._bring_up_plane)):
                future.result()
        key = read_env_file(self.plane.keys_file).get("AWAN_API_KEY")
        if key is None:
            raise DemoError("the demo was not finished: run `make demo`")
        stopped = json.loads(self.stopped_path.read_text()) if self.stopped_path.exists() else []
        with Api(self.plane.api_url, key) as customer:
            for row in _instances(customer):
                if row["uuid"] in stopped or row["hostname"] == HOSTNAME:
                    self._ensure_running(customer, row)
        self.stopped_path.unlink(missing_ok=True)
        self.console.print(f"\nAwan is up: {self.plane.api_url}   keys: {self.plane.keys_file}")

    def down(self) -> None:
        """Instances are stopped as a customer would, then everything that runs here is ended."""
        keys = read_env_file(self.plane.keys_file)
        if self.plane.health() == "ok" and "AWAN_API_KEY" in keys:
            with (
                self.clock.step("instances stopped"),
                Api(self.plane.api_url, keys["AWAN_API_KEY"]) as api,
            ):
                self._stop_instances(api)
        with self.clock.step("control plane ended"):
            self.plane.down()
        if self.slot_path.exists():
            slot = int(self.slot_path.read_text())
            with self.clock.step(f"lab slot {slot} ended"):
                Lab(slot).down(keep=True)
        self.console.print("Down. Data are kept; `make up` starts it again.")

    # --- parts

    def _build_templates(self) -> dict[TemplateKind, TemplateFile]:
        built = {}
        for kind in TEMPLATES:
            with self.clock.step(f"template {kind}"):
                built[kind] = cached(kind, lambda _: None)
        return built

    def _bring_up_lab(self) -> LabInfo:
        def report(step: str, elapsed_s: float) -> None:
            self.clock.done(f"lab: {step}", elapsed_s)

        if self.slot_path.exists():
            return Lab(int(self.slot_path.read_text())).up(report)
        slot = int(os.environ.get("AWAN_LAB_SLOT", "0"))
        # Recorded first, so that `down` also ends a location that came up only in part.
        self.slot_path.write_text(f"{slot}\n")
        try:
            return Lab(slot).up(report)
        except SlotTaken as err:
            self.slot_path.unlink()
            if "AWAN_LAB_SLOT" in os.environ:
                raise
            slot = acquire_free_slot(outlives_caller=True)
            self.console.print(f"  {err}; using slot {slot}", soft_wrap=True)
            self.slot_path.write_text(f"{slot}\n")
            return Lab(slot).up(report)

    def _bring_up_plane(self) -> None:
        self.plane.up(self.clock.done)

    def _operator_key(self) -> dict[str, str]:
        """The keys known so far, with a working operator's key: made now, or that of an earlier run."""
        keys = read_env_file(self.plane.keys_file)
        keys["AWAN_API_URL"] = self.plane.api_url
        if not _works(self.plane.api_url, keys.get("AWAN_ADMIN_KEY")):
            with self.clock.step("first operator key"):
                keys["AWAN_ADMIN_KEY"] = self.plane.run_command("init").split()[-1]
        write_env_file(self.plane.keys_file, keys)
        return keys

    def _seed_templates(
        self, operator: Api, templates: dict[TemplateKind, TemplateFile]
    ) -> dict[TemplateKind, int]:
        ids = {}
        for kind, file in templates.items():
            with self.clock.step(f"import of {kind}"):
                template = SeedTemplate(
                    name=file.name,
                    version=file.version,
                    family="linux",
                    default_username=file.default_username,
                    min_memory_mib=file.min_memory_mib,
                    min_storage_gib=file.min_storage_gib,
                    has_agent=file.has_agent,
                    path=file.path,
                    identity=file.sha256,
                )
                ids[kind] = seed_template(operator, template, self.dir / "images.json")
        return ids

    def _customer_key(self, operator: Api, keys: dict[str, str]) -> None:
        if _works(self.plane.api_url, keys.get("AWAN_API_KEY")):
            return
        with self.clock.step("demo customer and its key"):
            account = ensure_customer(operator, CUSTOMER)
            keys["AWAN_API_KEY"] = create_customer_key(operator, account, "demo")
            write_env_file(self.plane.keys_file, keys)

    def _order(self, api: Api, location_id: int, template_id: int) -> dict[str, Any]:
        """A running instance named `demo`, ready for its user: the present one, or a new one."""
        ssh_key_id = self._upload_ssh_key(api)
        row = next((row for row in _instances(api) if row["hostname"] == HOSTNAME), None)
        if row is not None and row["state"] != "error" and self._is_reusable(api, row):
            self._ensure_running(api, row)
        else:
            if row is not None:
                body = {"remove_ip": True, "remove_block_storage": True}
                answer = api.call("DELETE", f"instances/{row['uuid']}", body)
                self._follow(api, "delete the old instance", answer["operation"])
            self.known_hosts.unlink(missing_ok=True)
            row = self._create(api, location_id, template_id, ssh_key_id)
        return self._wait_until_ready(api, row["uuid"])

    def _is_reusable(self, api: Api, row: dict[str, Any]) -> bool:
        """Whether our present SSH key is in it; a lost var/demo cannot log in to the old one."""
        installed = {key["title"] for key in api.get(f"instances/{row['uuid']}/ssh-keys")}
        return self._key_title() in installed

    def _create(
        self, api: Api, location_id: int, template_id: int, ssh_key_id: int
    ) -> dict[str, Any]:
        tiers = api.get(f"pricing/tiers?location_id={location_id}")
        order = {
            "location_id": location_id,
            "tier_id": next(tier["id"] for tier in tiers if tier["name"] == TIER),
            "template_id": template_id,
            "hostname": HOSTNAME,
            "cpu": CPU,
            "memory": MEMORY_GIB,
            "storage": STORAGE_GIB,
            "username": USERNAME,
            "password": self._password(),
            "use_public_ip": True,
            "ssh_keys": [ssh_key_id],
        }
        with self.clock.step("POST /instances"):
            answer = api.call(
                "POST", "instances", order, headers={"Idempotency-Key": f"demo-{uuid4()}"}
            )
        self._follow(api, "create the instance", answer["operation"])
        return dict(answer["data"])

    def _ensure_running(self, api: Api, row: dict[str, Any]) -> None:
        """Starts an instance that is stopped. One that only seems to run is restarted."""
        path = f"instances/{row['uuid']}"
        detail = api.get(path)
        if detail["active_operation"]:
            self._follow(api, "wait for the running operation", detail["active_operation"])
            detail = api.get(path)
        if detail["state"] == "stopped":
            answer = api.call("POST", f"{path}/start", {})
            self._follow(api, f"start {row['hostname']}", answer["operation"])

    def _stop_instances(self, api: Api) -> None:
        running = [row for row in _instances(api) if row["state"] == "running"]
        operations = []
        for row in running:
            try:
                answer = api.call("POST", f"instances/{row['uuid']}/stop", {})
            except ApiError as err:
                self.console.print(f"  {row['hostname']}: {err}", soft_wrap=True)
                continue
            operations.append(answer.get("operation"))
        for operation in filter(None, operations):
            try:
                api.follow(operation, timeout_s=120)
            except OperationFailed as err:
                self.console.print(f"  {err}", soft_wrap=True)
        if running:
            self.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.stopped_path.write_text(json.dumps([row["uuid"] for row in running]))

    def _follow(self, api: Api, name: str, operation: dict[str, Any]) -> None:
        """Follows an operation with a bar, then one line with its time."""
        with self._progress() as progress, self.clock.step(name):
            task = progress.add_task(name, total=100)

            def show(state: dict[str, Any]) -> None:
                step = state["step"] or state["status"]
                progress.update(task, completed=state["percent"], description=f"{name}: {step}")

            api.follow(operation, show)

    def _wait_until_ready(self, api: Api, uuid: str) -> dict[str, Any]:
        """Waits for the guest's own sign that its user can log in."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        with self._progress() as progress, self.clock.step("guest is ready"):
            progress.add_task("the guest boots", total=None)
            while True:
                detail: dict[str, Any] = api.get(f"instances/{uuid}")
                if detail["ready_at"] is not None and detail["state"] == "running":
                    return detail
                if detail["state"] == "error":
                    raise DemoError(f"the instance failed: {detail['status_reason']}")
                if time.monotonic() > deadline:
                    raise DemoError(
                        f"the guest did not report within {READY_TIMEOUT_S:.0f} s,"
                        " see `awan logs worker`"
                    )
                time.sleep(0.25)

    def _progress(self) -> Progress:
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    # --- SSH

    def _upload_ssh_key(self, api: Api) -> int:
        """The id of our SSH key at the API; generated and uploaded the first time."""
        if not self.key_path.exists():
            with self.clock.step("SSH key"):
                subprocess.run(
                    [
                        *("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "awan-demo"),
                        *("-f", str(self.key_path)),
                    ],
                    check=True,
                    stdin=subprocess.DEVNULL,
                )
        title = self._key_title()
        for key in api.get("ssh-keys"):
            if key["title"] == title:
                return int(key["id"])
        public = self.key_path.with_suffix(".pub").read_text().strip()
        return int(api.post("ssh-keys", {"title": title, "key": public})["id"])

    def _key_title(self) -> str:
        """A title that changes with the key: some of its last characters."""
        blob = self.key_path.with_suffix(".pub").read_text().split()[1]
        tail = "".join(letter for letter in blob if letter.isalnum())[-8:]
        return f"demo-{tail}"

    def _password(self) -> str:
        """The instance's password, kept private for a login at the console."""
        path = self.dir / "password"
        if not path.exists():
            letters = string.ascii_letters + string.digits
            text = "".join(secrets.choice(letters) for _ in range(20)) + "aA1"
            path.touch(mode=0o600)
            path.write_text(f"{text}\n")
        return path.read_text().strip()

    def ssh_argv(self, address: str, *command: str) -> list[str]:
        """The command line of a login as the instance's user."""
        return [
            "ssh",
            *("-i", str(self.key_path)),
            *("-o", f"UserKnownHostsFile={self.known_hosts}"),
            *("-o", "StrictHostKeyChecking=accept-new"),
            *("-o", "IdentitiesOnly=yes"),
            f"{USERNAME}@{address}",
            *command,
        ]

    def _log_in(self, instance: dict[str, Any]) -> str:
        """What `uname -a` says in the guest."""
        argv = self.ssh_argv(instance["ip_address"], "uname", "-a")
        argv[1:1] = ["-F", "none", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        deadline = time.monotonic() + LOGIN_TIMEOUT_S
        with self.clock.step("SSH login"):
            while True:
                result = subprocess.run(
                    argv, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
                )
                if result.returncode == 0:
                    return result.stdout.strip()
                if time.monotonic() > deadline:
                    raise DemoError(f"no login at {instance['ip_address']}: {result.stderr}")
                time.sleep(0.5)

    def _say_goodbye(self, instance: dict[str, Any], key: str, greeting: str) -> None:
        url, uuid = self.plane.api_url, instance["uuid"]
        network = instance["public_network"] or {}
        ipv6 = network.get("ipv6_address")
        lines = [
            "",
            f"  {greeting}",
            "",
            f"  instance   {instance['hostname']}  {uuid}",
            f"  address    {instance['ip_address']}{f'  {ipv6}' if ipv6 else ''}",
            f"  price      {instance['cost_detail']['per_hour']} {instance['cost_detail']['currency']} an hour",
            f"  all of it  {self.clock.total_s:.1f} s",
            "",
            "Log in:",
            f"  {' '.join(self.ssh_argv(instance['ip_address']))}",
            "",
            "Go on (keys are in " + str(self.plane.keys_file) + "):",
            f"  curl -H 'x-apikey: {key}' {url}/instances",
            f"  curl -H 'x-apikey: {key}' {url}/instances/{uuid}",
            f"  curl -H 'x-apikey: {key}' -X POST {url}/instances/{uuid}/restart",
            f"  curl -H 'x-apikey: {key}' '{url}/instances/size-templates'",
            f"  API pages: {url.removesuffix('/api/v1')}/docs",
            "",
            "`make down` ends all of it and keeps the data, `make up` starts it again.",
        ]
        for line in lines:
            self.console.print(line, soft_wrap=True)


def _instances(api: Api) -> list[dict[str, Any]]:
    """All instances of the customer, as rows of the list."""
    rows: list[dict[str, Any]] = []
    page = 1
    while True:
        found = api.get(f"instances?limit=100&page={page}")
        rows += found["data"]
        if page >= found["page"]["total_pages"]:
            return rows
        page += 1


def _works(url: str, key: str | None) -> bool:
    """Whether the key opens the API. Raises: ApiError for anything but a wrong key."""
    if not key:
        return False
    with Api(url, key) as api:
        try:
            api.get("account")
        except ApiError as err:
            if err.type == "UNAUTHENTICATED":
                return False
            raise
    return True


def describe_location(info: LabInfo) -> SeedLocation:
    """The lab as an operator would register it."""
    return SeedLocation(
        name="Jakarta 1",
        code="jkt1",
        country="ID",
        engines={
            "hypervisor": Engine("libvirt"),
            "volumes": Engine("local"),
            "fabric": Engine("ovn", {"northbound": info.ovn_nb, "southbound": info.ovn_sb}),
            "nameserver": Engine("rfc2136", info.nameserver.options),
        },
        nodes=[
            SeedNode(
                name=node.name,
                libvirt_uri=node.libvirt_uri,
                ovn_system_id=node.system_id,
                mgmt_ip=node.mgmt_ip,
                cpu_threads_cap=NODE_THREADS,
                memory_mib_cap=NODE_MEMORY_MIB,
                disk_gib_cap=NODE_DISK_GIB,
            )
            for node in info.nodes
        ],
        pools=[
            SeedPool(info.public_v4_cidr, info.public_v4_gateway, info.dns_servers),
            SeedPool(info.public_v6_cidr, info.public_v6_gateway, info.dns_servers),
        ],
        physical_network=info.physical_network,
        prefix_pools=[SeedPrefixPool(info.routed_v6_cidr, info.routed_v6_router)],
    )


def main() -> None:
    """The command line."""
    commands: dict[str, tuple[Callable[[Demo], None], str]] = {
        "up": (Demo.up, "from nothing to a VPS with SSH"),
        "start": (Demo.start, "start again what `down` ended"),
        "down": (Demo.down, "end what was started here, keep data"),
    }
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description="The demo of Awan.")
    choices = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (_, text) in commands.items():
        choices.add_parser(name, help=text)
    command = parser.parse_args().command
    try:
        commands[command][0](Demo())
    except (*EXPECTED, DemoError) as err:
        sys.exit(f"demo: {err}")
    except KeyboardInterrupt:
        sys.exit("demo: stopped; run it again to go on, or `make down`")


if __name__ == "__main__":
    main()
