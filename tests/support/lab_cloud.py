"""A whole cloud on real engines: a lab slot, and a control plane of its own with real processes.

Guests are created through the HTTP API only, from the small template unless a test asks for another.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
import psycopg
import pytest

from awan.runtime.control_plane import ControlPlane
from lab import Lab, LabInfo, acquire_free_slot
from lab.http_api import Api
from lab.processes import start_ticks
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
from lab.templates import TemplateKind, cached
from tests.support import lab_inspection

PASSWORD = "Correct-Horse-7"
GENEROUS = 1_000_000
STATE_ROOT = Path("/var/lib/awan")
OWNER_FILE = "owner"
STOP_GRACE_S = 30
LEASE_S = 3
FINAL = ("succeeded", "failed", "cancelled")
UNUSED_ADDRESS = "free"


@dataclass
class LabCloud:
    """What the lab tests work with. `client` has a customer's key, `admin` the operator's."""

    lab: Lab
    info: LabInfo
    plane: ControlPlane
    directory: Path
    client: httpx.Client
    admin: httpx.Client
    admin_key: str
    location_id: int
    tier_id: int
    templates: dict[str, int]
    private_key: Path
    ssh_key_id: int
    account_uuid: str
    tenants: list[httpx.Client] = field(default_factory=list)

    def order(self, template: TemplateKind = "tiny-1", **changes: Any) -> dict[str, Any]:
        """A valid body of create, with `changes`; None removes a field."""
        body: dict[str, Any] = {
            "location_id": self.location_id,
            "tier_id": self.tier_id,
            "template_id": self.template_id(template),
            "hostname": f"vm-{uuid4().hex[:8]}",
            "cpu": 1,
            "memory": 1,
            "storage": 20,
            "username": "budi",
            "password": PASSWORD,
            "use_public_ip": True,
            "ssh_keys": [str(self.ssh_key_id)],
        }
        body.update(changes)
        return {name: value for name, value in body.items() if value is not None}

    def template_id(self, kind: TemplateKind) -> int:
        """The template's id; built and imported at the first use."""
        if kind not in self.templates:
            self.templates[kind] = import_template(self.admin_key, self.plane, self.directory, kind)
        return self.templates[kind]

    def create(self, client: httpx.Client | None = None, **changes: Any) -> dict[str, Any]:
        """The answer of a creation that was accepted. `client`: another customer's."""
        order = self.order(**changes)
        if client is not None:
            # Keys belong to one account.
            order.pop("ssh_keys", None)
            order["ssh_keys"] = [str(self.upload_key(client))]
        answer = (client or self.client).post("/instances", json=order)
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def create_instance(self, client: httpx.Client | None = None, **changes: Any) -> dict[str, Any]:
        """A running instance's detail."""
        answer = self.create(client, **changes)
        ended = self.wait(answer["operation"]["uuid"])
        assert ended["status"] == "succeeded", ended
        return self.show(answer["data"]["uuid"], client)

    def show(self, uuid: str, client: httpx.Client | None = None) -> dict[str, Any]:
        """The detail of an instance."""
        answer = (client or self.client).get(f"/instances/{uuid}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["data"])

    def is_gone(self, uuid: str) -> bool:
        """Whether the API does not know the instance any more."""
        return self.client.get(f"/instances/{uuid}").status_code == 404

    def change(self, uuid: str, verb: str, **body: Any) -> dict[str, Any]:
        """A start, stop or restart that succeeded: its operation."""
        answer = self.client.post(f"/instances/{uuid}/{verb}", json=body)
        assert answer.status_code == 202, answer.text
        ended = self.wait(answer.json()["operation"]["uuid"])
        assert ended["status"] == "succeeded", ended
        return ended

    def delete(
        self, uuid: str, *, remove_ip: bool = True, client: httpx.Client | None = None
    ) -> str:
        """Asks for a deletion; the operation's uuid."""
        answer = (client or self.client).request(
            "DELETE",
            f"/instances/{uuid}",
            json={"remove_ip": remove_ip, "remove_block_storage": True},
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["operation"]["uuid"])

    def delete_instance(
        self, uuid: str, *, remove_ip: bool = True, client: httpx.Client | None = None
    ) -> dict[str, Any]:
        """Deletes and waits; the operation."""
        return self.wait(self.delete(uuid, remove_ip=remove_ip, client=client))

    def delete_all(self) -> None:
        """No customer has an instance, a network or an address. For the end of a test."""
        for client in (self.client, *self.tenants):
            for row in client.get("/instances?limit=100").json()["data"]["data"]:
                if row["state"] == "terminating" and row["active_operation"]:
                    self.wait(row["active_operation"]["uuid"])
                else:
                    ended = self.delete_instance(row["uuid"], client=client)
                    assert ended["status"] == "succeeded", ended
            for row in client.get("/networks/private").json()["data"]:
                gone = client.delete(f"/networks/private/{row['uuid']}")
                assert self.wait(gone.json()["operation"]["uuid"])["status"] == "succeeded"
            for row in client.get("/networks/public?limit=100").json()["data"]["data"]:
                answer = client.delete(f"/networks/public/{row['uuid']}")
                assert answer.is_success or answer.status_code == 404, answer.text

    def wait(self, operation: str, timeout_s: float = 180.0) -> dict[str, Any]:
        """The operation when it has ended."""
        return until(
            lambda: self._ended(operation), timeout_s, f"operation {operation} has not ended"
        )

    def operation(self, uuid: str) -> dict[str, Any] | None:
        """The operation as it is; None while the API cannot say."""
        try:
            answer = self.admin.get(f"/operations/{uuid}")
        except httpx.TransportError:
            return None
        return dict(answer.json()["data"]) if answer.status_code == 200 else None

    def _ended(self, operation: str) -> dict[str, Any] | None:
        shown = self.operation(operation)
        return shown if shown is not None and shown["status"] in FINAL else None

    def wait_ready(self, uuid: str, timeout_s: float = 300.0) -> dict[str, Any]:
        """The instance once its guest was seen to be usable."""

        def ready() -> dict[str, Any] | None:
            shown = self.show(uuid)
            return shown if shown["ready_at"] else None

        return until(ready, timeout_s, f"instance {uuid} is not ready")

    def ssh(
        self,
        address: str,
        command: str,
        *,
        user: str = "budi",
        password: str | None = None,
        stdin: str | None = None,
        via: str | None = None,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in a guest, logged in with the key that was installed, or with the password alone.

        `via` is another guest through which this one is reached; there the key is used in any case.
        """
        environment = {"PATH": os.environ["PATH"]}
        if password is None:
            login = ["-i", str(self.private_key), "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
        else:
            login = [
                *("-o", "PubkeyAuthentication=no", "-o", "NumberOfPasswordPrompts=1"),
                *("-o", "PreferredAuthentications=password,keyboard-interactive"),
            ]
            # ssh asks a program instead of a terminal; the password is in its environment.
            environment |= {
                "SSH_ASKPASS": str(self._askpass()),
                "SSH_ASKPASS_REQUIRE": "force",
                "AWAN_GUEST_PASSWORD": password,
            }
        options = [
            *("-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR"),
        ]
        if via is not None:
            hop = ["ssh", *options, "-i", str(self.private_key), "-o", "BatchMode=yes"]
            login += [
                "-o",
                f"ProxyCommand={shlex.join([*hop, '-W', f'{address}:22', f'budi@{via}'])}",
            ]
        return subprocess.run(
            [
                *("ssh", *options, *login),
                f"{user}@{address}",
                command,
            ],
            capture_output=True,
            text=True,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            timeout=timeout_s,
            env=environment,
            check=False,
        )

    def _askpass(self) -> Path:
        program = self.directory / "askpass"
        if not program.exists():
            program.write_text("#!/bin/sh\nprintf '%s\\n' \"$AWAN_GUEST_PASSWORD\"\n")
            program.chmod(0o700)
        return program

    def ssh_when_up(
        self, address: str, command: str = "uname -a", *, timeout_s: float = 300.0, **login: Any
    ) -> str:
        """The command's output, once the guest lets us in and the command succeeds."""

        def logged_in() -> subprocess.CompletedProcess[str] | None:
            try:
                done = self.ssh(address, command, **login)
            except subprocess.TimeoutExpired:
                return None
            return done if done.returncode == 0 else None

        return until(logged_in, timeout_s, f"no SSH at {address}").stdout

    def worker_pid(self) -> int:
        """The worker's process, waited for when it is just being restarted."""
        return until(
            lambda: self.plane.statuses()["worker"].pid or None, 20, "the worker does not run"
        )

    def kill_worker(self) -> int:
        """kill -9; the supervisor starts it again. The dead one's pid."""
        pid = self.worker_pid()
        os.kill(pid, signal.SIGKILL)
        return pid

    @contextlib.contextmanager
    def second_worker(self, name: str = "worker-2") -> Iterator[subprocess.Popen[bytes]]:
        """Another worker process beside the supervised one; its log is `<name>.log` among the others."""
        environment = {
            **_foreign_environment(),
            **self.plane.environment(),
            "AWAN_WORKER_ID": name,
            "AWAN_ENV_FILE": str(self.plane.runtime_file),
        }
        with (self.plane.log_dir / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "awan.runtime.process", "worker"],
                env=environment,
                cwd="/",
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A connection to the control plane's database."""
        url = self.plane.environment()["AWAN_DATABASE_URL"]
        return psycopg.connect(url, connect_timeout=5)

    def query(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of the control plane's database."""
        with self.connect() as connection:
            return connection.execute(statement.encode(), parameters).fetchall()

    def customer(self, name: str, **quotas: int) -> httpx.Client:
        """A client with the key of another, new account; its instances are removed with ours."""
        with Api(self.plane.api_url, self.admin_key) as api:
            uuid = ensure_customer(api, name, **quotas)
            body = {
                "name": "test",
                "reads_per_minute": GENEROUS,
                "writes_per_minute": GENEROUS,
            }
            key = str(api.post(f"admin/accounts/{uuid}/api-keys", body)["key"])
        client = _client(self.plane.api_url, key)
        self.tenants.append(client)
        return client

    def upload_key(self, client: httpx.Client) -> int:
        """The id of our SSH key in a customer's account; stored at the first use."""
        for row in client.get("/ssh-keys").json()["data"]:
            if row["title"] == "lab":
                return int(row["id"])
        public = self.private_key.with_suffix(".pub").read_text()
        stored = client.post("/ssh-keys", json={"title": "lab", "key": public})
        assert stored.status_code == 201, stored.text
        return int(stored.json()["data"]["id"])

    def audit(self) -> list[str]:
        """The findings of an audit, a sentence each; none when all is well."""
        answer = self.admin.post("/admin/audit")
        assert answer.is_success, answer.text
        ended = self.wait(answer.json()["operation"]["uuid"])
        assert ended["status"] == "succeeded", ended
        shown = self.admin.get(f"/admin/audit/{answer.json()['data']['uuid']}").json()["data"]
        assert shown["is_green"] == (not shown["findings"])
        return [f"{it['kind']}: {it['sentence']}" for it in shown["findings"]]

    def assert_green(self, settle_s: float = 20.0) -> None:
        """The audit finds nothing. What is only late (a chassis of a busy machine) may come within `settle_s`."""
        deadline = time.monotonic() + settle_s
        while findings := self.audit():
            assert time.monotonic() < deadline, "\n".join(findings)
            time.sleep(0.5)

    def assert_nothing_left(self) -> None:
        """Neither engine holds anything of an instance, on any node."""
        left = lab_inspection.read_holdings(self.lab)
        assert not left, left

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """Inside, nobody watches nodes and locations: what is planted by hand is not put right.

        The leases are taken by nobody's worker; whoever has held one lets go at its next beat, after its round.
        """
        self.query(
            "UPDATE watch_lease SET executor_id = 'nobody', leased_until = now() + interval '1 h'"
            " RETURNING subject"
        )
        time.sleep(2 * LEASE_S)
        try:
            yield
        finally:
            self.query(
                "UPDATE watch_lease SET executor_id = NULL, leased_until = now() - interval '1 s'"
                " RETURNING subject"
            )

    def node_of(self, uuid: str) -> dict[str, Any]:
        """The node of an instance, as the operator sees it."""
        ((node_id,),) = self.query("SELECT node_id FROM instance WHERE instance_id = %s", uuid)
        return dict(self.admin.get(f"/admin/nodes/{node_id}").json()["data"])

    def heal(self) -> None:
        """What of the lab has died runs again."""
        self.lab.up()


T = TypeVar("T")


def until(found: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """What `found` gives once it is truthy. Raises: AssertionError `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what} after {timeout_s:.0f} s"
        time.sleep(0.1)
    return value


def shared(config: pytest.Config) -> LabCloud:
    """The one cloud of a test run, whichever suite asks for it first. Ended by `stop_shared`."""
    found = config.stash.get(SHARED, None)
    if isinstance(found, BaseException):
        # Every further test fails at once instead of waiting for the same failure.
        raise RuntimeError("the lab's cloud did not start") from found
    if found is None:
        if os.geteuid() != 0:
            pytest.skip("the lab needs root")
        STATE_ROOT.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="test-", dir=STATE_ROOT))
        directory.chmod(0o711)
        try:
            found = start(directory, lambda step, seconds: None)
        except BaseException as err:
            config.stash[SHARED] = err
            raise
        config.stash[SHARED] = found
    return found


def stop_shared(config: pytest.Config) -> None:
    """Ends the run's cloud. Ended already, or never started: no effect."""
    found = config.stash.get(SHARED, None)
    if isinstance(found, LabCloud):
        del config.stash[SHARED]
        stop(found)


SHARED = pytest.StashKey[LabCloud | BaseException]()


def _foreign_environment() -> dict[str, str]:
    """This process's environment without the settings of its own tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWAN_")}


@contextlib.contextmanager
def _without_own_settings() -> Iterator[None]:
    """Inside, a control plane that is started does not take over this process's database and directories."""
    own = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AWAN_")}
    try:
        yield
    finally:
        os.environ.update(own)


def _client(api_url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=api_url, headers={"x-apikey": key}, timeout=60, trust_env=False)


def start(directory: Path, report: Callable[[str, float], None]) -> LabCloud:
    """Brings up a slot and a control plane of its own, and fills it. End it with `stop`."""
    directory.mkdir(parents=True, exist_ok=True)
    _end_abandoned(directory.parent)
    (directory / OWNER_FILE).write_text(f"{os.getpid()} {start_ticks(os.getpid())}")
    lab = Lab(acquire_free_slot(first=1))
    plane = ControlPlane(directory / "state")
    try:
        with _without_own_settings():
            return _fill(directory, lab, plane, report)
    except BaseException:
        _end(lab, plane, directory)
        raise


def _fill(
    directory: Path, lab: Lab, plane: ControlPlane, report: Callable[[str, float], None]
) -> LabCloud:
    info = lab.up(report)
    plane.up(
        report,
        {
            "AWAN_WORKER_LEASE_S": str(LEASE_S),
            "AWAN_RECONCILE_INTERVAL_S": "5",
            "AWAN_RECONCILE_FILES_INTERVAL_S": "10",
            "AWAN_STOP_GRACE_S": str(STOP_GRACE_S),
            "AWAN_RDNS_RESOLVERS": json.dumps([info.nameserver.server]),
            "AWAN_LISTEN_PORT": str(18080 + info.slot),
        },
    )
    printed = plane.run_command("init")
    found = re.search(r"awan_[A-Za-z0-9]+_[A-Za-z0-9]+", printed)
    assert found, f"awan init printed no key: {printed}"
    admin_key = found.group()
    with Api(plane.api_url, admin_key) as api:
        location_id = seed_location(api, lab_location(info))
        tier_id = int(api.get("admin/tiers")[0]["id"])
        account = ensure_customer(api, "Lab customer")
        key = create_customer_key(api, account, "lab")
    lift_rate_limits(plane)
    tiny = import_template(admin_key, plane, directory, "tiny-1")
    private_key = directory / "id_ed25519"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(private_key)],
        check=True,
    )
    client = _client(plane.api_url, key)
    stored = client.post(
        "/ssh-keys",
        json={"title": "lab", "key": private_key.with_suffix(".pub").read_text()},
    )
    assert stored.status_code == 201, stored.text
    return LabCloud(
        lab=lab,
        info=info,
        plane=plane,
        directory=directory,
        client=client,
        admin=_client(plane.api_url, admin_key),
        admin_key=admin_key,
        location_id=location_id,
        tier_id=tier_id,
        templates={"tiny-1": tiny},
        private_key=private_key,
        ssh_key_id=stored.json()["data"]["id"],
        account_uuid=account,
    )


def lab_location(info: LabInfo) -> SeedLocation:
    """The lab's slot as a location."""
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
                memory_mib_cap=6144,
                disk_gib_cap=100,
            )
            for node in info.nodes
        ],
        pools=[
            SeedPool(info.public_v4_cidr, info.public_v4_gateway, info.dns_servers),
            SeedPool(info.public_v6_cidr, info.public_v6_gateway),
        ],
        physical_network=info.physical_network,
        prefix_pools=[SeedPrefixPool(info.routed_v6_cidr, info.routed_v6_router)],
    )


