"""Hypervisor engine on libvirt and QEMU.

Waits are for events, never for the next tick of a timer: a listener is registered first, then the
state is read, and read again at each event of the domain and after each reconnect (events are lost
while disconnected).

Reads take no lock of the domain in libvirtd, so they answer also when its QEMU hangs, and need no
key. The one exception are counters: libvirtd asks each QEMU for those of its disks and memory, one
after the other, and hangs at one that does not answer. `read_counters` tells how it goes round it,
on connections of its own.

Changes share the domain's key. A power cut and a question to the guest agent have keys of their
own: the one must not wait behind a change that hangs, the other must not hold one up.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit
from uuid import UUID

import libvirt
import libvirt_qemu
import structlog
from lxml import etree

from awan.engines.hypervisor import (
    COUNTERS_TIMEOUT_S,
    GIVE_UP_INTERVAL_S,
    NIC_RELEASE_TIMEOUT_S,
    NODE_CALL_TIMEOUT_S,
    PAUSED_BUSY,
    PAUSED_IO_ERROR,
    SEEN_AFTER_RECONNECT,
    UNEXPLAINED,
    AgentAnswer,
    CardHeld,
    ConsoleEndpoint,
    DiskCounters,
    DomainCounters,
    DomainEvent,
    DomainFacts,
    DomainSpec,
    GuestSign,
    NicSpec,
    NodeCounters,
    NodeEndpoint,
    NodeFacts,
    Power,
    StopOutcome,
    Subscription,
    domain_xml,
    never,
    serial_log,
)
from awan.engines.hypervisor.domain_xml import HostTraits
from awan.engines.hypervisor.pixmap import PNG_SIGNATURE, png_of_pixmap
from awan.engines.libvirt_nodes import (
    ENGINE,
    Connection,
    LibvirtNodes,
    LifecycleEvent,
    Watcher,
    has_code,
    read_host_uuid,
    translate,
)
from awan.errors import EngineError, EngineRejected, EngineUnavailable
from awan.kit.clock import now

POWER_BUTTON_INTERVAL_S = 5.0
"""A guest that is still booting ignores the power button: it is pressed again after this time."""
POWER_BUTTON_TIMEOUT_S = 5.0
POWER_CUT_TIMEOUT_S = 30.0
"""libvirt sends SIGTERM, waits, then SIGKILL: up to 15 s for a QEMU that hangs."""
POWER_CUT_SETTLE_S = 5.0
AGENT_TIMEOUT_S = 2
QEMU_READS_MAX = 2
"""Reads of counters that may hang in QEMUs of one node at once. Each holds a thread of libvirtd, and
one of the five requests that it serves a connection at once."""
AGENT_COMMAND_TIMEOUT_S = 8
NIC_RELEASE_LOOK_S = 2.0
"""A guest that says nothing is asked again for a card after this time."""
GUEST_EXEC_TIMEOUT_S = 15.0
GUEST_EXEC_POLL_S = 0.1
SCREENSHOT_TIMEOUT_S = 10.0
# What a stream's message may carry with every libvirt since streams exist.
STREAM_CHUNK_BYTES = 262120
SCREENSHOT_MAX_BYTES = 64 * 1024**2
GIB = 1024**3
KIB = 1024

T = TypeVar("T")
Domain: TypeAlias = Any
"""A `libvirt.virDomain`; the package has no type information."""

log = structlog.get_logger(__name__)

# Run in the guest with the full name as its one argument. Systems with systemd keep their static name with hostnamectl,
# others in /etc/hostname. cloud-init takes a name that differs from the one it set last for the owner's own and never
# changes it again: so it is told.
_SET_HOSTNAME = """
set -e
name=${1%%.*}
if command -v hostnamectl >/dev/null 2>&1 && [ -d /run/systemd/system ]; then
    hostnamectl set-hostname "$name"
else
    echo "$name" >/etc/hostname
    hostname "$name"
fi
if [ "$1" = "$name" ]; then names=$name; else names="$1 $name"; fi
if grep -q '^127\\.0\\.1\\.1[[:space:]]' /etc/hosts 2>/dev/null; then
    sed -i "s/^127\\.0\\.1\\.1[[:space:]].*/127.0.1.1 $names/" /etc/hosts
