"""What only real nodes can show: libvirt, QEMU and its guests when things go wrong, and what a domain is born with."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import libvirt
import pytest
from lxml import etree

from awan.engines.hypervisor import (
    COUNTERS_TIMEOUT_S,
    DomainCounters,
    DomainSpec,
    GuestSign,
    NicSpec,
    Power,
    StopOutcome,
)
from awan.engines.libvirt_nodes import KEEPALIVE_COUNT, KEEPALIVE_INTERVAL_S
from awan.engines.volumes import ImageSource
from awan.errors import EngineError, EngineUnavailable
from tests.engines.hypervisor_contract.rigs import (
    Events,
    LabRig,
    boot_tiny,
    build_blank,
    restart,
    wait_for_agent,
)

pytestmark = pytest.mark.lab

LIVE_AND_CONFIG = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG
KEEPALIVE_S = KEEPALIVE_INTERVAL_S * (KEEPALIVE_COUNT + 1)


@pytest.fixture
def blank(lab_rig: LabRig) -> DomainSpec:
    """A running domain without a system in it."""
    return start_blank(lab_rig)


def start_blank(rig: LabRig, **changes: Any) -> DomainSpec:
    spec = build_blank(rig, **changes)
    rig.hypervisor.ensure_defined(rig.node, spec)
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    return spec


def daemon_pid(rig: LabRig) -> int:
    """libvirtd of the rig's node, as the machine that runs the lab numbers it."""
    processes = rig.lab.status().processes
    return next(found.pid for found in processes if found.name == f"{rig.node.name}.libvirtd")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def addresses(xml: str) -> list[tuple[str, str]]:
    """Where each device sits in its guest."""
    devices = etree.fromstring(xml).find("devices")
    assert devices is not None
    found = []
    for device in devices:
        address = device.find("address")
        if address is not None:
            found.append((device.tag, str(sorted(address.attrib.items()))))
    return sorted(found)


