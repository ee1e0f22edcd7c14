"""What libvirt says of domains, as facts and as events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias
from uuid import UUID

import libvirt

from awan.engines.hypervisor import (
    PAUSED_BUSY,
    PAUSED_IO_ERROR,
    UNEXPLAINED,
    DomainEvent,
    DomainFacts,
    Power,
    domain_xml,
)
from awan.engines.libvirt_nodes import Connection, LifecycleEvent, has_code
from awan.kit.clock import now

Domain: TypeAlias = Any
"""A `libvirt.virDomain`; the package has no type information."""

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


def find(conn: Connection, instance_id: UUID) -> Domain | None:
    try:
        return conn.lookupByUUID(instance_id.bytes)
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_DOMAIN):
            return None
        raise


def read_facts(domain: Domain) -> DomainFacts | None:
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


def is_persistent(domain: Domain) -> bool:
    try:
        return bool(domain.isPersistent())
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_DOMAIN):
            return False
        raise


def is_off(power: Power | None) -> bool:
    return power in (None, Power.STOPPED, Power.CRASHED)


class Announcer:
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
