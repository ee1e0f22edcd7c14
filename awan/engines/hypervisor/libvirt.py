"""Hypervisor engine on libvirt and QEMU.

Waits are for events, never for the next tick of a timer: a listener is registered first, then the
state is read, and read again at each event of the domain and after each reconnect (events are lost
while disconnected).

Reads take no lock of the domain in libvirtd, so they answer also when its QEMU hangs, and need no
key. The one exception are counters (`libvirt_counters`).

Changes share the domain's key. A power cut and a question to the guest agent have keys of their
own: the one must not wait behind a change that hangs, the other must not hold one up.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar
from uuid import UUID

import libvirt
import structlog
from lxml import etree

from awan.engines.hypervisor import (
    GIVE_UP_INTERVAL_S,
    NIC_RELEASE_TIMEOUT_S,
    NODE_CALL_TIMEOUT_S,
    SEEN_AFTER_RECONNECT,
    AgentAnswer,
    CardHeld,
    ConsoleEndpoint,
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
    libvirt_screen,
    never,
    serial_log,
)
from awan.engines.hypervisor.domain_xml import HostTraits
from awan.engines.hypervisor.libvirt_cards import define_nics, plug_nics
from awan.engines.hypervisor.libvirt_counters import CounterReader
from awan.engines.hypervisor.libvirt_domains import (
    Announcer,
    Domain,
    find,
    is_off,
    is_persistent,
    read_facts,
    read_power,
)
from awan.engines.hypervisor.libvirt_guest import Guests
from awan.engines.libvirt_nodes import (
    ENGINE,
    Connection,
    LibvirtNodes,
    LifecycleEvent,
    Watcher,
    has_code,
    read_host_uuid,
)
from awan.errors import EngineError, EngineRejected, EngineUnavailable

POWER_BUTTON_INTERVAL_S = 5.0
"""A guest that is still booting ignores the power button: it is pressed again after this time."""
POWER_BUTTON_TIMEOUT_S = 5.0
POWER_CUT_TIMEOUT_S = 30.0
"""libvirt sends SIGTERM, waits, then SIGKILL: up to 15 s for a QEMU that hangs."""
POWER_CUT_SETTLE_S = 5.0
NIC_RELEASE_LOOK_S = 2.0
"""A guest that says nothing is asked again for a card after this time."""
SCREENSHOT_TIMEOUT_S = 10.0
GIB = 1024**3

T = TypeVar("T")

log = structlog.get_logger(__name__)


_UNDEFINE_FLAGS = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)


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
        self._counters = CounterReader(counter_nodes)
        self._guests = Guests(self._call)

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
                domain = find(conn, domain_uuid)
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
            if is_off(power):
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
            domain = find(conn, instance_id)
            if domain is None:
                return
            try:
                domain.undefineFlags(_UNDEFINE_FLAGS)
            except libvirt.libvirtError as err:
                # A domain without a definition vanished with its QEMU.
                gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
                if not has_code(err, *gone) or find(conn, instance_id) is not None:
                    raise

        self._call(node, "undefine", undefine, instance_id)
        if self._find_power(node, instance_id) is not None:
            what = f"remove {instance_id} from {node.name}"
            raise EngineUnavailable(ENGINE, what, "the domain was started again meanwhile")

    def _is_known_after_calls(self, node: NodeEndpoint, instance_id: UUID) -> bool:
        """Whether the domain exists once no other call on it is in flight: a late `define` may still land."""

        def look(conn: Connection) -> bool:
            return find(conn, instance_id) is not None

        return self._call(node, "look again", look, instance_id)

    def find_domain(self, node: NodeEndpoint, instance_id: UUID) -> DomainFacts | None:
        def look(conn: Connection) -> DomainFacts | None:
            domain = find(conn, instance_id)
            if domain is None:
                return None
            facts = read_facts(domain)
            if facts is None or is_persistent(domain):
                return facts
            return replace(facts, is_persistent=False)

        return self._call(node, "find domain", look)

    def list_domains(
        self, node: NodeEndpoint, *, timeout_s: float = NODE_CALL_TIMEOUT_S
    ) -> list[DomainFacts]:
        def read(conn: Connection) -> list[DomainFacts]:
            # One call for all of them: asking each domain would be as many.
            found = conn.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_TRANSIENT)
            transient = {UUID(bytes=domain.UUID()) for domain in found}
            every = (read_facts(domain) for domain in conn.listAllDomains(0))
            return [
                replace(facts, is_persistent=False) if facts.domain_uuid in transient else facts
                for facts in every
                if facts is not None
            ]

        return self._call(node, "list domains", read, timeout_s=timeout_s)

    def read_counters(self, node: NodeEndpoint) -> NodeCounters:
        return self._counters.read(node)

    def guest_sign(self, node: NodeEndpoint, instance_id: UUID) -> GuestSign:
        return self._guests.guest_sign(node, instance_id)

    def set_password(
        self, node: NodeEndpoint, instance_id: UUID, username: str, password_hash: str
    ) -> AgentAnswer:
        return self._guests.set_password(node, instance_id, username, password_hash)

    def set_hostname(self, node: NodeEndpoint, instance_id: UUID, hostname: str) -> AgentAnswer:
        return self._guests.set_hostname(node, instance_id, hostname)

    def reset(self, node: NodeEndpoint, instance_id: UUID) -> None:
        def press(conn: Connection) -> None:
            conn.lookupByUUID(instance_id.bytes).reset(0)

        self._call(node, "reset", press, instance_id)

    def screenshot(self, node: NodeEndpoint, instance_id: UUID) -> bytes:
        return self._call(
            node,
            "screenshot",
            lambda conn: libvirt_screen.draw(conn, instance_id),
            instance_id,
            role="/screen",
            timeout_s=SCREENSHOT_TIMEOUT_S,
        )

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
                define_nics(domain, nics, host)
            return plug_nics(domain, nics, host) if domain.isActive() else []

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
        return self._call(
            node,
            "unlock console",
            lambda conn: libvirt_screen.unlock(conn, node, instance_id, password, valid_s),
            instance_id,
        )

    def lock_console(self, node: NodeEndpoint, instance_id: UUID) -> None:
        self._call(
            node, "lock console", lambda conn: libvirt_screen.lock(conn, instance_id), instance_id
        )

    def subscribe(
        self, node: NodeEndpoint, listener: Callable[[DomainEvent], None]
    ) -> Subscription:
        announcer = Announcer(node.node_id, listener)

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
        self._counters.close()

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
            domain = find(conn, instance_id)
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
            domain = find(conn, instance_id)
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
                if is_off(self._find_power(node, instance_id)):
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
            domain = find(conn, instance_id)
            if domain is None:
                return
            try:
                domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
            except libvirt.libvirtError as err:
                if not has_code(err, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
                    raise

        self._call(node, "press power", press, instance_id, timeout_s=POWER_BUTTON_TIMEOUT_S)


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