def import_template(
    admin_key: str, plane: ControlPlane, directory: Path, kind: TemplateKind
) -> int:
    """Uploads a cached build through the operator's API."""
    file = cached(kind, lambda _: None)
    with Api(plane.api_url, admin_key) as api:
        return seed_template(
            api,
            SeedTemplate(
                name=file.name,
                version=file.version,
                family="linux",
                default_username=file.default_username,
                min_memory_mib=file.min_memory_mib,
                min_storage_gib=file.min_storage_gib,
                has_agent=file.has_agent,
                path=file.path,
                identity=file.sha256,
            ),
            directory / "uploads.json",
        )


def lift_rate_limits(plane: ControlPlane) -> None:
    """The keys made so far may call as often as they like; limits are columns of the key."""
    with psycopg.connect(plane.environment()["AWAN_DATABASE_URL"]) as connection:
        connection.execute(
            "UPDATE api_key SET reads_per_minute = %s, writes_per_minute = %s",
            [GENEROUS, GENEROUS],
        )


def stop(cloud: LabCloud) -> None:
    """Ends the control plane and the slot, and removes their files."""
    for client in (cloud.client, cloud.admin, *cloud.tenants):
        client.close()
    _end(cloud.lab, cloud.plane, cloud.directory)


def _end(lab: Lab, plane: ControlPlane, directory: Path) -> None:
    plane.down()
    lab.down()
    _remove_files(plane, directory)


def _remove_files(plane: ControlPlane, directory: Path) -> None:
    # Where an unprivileged server cannot reach the state directory, its data lie elsewhere.
    for path in (plane.place.data_dir.parent, directory):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        directory.parent.rmdir()


def _end_abandoned(root: Path) -> None:
    """Ends control planes of runs that were killed. Their lab slots end when they are next acquired."""
    for owner in root.glob(f"*/{OWNER_FILE}"):
        pid, ticks = owner.read_text().split()
        if start_ticks(int(pid)) != int(ticks):
            plane = ControlPlane(owner.parent / "state")
            plane.down()
            _remove_files(plane, owner.parent)
