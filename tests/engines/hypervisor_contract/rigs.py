"""What the hypervisor's contract suite runs on: simulated nodes, and the nodes of a lab location.

A `Rig` is one hypervisor engine with a node, disks to start domains from, and a hand for what happens outside the
engine's control: a QEMU that dies, a guest that shuts itself down.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import queue
import signal
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID, uuid4

from awan.engines.hypervisor import (
    ConsoleEndpoint,
    DiskSpec,
    DomainEvent,
    DomainSpec,
    GuestSign,
    Hypervisor,
    NicSpec,
    NodeEndpoint,
    Power,
    StopOutcome,
)
from awan.engines.hypervisor.fake import FakeHypervisor
from awan.engines.hypervisor.libvirt import LibvirtHypervisor
from awan.engines.libvirt_nodes import LibvirtNodes
from awan.engines.rfb import open_node
from awan.engines.seed import SeedNic, SeedSpec, render_seed
from awan.engines.sim import SimStore
from awan.engines.volumes import ImageSource, Volumes
from awan.engines.volumes.fake import FakeVolumes
from awan.engines.volumes.local import LocalVolumes
from lab.location import Lab

POOL_NAME = "awan"
POOL_PATH = "/var/lib/libvirt/images/awan"
MEMORY_MIB = 192
BOOT_TIMEOUT_S = 90.0


class Rig(Protocol):
    """What the contract's tests need besides the engine."""

    hypervisor: Hypervisor
    volumes: Volumes
    node: NodeEndpoint

    def crash(self, instance_id: UUID) -> None:
        """The domain's QEMU dies at once."""
        ...

    def shut_down_from_inside(self, instance_id: UUID) -> None:
        """Somebody in the booted guest shuts it down."""
        ...

    def undefine(self, instance_id: UUID) -> None:
        """Somebody removes the domain's definition by hand."""
        ...

    def pause(self, instance_id: UUID) -> None:
        """Somebody pauses the domain by hand."""
        ...

    def deafen(self, instance_id: UUID) -> None:
        """The guest does not hear the power button (a machine without an operating system never does)."""
        ...

    def silence(self, instance_id: UUID) -> None:
        """No agent answers in the guest (in a machine without an operating system there is none)."""
        ...

    def clutch_nics(self, instance_id: UUID) -> None:
        """The guest lets go of no network card (a machine without an operating system never does)."""
        ...

    def hostname_in_guest(self, instance_id: UUID) -> str:
        """The name that the booted guest has now, its first label."""
        ...

    def has_password(self, instance_id: UUID, username: str, password_hash: str) -> bool:
        """Whether the account in the booted guest has this hash."""
        ...

    def make_disobedient(self, instance_id: UUID) -> None:
        """The booted guest's agent answers, and cannot set passwords any more."""
        ...

    def print_from_kernel(self, instance_id: UUID, line: str) -> None:
        """The booted guest's kernel prints a line on its consoles."""
        ...


class FakeRig:
    def __init__(self, store: SimStore) -> None:
        self.store = store
        self.fake = FakeHypervisor(store, boot_s=0.1)
        self.hypervisor: Hypervisor = self.fake
        self.volumes: Volumes = FakeVolumes(store)
        self.node = NodeEndpoint(uuid4(), "sim-n1", "fake:///sim-n1")

    def crash(self, instance_id: UUID) -> None:
        self.fake.crash(self.node, instance_id)

    def shut_down_from_inside(self, instance_id: UUID) -> None:
        self.fake.shut_down_from_inside(self.node, instance_id)

    def undefine(self, instance_id: UUID) -> None:
        self.fake.undefine(self.node, instance_id)

    def pause(self, instance_id: UUID) -> None:
        self.fake.pause(self.node, instance_id, "paused")

    def deafen(self, instance_id: UUID) -> None:
        self.fake.set_guest(self.node, instance_id, hears_power=False)

    def silence(self, instance_id: UUID) -> None:
        self.fake.set_guest(self.node, instance_id, sign="none")

    def clutch_nics(self, instance_id: UUID) -> None:
        self.fake.set_holds_nics(self.node, instance_id, True)

    def hostname_in_guest(self, instance_id: UUID) -> str:
        return str(self._guest(instance_id)["hostname"]).partition(".")[0]

    def has_password(self, instance_id: UUID, username: str, password_hash: str) -> bool:
        row = self._guest(instance_id)
        digest = hashlib.sha256(password_hash.encode()).hexdigest()
        return (row["username"], row["password_digest"]) == (username, digest)

    def make_disobedient(self, instance_id: UUID) -> None:
        self.fake.set_guest_obedient(self.node, instance_id, False)

    def print_from_kernel(self, instance_id: UUID, line: str) -> None:
        self.fake.print_serial(instance_id, f"[    9.000000] {line}\r\n".encode())

    def _guest(self, instance_id: UUID) -> dict[str, Any]:
        query = "SELECT * FROM sim.guest WHERE uuid = %s"
        row = self.store.find_one(query, [instance_id])
        assert row is not None
        return row


