"""Counters of all domains of a node.

libvirtd asks each QEMU for those of its disks and memory, one after the other, and hangs at one that does not answer:
`CounterReader.read` tells how it goes round it, on connections of its own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import UUID

import libvirt
import structlog

from awan.engines.hypervisor import (
    COUNTERS_TIMEOUT_S,
    CardCounters,
    DiskCounters,
    DomainCounters,
    NodeCounters,
    NodeEndpoint,
)
from awan.engines.hypervisor.libvirt_domains import Domain
from awan.engines.libvirt_nodes import Connection, LibvirtNodes, has_code
from awan.errors import EngineUnavailable
from awan.kit.clock import now

QEMU_READS_MAX = 2
"""Reads of counters that may hang in QEMUs of one node at once. Each holds a thread of libvirtd, and
one of the five requests that it serves a connection at once."""
KIB = 1024

log = structlog.get_logger(__name__)

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


class CounterReader:
    """Reads the counters of nodes. Thread-safe."""

    def __init__(self, nodes: LibvirtNodes | None = None) -> None:
        """`nodes` are the connections that are used; our own unless given."""
        # libvirt's client hands out answers late on a connection on which another call hangs (seen with 9.0: at
        # the next keepalive), so a read that hangs costs its connection, which is nobody else's.
        self._nodes = nodes or LibvirtNodes(
            calls_per_node=QEMU_READS_MAX + 2, overdue_per_connection=1
        )
        self._qemu_reads: Counter[UUID] = Counter()
        self._qemu_reads_lock = threading.Lock()

    def close(self) -> None:
        """Ends the connections."""
        self._nodes.close()

    def read(self, node: NodeEndpoint) -> NodeCounters:
        """As `Hypervisor.read_counters`.

        A read that hangs holds its QEMU's job in libvirtd, so the next one passes that QEMU by.

        So each QEMU that hangs costs one read, which is left behind and made up for at once without
        asking QEMUs. With `QEMU_READS_MAX` left behind none is asked until one of them has returned.
        Processor times that do not come from QEMU have to be read domain by domain: only then.
        """
        if self._qemu_reads[node.node_id] < QEMU_READS_MAX:
            try:
                return self._read(node, self._ask_qemus)
            except EngineUnavailable as err:
                if not self._qemu_reads[node.node_id]:
                    raise
                log.warning("hypervisor_counters_hang", node=node.name, error=str(err))
        return self._read(node, self._ask_host)

    def _read(
        self, node: NodeEndpoint, ask: Callable[[UUID, Connection], NodeCounters]
    ) -> NodeCounters:
        return self._nodes.call(
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
    return DomainCounters(
        domain_uuid=UUID(bytes=domain.UUID()),
        run_id=domain.ID(),
        cpu_time_ns=stats["cpu.time"],
        cards=_read_card_counters(stats),
        disks=_read_disk_counters(stats),
        memory_used_bytes=_read_memory_used(stats),
    )


def _read_card_counters(stats: dict[str, Any]) -> tuple[CardCounters, ...]:
    """All cards with counters: one that is just being plugged in has none yet."""
    names = (f"net.{number}" for number in range(stats.get("net.count", 0)))
    return tuple(
        CardCounters(
            stats.get(f"{name}.name", ""), stats[f"{name}.rx.bytes"], stats[f"{name}.tx.bytes"]
        )
        for name in names
        if f"{name}.rx.bytes" in stats and f"{name}.tx.bytes" in stats
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