def test_qemu_is_unprivileged_and_filtered(lab_rig: LabRig, blank: DomainSpec) -> None:
    status = Path(f"/proc/{lab_rig.qemu_pid(blank.instance_id)}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    user = int(lab_rig.lab.node_exec(lab_rig.node.name, ["id", "-u", "libvirt-qemu"]).stdout)
    assert fields["Uid"].split() == [str(user)] * 4
    assert fields["Seccomp"].strip() == "2"
    assert int(fields["CapEff"], 16) == 0


def test_libvirt_takes_the_definition_as_it_is(lab_rig: LabRig) -> None:
    """Valid by its schema, and the guest's devices stay where they are when it is defined again."""
    spec = build_blank(lab_rig)
    lab_rig.hypervisor.ensure_defined(lab_rig.node, spec)
    inactive = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE

    def read(domain: Any) -> str:
        return str(domain.XMLDesc(inactive))

    first = lab_rig.on_domain(spec.instance_id, read)
    lab_rig.on_domain(
        spec.instance_id,
        lambda domain: domain.connect().defineXMLFlags(first, libvirt.VIR_DOMAIN_DEFINE_VALIDATE),
    )
    more = replace(spec, nics=(*spec.nics, NicSpec(uuid4(), "52:54:00:00:00:02")))
    lab_rig.hypervisor.ensure_defined(lab_rig.node, more)
    second = lab_rig.on_domain(spec.instance_id, read)
    assert set(addresses(first)) <= set(addresses(second))
    assert etree.fromstring(first).find("cputune/shares") is not None


def test_images_stay_roots(lab_rig: LabRig, tiny_image: ImageSource) -> None:
    """A domain that runs on an image does not take it over."""
    rig = lab_rig
    image = rig.volumes.ensure_image(rig.node, tiny_image)
    instance_id = uuid4()
    root = rig.volumes.create_from_image(rig.node, instance_id, tiny_image, 1)
    spec = build_blank(rig)
    disks = (replace(spec.disks[0], path=root.path, backing=root.backing), spec.disks[1])
    rig.hypervisor.ensure_defined(rig.node, replace(spec, instance_id=instance_id, disks=disks))

    def owner(path: str) -> str:
        return rig.lab.node_exec(rig.node.name, ["stat", "-c", "%U %a", path]).stdout.strip()

    before = owner(image.path)
    assert before == "root 444"
    rig.hypervisor.ensure_running(rig.node, instance_id)
    assert owner(root.path) == "libvirt-qemu 600"
    assert owner(image.path) == before
    rig.hypervisor.ensure_absent(rig.node, instance_id)
    assert owner(image.path) == before


def test_the_console_is_locked_from_birth(lab_rig: LabRig, blank: DomainSpec) -> None:
    """VNC listens on the node's management address only, asks for a password, and none is right."""
    xml = lab_rig.on_domain(
        blank.instance_id, lambda domain: domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
    )
    graphics = etree.fromstring(xml).find("devices/graphics")
    assert graphics is not None
    management = lab_rig.lab.info.nodes[0].mgmt_ip
    assert graphics.get("listen") == management
    with socket.create_connection((management, int(graphics.get("port", "0"))), timeout=5) as vnc:
        assert vnc.recv(12) == b"RFB 003.008\n"
        vnc.sendall(b"RFB 003.008\n")
        count = vnc.recv(1)[0]
        kinds = vnc.recv(count)
        assert kinds == b"\x02", "only VNC authentication"
        vnc.sendall(b"\x02")
        assert len(vnc.recv(16)) == 16
        # Whatever answer, also the right one: the password is not valid any more.
        vnc.sendall(b"\0" * 16)
        assert vnc.recv(4) == b"\0\0\0\1"


def run_in_guest(rig: LabRig, instance_id: UUID, command: str) -> bool:
    """Whether the command succeeds in the guest."""
    started = rig.ask_agent(instance_id, "guest-exec", path="/bin/sh", arg=["-c", command])
    for _ in range(200):
        status = rig.ask_agent(instance_id, "guest-exec-status", pid=started["pid"])
        if status["exited"]:
            return bool(status["exitcode"] == 0)
        time.sleep(0.05)
    raise AssertionError(f"{command} does not end")


def wait_until(is_true: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)


def test_foreign_domains_are_listed_and_left_alone(lab_rig: LabRig) -> None:
    foreign = uuid4()
    xml = (
        f"<domain type='qemu'><name>foreign</name><uuid>{foreign}</uuid><memory>65536</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
    )
    lab_rig.nodes.call(lab_rig.node, "define", lambda conn: conn.defineXML(xml), timeout_s=10)
    found = lab_rig.hypervisor.list_domains(lab_rig.node)
    assert [(facts.domain_uuid, facts.name, facts.instance_id) for facts in found] == [
        (foreign, "foreign", None)
    ]


def test_removal_takes_snapshots_and_saved_memory_along(lab_rig: LabRig, blank: DomainSpec) -> None:
    def leave_traces(domain: Any) -> None:
        domain.destroy()
        xml = "<domainsnapshot><name>s1</name></domainsnapshot>"
        domain.snapshotCreateXML(xml, 0)
        domain.create()
        domain.managedSave(0)

    # A CD drive has no snapshots: the disk alone must be in the definition.
    spec = replace(blank, disks=blank.disks[:1])
    lab_rig.hypervisor.ensure_defined(lab_rig.node, spec)
    lab_rig.on_domain(spec.instance_id, leave_traces)
    lab_rig.hypervisor.ensure_absent(lab_rig.node, spec.instance_id)
    assert lab_rig.hypervisor.find_domain(lab_rig.node, spec.instance_id) is None
    left = lab_rig.lab.node_exec(
        lab_rig.node.name,
        ["find", "/var/lib/libvirt/qemu", "/etc/libvirt/qemu", "-name", f"*{spec.instance_id}*"],
    )
    assert left.stdout == ""


def test_the_kernel_holds_domains_to_their_threads(lab_rig: LabRig) -> None:
    threads = lab_rig.hypervisor.probe(lab_rig.node).cpu_threads
    if len(threads) < 2:
        pytest.skip("the node has one thread")

    def allowed(spec: DomainSpec) -> set[str]:
        """Where the vCPUs may run, and the thread of QEMU that does the rest."""
        pid = lab_rig.qemu_pid(spec.instance_id)
        found = set()
        for task in Path(f"/proc/{pid}/task").iterdir():
            is_vcpu = (task / "comm").read_text().startswith("CPU ")
            if is_vcpu or task.name == str(pid):
                status = (task / "status").read_text().splitlines()
                line = next(line for line in status if line.startswith("Cpus_allowed_list:"))
                found.add(line.split()[1])
        return found

    first, second = threads[0], threads[1]
    shared = start_blank(lab_rig, vcpus=2)
    dedicated = start_blank(lab_rig, dedicated=True, threads=(second,))
    assert allowed(dedicated) == {str(second)}
    assert allowed(shared) != {str(first)}
    lab_rig.hypervisor.ensure_shared_threads(lab_rig.node, (first,))
    assert allowed(shared) == {str(first)}
    assert allowed(start_blank(lab_rig, threads=(first,))) == {str(first)}
    assert allowed(dedicated) == {str(second)}


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_a_frozen_qemu_does_not_stall_the_others(lab_rig: LabRig, blank: DomainSpec) -> None:
    other = start_blank(lab_rig)
    hypervisor, node = lab_rig.hypervisor, lab_rig.node
    with stopped(lab_rig.qemu_pid(blank.instance_id)):
        waiting = threading.Thread(
            target=lambda: hypervisor.ensure_stopped(node, blank.instance_id, grace_s=40)
        )
        waiting.start()
        time.sleep(0.5)
        began = time.monotonic()
        restart(lab_rig, other.instance_id, grace_s=0, force=True)
        hypervisor.list_domains(node)
        facts = hypervisor.find_domain(node, blank.instance_id)
        assert facts is not None
        assert facts.power == Power.RUNNING
        assert time.monotonic() - began < 30
        # The button's press hangs in QEMU; the power cut goes past it.
        waiting.join(120)
        assert not waiting.is_alive()
        facts = hypervisor.find_domain(node, blank.instance_id)
        assert facts is not None
        assert facts.power == Power.STOPPED
        hypervisor.ensure_running(node, blank.instance_id)


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_many_frozen_qemus_leave_room_for_others(lab_rig: LabRig) -> None:
    """More hanging calls than the daemon serves one connection at once."""
    node = lab_rig.node
    frozen = [start_blank(lab_rig) for _ in range(7)]
    other = start_blank(lab_rig)
    pids = [lab_rig.qemu_pid(spec.instance_id) for spec in frozen]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        errors: list[EngineError] = []

        def hang(spec: DomainSpec) -> None:
            try:
                lab_rig.nodes.call(
                    node,
                    "hang",
                    lambda conn: conn.lookupByUUID(spec.instance_id.bytes).shutdown(),
                    timeout_s=2,
                    key=str(spec.instance_id),
                )
            except EngineUnavailable as err:
                errors.append(err)

        threads = [threading.Thread(target=hang, args=(spec,)) for spec in frozen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == len(frozen)
        began = time.monotonic()
        restart(lab_rig, other.instance_id, grace_s=0, force=True)
        assert time.monotonic() - began < 8
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def counters_by_domain(rig: LabRig) -> dict[UUID, DomainCounters]:
    """One bulk read, which must not take longer than it may."""
    began = time.monotonic()
    read = rig.hypervisor.read_counters(rig.node)
    assert time.monotonic() - began < 2 * COUNTERS_TIMEOUT_S + 2
    return {counters.domain_uuid: counters for counters in read.domains}


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_frozen_qemus_keep_nobodys_counters(lab_rig: LabRig) -> None:
    """However many freeze: processor and network of all are read at once, and with a few frozen the disks of others.

    Nor do the reads that hang use up what other calls of the node need.
    """
    specs = [start_blank(lab_rig) for _ in range(6)]
    ids = [spec.instance_id for spec in specs]
    other, frozen = ids[0], ids[1:]
    before = counters_by_domain(lab_rig)
    assert set(before) == set(ids)
    assert all(counters.disks is not None for counters in before.values())
    pids = [lab_rig.qemu_pid(instance_id) for instance_id in frozen]
    try:
        os.kill(pids[0], signal.SIGSTOP)
        first = counters_by_domain(lab_rig)
        assert set(first) == set(ids)
        assert first[other].cpu_time_ns >= before[other].cpu_time_ns
        # From the next read on, only the frozen one's disks are missing.
        second = counters_by_domain(lab_rig)
        assert {uuid for uuid in ids if second[uuid].disks is None} == {frozen[0]}
        began = time.monotonic()
        assert set(counters_by_domain(lab_rig)) == set(ids)
        assert time.monotonic() - began < COUNTERS_TIMEOUT_S, "the frozen one is asked again"
        for pid in pids[1:]:
            os.kill(pid, signal.SIGSTOP)
        for _ in range(4):
            found = counters_by_domain(lab_rig)
            assert set(found) == set(ids)
        began = time.monotonic()
        restart(lab_rig, other, grace_s=0, force=True)
        assert time.monotonic() - began < 8
        assert counters_by_domain(lab_rig)[other].run_id != before[other].run_id
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def all_answer() -> bool:
        return all(counters.disks is not None for counters in counters_by_domain(lab_rig).values())

    wait_until(all_answer, "every QEMU to answer again", timeout_s=30)


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_a_frozen_daemon_is_given_up_and_found_again(lab_rig: LabRig, blank: DomainSpec) -> None:
    hypervisor, node = lab_rig.hypervisor, lab_rig.node
    events = Events(blank.instance_id)
    subscription = hypervisor.subscribe(node, events.put)
    hypervisor.list_domains(node)
    with stopped(daemon_pid(lab_rig)):
        began = time.monotonic()
        with pytest.raises(EngineUnavailable):
            hypervisor.list_domains(node)
        assert time.monotonic() - began < KEEPALIVE_S + 3
        # What happens meanwhile is learnt after the reconnect.
        lab_rig.crash(blank.instance_id)
    while events.next(timeout_s=30)[0] == Power.RUNNING:
        pass
    subscription.cancel()
    facts = hypervisor.find_domain(node, blank.instance_id)
    assert facts is not None
    assert facts.power == Power.CRASHED


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_a_stop_outlives_the_daemons_restart(lab_rig: LabRig, blank: DomainSpec) -> None:
    hypervisor, node = lab_rig.hypervisor, lab_rig.node
    outcomes: list[StopOutcome] = []
    waiting = threading.Thread(
        target=lambda: outcomes.append(
            hypervisor.ensure_stopped(node, blank.instance_id, grace_s=25)
        )
    )
    waiting.start()
    time.sleep(0.5)
    os.kill(daemon_pid(lab_rig), signal.SIGKILL)
    wait_until(lambda: not is_answering(lab_rig), "libvirtd to be gone")
    lab_rig.lab.up()
    lab_rig.crash(blank.instance_id)
    waiting.join(24)
    assert outcomes == [StopOutcome.GRACEFUL]


def is_answering(rig: LabRig) -> bool:
    try:
        rig.hypervisor.list_domains(rig.node)
    except EngineUnavailable:
        return False
    return True


@pytest.mark.timeout(400)
def test_the_life_of_a_guest(lab_rig: LabRig, tiny_image: ImageSource) -> None:
    """One guest for all that needs a system inside: booting takes most of the time."""
    rig = lab_rig
    spec = boot_tiny(rig, tiny_image)
    check_serial_log(rig, spec)
    check_hot_plug(rig, spec)
    check_locked_tray(rig, spec)
    check_traffic_sign(rig, spec)
    check_early_power_button(rig, spec)


def check_serial_log(rig: LabRig, spec: DomainSpec) -> None:
    path = f"/var/log/libvirt/qemu/awan-{spec.instance_id}-serial.log"
    assert "login:" in rig.lab.node_exec(rig.node.name, ["cat", path]).stdout


def check_hot_plug(rig: LabRig, spec: DomainSpec) -> None:
    """The first definition leaves room: a disk and a network card come and go in a running guest."""
    disk = rig.volumes.create_blank(rig.node, uuid4(), 1)
    devices = {
        "/sys/class/block/sdb": (
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
            f"<source file='{disk.path}'/><target dev='sdc' bus='scsi'/><serial>data-1</serial>"
            "<address type='drive' controller='0' bus='0' target='2' unit='0'/></disk>"
        ),
        "/sys/class/net/eth1": (
            "<interface type='bridge'><mac address='52:54:00:00:00:77'/><source bridge='br-int'/>"
            f"<virtualport type='openvswitch'><parameters interfaceid='{uuid4()}'/></virtualport>"
            "<model type='virtio'/></interface>"
        ),
    }

    def is_seen(path: str) -> bool:
        return run_in_guest(rig, spec.instance_id, f"test -e {path}")

    for path, xml in devices.items():
        assert not is_seen(path)
        rig.on_domain(
            spec.instance_id,
            lambda domain, xml=xml: domain.attachDeviceFlags(xml, LIVE_AND_CONFIG),
        )
        wait_until(lambda path=path: is_seen(path), f"{path} to come")
    for path, xml in devices.items():
        rig.on_domain(
            spec.instance_id,
            lambda domain, xml=xml: domain.detachDeviceFlags(xml, LIVE_AND_CONFIG),
        )
        wait_until(lambda path=path: not is_seen(path), f"{path} to go")


def check_locked_tray(rig: LabRig, spec: DomainSpec) -> None:
    """The guest has the CD mounted, which locks the tray: it is taken away all the same."""
    mount = "mkdir -p /run/cd && mount -t iso9660 -o ro /dev/sr0 /run/cd && ls /run/cd/user-data"
    assert run_in_guest(rig, spec.instance_id, mount)
    rig.hypervisor.ensure_media(rig.node, spec.instance_id, 1, None)
    facts = rig.hypervisor.find_domain(rig.node, spec.instance_id)
    assert facts is not None
    assert facts.disk_paths == (spec.disks[0].path,)
    wait_for_agent(rig, spec.instance_id)


def check_traffic_sign(rig: LabRig, spec: DomainSpec) -> None:
    """Without its agent, the first packets are the guest's sign."""
    assert run_in_guest(rig, spec.instance_id, "sed -i /agent/d /etc/inittab && sync")
    restart(rig, spec.instance_id, grace_s=60)
    assert rig.hypervisor.guest_sign(rig.node, spec.instance_id) == GuestSign.NONE

    def has_sign() -> bool:
        return rig.hypervisor.guest_sign(rig.node, spec.instance_id) == GuestSign.TRAFFIC

    wait_until(has_sign, "traffic", timeout_s=60)


def check_early_power_button(rig: LabRig, spec: DomainSpec) -> None:
    """A guest that is still booting when it is asked to stop ends by itself all the same."""
    restart(rig, spec.instance_id, grace_s=0, force=True)
    outcome = rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=90)
    assert outcome == StopOutcome.GRACEFUL