fi
known=/var/lib/cloud/data/previous-hostname
if [ -e "$known" ]; then echo "$name" >"$known"; fi
"""

_UNDEFINE_FLAGS = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)

# libvirtd asks QEMU for all of these but the network's: with cpu.time come statistics of KVM.
_QEMU_COUNTERS = (
    libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
    | libvirt.VIR_DOMAIN_STATS_INTERFACE
    | libvirt.VIR_DOMAIN_STATS_BALLOON
    | libvirt.VIR_DOMAIN_STATS_BLOCK
)
# A domain whose job another call holds is read without its QEMU instead of waited for.
_COUNTER_FLAGS = (
    libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_RUNNING
    | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
)

_STOPPED_DETAILS = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: (Power.STOPPED, "shutdown"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: (Power.STOPPED, "destroyed"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: (Power.CRASHED, "crashed"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED: (Power.STOPPED, "migrated"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED: (Power.STOPPED, "saved"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: (Power.CRASHED, "failed"),
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT: (Power.STOPPED, "from_snapshot"),
}
_CHANGES = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: (Power.RUNNING, "started"),
    libvirt.VIR_DOMAIN_EVENT_RESUMED: (Power.RUNNING, "resumed"),
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: (Power.PAUSED, "paused"),
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: (Power.PAUSED, "sleeping"),
    libvirt.VIR_DOMAIN_EVENT_CRASHED: (Power.CRASHED, "panicked"),
}
_SHUTOFF_CRASHES = frozenset(
    {
        libvirt.VIR_DOMAIN_SHUTOFF_CRASHED,
        libvirt.VIR_DOMAIN_SHUTOFF_FAILED,
        # QEMU was found dead when libvirtd came back.
        libvirt.VIR_DOMAIN_SHUTOFF_DAEMON,
    }
)
_SHUTOFF_DETAILS = {
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: "destroyed",
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED: "migrated",
    libvirt.VIR_DOMAIN_SHUTOFF_SAVED: "saved",
    libvirt.VIR_DOMAIN_SHUTOFF_FAILED: "failed",
    libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT: "from_snapshot",
    libvirt.VIR_DOMAIN_SHUTOFF_DAEMON: "daemon",
}


# What libvirt pauses for a moment by itself.
_PAUSED_BUSY = frozenset(
    {
        libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
        libvirt.VIR_DOMAIN_PAUSED_SAVE,
        libvirt.VIR_DOMAIN_PAUSED_DUMP,
        libvirt.VIR_DOMAIN_PAUSED_FROM_SNAPSHOT,
        libvirt.VIR_DOMAIN_PAUSED_SHUTTING_DOWN,
        libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT,
        libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,
    }
)


def read_detail(state: int, reason: int) -> str:
    """The word for why a domain is off or paused; empty for one that runs."""
    if state == libvirt.VIR_DOMAIN_PAUSED:
        if reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR:
            return PAUSED_IO_ERROR
        return PAUSED_BUSY if reason in _PAUSED_BUSY else "paused"
    if state == libvirt.VIR_DOMAIN_PMSUSPENDED:
        return "sleeping"
    if state != libvirt.VIR_DOMAIN_SHUTOFF:
        return ""
    return _SHUTOFF_DETAILS.get(reason, UNEXPLAINED)


def read_power(state: int, reason: int) -> Power:
    """The power that libvirt's state and its reason mean."""
    if state == libvirt.VIR_DOMAIN_CRASHED:
        return Power.CRASHED
    if state == libvirt.VIR_DOMAIN_PAUSED:
        is_crash = reason == libvirt.VIR_DOMAIN_PAUSED_CRASHED
        return Power.CRASHED if is_crash else Power.PAUSED
    if state == libvirt.VIR_DOMAIN_PMSUSPENDED:
        return Power.PAUSED
    if state == libvirt.VIR_DOMAIN_SHUTOFF:
        return Power.CRASHED if reason in _SHUTOFF_CRASHES else Power.STOPPED
    # RUNNING, BLOCKED, and SHUTDOWN: the guest has ended but its QEMU has not yet.
    return Power.RUNNING


def read_event(event: int, detail: int) -> tuple[Power, str] | None:
    """The power that a lifecycle event announces and the word for why; None for other events."""
    if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
        return _STOPPED_DETAILS.get(detail, (Power.STOPPED, "stopped"))
    return _CHANGES.get(event)


