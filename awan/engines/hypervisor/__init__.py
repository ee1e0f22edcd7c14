"""Hypervisor engine: virtual machines ("domains") on one node.

All verbs are idempotent and blocking; each has a deadline and raises `EngineUnavailable` (node or QEMU does not
answer in time: a retry may help) or `EngineRejected` (it never will). A domain is addressed by the instance's uuid,
which is also the domain's uuid; its name on the node is `awan-<uuid>`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Literal, Protocol
from uuid import UUID

from awan.errors import EngineUnavailable

NODE_CALL_TIMEOUT_S = 30.0
GIVE_UP_INTERVAL_S = 0.5
NIC_RELEASE_TIMEOUT_S = 10.0
"""How long a guest may take to let go of a network card that is taken away."""
COUNTERS_TIMEOUT_S = 4.0
"""How long one bulk read of counters may take; `read_counters` makes at most two of them."""
CONSOLE_PASSWORD_MAX = 8
"""Characters of a VNC password; the protocol ignores further ones."""
UNEXPLAINED = "unknown"
"""The `detail` of a domain of which the node does not know why it is off: it has not run since the node started."""
PAUSED_IO_ERROR = "io_error"
"""The `detail` of a paused domain whose QEMU could not write to a disk, mostly for want of room in the pool."""
PAUSED_BUSY = "busy"
"""The `detail` of a domain that the node itself has paused for a moment, as it does while it starts one."""
SEEN_AFTER_RECONNECT = "seen_after_reconnect"
"""The `detail` of an event that the engine made up from what it found after events may have been missed."""


class CardHeld(EngineUnavailable):
    """A guest does not let go of a network card; it may do so later."""


def never() -> bool:
    """No wait is given up."""
    return False


@dataclass(frozen=True)
class NodeEndpoint:
    """How a node is reached. `uri` is a libvirt URI; `host_uuid` is verified when known (a changed host is refused)."""

    node_id: UUID
    name: str
    uri: str
    host_uuid: UUID | None = None


@dataclass(frozen=True)
class NodeFacts:
    """What a probe of a node found. Sizes in MiB and GiB; `cpu_threads` are the hardware threads in use, by number."""

    hostname: str
    host_uuid: UUID
    libvirt_version: str
    qemu_version: str
    cpu_model: str
    cpu_threads: tuple[int, ...]
    memory_mib: int
    kvm: bool
    pool_name: str
    pool_capacity_gib: int
    pool_available_gib: int


@dataclass(frozen=True)
class DiskSpec:
    """A disk of a domain. `path` and `backing` are what the volumes engine returned.

    Formats are explicit, never probed. `serial` is shown in the guest below /dev/disk/by-id.
    `target` is the SCSI target number on controller 0.
    """

    path: str
    format: Literal["qcow2", "raw"]
    target: int
    serial: str
    device: Literal["disk", "cdrom"] = "disk"
    backing: tuple[BackingSpec, ...] = ()


@dataclass(frozen=True)
class BackingSpec:
    """One read-only layer below a disk, nearest first. Its owner and mode are never changed by the hypervisor."""

    path: str
    format: Literal["qcow2", "raw"]


@dataclass(frozen=True)
class NicSpec:
    """A network card bound to a logical switch port: `port_id` is the port's uuid and name in the fabric."""

    port_id: UUID
    mac: str
    mtu: int = 1500


def card_device(port_id: UUID) -> str:
    """The node's own name of a card, which counters bear: 15 characters, the most that Linux takes.

    It does not begin with `vnet`: libvirt replaces such names.
    """
    return f"tap{port_id.hex[-12:]}"


@dataclass(frozen=True)
class DomainSpec:
    """The whole wished definition of a domain. Memory in MiB.

    `vcpus_max` and `memory_max_mib` are the tier's limits, reserved in the definition so that a later live change is
    possible. `cpu_shares` is the relative weight of shared CPUs. `threads` are the host's threads that the domain runs
    on: one for each vCPU, pinned, when it is `dedicated`; else any of them, or of all when there are none.
    """

    instance_id: UUID
    operation_id: UUID
    account_id: UUID
    title: str
    vcpus: int
    vcpus_max: int
    memory_mib: int
    memory_max_mib: int
    dedicated: bool
    cpu_shares: int
    disks: tuple[DiskSpec, ...]
    nics: tuple[NicSpec, ...]
    threads: tuple[int, ...] = ()


