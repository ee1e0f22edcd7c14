"""Metrics: rounds of the collector on 500 domains of one simulated connection, and charts with a year of data.

The simulated connection answers as libvirt does, key by key, so that reading its answer and storing it is our real
work; what libvirtd itself takes, and the network, is not part of the figure.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg

from awan.engines.hypervisor import card_device
from awan.runtime.control_plane import ControlPlane
from benchmarks.processor import cpu_of_tree
from benchmarks.report import Row, percentile, publish, spread
from lab.http_api import Api
from lab.seed_catalogue import (
    Engine,
    SeedLocation,
    SeedNode,
    SeedPool,
    create_customer_key,
    ensure_customer,
    seed_location,
)

TITLE = "Metrics: 500 domains on a connection, a year of 10,000 instances"
DOMAINS, INSTANCES = 500, 10_000
ROUNDS, INTERVAL_S = 13, 10.0
CHART_CALLS = 1_000
PERIODS = ("hour", "day", "week", "month", "year")
FAKE = {"node_threads": 4096, "node_memory_mib": 64 * 1024**2, "node_disk_gib": 4 * 1024**2}


def run(*, record: bool) -> None:
    """A control plane with its worker stopped: the collector runs in this process, charts are asked for over HTTP."""
    with tempfile.TemporaryDirectory(prefix="awan-bench-") as directory:
        Path(directory).chmod(0o755)
        plane = ControlPlane(Path(directory) / "state")
        plane.up(lambda step, seconds: None, {"AWAN_LISTEN_PORT": "18078"})
        try:
            rows = _measure(plane)
        finally:
            plane.down()
    publish(TITLE, "python -m benchmarks metrics", rows, record=record)


def _measure(plane: ControlPlane) -> list[Row]:
    printed = re.search(r"awan_[A-Za-z0-9]+_[A-Za-z0-9]+", plane.run_command("init"))
    assert printed is not None
    admin_key = printed.group()
    with Api(plane.api_url, admin_key) as api:
        location_id = seed_location(api, _location())
        tier_id = int(api.get("admin/tiers")[0]["id"])
        template = api.post("admin/templates", {"name": "Debian", "version": "12"})
        account = ensure_customer(api, "Bench")
        key = create_customer_key(api, account, "bench")
    plane.supervisor.stop_program("worker")
    database_url = plane.environment()["AWAN_DATABASE_URL"]
    _use_database(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE api_key SET reads_per_minute = 1000000")
        instances = _fill_instances(connection, account, location_id, tier_id, template["id"])
        rows = _time_rounds(connection, instances[:DOMAINS])
        rows += _fill_year(connection)
    client = httpx.Client(
        base_url=plane.api_url, headers={"x-apikey": key}, timeout=30, trust_env=False
    )
    return rows + _time_charts(client, instances)


def _location() -> SeedLocation:
    return SeedLocation(
        name="Scale",
        code="scale",
        country="ID",
        engines={kind: Engine("fake", FAKE) for kind in ("hypervisor", "volumes", "fabric")},
        nodes=[SeedNode("n1", "fake://n1/")],
        pools=[SeedPool("198.18.0.0/20", "198.18.0.1")],
    )


def _use_database(database_url: str) -> None:
    from awan.kit.database import dispose_engine
    from awan.settings import get_settings

    os.environ["AWAN_DATABASE_URL"] = database_url
    get_settings.cache_clear()
    dispose_engine()


def _fill_instances(
    connection: Any, account: str, location_id: int, tier_id: int, template_id: int
) -> list[UUID]:
    """Running instances of one account; the first ones are on the node."""
    connection.execute(
        "INSERT INTO template_image (image_id, template_id, state, declared_format, format, sha256,"
        " size_bytes, virtual_size_bytes, has_agent)"
        " VALUES (gen_random_uuid(), %s, 'ready', 'qcow2', 'qcow2', repeat('ab', 32), 1024, 2147483648, true)",
        [template_id],
    )
    connection.execute(
        "CREATE TEMPORARY TABLE made AS"
        " SELECT gen_random_uuid() AS id, n FROM generate_series(1, %s) n",
        [INSTANCES],
    )
    connection.execute(
        "INSERT INTO resource (resource_id, kind, account_id, location_id, name)"
        " SELECT id, 'instance', %s, %s, 'host-' || n FROM made",
        [account, location_id],
    )
    connection.execute(
        """
        INSERT INTO instance (instance_id, account_id, location_id, tier_id, template_id, image_id, node_id, hostname,
            username, vcpus, cpu_mode, memory_mib, storage_gib, desired_state, observed_state, currency,
            create_operation_id)
        SELECT id, %s, %s, %s, %s, (SELECT image_id FROM template_image LIMIT 1),
            CASE WHEN n <= %s THEN (SELECT node_id FROM node LIMIT 1) END, 'host-' || n,
            'budi', 2, 'shared', 4096, 40, 'running', 'running', 'IDR', gen_random_uuid() FROM made
        """,
        [account, location_id, tier_id, template_id, DOMAINS],
    )
    _fill_private_cards(connection, account, location_id)
    connection.execute("VACUUM ANALYZE")
    return [row[0] for row in connection.execute("SELECT id FROM made ORDER BY n").fetchall()]


def _fill_private_cards(connection: Any, account: str, location_id: int) -> None:
    """Each instance on the node is in one private network."""
    connection.execute(
        """
        WITH made_network AS (
            INSERT INTO resource (resource_id, kind, account_id, location_id, name)
            VALUES (gen_random_uuid(), 'private_network', %s, %s, 'backend') RETURNING resource_id
        )
        INSERT INTO private_network (resource_id, account_id, location_id, cidr, state)
        SELECT resource_id, %s, %s, '10.20.0.0/16', 'active' FROM made_network
        """,
        [account, location_id, account, location_id],
    )
    connection.execute(
        """
        INSERT INTO nic (nic_id, instance_id, account_id, location_id, role, mac, network_id, private_ip, operation_id)
        SELECT gen_random_uuid(), id, %s, %s, 'private', 'mac-' || n, network_id, inet '10.20.0.1' + n,
            gen_random_uuid()
        FROM made CROSS JOIN private_network WHERE n <= %s
        """,
        [account, location_id, DOMAINS],
    )


class _Domain:
    """What of a `libvirt.virDomain` is read beside its statistics."""

    def __init__(self, instance_id: UUID, number: int) -> None:
        self._uuid, self._number = instance_id.bytes, number

    def UUID(self) -> bytes:  # noqa: N802 libvirt's name
        return self._uuid

    def ID(self) -> int:  # noqa: N802 libvirt's name
        return self._number


class _Connection:
    """A libvirt connection to a node with busy guests: each with two vCPUs, two network cards, a disk and a seed.

    `cards` are the private ones.
    """

    def __init__(self, instances: list[UUID], cards: dict[UUID, UUID]) -> None:
        self._cards = [card_device(cards[uuid]) for uuid in instances]
        self._domains = [_Domain(uuid, number) for number, uuid in enumerate(instances, 1)]
        self._reads = 0

    def getAllDomainStats(  # noqa: N802 libvirt's name
        self, _stats: int, _flags: int
    ) -> list[tuple[_Domain, dict[str, Any]]]:
        self._reads += 1
        return [(domain, self._stats(domain.ID())) for domain in self._domains]

    def _stats(self, number: int) -> dict[str, Any]:
        grown = self._reads * number
        stats: dict[str, Any] = {
            "cpu.time": grown * 1_000_000, "cpu.user": grown * 900_000, "cpu.system": grown * 100_000,
            "cpu.cache.monitor.count": 0, "cpu.haltpoll.success.time": 0, "cpu.haltpoll.fail.time": 0,
            "balloon.current": 4194304, "balloon.maximum": 4194304, "balloon.swap_in": 0, "balloon.swap_out": 0,
            "balloon.major_fault": grown, "balloon.minor_fault": grown, "balloon.unused": 2000000,
            "balloon.available": 4000000, "balloon.usable": 3000000, "balloon.last-update": 1795000000,
            "balloon.disk_caches": 500000, "balloon.rss": 4300000, "net.count": 2, "net.0.name": f"tap{number}",
            "net.1.name": self._cards[number - 1],
        }  # fmt: skip
        for card, way in product((0, 1), ("rx", "tx")):
            stats |= {
                f"net.{card}.{way}.bytes": grown * 1000, f"net.{card}.{way}.pkts": grown, f"net.{card}.{way}.errs": 0,
                f"net.{card}.{way}.drop": 0,
            }  # fmt: skip
        stats["block.count"] = 2
        for disk, name in enumerate(("sda", "sdb")):
            stats |= {
                f"block.{disk}.name": name, f"block.{disk}.path": f"/pool/{name}-{number}",
                f"block.{disk}.backingIndex": disk, f"block.{disk}.allocation": 2**30,
                f"block.{disk}.capacity": 2**35, f"block.{disk}.physical": 2**30,
            }  # fmt: skip
            for way in ("rd", "wr", "fl"):
                stats |= {f"block.{disk}.{way}.reqs": grown, f"block.{disk}.{way}.times": grown}
            for way in ("rd", "wr"):
                stats[f"block.{disk}.{way}.bytes"] = grown * 4096
        return stats


class _Nodes:
    """`LibvirtNodes` whose connection is always there."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def call(self, _node: Any, _name: str, fn: Callable[[Any], Any], **_: Any) -> Any:
        return fn(self._connection)


