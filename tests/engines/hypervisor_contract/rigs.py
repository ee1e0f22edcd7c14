"""What the hypervisor's contract suite runs on: simulated nodes, and the nodes of a lab location.

A `Rig` is one hypervisor engine with a node, disks to start domains from, and a hand for what happens outside the
engine's control: a QEMU that dies, a guest that shuts itself down.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID, uuid4

from awan.engines.hypervisor import (
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

    def deafen(self, instance_id: UUID) -> None:
        """The guest does not hear the power button (a machine without an operating system never does)."""
        ...


class FakeRig:
    def __init__(self, store: SimStore) -> None:
        self.fake = FakeHypervisor(store, boot_s=0.1)
        self.hypervisor: Hypervisor = self.fake
        self.volumes: Volumes = FakeVolumes(store)
        self.node = NodeEndpoint(uuid4(), "sim-n1", "fake:///sim-n1")

    def crash(self, instance_id: UUID) -> None:
        self.fake.crash(self.node, instance_id)

    def shut_down_from_inside(self, instance_id: UUID) -> None:
        self.fake.shut_down_from_inside(self.node, instance_id)

    def deafen(self, instance_id: UUID) -> None:
        self.fake.set_guest(self.node, instance_id, hears_power=False)


class LabRig:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.nodes = LibvirtNodes()
        self.hypervisor: Hypervisor = LibvirtHypervisor(self.nodes, pool_name=POOL_NAME)
        self.volumes: Volumes = LocalVolumes(self.nodes, pool_name=POOL_NAME, pool_path=POOL_PATH)
        self.node = self.endpoint(0)

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

    def deafen(self, instance_id: UUID) -> None:
        """Domains of `blank_spec` have no system that could hear."""

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

    def is_quiet(self, duration_s: float = 0.3) -> bool:
        time.sleep(duration_s)
        return self._queue.empty()
