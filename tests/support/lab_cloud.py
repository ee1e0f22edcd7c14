"""A whole cloud on real engines: a lab slot, and a control plane of its own with real processes.

Guests are created through the HTTP API only, from the small template unless a test asks for another.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from awan.runtime.control_plane import ControlPlane
from lab import Lab, LabInfo, acquire_free_slot
from lab.http_api import Api
from lab.seed_catalogue import (
    Engine,
    SeedLocation,
    SeedNode,
    SeedPool,
    SeedTemplate,
    create_customer_key,
    ensure_customer,
    seed_location,
    seed_template,
)
from lab.templates import TemplateKind, cached

PASSWORD = "Correct-Horse-7"
GENEROUS = 1_000_000


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
    extras: dict[str, Any] = field(default_factory=dict)

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

    def create(self, **changes: Any) -> dict[str, Any]:
        """The answer of a creation that was accepted."""
        answer = self.client.post("/instances", json=self.order(**changes))
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def create_instance(self, **changes: Any) -> dict[str, Any]:
        """A running instance's detail."""
        answer = self.create(**changes)
        ended = self.wait(answer["operation"]["uuid"])
        assert ended["status"] == "succeeded", ended
        return self.show(answer["data"]["uuid"])

    def show(self, uuid: str) -> dict[str, Any]:
        """The detail of an instance."""
        return dict(self.client.get(f"/instances/{uuid}").json()["data"])

    def delete_instance(self, uuid: str, *, remove_ip: bool = True) -> dict[str, Any]:
        """Deletes and waits; the operation."""
        answer = self.client.request(
            "DELETE",
            f"/instances/{uuid}",
            json={"remove_ip": remove_ip, "remove_block_storage": True},
        )
        assert answer.status_code == 202, answer.text
        return self.wait(answer.json()["operation"]["uuid"])

    def delete_all(self) -> None:
        """No instance is left. For the end of a test."""
        for row in self.client.get("/instances?limit=100").json()["data"]["data"]:
            if row["state"] != "terminating":
                self.delete_instance(row["uuid"])
            elif row["active_operation"]:
                self.wait(row["active_operation"]["uuid"])

    def wait(self, operation: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """The operation when it has ended."""
        return until(
            lambda: self._ended(operation), timeout_s, f"operation {operation} has not ended"
        )

    def _ended(self, operation: str) -> dict[str, Any] | None:
        try:
            answer = self.admin.get(f"/operations/{operation}")
        except httpx.TransportError:
            return None
        if answer.status_code != 200:
            return None
        shown = dict(answer.json()["data"])
        return shown if shown["status"] in ("succeeded", "failed", "cancelled") else None

    def wait_ready(self, uuid: str, timeout_s: float = 180.0) -> dict[str, Any]:
        """The instance once its guest was seen to be usable."""

        def ready() -> dict[str, Any] | None:
            shown = self.show(uuid)
            return shown if shown["ready_at"] else None

        return until(ready, timeout_s, f"instance {uuid} is not ready")

    def ssh(
        self, address: str, command: str, *, user: str = "budi", timeout_s: float = 20.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in a guest, with the key that was installed."""
        return subprocess.run(
            [
                *("ssh", "-i", str(self.private_key), "-o", "BatchMode=yes"),
                *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
                *("-o", "ConnectTimeout=5", "-o", "LogLevel=ERROR"),
                f"{user}@{address}",
                command,
            ],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ssh_when_up(
        self, address: str, command: str = "uname -a", timeout_s: float = 180.0
    ) -> str:
        """The command's output, once the guest lets us in."""

        def logged_in() -> str | None:
            try:
                done = self.ssh(address, command)
            except subprocess.TimeoutExpired:
                return None
            return done.stdout if done.returncode == 0 else None

        return until(logged_in, timeout_s, f"no SSH at {address}")

    def worker_pid(self) -> int:
        """The worker's process, waited for when it is just being restarted."""
        return until(
            lambda: self.plane.statuses()["worker"].pid or None, 10, "the worker does not run"
        )

    def kill_worker(self) -> int:
        """kill -9; the supervisor starts it again. The dead one's pid."""
        pid = self.worker_pid()
        os.kill(pid, signal.SIGKILL)
        return pid

    def customer(self, name: str, **quotas: int) -> httpx.Client:
        """A client with the key of another, new account."""
        with Api(self.plane.api_url, self.admin_key) as api:
            uuid = ensure_customer(api, name, **quotas)
            key = create_customer_key(api, uuid, "test")
        return _client(self.plane.api_url, key)


def until(found: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """What `found` gives once it is truthy. Raises: AssertionError `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what} after {timeout_s:.0f} s"
        time.sleep(0.1)
    return value


def _client(api_url: str, key: str) -> httpx.Client:
    return httpx.Client(
        base_url=api_url, headers={"x-apikey": key}, timeout=60, trust_env=False
    )


def start(directory: Path, report: Callable[[str, float], None]) -> LabCloud:
    """Brings up a slot and a control plane of its own, and fills it. End it with `stop`."""
    directory.mkdir(parents=True, exist_ok=True)
    lab = Lab(acquire_free_slot(first=1))
    plane = ControlPlane(directory / "state")
    try:
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
            "AWAN_WORKER_LEASE_S": "3",
            "AWAN_STOP_GRACE_S": "10",
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
    """The keys of the tests may call as often as they like; limits are columns of the key."""
    import psycopg

    with psycopg.connect(plane.environment()["AWAN_DATABASE_URL"]) as connection:
        connection.execute(
            "UPDATE api_key SET reads_per_minute = %s, writes_per_minute = %s",
            [GENEROUS, GENEROUS],
        )


def stop(cloud: LabCloud) -> None:
    """Ends the control plane and the slot, and removes their files."""
    cloud.client.close()
    cloud.admin.close()
    _end(cloud.lab, cloud.plane, cloud.directory)


def _end(lab: Lab, plane: ControlPlane, directory: Path) -> None:
    plane.down()
    lab.down()
    shutil.rmtree(plane.place.data_dir.parent, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)