class LabRig:
    def __init__(self, lab: Lab, number: int = 0) -> None:
        self.lab = lab
        self.nodes = LibvirtNodes()
        self.hypervisor: Hypervisor = LibvirtHypervisor(self.nodes, pool_name=POOL_NAME)
        self.volumes: Volumes = LocalVolumes(self.nodes, pool_name=POOL_NAME, pool_path=POOL_PATH)
        self.node = self.endpoint(number)

    def endpoint(self, number: int) -> NodeEndpoint:
        found = self.lab.info.nodes[number]
        return NodeEndpoint(uuid4(), found.name, found.libvirt_uri, UUID(found.host_uuid))

    def on_domain(self, instance_id: UUID, fn: Callable[[Any], Any]) -> Any:
        """Calls `fn` with the domain's libvirt object."""
        return self.nodes.call(
            self.node, "test", lambda conn: fn(conn.lookupByUUID(instance_id.bytes)), timeout_s=30
        )

    def qemu_pid(self, instance_id: UUID) -> int:
        """The QEMU of the domain, as the machine that runs the lab numbers it."""
        name = f"guest=awan-{instance_id}".encode()
        for folder in list(Path("/proc").iterdir()):
            if folder.name.isdecimal() and name in _read(folder / "cmdline"):
                return int(folder.name)
        raise AssertionError(f"no QEMU of {instance_id}")

    def crash(self, instance_id: UUID) -> None:
        os.kill(self.qemu_pid(instance_id), signal.SIGKILL)

    def shut_down_from_inside(self, instance_id: UUID) -> None:
        self.ask_agent(instance_id, "guest-exec", path="/usr/sbin/poweroff")

    def undefine(self, instance_id: UUID) -> None:
        self.on_domain(instance_id, lambda domain: domain.undefine())

    def pause(self, instance_id: UUID) -> None:
        self.on_domain(instance_id, lambda domain: domain.suspend())

    def deafen(self, instance_id: UUID) -> None:
        """Domains of `blank_spec` have no system that could hear."""

    def silence(self, instance_id: UUID) -> None:
        """Domains of `blank_spec` have no agent."""

    def clutch_nics(self, instance_id: UUID) -> None:
        """Domains of `blank_spec` have no system that could let go."""

    def hostname_in_guest(self, instance_id: UUID) -> str:
        known, kept = self.run(instance_id, "hostname; cat /etc/hostname").split()
        assert known == kept
        return known

    def has_password(self, instance_id: UUID, username: str, password_hash: str) -> bool:
        line = self.run(instance_id, f"grep ^{username}: /etc/shadow")
        return line.split(":")[1] == password_hash

    def make_disobedient(self, instance_id: UUID) -> None:
        self.run(instance_id, "rm /usr/sbin/chpasswd")

    def print_from_kernel(self, instance_id: UUID, line: str) -> None:
        self.run(instance_id, f"echo '<2>{line}' >/dev/kmsg")

    def run(self, instance_id: UUID, command: str) -> str:
        """The output of a command in the guest, which must succeed."""
        started = self.ask_agent(
            instance_id,
            "guest-exec",
            path="/bin/sh",
            arg=["-c", command],
            **{"capture-output": True},
        )
        for _ in range(200):
            status = self.ask_agent(instance_id, "guest-exec-status", pid=started["pid"])
            if status["exited"]:
                assert status["exitcode"] == 0, status
                return base64.b64decode(status.get("out-data", "")).decode()
            time.sleep(0.05)
        raise AssertionError(f"{command} does not end")

    def ask_agent(self, instance_id: UUID, command: str, **arguments: Any) -> Any:
        import libvirt_qemu

        text = json.dumps({"execute": command, "arguments": arguments})
        answer = self.on_domain(
            instance_id, lambda domain: libvirt_qemu.qemuAgentCommand(domain, text, 10, 0)
        )
        return json.loads(answer)["return"]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def restart(rig: Rig, instance_id: UUID, *, grace_s: float, force: bool = False) -> StopOutcome:
    """Stops and starts: QEMU is a new process, so a changed definition takes effect. How the stop ended."""
    outcome = rig.hypervisor.ensure_stopped(rig.node, instance_id, grace_s=grace_s, force=force)
    rig.hypervisor.ensure_running(rig.node, instance_id)
    return outcome


