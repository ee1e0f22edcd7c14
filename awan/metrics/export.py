"""What Prometheus reads: a customer's instances, and the control plane. Read from the database at each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from uuid import UUID

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import RowMapping, text
from sqlalchemy.orm import Session

from awan import __version__
from awan.metrics.rules import BYTES_PER_GIB, BYTES_PER_MIB, GAP_MAX_S, NS_PER_S
from awan.settings import get_settings

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# What has not been read for as long as a gap is not shown any more.
_INSTANCES = text(
    """
    SELECT instance.instance_id, instance.hostname, location.code AS location, instance.vcpus,
        instance.memory_mib, instance.storage_gib, reading.read_at, reading.cpu_time_ns,
        reading.net_in_total_bytes, reading.net_out_total_bytes, reading.disk_read_total_bytes,
        reading.disk_written_total_bytes, reading.disk_used_bytes, reading.memory_used_bytes
    FROM instance
    JOIN resource ON resource.resource_id = instance.instance_id
    JOIN location ON location.location_id = instance.location_id
    LEFT JOIN metric_reading AS reading ON reading.instance_id = instance.instance_id
        AND reading.read_at > now() - make_interval(secs => :gap_s)
    WHERE resource.account_id = :account_id AND resource.kind = 'instance' AND resource.deleted_at IS NULL
    ORDER BY instance.hostname, instance.instance_id
    """
)
_INSTANCE_GAUGES = {
    "vcpus": ("vCPUs", "vcpus", 1),
    "memory_bytes": ("Memory", "memory_mib", BYTES_PER_MIB),
    "memory_used_bytes": ("Memory in use", "memory_used_bytes", 1),
    "storage_bytes": ("Storage", "storage_gib", BYTES_PER_GIB),
    "storage_used_bytes": ("Storage that the disks occupy", "disk_used_bytes", 1),
}
_INSTANCE_COUNTERS = {
    "network_receive_bytes": ("Received since the start", "net_in_total_bytes"),
    "network_transmit_bytes": ("Sent since the start", "net_out_total_bytes"),
    "disk_read_bytes": ("Read from disks since the start", "disk_read_total_bytes"),
    "disk_written_bytes": ("Written to disks since the start", "disk_written_total_bytes"),
}

_WORKERS = text(
    "SELECT executor_id AS worker, extract(epoch FROM now() - seen_at)::float8 AS age_s FROM worker ORDER BY 1"
)
_OPERATIONS = text(
    """
    SELECT kind, status, count(*) AS number, count(*) FILTER (WHERE deadline_at < now()) AS overdue,
        coalesce(extract(epoch FROM now() - min(created_at) FILTER (WHERE status = 'queued')), 0)::float8 AS waiting_s
    FROM operation WHERE status IN ('queued', 'running') GROUP BY kind, status ORDER BY 1, 2
    """
)
_INSTANCE_COUNTS = text(
    """
    SELECT location.code AS location, instance.observed_state AS state, count(*) AS number
    FROM instance JOIN location USING (location_id) WHERE instance.deleted_at IS NULL
    GROUP BY 1, 2 ORDER BY 1, 2
    """
)
_NODES = text(
    """
    SELECT node.name AS node, location.code AS location, node.cpu_threads, node.vcpus_used, node.dedicated_threads_used,
        node.memory_mib, node.memory_mib_used, node.disk_gib, node.disk_gib_used, metric.took_s, metric.domains,
        metric.failures, extract(epoch FROM now() - metric.collected_at)::float8 AS age_s
    FROM node JOIN location USING (location_id) LEFT JOIN metric_node AS metric USING (node_id)
    WHERE node.state IN ('active', 'cordoned') ORDER BY 2, 1
    """
)


class _Families(Collector):
    """Families made for one answer."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _render(families: Iterable[Metric]) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


def of_account(session: Session, account_id: UUID) -> bytes:
    """The account's instances. What is not known of one (it is off, its guest is silent) has no line."""
    parameters = {"account_id": account_id, "gap_s": GAP_MAX_S}
    return _render(_instance_families(session.execute(_INSTANCES, parameters).mappings().all()))