def _time_rounds(connection: Any, instances: list[UUID]) -> list[Row]:
    """Rounds at the real interval, with the polls between them, in this process."""
    from types import SimpleNamespace

    from awan.engines.hypervisor.libvirt import LibvirtHypervisor
    from awan.fleet.service import ReachedNode, node_with_engines
    from awan.metrics import collector, history

    cards = dict(connection.execute("SELECT instance_id, nic_id FROM nic").fetchall())
    simulated: Any = _Connection(instances, cards)
    nodes: Any = _Nodes(simulated)
    hypervisor = LibvirtHypervisor(nodes, pool_name="awan", counter_nodes=nodes)
    opened: Any = SimpleNamespace(hypervisor=hypervisor)

    def reach(session: Any, node_id: UUID) -> ReachedNode:
        """The location's rows name simulated engines; this one stands in for a real node's."""
        return replace(node_with_engines(session, node_id), engines=opened)

    collector.node_with_engines = reach  # type: ignore[assignment]
    history.make_partitions()
    made_s, server_pid = _time_making(simulated), _postmaster(connection)
    wall: list[float] = []
    cpu_s = server_s = 0.0
    for number in range(ROUNDS):
        began, own, server = time.monotonic(), time.process_time(), cpu_of_tree(server_pid)
        connection.execute("UPDATE metric_node SET due_at = now()")
        claims = collector.claim_due()
        assert len(claims) == 1
        assert collector.collect(claims[0])
        round_s = time.monotonic() - began
        read = connection.execute("SELECT domains FROM metric_node").fetchone()[0]
        assert read == DOMAINS, f"{read} domains were read"
        for _ in range(int(INTERVAL_S / collector.POLL_S) - 1):
            assert collector.claim_due() == []
        if number:  # the first one opens connections and knows no earlier counters
            wall.append(round_s)
            cpu_s += time.process_time() - own - made_s
            server_s += cpu_of_tree(server_pid) - server
        time.sleep(max(0.0, INTERVAL_S - (time.monotonic() - began)))
    stored = connection.execute("SELECT count(*) FROM metric_point WHERE step_s = 60").fetchone()[0]
    assert stored >= DOMAINS, "no minute was completed"
    readings = connection.execute("SELECT count(*) FROM metric_card_reading").fetchone()[0]
    assert readings == DOMAINS, "private cards were not read"
    elapsed_s = len(wall) * INTERVAL_S
    return [
        Row(f"round of {DOMAINS} domains: median", spread(wall, "s", 3)),
        Row("the same, longest", f"{max(wall):.3f} s", "≤ 1 s"),
        Row(
            "collector's share of a core, rounds every 10 s and polls every second",
            f"{100 * cpu_s / elapsed_s:.2f} %",
            "≤ 3 %",
        ),
        Row(
            "PostgreSQL's share of a core meanwhile (API's and supervisor's calls included)",
            f"{100 * server_s / elapsed_s:.2f} %",
        ),
    ]