def open_screen(
    endpoint: ConsoleEndpoint, password: str, tls: ssl.SSLContext | None = None
) -> tuple[int, int]:
    """Width and height of a screen, read over a new connection. Raises: as `open_node`."""

    async def look() -> tuple[int, int]:
        async with asyncio.timeout(20):
            stream = await open_node(endpoint, password, tls)
            try:
                await stream.write(b"\1")
                width, height = struct.unpack(">HH", await stream.read_exactly(4))
                return width, height
            finally:
                await stream.close()

    return asyncio.run(look())


def remove_all(rig: Rig) -> None:
    for facts in rig.hypervisor.list_domains(rig.node):
        rig.hypervisor.ensure_absent(rig.node, facts.domain_uuid)
    for volume in rig.volumes.list_volumes(rig.node):
        if volume.volume_id is not None and volume.kind == "volume":
            rig.volumes.delete(rig.node, volume.volume_id)


def make_spec(instance_id: UUID, disks: tuple[DiskSpec, ...], **changes: Any) -> DomainSpec:
    spec = DomainSpec(
        instance_id=instance_id,
        operation_id=uuid4(),
        account_id=uuid4(),
        title="web-1",
        vcpus=1,
        vcpus_max=4,
        memory_mib=MEMORY_MIB,
        memory_max_mib=1024,
        dedicated=False,
        cpu_shares=1024,
        disks=disks,
        nics=(NicSpec(uuid4(), "52:54:00:00:00:01"),),
    )
    return replace(spec, **changes)


def build_blank(rig: Rig, **changes: Any) -> DomainSpec:
    instance_id = uuid4()
    disk = rig.volumes.create_blank(rig.node, instance_id, 1)
    seed = rig.volumes.ensure_seed(rig.node, instance_id, 1, b"\0" * 65536)
    disks = (
        DiskSpec(disk.path, disk.format, 0, "root", backing=disk.backing),
        DiskSpec(seed.path, "raw", 1, "seed", device="cdrom"),
    )
    return make_spec(instance_id, disks, **changes)


def boot_tiny(rig: Rig, image: ImageSource, **changes: Any) -> DomainSpec:
    instance_id = uuid4()
    rig.volumes.ensure_image(rig.node, image)
    root = rig.volumes.create_from_image(rig.node, instance_id, image, 1)
    nic = NicSpec(uuid4(), "52:54:00:00:00:01")
    seed = SeedSpec(
        instance_id=instance_id,
        hostname="guest",
        username="awan",
        password_hash=None,
        ssh_keys=(),
        nics=(SeedNic(nic.mac, has_ipv4=True, has_ipv6=False),),
    )
    cd = rig.volumes.ensure_seed(rig.node, instance_id, 1, render_seed(seed))
    disks = (
        DiskSpec(root.path, root.format, 0, "root", backing=root.backing),
        DiskSpec(cd.path, "raw", 1, "seed", device="cdrom"),
    )
    spec = make_spec(instance_id, disks, nics=(nic,), **changes)
    rig.hypervisor.ensure_defined(rig.node, spec)
    rig.hypervisor.ensure_running(rig.node, instance_id)
    wait_for_agent(rig, instance_id)
    return spec


def wait_for_agent(rig: Rig, instance_id: UUID) -> None:
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while rig.hypervisor.guest_sign(rig.node, instance_id) != GuestSign.AGENT:
        assert time.monotonic() < deadline, "the guest's agent does not answer"
        time.sleep(0.1)


class Events:
    """Collects what a node announces of one domain."""

    def __init__(self, instance_id: UUID) -> None:
        self._instance_id = instance_id
        self._queue: queue.Queue[DomainEvent] = queue.Queue()

    def put(self, event: DomainEvent) -> None:
        if event.domain_uuid == self._instance_id:
            self._queue.put(event)

    def next(self, timeout_s: float = 15.0) -> tuple[Power, str]:
        event = self._queue.get(timeout=timeout_s)
        return event.power, event.detail

    def next_after_start(self) -> tuple[Power, str]:
        """The next one, for a domain started before: the word of that start may come late."""
        found = self.next()
        return self.next() if found[0] == Power.RUNNING else found

    def is_quiet(self, duration_s: float = 0.3) -> bool:
        time.sleep(duration_s)
        return self._queue.empty()