class LibvirtHypervisor:
    """`Hypervisor` over the libvirt daemon of each node. Thread-safe."""

    def __init__(
        self,
        nodes: LibvirtNodes,
        *,
        pool_name: str,
        ovs_bridge: str = "br-int",
        nic_offloads: bool | None = None,
        counter_nodes: LibvirtNodes | None = None,
    ) -> None:
        """`pool_name` is the pool whose size a probe tells. `nic_offloads` None: only where KVM is,
        for a node without it is taken to run its virtual switch in user space as well.
        `counter_nodes` are the connections that counters are read on; our own unless given."""
        self._nodes = nodes
        self._pool_name = pool_name
        self._ovs_bridge = ovs_bridge
        self._nic_offloads = nic_offloads
        self._traits: dict[UUID, HostTraits] = {}
        # libvirt's client hands out answers late on a connection on which another call hangs (seen with 9.0: at
        # the next keepalive), so a read that hangs costs its connection, which is nobody else's.
        self._counter_nodes = counter_nodes or LibvirtNodes(
            calls_per_node=QEMU_READS_MAX + 2, overdue_per_connection=1
        )
        self._qemu_reads: Counter[UUID] = Counter()
        self._qemu_reads_lock = threading.Lock()

    def probe(self, node: NodeEndpoint) -> NodeFacts:
        def read(conn: Connection) -> NodeFacts:
            self._traits[node.node_id] = self._read_traits(conn)
            capabilities = etree.fromstring(conn.getCapabilities())
            info = conn.getInfo()
            # `getInfo` tells only the memory that was there when the host booted.
            memory = conn.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)
            capacity_gib, available_gib = self._read_pool(conn)
            return NodeFacts(
                hostname=str(conn.getHostname()),
                host_uuid=read_host_uuid(conn),
                libvirt_version=_format_version(conn.getLibVersion()),
                qemu_version=_format_version(conn.getVersion()),
                cpu_model=capabilities.findtext("host/cpu/model") or str(info[0]),
                cpu_threads=_read_threads(conn),
                memory_mib=int(memory[libvirt.VIR_NODE_MEMORY_STATS_TOTAL]) // 1024,
                kvm=self._traits[node.node_id].kvm,
                pool_name=self._pool_name,
                pool_capacity_gib=capacity_gib,
                pool_available_gib=available_gib,
            )

        facts = self._call(node, "probe", read)
        if node.host_uuid is not None and facts.host_uuid != node.host_uuid:
            words = f"the host's uuid is {facts.host_uuid}, expected {node.host_uuid}"
            raise EngineRejected(ENGINE, f"probe {node.name}", words)
        return facts

    def ensure_defined(self, node: NodeEndpoint, spec: DomainSpec) -> None:
        vnc_password = secrets.token_urlsafe(6)

        def define(conn: Connection) -> None:
            host = self._traits.get(node.node_id)
            if host is None:
                host = self._traits[node.node_id] = self._read_traits(conn)
            conn.defineXMLFlags(domain_xml.build_domain(spec, host, vnc_password), 0)

        self._call(node, "define", define, spec.instance_id)

    def ensure_shared_threads(self, node: NodeEndpoint, threads: tuple[int, ...]) -> None:
        def read(conn: Connection) -> tuple[list[UUID], list[bool]]:
            found = [UUID(bytes=domain.UUID()) for domain in conn.listAllDomains(0)]
            # One flag for each thread of the host, as libvirt wants them.
            flags = [number in threads for number in range(len(conn.getCPUMap(0)[1]))]
            return found, flags

        found, flags = self._call(node, "list domains", read)
        for domain_uuid in found:

            def confine(conn: Connection, domain_uuid: UUID = domain_uuid) -> None:
                domain = _find(conn, domain_uuid)
                if domain is not None:
                    _confine(domain, threads, tuple(flags))

            self._call(node, "confine to threads", confine, domain_uuid)

    def ensure_running(self, node: NodeEndpoint, instance_id: UUID) -> None:
        if self._start(node, instance_id):
            return
        # The guest has shut down and its QEMU is about to end: started once it has.
        deadline = time.monotonic() + NODE_CALL_TIMEOUT_S
        with self._watch_domain(node, instance_id) as changed:
            self._wait_off(node, instance_id, deadline, changed)
        if not self._start(node, instance_id):
            raise EngineUnavailable(ENGINE, f"start {instance_id} on {node.name}", "still ending")

    def ensure_stopped(
        self,
        node: NodeEndpoint,
        instance_id: UUID,
        *,
        grace_s: float,
        force: bool = False,
        gives_up: Callable[[], bool] = never,
    ) -> StopOutcome:
        with self._watch_domain(node, instance_id) as changed:
            power = self._find_power(node, instance_id)
            if _is_off(power):
                return StopOutcome.ALREADY_STOPPED
            # A paused guest cannot hear the power button.
            if not force and power == Power.RUNNING:
                deadline = time.monotonic() + grace_s
                if self._wait_off(
                    node, instance_id, deadline, changed, press_button=True, gives_up=gives_up
                ):
                    return StopOutcome.GRACEFUL
                if gives_up():
                    return StopOutcome.GIVEN_UP
            self._cut_power(node, instance_id)
            settled = time.monotonic() + POWER_CUT_SETTLE_S
            if not self._wait_off(node, instance_id, settled, changed):
                what = f"cut the power of {instance_id} on {node.name}"
                raise EngineUnavailable(ENGINE, what, "the domain is still running")
            return StopOutcome.FORCED

    def ensure_absent(self, node: NodeEndpoint, instance_id: UUID) -> None:
        if self._find_power(node, instance_id) is None and not self._is_known_after_calls(
            node, instance_id
        ):
            return
        # Cut also when it seems off: whatever starts it meanwhile is ended before the definition.
        self._cut_power(node, instance_id)

        def undefine(conn: Connection) -> None:
            domain = _find(conn, instance_id)
            if domain is None:
                return
            try:
                domain.undefineFlags(_UNDEFINE_FLAGS)
            except libvirt.libvirtError as err:
                # A domain without a definition vanished with its QEMU.
                gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
                if not has_code(err, *gone) or _find(conn, instance_id) is not None:
                    raise

        self._call(node, "undefine", undefine, instance_id)
        if self._find_power(node, instance_id) is not None:
            what = f"remove {instance_id} from {node.name}"
            raise EngineUnavailable(ENGINE, what, "the domain was started again meanwhile")

    def _is_known_after_calls(self, node: NodeEndpoint, instance_id: UUID) -> bool:
        """Whether the domain exists once no other call on it is in flight: a late `define` may still land."""

        def look(conn: Connection) -> bool:
            return _find(conn, instance_id) is not None

        return self._call(node, "look again", look, instance_id)

    def find_domain(self, node: NodeEndpoint, instance_id: UUID) -> DomainFacts | None:
        def find(conn: Connection) -> DomainFacts | None:
            domain = _find(conn, instance_id)
            if domain is None:
                return None
            facts = _read_facts(domain)
            if facts is None or _is_persistent(domain):
                return facts
            return replace(facts, is_persistent=False)

        return self._call(node, "find domain", find)

    def list_domains(
        self, node: NodeEndpoint, *, timeout_s: float = NODE_CALL_TIMEOUT_S
    ) -> list[DomainFacts]:
        def read(conn: Connection) -> list[DomainFacts]:
            # One call for all of them: asking each domain would be as many.
            found = conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_TRANSIENT)
            transient = {UUID(bytes=domain.UUID()) for domain in found}
            read_facts = (_read_facts(domain) for domain in conn.listAllDomains(0))
            return [
                replace(facts, is_persistent=False) if facts.domain_uuid in transient else facts
                for facts in read_facts
                if facts is not None
            ]

        return self._call(node, "list domains", read, timeout_s=timeout_s)

    def read_counters(self, node: NodeEndpoint) -> NodeCounters:
        """A read that hangs holds its QEMU's job in libvirtd, so the next one passes that QEMU by.

        So each QEMU that hangs costs one read, which is left behind and made up for at once without
        asking QEMUs. With `QEMU_READS_MAX` left behind none is asked until one of them has returned.
        Processor times that do not come from QEMU have to be read domain by domain: only then.
        """
        if self._qemu_reads[node.node_id] < QEMU_READS_MAX:
            try:
                return self._read_counters(node, self._ask_qemus)
            except EngineUnavailable as err:
                if not self._qemu_reads[node.node_id]:
                    raise
                log.warning("hypervisor_counters_hang", node=node.name, error=str(err))
        return self._read_counters(node, self._ask_host)

    def _read_counters(
        self, node: NodeEndpoint, ask: Callable[[UUID, Connection], NodeCounters]
    ) -> NodeCounters:
        return self._counter_nodes.call(
            node,
            "read counters",
            lambda conn: ask(node.node_id, conn),
            timeout_s=COUNTERS_TIMEOUT_S,
        )

    def _ask_qemus(self, node_id: UUID, conn: Connection) -> NodeCounters:
        with self._qemu_reads_lock:
            self._qemu_reads[node_id] += 1
        try:
            rows = conn.getAllDomainStats(_QEMU_COUNTERS, _COUNTER_FLAGS)
        finally:
            with self._qemu_reads_lock:
                self._qemu_reads[node_id] -= 1
        return _read_all_counters(rows)

    def _ask_host(self, _node_id: UUID, conn: Connection) -> NodeCounters:
        rows = conn.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_INTERFACE, _COUNTER_FLAGS)
        for domain, stats in rows:
            cpu_time_ns = _find_cpu_time(domain)
            if cpu_time_ns is not None:
                stats["cpu.time"] = cpu_time_ns
        return _read_all_counters(rows)

    def guest_sign(self, node: NodeEndpoint, instance_id: UUID) -> GuestSign:
        if self._agent_answers(node, instance_id):
            return GuestSign.AGENT

        def has_sent(conn: Connection) -> bool:
            domain = _find(conn, instance_id)
            if domain is None or not domain.isActive():
                return False
            names = domain_xml.read_interface_names(domain.XMLDesc(0))
            # Counted from the guest's side: index 5 is the number of packets it has sent.
            return any(int(domain.interfaceStats(name)[5]) > 0 for name in names)

        is_heard = self._call(node, "read traffic", has_sent, instance_id)
        return GuestSign.TRAFFIC if is_heard else GuestSign.NONE

    def set_password(
        self, node: NodeEndpoint, instance_id: UUID, username: str, password_hash: str
    ) -> AgentAnswer:
        wish = {
            "username": username,
            "password": base64.b64encode(password_hash.encode()).decode(),
            "crypted": True,
        }
        try:
            said = self._ask_agent(node, instance_id, "guest-set-user-password", wish)
        except _AgentRefused:
            return AgentAnswer.REFUSED
        return AgentAnswer.SILENT if said is None else AgentAnswer.DONE

    def set_hostname(self, node: NodeEndpoint, instance_id: UUID, hostname: str) -> AgentAnswer:
        command = {"path": "/bin/sh", "arg": ["-c", _SET_HOSTNAME, "set-hostname", hostname]}
        try:
            started = self._ask_agent(node, instance_id, "guest-exec", command)
            pid = started.get("pid") if started is not None else None
            exit_code = self._wait_for_exit(node, instance_id, pid)
        except _AgentRefused:
            return AgentAnswer.REFUSED
        if exit_code is None:
            return AgentAnswer.SILENT
        return AgentAnswer.DONE if exit_code == 0 else AgentAnswer.REFUSED

    def reset(self, node: NodeEndpoint, instance_id: UUID) -> None:
        def press(conn: Connection) -> None:
            conn.lookupByUUID(instance_id.bytes).reset(0)

        self._call(node, "reset", press, instance_id)

    def screenshot(self, node: NodeEndpoint, instance_id: UUID) -> bytes:
        def draw(conn: Connection) -> bytes:
            domain = conn.lookupByUUID(instance_id.bytes)
            stream = conn.newStream(0)
            try:
                domain.screenshot(stream, 0, 0)
                picture = _receive(stream, SCREENSHOT_MAX_BYTES)
                stream.finish()
            except BaseException:
                # A stream that failed by itself refuses to be aborted.
                with contextlib.suppress(libvirt.libvirtError):
                    stream.abort()
                raise
            return picture

        picture = self._call(
            node, "screenshot", draw, instance_id, role="/screen", timeout_s=SCREENSHOT_TIMEOUT_S
        )
        return picture if picture.startswith(PNG_SIGNATURE) else png_of_pixmap(picture)

    def read_serial_log(self, node: NodeEndpoint, instance_id: UUID, *, bytes_max: int) -> bytes:
        def read(conn: Connection) -> bytes:
            conn.lookupByUUID(instance_id.bytes)
            return serial_log.read_end(conn, instance_id, bytes_max)

        return self._call(node, "read serial log", read, instance_id, role="/serial")

    def ensure_media(
        self, node: NodeEndpoint, instance_id: UUID, target: int, path: str | None
    ) -> None:
        def change(conn: Connection) -> None:
            domain = conn.lookupByUUID(instance_id.bytes)
            config = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            wrong = 0
            if domain_xml.read_media_path(config, target) != path:
                wrong |= libvirt.VIR_DOMAIN_AFFECT_CONFIG
            if domain.isActive() and domain_xml.read_media_path(domain.XMLDesc(0), target) != path:
                # By force: a guest that has locked the tray must not keep us from taking a seed away.
                wrong |= libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_DEVICE_MODIFY_FORCE
            if wrong:
                domain.updateDeviceFlags(domain_xml.build_media(target, path), wrong)

        self._call(node, "change media", change, instance_id)

    def ensure_nics(self, node: NodeEndpoint, instance_id: UUID, nics: tuple[NicSpec, ...]) -> None:
        domain_xml.check_nics(nics)

        def change(conn: Connection) -> list[str]:
            host = self._traits.get(node.node_id)
            if host is None:
                host = self._traits[node.node_id] = self._read_traits(conn)
            domain = conn.lookupByUUID(instance_id.bytes)
            if domain.isPersistent():
                _define_nics(domain, nics, host)
            return _plug_nics(domain, nics, host) if domain.isActive() else []

        deadline = time.monotonic() + NIC_RELEASE_TIMEOUT_S
        with self._watch_domain(node, instance_id) as changed:
            while True:
                changed.clear()
                held = self._call(node, "change network cards", change, instance_id)
                if not held:
                    return
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    what = f"take network cards from {instance_id} on {node.name}"
                    words = f"the guest does not let go of {', '.join(held)}"
                    raise CardHeld(ENGINE, what, words)
                changed.wait(min(left_s, NIC_RELEASE_LOOK_S))

    def unlock_console(
        self, node: NodeEndpoint, instance_id: UUID, *, password: str, valid_s: float
    ) -> ConsoleEndpoint:
        def unlock(conn: Connection) -> ConsoleEndpoint:
            domain = conn.lookupByUUID(instance_id.bytes)
            live = domain.XMLDesc(0)
            if not domain.isActive():
                what = f"unlock the console of {instance_id} on {node.name}"
                raise EngineRejected(ENGINE, what, "the domain does not run")
            host, port = domain_xml.read_console(live)
            changed = domain_xml.build_console_password(
                live, password, now() + timedelta(seconds=valid_s)
            )
            domain.updateDeviceFlags(changed, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            # A node that is spoken to with certificates serves its screens so as well.
            return ConsoleEndpoint(host, port, urlsplit(node.uri).scheme == "qemu+tls")

        return self._call(node, "unlock console", unlock, instance_id)

    def lock_console(self, node: NodeEndpoint, instance_id: UUID) -> None:
        password = secrets.token_urlsafe(6)

        def lock(conn: Connection) -> None:
            domain = _find(conn, instance_id)
            if domain is None or not domain.isActive():
                return
            changed = domain_xml.build_console_password(
                domain.XMLDesc(0), password, domain_xml.LOCKED_SINCE
            )
            try:
                domain.updateDeviceFlags(changed, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            except libvirt.libvirtError as err:
                # It has been stopped meanwhile.
                if not has_code(err, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                    raise

        self._call(node, "lock console", lock, instance_id)

    def subscribe(
        self, node: NodeEndpoint, listener: Callable[[DomainEvent], None]
    ) -> Subscription:
        announcer = _Announcer(node.node_id, listener)

        def resync() -> None:
            try:
                domains = self.list_domains(node)
            except EngineError as err:
                # The connection was lost again: the next one brings the next resync.
                log.warning("hypervisor_resync_failed", node=node.name, error=str(err))
                return
            for facts in domains:
                announcer.announce(facts.domain_uuid, facts.power, SEEN_AFTER_RECONNECT)

        return Subscription(self._nodes.watch(node, Watcher(announcer.on_lifecycle, resync)))

    def close(self) -> None:
        """Ends the connections, also those that the volumes engine uses with us."""
        self._nodes.close()
        self._counter_nodes.close()

    def _call(
        self,
        node: NodeEndpoint,
        name: str,
        fn: Callable[[Connection], T],
        instance_id: UUID | None = None,
        *,
        role: str = "",
        timeout_s: float = NODE_CALL_TIMEOUT_S,
    ) -> T:
        key = f"{instance_id}{role}" if instance_id is not None else None
        return self._nodes.call(node, name, fn, timeout_s=timeout_s, key=key)

    def _read_traits(self, conn: Connection) -> HostTraits:
        guest = etree.fromstring(conn.getCapabilities()).find("guest/arch[@name='x86_64']")
        if guest is None:
            raise EngineRejected(ENGINE, "read capabilities", "the node cannot run x86_64 guests")
        kvm = guest.find("domain[@type='kvm']") is not None
        return HostTraits(
            kvm=kvm,
            emulator=guest.findtext("emulator") or "/usr/bin/qemu-system-x86_64",
            ovs_bridge=self._ovs_bridge,
            nic_offloads=kvm if self._nic_offloads is None else self._nic_offloads,
        )

    def _read_pool(self, conn: Connection) -> tuple[int, int]:
        """Capacity and free space of the pool in GiB; zeroes when the node does not have it."""
        try:
            pool = conn.storagePoolLookupByName(self._pool_name)
        except libvirt.libvirtError as err:
            if has_code(err, libvirt.VIR_ERR_NO_STORAGE_POOL):
                return 0, 0
            raise
        try:
            pool.refresh(0)
        except libvirt.libvirtError as err:
            # Refused while a volume is written; the numbers of the last refresh serve as well.
            log.debug("pool_refresh_failed", pool=self._pool_name, error=str(err))
        _, capacity, _, available = pool.info()
        return int(capacity) // GIB, int(available) // GIB

    def _find_power(self, node: NodeEndpoint, instance_id: UUID) -> Power | None:
        """The domain's power, or None when the node does not know it."""

        def read(conn: Connection) -> Power | None:
            domain = _find(conn, instance_id)
            return read_power(*domain.state(0)) if domain is not None else None

        return self._call(node, "read state", read)

    def _start(self, node: NodeEndpoint, instance_id: UUID) -> bool:
        """Makes the domain run; False when its guest has ended and its QEMU has not yet."""

        def start(conn: Connection) -> bool:
            domain = conn.lookupByUUID(instance_id.bytes)
            state, reason = domain.state(0)
            if state == libvirt.VIR_DOMAIN_SHUTDOWN:
                return False
            if state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED):
                return True
            if state == libvirt.VIR_DOMAIN_PMSUSPENDED:
                domain.pMWakeup(0)
            elif state == libvirt.VIR_DOMAIN_PAUSED and reason != libvirt.VIR_DOMAIN_PAUSED_CRASHED:
                domain.resume()
            else:
                if domain.isActive():
                    domain.destroy()
                self._create(node, domain)
            return True

        return self._call(node, "start", start, instance_id)

    def _create(self, node: NodeEndpoint, domain: Domain) -> None:
        """Starts QEMU. A node whose cgroups cannot weigh CPUs is remembered and the weight left out."""
        # A saved memory image would bring back an old definition.
        flags = libvirt.VIR_DOMAIN_START_FORCE_BOOT
        try:
            domain.createWithFlags(flags)
        except libvirt.libvirtError as err:
            if not has_code(err, libvirt.VIR_ERR_CONFIG_UNSUPPORTED):
                if domain.isActive():
                    # Someone else was faster.
                    return
                raise
            secure = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
            without = domain_xml.drop_cpu_shares(domain.XMLDesc(secure))
            if without is None:
                raise
            log.warning("node_without_cpu_shares", node=node.name)
            conn = domain.connect()
            host = self._traits.get(node.node_id) or self._read_traits(conn)
            self._traits[node.node_id] = replace(host, has_cpu_shares=False)
            conn.defineXMLFlags(without, 0).createWithFlags(flags)

    def _cut_power(self, node: NodeEndpoint, instance_id: UUID) -> None:
        def cut(conn: Connection) -> None:
            domain = _find(conn, instance_id)
            if domain is None:
                return
            try:
                domain.destroy()
            except libvirt.libvirtError as err:
                if not has_code(err, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                    raise

        self._call(
            node, "cut power", cut, instance_id, role="/power-cut", timeout_s=POWER_CUT_TIMEOUT_S
        )

    @contextmanager
    def _watch_domain(self, node: NodeEndpoint, instance_id: UUID) -> Iterator[threading.Event]:
        """An event that is set whenever the domain may have changed."""
        changed = threading.Event()

        def on_event(event: LifecycleEvent) -> None:
            on_device(event.domain_uuid)

        def on_device(domain_uuid: UUID) -> None:
            if domain_uuid == instance_id:
                changed.set()

        cancel = self._nodes.watch(node, Watcher(on_event, changed.set, on_device))
        try:
            yield changed
        finally:
            cancel()

    def _wait_off(
        self,
        node: NodeEndpoint,
        instance_id: UUID,
        deadline: float,
        changed: threading.Event,
        *,
        press_button: bool = False,
        gives_up: Callable[[], bool] = never,
    ) -> bool:
        """Waits until the domain is off or gone; False at the deadline, or when the wait is given up.

        Outlives lost connections.
        """
        press_at = time.monotonic() if press_button else deadline
        while True:
            changed.clear()
            try:
                if _is_off(self._find_power(node, instance_id)):
                    return True
                if press_button and time.monotonic() >= press_at:
                    press_at = time.monotonic() + POWER_BUTTON_INTERVAL_S
                    self._press_power_button(node, instance_id)
            except EngineUnavailable as err:
                log.info("hypervisor_wait_interrupted", instance=str(instance_id), error=str(err))
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            look_at = min(deadline, max(time.monotonic() + 0.05, press_at))
            while not changed.is_set() and (left_s := look_at - time.monotonic()) > 0:
                if gives_up():
                    return False
                changed.wait(min(left_s, GIVE_UP_INTERVAL_S))

    def _press_power_button(self, node: NodeEndpoint, instance_id: UUID) -> None:
        def press(conn: Connection) -> None:
            domain = _find(conn, instance_id)
            if domain is None:
                return
            try:
                domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
            except libvirt.libvirtError as err:
                if not has_code(err, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                    raise

        self._call(node, "press power", press, instance_id, timeout_s=POWER_BUTTON_TIMEOUT_S)

    def _wait_for_exit(self, node: NodeEndpoint, instance_id: UUID, pid: object) -> int | None:
        """The exit code of a program in the guest, -1 when a signal ended it.

        None when it goes on for too long, or nobody tells. Raises: _AgentRefused.
        """
        deadline = time.monotonic() + GUEST_EXEC_TIMEOUT_S
        while isinstance(pid, int) and time.monotonic() < deadline:
            status = self._send_agent(node, instance_id, "guest-exec-status", {"pid": pid})
            if status is None:
                return None
            if status.get("exited"):
                code = status.get("exitcode")
                return code if isinstance(code, int) else -1
            time.sleep(GUEST_EXEC_POLL_S)
        return None

    def _ask_agent(
        self, node: NodeEndpoint, instance_id: UUID, command: str, arguments: dict[str, Any]
    ) -> dict[str, Any] | None:
        """As `_send_agent`, after a ping: a refusal is then known to be the agent's own."""
        if not self._agent_answers(node, instance_id):
            return None
        return self._send_agent(node, instance_id, command, arguments)

    def _send_agent(
        self, node: NodeEndpoint, instance_id: UUID, command: str, arguments: dict[str, Any]
    ) -> dict[str, Any] | None:
        """What the agent returns for a command that returns an object; None when nobody answers.

        Raises: _AgentRefused. The guest decides what is in the object.
        """
        text = json.dumps({"execute": command, "arguments": arguments})

        def send(conn: Connection) -> dict[str, Any] | None:
            domain = _find(conn, instance_id)
            if domain is None or not domain.isActive():
                return None
            try:
                said = libvirt_qemu.qemuAgentCommand(domain, text, AGENT_COMMAND_TIMEOUT_S, 0)
            except libvirt.libvirtError as err:
                if has_code(err, libvirt.VIR_ERR_INTERNAL_ERROR) and conn.isAlive():
                    # What the agent says when it cannot do something has no code of its own.
                    raise _AgentRefused from err
                if _is_silence(conn, err):
                    return None
                raise
            return _read_return(said)

        timeout_s = AGENT_COMMAND_TIMEOUT_S + POWER_BUTTON_TIMEOUT_S
        return self._call(node, command, send, instance_id, role="/agent", timeout_s=timeout_s)

    def _agent_answers(self, node: NodeEndpoint, instance_id: UUID) -> bool:
        ping = json.dumps({"execute": "guest-ping"})

        def ask(conn: Connection) -> bool:
            domain = _find(conn, instance_id)
            if domain is None or not domain.isActive():
                return False
            try:
                libvirt_qemu.qemuAgentCommand(domain, ping, AGENT_TIMEOUT_S, 0)
            except libvirt.libvirtError as err:
                if _is_silence(conn, err):
                    return False
                raise
            return True

        timeout_s = AGENT_TIMEOUT_S + POWER_BUTTON_TIMEOUT_S
        return self._call(node, "ping agent", ask, instance_id, role="/agent", timeout_s=timeout_s)


class _AgentRefused(Exception):
    """The guest's agent answers that it cannot do what it was asked."""


class _Announcer:
    """Tells one listener of changes of power; libvirt sends several events for some of them."""

    def __init__(self, node_id: UUID, listener: Callable[[DomainEvent], None]) -> None:
        self._node_id = node_id
        self._listener = listener
        self._known: dict[UUID, Power] = {}
        self._lock = threading.Lock()

    def on_lifecycle(self, event: LifecycleEvent) -> None:
        if event.event == libvirt.VIR_DOMAIN_EVENT_UNDEFINED:
            with self._lock:
                self._known.pop(event.domain_uuid, None)
            return
        change = read_event(event.event, event.detail)
        if change is not None:
            self.announce(event.domain_uuid, *change)

    def announce(self, domain_uuid: UUID, power: Power, detail: str) -> None:
        with self._lock:
            if self._known.get(domain_uuid) == power:
                return
            self._known[domain_uuid] = power
            self._listener(DomainEvent(self._node_id, domain_uuid, power, detail, now()))


def _is_silence(conn: Connection, err: libvirt.libvirtError) -> bool:
    """Not connected, not answering, answering nonsense: no agent, as far as we can tell. Else the node is to blame."""
    if isinstance(translate(err, "ask agent"), EngineUnavailable):
        return bool(conn.isAlive())
    return has_code(
        err,
        libvirt.VIR_ERR_OPERATION_INVALID,
        libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
        libvirt.VIR_ERR_NO_DOMAIN,
    )


def _read_return(said: str) -> dict[str, Any] | None:
    """The object in an agent's answer; None when the guest sends anything else."""
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        return None
    found = answer.get("return") if isinstance(answer, dict) else None
    return found if isinstance(found, dict) else None


def _receive(stream: Any, most: int) -> bytes:
    """Everything that a stream gives. Raises: EngineRejected above `most` bytes, EngineUnavailable without data."""
    content = bytearray()
    while chunk := stream.recv(STREAM_CHUNK_BYTES):
        if not isinstance(chunk, bytes):
            raise EngineUnavailable(ENGINE, "read a stream", "the stream gives no data")
        content += chunk
        if len(content) > most:
            raise EngineRejected(ENGINE, "read a stream", f"more than {most} bytes")
    return bytes(content)


def _is_off(power: Power | None) -> bool:
    return power in (None, Power.STOPPED, Power.CRASHED)


def _find(conn: Connection, instance_id: UUID) -> Domain | None:
    try:
        return conn.lookupByUUID(instance_id.bytes)
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_DOMAIN):
            return None
        raise


def _read_facts(domain: Domain) -> DomainFacts | None:
    """The domain's facts, or None when it vanishes while it is read, or only reads a serial log."""
    try:
        state = domain.state(0)
        # Whether a screen has a password, and until when, is told with the password only.
        identity = domain_xml.read_identity(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE))
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_DOMAIN):
            return None
        raise
    if identity.is_reader:
        return None
    return DomainFacts(
        domain_uuid=UUID(bytes=domain.UUID()),
        name=str(domain.name()),
        power=read_power(*state),
        instance_id=identity.instance_id,
        operation_id=identity.operation_id,
        disk_paths=identity.disk_paths,
        port_ids=identity.port_ids,
        threads=identity.threads,
        detail=read_detail(*state),
        unlocked_until=identity.unlocked_until if domain.isActive() else None,
    )


def _find_cpu_time(domain: Domain) -> int | None:
    """The domain's processor time in ns as the host accounts it; None when it vanishes while it is read."""
    try:
        return int(domain.info()[4])
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
            return None
        raise


def _read_all_counters(rows: list[tuple[Domain, dict[str, Any]]]) -> NodeCounters:
    """The counters of a bulk read. Domains that ended while they were read are left out."""
    found = (read_domain_counters(domain, stats) for domain, stats in rows)
    return NodeCounters(now(), tuple(counters for counters in found if counters is not None))


def read_domain_counters(domain: Domain, stats: dict[str, Any]) -> DomainCounters | None:
    """The counters of one domain as libvirt names them; None for one that has ended.

    Source: virConnectGetAllDomainStats in libvirt's reference. Memory is in KiB there, cpu.time in ns.
    """
    if "cpu.time" not in stats or domain.ID() < 0:
        return None
    nics = range(stats.get("net.count", 0))
    return DomainCounters(
        domain_uuid=UUID(bytes=domain.UUID()),
        run_id=domain.ID(),
        cpu_time_ns=stats["cpu.time"],
        # A card that is just being plugged in has no counters yet.
        net_in_bytes=sum(stats.get(f"net.{number}.rx.bytes", 0) for number in nics),
        net_out_bytes=sum(stats.get(f"net.{number}.tx.bytes", 0) for number in nics),
        disks=_read_disk_counters(stats),
        memory_used_bytes=_read_memory_used(stats),
    )


def _read_disk_counters(stats: dict[str, Any]) -> DiskCounters | None:
    """The sums over all disks, or None when one is missing: a sum without it would seem to fall."""
    read = written = used = 0
    try:
        for number in range(stats["block.count"]):
            if f"block.{number}.path" not in stats:
                continue  # an empty CD drive
            read += stats[f"block.{number}.rd.bytes"]
            written += stats[f"block.{number}.wr.bytes"]
            used += stats[f"block.{number}.physical"]
    except KeyError:
        return None
    return DiskCounters(read, written, used)


def _read_memory_used(stats: dict[str, Any]) -> int | None:
    """What the guest uses and could not give up: its memory without what it says is available to programs."""
    total = stats.get("balloon.available")
    free = stats.get("balloon.usable", stats.get("balloon.unused"))
    return max(0, total - free) * KIB if total is not None and free is not None else None


def _define_nics(domain: Domain, nics: tuple[NicSpec, ...], host: HostTraits) -> None:
    """The definition has exactly these cards. Those that are plugged in already keep their place."""
    config = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    found = domain_xml.read_nics(config)
    for nic in found:
        if not any(nic.is_as(spec) for spec in nics):
            domain.detachDeviceFlags(nic.xml, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    missing = [spec for spec in nics if not any(nic.is_as(spec) for nic in found)]
    if not missing:
        return
    free = domain_xml.free_nic_buses(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    live = domain.XMLDesc(0) if domain.isActive() else None
    places = {nic.port_id: nic.bus for nic in domain_xml.read_nics(live)} if live else {}
    # A place that is taken in the running domain would move the card at the next start.
    both = free & domain_xml.free_nic_buses(live) if live else free
    for spec in missing:
        preferred = places.get(spec.port_id) or min(both, default=0)
        bus = domain_xml.require_free_bus(free, preferred)
        both.discard(bus)
        xml = domain_xml.build_nic(spec, bus, host)
        domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_CONFIG)


def _plug_nics(domain: Domain, nics: tuple[NicSpec, ...], host: HostTraits) -> list[str]:
    """The running domain gets the cards that it lacks, where its definition has them, and is asked for the others.

    Returns the MAC addresses of those that its guest holds on to. One that ends meanwhile holds none.
    """
    try:
        found = domain_xml.read_nics(domain.XMLDesc(0))
        held = [nic for nic in found if not any(nic.is_as(spec) for spec in nics)]
        for nic in held:
            _ask_to_release(domain, nic.alias)
        taken = {nic.port_id for nic in found} | {nic.mac for nic in found}
        missing = [spec for spec in nics if spec.port_id not in taken and spec.mac not in taken]
        if missing:
            config = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            places = {nic.port_id: nic.bus for nic in domain_xml.read_nics(config)}
            free = domain_xml.free_nic_buses(domain.XMLDesc(0))
            for spec in missing:
                bus = domain_xml.require_free_bus(free, places.get(spec.port_id, 0))
                xml = domain_xml.build_nic(spec, bus, host)
                domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_OPERATION_INVALID) and not domain.isActive():
            return []
        raise
    return [nic.mac for nic in held]


def _ask_to_release(domain: Domain, alias: str) -> None:
    """Asks the guest for a card; the device is gone once the guest has answered.

    QEMU refuses to ask twice, without a code of its own for it: what is held is seen at the next look.
    """
    try:
        domain.detachDeviceAlias(alias, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as err:
        if not has_code(
            err,
            libvirt.VIR_ERR_INTERNAL_ERROR,
            libvirt.VIR_ERR_OPERATION_FAILED,
            libvirt.VIR_ERR_DEVICE_MISSING,
        ):
            raise


def _is_persistent(domain: Domain) -> bool:
    try:
        return bool(domain.isPersistent())
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_DOMAIN):
            return False
        raise


def _read_threads(conn: Connection) -> tuple[int, ...]:
    """The host's threads that are online, by number."""
    _, online, _ = conn.getCPUMap(0)
    return tuple(number for number, is_online in enumerate(online) if is_online)


def _confine(domain: Domain, threads: tuple[int, ...], flags: tuple[bool, ...]) -> None:
    """A shared domain of ours runs on these threads alone, now if it runs, and from its next start on."""
    try:
        config = domain_xml.read_identity(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        if config.instance_id is None or config.is_dedicated:
            return
        if config.threads != threads:
            _pin(domain, flags, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        # Read after the definition is right: what starts meanwhile starts with it.
        if domain.isActive() and domain_xml.read_identity(domain.XMLDesc(0)).threads != threads:
            _pin(domain, flags, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as err:
        is_gone = has_code(err, libvirt.VIR_ERR_NO_DOMAIN)
        is_off = has_code(err, libvirt.VIR_ERR_OPERATION_INVALID) and not domain.isActive()
        if not is_gone and not is_off:
            raise


def _pin(domain: Domain, flags: tuple[bool, ...], where: int) -> None:
    # Every vCPU the domain may ever have: those that are not plugged in keep it for when they are.
    for vcpu in range(domain.vcpusFlags(where | libvirt.VIR_DOMAIN_VCPU_MAXIMUM)):
        domain.pinVcpuFlags(vcpu, flags, where)
    domain.pinEmulator(flags, where)


def _format_version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