def _time_making(simulated: _Connection) -> float:
    """What making up the answer itself takes of the processor: no part of the collector's work."""
    began = time.process_time()
    for _ in range(5):
        simulated.getAllDomainStats(0, 0)
    return (time.process_time() - began) / 5


def _postmaster(connection: Any) -> int:
    pid = connection.info.backend_pid
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _fill_year(connection: Any) -> list[Row]:
    """Points of every length for as long as they are kept, in the order in which they would have come."""
    from awan.kit.clock import now
    from awan.metrics import history
    from awan.metrics.rules import floor

    moment = now()
    for keeping in history.KEEPINGS:
        begin = moment - timedelta(seconds=keeping.keep_s)
        for number in range(keeping.keep_s // keeping.width_s + 1):
            past = begin + timedelta(seconds=number * keeping.width_s)
            history.make_partitions(past, [replace(keeping, ahead=1)])
        sums, peaks = ", ".join(history.ADDED), ", ".join(history.PEAKS)
        # Within the step: what a guest with 2 vCPUs, 4 GiB and 40 GiB uses.
        connection.execute(
            f"""
            INSERT INTO metric_point (step_s, instance_id, starts_at, {sums}{", " + peaks if keeping.source_s else ""})
            SELECT {keeping.step_s}, instance_id, at, {_values(keeping.step_s, has_peaks=bool(keeping.source_s))}
            FROM generate_series(%s::timestamptz, %s, make_interval(secs => {keeping.step_s})) AS at
            CROSS JOIN instance
            ON CONFLICT DO NOTHING
            """,
            [floor(begin, keeping.step_s), moment],
        )
    connection.execute("VACUUM ANALYZE")
    began = time.monotonic()
    history.roll_up()
    first_s = time.monotonic() - began
    began = time.monotonic()
    history.roll_up()
    number, size = connection.execute(
        "SELECT (SELECT count(*) FROM metric_point),"
        " (SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('metric_point') WHERE isleaf)"
    ).fetchone()
    return [
        Row(
            f"points of {INSTANCES:,} instances, all lengths kept in full",
            f"{number:,} rows, {size / 1024**3:.1f} GiB with indexes",
        ),
        Row(
            "roll-up of all four longer lengths, as every 5 minutes",
            f"{time.monotonic() - began:.1f} s (the first, over all that is kept: {first_s:.1f} s)",
        ),
    ]


def _values(step_s: int, *, has_peaks: bool) -> str:
    limit = f"{step_s} * 4294967296.0, {step_s} * 42949672960.0"
    sums = (
        f"{step_s}, random() * {step_s}, 2 * {step_s}, {limit}, random() * 1e6, random() * 1e6, {step_s},"
        f" random() * 1e6, random() * 1e6, {step_s} * 1e10, {step_s}, {step_s} * 2e9"
    )
    peaks = (
        "0.9, 2, 4294967296.0, 42949672960.0, random() * 1e5, random() * 1e5, 1e6, 1e6, 1e10, 3e9"
    )
    return f"{sums}, {peaks}" if has_peaks else sums


def _time_charts(client: httpx.Client, instances: list[UUID]) -> list[Row]:
    """Random instances, each period in turn, over loopback HTTP."""
    chosen = random.Random(1)
    times: dict[str, list[float]] = {period: [] for period in PERIODS}
    for number in range(CHART_CALLS):
        period = PERIODS[number % len(PERIODS)]
        path = f"/instances/{chosen.choice(instances)}/rrd"
        began = time.perf_counter()
        answer = client.get(
            path, params={"periode": period, "cf": "MAX" if number % 2 else "AVERAGE"}
        )
        times[period].append((time.perf_counter() - began) * 1000)
        assert answer.status_code == 200, answer.text
        known = [point for point in answer.json()["data"]["points"] if point["cpu"] is not None]
        assert len(known) >= 55, period
    together = [one for found in times.values() for one in found]
    rows = [
        Row("RRD data, all periods: median", spread(together, "ms", 1)),
        Row("the same, p95", f"{percentile(together, 95):.1f} ms", "≤ 50 ms"),
    ]
    return rows + [
        Row(f"period {period}, p95", f"{percentile(found, 95):.1f} ms")
        for period, found in times.items()
    ]
