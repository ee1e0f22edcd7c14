"""Hypervisor engine on libvirt and QEMU.

Waits are for events, never for the next tick of a timer: a listener is registered first, then the
state is read, and read again at each event of the domain and after each reconnect (events are lost
while disconnected).

Reads take no lock of the domain in libvirtd, so they answer also when its QEMU hangs, and need no
key. Changes share the domain's key. A power cut and a question to the guest agent have keys of their
own: the one must not wait behind a change that hangs, the other must not hold one up.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

import libvirt
import libvirt_qemu
import structlog
from lxml import etree

from awan.engines.hypervisor import (
    GIVE_UP_INTERVAL_S,
    NODE_CALL_TIMEOUT_S,
    DomainEvent,
    DomainFacts,
    DomainSpec,
    GuestSign,
    NodeEndpoint,
    NodeFacts,
    Power,
    StopOutcome,
    Subscription,
    domain_xml,
    never,
)
from awan.engines.hypervisor.domain_xml import HostTraits
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
GIB = 1024**3

T = TypeVar("T")
Domain: TypeAlias = Any
"""A `libvirt.virDomain`; the package has no type information."""

log = structlog.get_logger(__name__)

_UNDEFINE_FLAGS = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
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
    ) -> None:
        """`pool_name` is the pool whose size a probe tells. `nic_offloads` None: only where KVM is,
        for a node without it is taken to run its virtual switch in user space as well."""
        self._nodes = nodes
        self._pool_name = pool_name
        self._ovs_bridge = ovs_bridge
        self._nic_offloads = nic_offloads
        self._traits: dict[UUID, HostTraits] = {}

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
            return _read_facts(domain) if domain is not None else None

        return self._call(node, "find domain", find)

    def list_domains(self, node: NodeEndpoint) -> list[DomainFacts]:
        def read(conn: Connection) -> list[DomainFacts]:
            found = (_read_facts(domain) for domain in conn.listAllDomains(0))
            return [facts for facts in found if facts is not None]

        return self._call(node, "list domains", read)

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
                announcer.announce(facts.domain_uuid, facts.power, "seen_after_reconnect")

        return Subscription(self._nodes.watch(node, Watcher(announcer.on_lifecycle, resync)))

    def close(self) -> None:
        """Ends the connections, also those that the volumes engine uses with us."""
        self._nodes.close()

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
            if event.domain_uuid == instance_id:
                changed.set()

        cancel = self._nodes.watch(node, Watcher(on_event, changed.set))
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

    def _agent_answers(self, node: NodeEndpoint, instance_id: UUID) -> bool:
        ping = json.dumps({"execute": "guest-ping"})

        def ask(conn: Connection) -> bool:
            domain = _find(conn, instance_id)
            if domain is None or not domain.isActive():
                return False
            try:
                libvirt_qemu.qemuAgentCommand(domain, ping, AGENT_TIMEOUT_S, 0)
            except libvirt.libvirtError as err:
                # Not connected, not answering, answering nonsense: no agent, as far as we can tell.
                if isinstance(translate(err, "ping agent"), EngineUnavailable):
                    if not conn.isAlive():
                        raise
                    return False
                if has_code(
                    err,
                    libvirt.VIR_ERR_OPERATION_INVALID,
                    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
                    libvirt.VIR_ERR_NO_DOMAIN,
                ):
                    return False
                raise
            return True

        timeout_s = AGENT_TIMEOUT_S + POWER_BUTTON_TIMEOUT_S
        return self._call(node, "ping agent", ask, instance_id, role="/agent", timeout_s=timeout_s)


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
    """The domain's facts, or None when it vanishes while it is read."""
    try:
        power = read_power(*domain.state(0))
        identity = domain_xml.read_identity(domain.XMLDesc(0))
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_DOMAIN):
            return None
        raise
    return DomainFacts(
        domain_uuid=UUID(bytes=domain.UUID()),
        name=str(domain.name()),
        power=power,
        instance_id=identity.instance_id,
        operation_id=identity.operation_id,
        disk_paths=identity.disk_paths,
        port_ids=identity.port_ids,
        threads=identity.threads,
    )


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