def _instance_families(rows: Iterable[RowMapping]) -> Iterator[Metric]:
    names = ["uuid", "hostname", "location"]
    labelled = [((str(row["instance_id"]), row["hostname"], row["location"]), row) for row in rows]
    up = GaugeMetricFamily("awan_instance_up", "Whether it runs and was measured.", labels=names)
    cpu = CounterMetricFamily(
        "awan_instance_cpu_seconds", "Processor time since the start.", labels=names
    )
    for labels, row in labelled:
        up.add_metric(labels, float(row["read_at"] is not None))
        if row["read_at"] is not None:
            cpu.add_metric(labels, row["cpu_time_ns"] / NS_PER_S)
    yield up
    yield cpu
    for name, (words, column, unit) in _INSTANCE_GAUGES.items():
        gauge = GaugeMetricFamily(f"awan_instance_{name}", f"{words}.", labels=names)
        for labels, row in labelled:
            if row[column] is not None:
                gauge.add_metric(labels, row[column] * unit)
        yield gauge
    for name, (words, column) in _INSTANCE_COUNTERS.items():
        counter = CounterMetricFamily(f"awan_instance_{name}", f"{words}.", labels=names)
        for labels, row in labelled:
            if row[column] is not None:
                counter.add_metric(labels, row[column])
        yield counter


def of_control_plane(session: Session) -> bytes:
    """This process's own figures (calls, processor time, memory), then the state of the whole cloud."""
    return generate_latest(REGISTRY) + _render(_control_plane_families(session))


def _control_plane_families(session: Session) -> Iterator[Metric]:
    build = GaugeMetricFamily("awan_build_info", "The running version.", labels=["version"])
    build.add_metric([__version__], 1)
    yield build
    yield from _worker_families(session)
    yield from _operation_families(session)
    instances = GaugeMetricFamily(
        "awan_instances", "Instances by what was last seen of them.", labels=["location", "state"]
    )
    for row in session.execute(_INSTANCE_COUNTS):
        instances.add_metric([row.location, row.state], row.number)
    yield instances
    yield from _node_families(session)


def _worker_families(session: Session) -> Iterator[Metric]:
    age = GaugeMetricFamily(
        "awan_worker_heartbeat_age_seconds", "Since a worker was last heard of.", labels=["worker"]
    )
    alive = GaugeMetricFamily("awan_worker_up", "Whether a worker is alive.", labels=["worker"])
    for row in session.execute(_WORKERS):
        age.add_metric([row.worker], row.age_s)
        alive.add_metric([row.worker], float(row.age_s <= get_settings().worker_lease_s))
    yield age
    yield alive


def _operation_families(session: Session) -> Iterator[Metric]:
    names = ["kind", "status"]
    number = GaugeMetricFamily(
        "awan_operations_unfinished", "Operations queued and running.", labels=names
    )
    overdue = GaugeMetricFamily(
        "awan_operations_overdue", "Unfinished operations past their deadline.", labels=names
    )
    waiting = GaugeMetricFamily(
        "awan_operations_queued_age_seconds",
        "How long the oldest operation has been waiting for a worker.",
        labels=["kind"],
    )
    for row in session.execute(_OPERATIONS):
        number.add_metric([row.kind, row.status], row.number)
        overdue.add_metric([row.kind, row.status], row.overdue)
        if row.status == "queued":
            waiting.add_metric([row.kind], row.waiting_s)
    yield number
    yield overdue
    yield waiting


_NODE_GAUGES = {
    "cpu_threads": ("Hardware threads", "cpu_threads", 1),
    "vcpus_placed": ("Shared vCPUs placed", "vcpus_used", 1),
    "dedicated_threads_placed": ("Dedicated threads placed", "dedicated_threads_used", 1),
    "memory_bytes": ("Memory", "memory_mib", BYTES_PER_MIB),
    "memory_placed_bytes": ("Memory placed", "memory_mib_used", BYTES_PER_MIB),
    "storage_bytes": ("Storage", "disk_gib", BYTES_PER_GIB),
    "storage_placed_bytes": ("Storage placed", "disk_gib_used", BYTES_PER_GIB),
    "instances_measured": ("Running instances whose counters were read", "domains", 1),
    "metrics_round_seconds": ("How long the last reading of counters took", "took_s", 1),
    "metrics_age_seconds": ("Since counters were last read", "age_s", 1),
}


def _node_families(session: Session) -> Iterator[Metric]:
    rows = session.execute(_NODES).mappings().all()
    names = ["location", "node"]
    up = GaugeMetricFamily(
        "awan_node_up", "Whether the node answered when its counters were last read.", labels=names
    )
    for row in rows:
        has_answered = row["age_s"] is not None and not row["failures"]
        up.add_metric([row["location"], row["node"]], float(has_answered))
    yield up
    for name, (words, column, unit) in _NODE_GAUGES.items():
        gauge = GaugeMetricFamily(f"awan_node_{name}", f"{words}.", labels=names)
        for row in rows:
            if row[column] is not None:
                gauge.add_metric([row["location"], row["node"]], row[column] * unit)
        yield gauge