class Power(StrEnum):
    """Observed power state of a domain."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    CRASHED = "crashed"


@dataclass(frozen=True)
class DomainFacts:
    """A domain found on a node. `instance_id` is None for a domain that does not carry our metadata.

    `threads` are those of the host that its vCPUs may run on; none when it was never told.
    `detail` of one that is off is the engine's word for why ("shutdown" by its guest, "destroyed", "crashed", ...), or
    `UNEXPLAINED`; of one that is paused `PAUSED_IO_ERROR`, `PAUSED_BUSY` or another word. One that is not persistent
    has no definition any more and vanishes with its QEMU. `unlocked_until` is when the password ends that opens the
    screen of one that runs: in the past, or None, when none opens it; `datetime.max` when nothing has to end.
    """

    domain_uuid: UUID
    name: str
    power: Power
    instance_id: UUID | None
    operation_id: UUID | None
    disk_paths: tuple[str, ...] = ()
    port_ids: tuple[UUID, ...] = ()
    threads: tuple[int, ...] = ()
    detail: str = ""
    is_persistent: bool = True
    unlocked_until: datetime | None = None


@dataclass(frozen=True)
class DiskCounters:
    """All disks of a domain together, in bytes: read and written since its start, and what their files occupy."""

    read_bytes: int
    written_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class CardCounters:
    """What a network card has received and sent since it was plugged in. `device` as `card_device` names it."""

    device: str
    in_bytes: int
    out_bytes: int


@dataclass(frozen=True)
class DomainCounters:
    """What a running domain has used since its start, from the guest's point of view.

    `run_id` changes with each start: counters of two runs say nothing together. `disks` is None while the domain's
    QEMU does not answer, `memory_used_bytes` also while its guest tells nothing (no balloon driver, still booting).
    """

    domain_uuid: UUID
    run_id: int
    cpu_time_ns: int
    cards: tuple[CardCounters, ...]
    disks: DiskCounters | None
    memory_used_bytes: int | None

    @property
    def net_in_bytes(self) -> int:
        """What all cards together have received."""
        return sum(card.in_bytes for card in self.cards)

    @property
    def net_out_bytes(self) -> int:
        """What all cards together have sent."""
        return sum(card.out_bytes for card in self.cards)


@dataclass(frozen=True)
class NodeCounters:
    """The counters of all domains that run on a node, as they were at `read_at` (this process's clock)."""

    read_at: datetime
    domains: tuple[DomainCounters, ...]


@dataclass(frozen=True)
class DomainEvent:
    """A change of a domain's power that the node announced. `detail` is the engine's word for why."""

    node_id: UUID
    domain_uuid: UUID
    power: Power
    detail: str
    seen_at: datetime


class StopOutcome(StrEnum):
    """How a stop ended. After `GIVEN_UP` the domain may run on, or still end by itself."""

    ALREADY_STOPPED = "already_stopped"
    GRACEFUL = "graceful"
    FORCED = "forced"
    GIVEN_UP = "given_up"


class GuestSign(StrEnum):
    """Why a guest is believed usable; `NONE` means nothing was seen yet."""

    NONE = "none"
    AGENT = "agent"
    TRAFFIC = "traffic"


class AgentAnswer(StrEnum):
    """What became of a wish to the guest's agent: `SILENT`, nobody answers; `REFUSED`, the guest could not do it."""

    DONE = "done"
    SILENT = "silent"
    REFUSED = "refused"


@dataclass(frozen=True)
class ConsoleEndpoint:
    """Where the screen of a running domain is served as RFB ("VNC"), on the node's management address.

    `requires_tls`: nothing but VeNCrypt with certificates on both sides may be spoken with it.
    """

    host: str
    port: int
    requires_tls: bool


@dataclass(frozen=True)
class Subscription:
    """A registered listener; `cancel()` ends it."""

    cancel: Callable[[], None] = field(repr=False)


class Hypervisor(Protocol):
    """The contract. One object serves all nodes of a location; nodes are passed in."""

    def probe(self, node: NodeEndpoint) -> NodeFacts:
        """Facts of the node, read now. Raises EngineRejected when `host_uuid` is set and differs."""
        ...

    def ensure_defined(self, node: NodeEndpoint, spec: DomainSpec) -> None:
        """The domain exists with this definition (power unchanged). An existing one of the same uuid is redefined."""
        ...

    def ensure_shared_threads(self, node: NodeEndpoint, threads: tuple[int, ...]) -> None:
        """Every domain of ours that is not dedicated runs on these threads of the host alone, now and when restarted.

        Takes a call for each such domain that differs. Domains that are defined later say so in their own definition.
        """
        ...

    def ensure_running(self, node: NodeEndpoint, instance_id: UUID) -> None:
        """The domain runs. Raises EngineRejected when it is not defined."""
        ...

    def ensure_stopped(
        self,
        node: NodeEndpoint,
        instance_id: UUID,
        *,
        grace_s: float,
        force: bool = False,
        gives_up: Callable[[], bool] = never,
    ) -> StopOutcome:
        """The domain is off: ACPI power button, then power cut after `grace_s` seconds (at once with `force`).

        Waits on the node's events, not on a timer. An absent domain counts as stopped. `gives_up` is asked every
        `GIVE_UP_INTERVAL_S` of the grace; once it says so, the wait ends with `GIVEN_UP` and the power is not cut.
        """
        ...

    def ensure_absent(self, node: NodeEndpoint, instance_id: UUID) -> None:
        """The domain is gone, power cut first, with all its metadata. Absent already: no effect."""
        ...

    def find_domain(self, node: NodeEndpoint, instance_id: UUID) -> DomainFacts | None:
        """The domain, or None when the node does not know it."""
        ...

    def list_domains(
        self, node: NodeEndpoint, *, timeout_s: float = NODE_CALL_TIMEOUT_S
    ) -> list[DomainFacts]:
        """All domains of the node, also foreign ones, in one call. EngineUnavailable after `timeout_s`."""
        ...

    def read_counters(self, node: NodeEndpoint) -> NodeCounters:
        """The counters of all running domains, in one call for the whole node.

        Takes at most twice `COUNTERS_TIMEOUT_S`. A QEMU that hangs keeps only its own disks and memory from being
        read; where several hang, those of the node may be missing for a while, processor and network never are.
        """
        ...

    def guest_sign(self, node: NodeEndpoint, instance_id: UUID) -> GuestSign:
        """AGENT when the guest agent answers within 2 s; else TRAFFIC when the guest has sent packets; else NONE."""
        ...

    def set_password(
        self, node: NodeEndpoint, instance_id: UUID, username: str, password_hash: str
    ) -> AgentAnswer:
        """Asks the guest's agent to give the account this password, a crypt(3) hash as /etc/shadow holds it.

        SILENT also for a domain that is off or absent. Blocks 15 s at most.
        """
        ...

    def set_hostname(self, node: NodeEndpoint, instance_id: UUID, hostname: str) -> AgentAnswer:
        """Asks the guest's agent to give the running system this name, and to keep it over reboots.

        `hostname` is one label or a full name; its first label becomes the name of the host, the whole its FQDN.
        SILENT also for a domain that is off or absent. Blocks 30 s at most.
        """
        ...

    def reset(self, node: NodeEndpoint, instance_id: UUID) -> None:
        """The reset button: the guest starts anew at once, in the same QEMU, without being asked.

        Each call is another reset. Raises EngineRejected when the domain is absent or does not run.
        """
        ...

    def screenshot(self, node: NodeEndpoint, instance_id: UUID) -> bytes:
        """What the guest's screen shows, as a PNG. Raises EngineRejected when the domain is absent or off."""
        ...

    def read_serial_log(self, node: NodeEndpoint, instance_id: UUID, *, bytes_max: int) -> bytes:
        """The last bytes that the guest has printed on its serial console, as they are; over all of its runs.

        Whatever the guest chose to print: nothing of it may be trusted. `bytes_max` is 1 MiB at most. Raises
        EngineRejected when the domain is absent.
        """
        ...

    def ensure_media(
        self, node: NodeEndpoint, instance_id: UUID, target: int, path: str | None
    ) -> None:
        """The CD drive at SCSI target `target` holds the raw image `path`, or is empty, live and in the definition."""
        ...

    def ensure_nics(self, node: NodeEndpoint, instance_id: UUID, nics: tuple[NicSpec, ...]) -> None:
        """The domain has exactly these network cards, live and in its definition. Cards that stay are not touched.

        A card is taken from a running guest with the guest's help: until it lets go, the card goes on working.
        Raises CardHeld when the guest still holds one after `NIC_RELEASE_TIMEOUT_S` (it is booting, or has
        no system): then the other cards are right already, and the definition is for the next start.
        Raises EngineRejected when the domain is absent, or has no room for so many cards.
        """
        ...

    def unlock_console(
        self, node: NodeEndpoint, instance_id: UUID, *, password: str, valid_s: float
    ) -> ConsoleEndpoint:
        """From now on `password` (1 to 8 ASCII characters, no other) opens the screen, for `valid_s` seconds.

        Sessions that are open already go on. Only the running domain is changed: it starts locked the next time.
        Raises EngineRejected when the domain does not run, or its screen is not served on one reachable address.
        """
        ...

    def lock_console(self, node: NodeEndpoint, instance_id: UUID) -> None:
        """No password opens the screen. Open sessions go on. A domain that does not run or is absent: no effect."""
        ...

    def subscribe(
        self, node: NodeEndpoint, listener: Callable[[DomainEvent], None]
    ) -> Subscription:
        """Calls `listener` (from the engine's thread: it must only enqueue) at each change of power on the node."""
        ...

    def close(self) -> None:
        """Ends connections and threads."""
        ...
