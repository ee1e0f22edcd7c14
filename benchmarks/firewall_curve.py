"""How changes of firewalls and ports grow with their location: up to 10,000 ports, each with a firewall of its own.

Both nodes carry ports of all pools, so each of them holds the whole location: the worst case for a node.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from uuid import UUID, uuid4

from awan.engines.fabric import PortSpec, PublicNetworkSpec
from awan.engines.fabric.firewall import FirewallSpec, RuleAction
from awan.engines.fabric.ovn import OvnFabric
from benchmarks.chart import Line, draw
from benchmarks.firewall import bind, make_rules, unbind
from benchmarks.processor import cpu_of_tree
from benchmarks.report import percentile, publish_table
from lab import Lab, acquire_free_slot
from lab.processes import run as run_command

TITLE = "Firewalls and ports, by the size of the location"
PICTURE = Path(__file__).parent.parent / "docs" / "ports-per-location.svg"
SIZES = (10, 100, 500, 1_000, 2_000, 5_000, 10_000)
PORTS_PER_POOL = 1_000
# Every fiftieth port has a firewall of nine rules and the policy DROP: ten ACLs, so a fifth as many as ports.
RULED_EVERY, RULES = 50, 9
EDITS, NEW_PORTS = 20, 10
TIMEOUT_S, REST_S = 120.0, 1.0
HEAD = (
    "ports",
    "ACLs",
    "one rule changed → node has it, median",
    "p95",
    "port more → up, median",
    "p95",
    "our own call, median",
    "one run of northd",
    "northd's processor time a change",
    "its share of the edit",
    "both ovn-controllers'",
    "northd's memory",
)
RUN_STOPWATCHES = ("ovnnb_db_run", "build_lflows")


def run(*, record: bool) -> None:
    """A lab slot without guests that is filled step by step; the picture is drawn with `record` alone."""
    lab = Lab(acquire_free_slot(first=1))
    loads = [os.getloadavg()[0]]
    try:
        lab.up()
        location = Location(lab)
        try:
            points = []
            for size in SIZES:
                points.append(location.measure(size))
                loads.append(os.getloadavg()[0])
                print(*points[-1].cells(), sep=", ", flush=True)
        finally:
            location.close()
    finally:
        lab.down()
    publish_table(
        TITLE,
        "python -m benchmarks firewall --curve",
        HEAD,
        [point.cells() for point in points],
        record=record,
        notes=[
            f"{EDITS} edits and {NEW_PORTS} new ports at each size. Pools of {PORTS_PER_POOL:,} ports, each on both"
            " nodes; every port has a firewall of its own. Two edits never overlap here. Load while it ran (one"
            f" minute, {os.cpu_count()} cores): {min(loads):.1f} to {max(loads):.1f}.",
        ],
    )
    if record:
        PICTURE.write_text(_picture(points))


@dataclass(frozen=True)
class Point:
    """What was measured at one size. Times in seconds; the processor's are for one edit."""

    ports: int
    acls: int
    edits: list[float]
    new_ports: list[float]
    calls: list[float]
    northd_run_s: float
    northd_cpu_s: float
    controllers_cpu_s: float
    northd_bytes: int

    def cells(self) -> list[str]:
        """The row of the table."""
        share = min(1.0, self.northd_cpu_s / percentile(self.edits, 50))
        return [
            f"{self.ports:,}",
            f"{self.acls:,}",
            _ms(percentile(self.edits, 50)),
            _ms(percentile(self.edits, 95)),
            _ms(percentile(self.new_ports, 50)),
            _ms(percentile(self.new_ports, 95)),
            _ms(percentile(self.calls, 50)),
            _ms(self.northd_run_s),
            _ms(self.northd_cpu_s),
            f"{share:.0%}",
            _ms(self.controllers_cpu_s),
            f"{self.northd_bytes / 2**20:.0f} MiB",
        ]


class Location:
    """The slot's OVN, filled with ports that have no guests behind them."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._fabric = OvnFabric(lab.info.ovn_nb, lab.info.ovn_sb, timeout_s=TIMEOUT_S)
        self._made = 0
        self._acls = 0
        self._extra = 0
        self._edited: FirewallSpec | None = None

    def close(self) -> None:
        """Ends the connections."""
        self._fabric.close()

    def measure(self, size: int) -> Point:
        """Fills the location up to `size` ports and measures there."""
        with self._northd_paused():
            while self._made < size:
                self._add_port()
        self._settle()
        pids = self._pids()
        self._northd("stopwatch/reset")
        before = {name: cpu_of_tree(pid) for name, pid in pids.items()}
        edits, calls = self._edit()
        spent = {name: (cpu_of_tree(pid) - before[name]) / EDITS for name, pid in pids.items()}
        northd_run_s = self._northd_run_s()
        acls = self._acls
        new_ports = [self._time_new_port() for _ in range(NEW_PORTS)]
        return Point(
            size,
            acls,
            edits,
            new_ports,
            calls,
            northd_run_s,
            spent["central.northd"],
            sum(cpu_s for name, cpu_s in spent.items() if name.endswith(".ovn-controller")),
            _resident_bytes(pids["central.northd"]),
        )

    def _add_port(self) -> PortSpec:
        """A port with its firewall; the first two of a pool are bound, one on each node."""
        pool, number = divmod(self._made, PORTS_PER_POOL)
        network = self._network(pool)
        if number == 0:
            self._fabric.ensure_public_network(network)
        firewall = FirewallSpec(uuid4(), uuid4(), 1)
        if self._made % RULED_EVERY == 0:
            firewall = replace(firewall, policy=RuleAction.DROP, rules=make_rules(RULES))
            self._acls += RULES + 1
        self._fabric.ensure_firewall(firewall)
        if self._edited is None:
            self._edited = firewall
        spec = _port(network, pool, number, firewall.firewall_id)
        if number < len(self._lab.info.nodes):
            bind(self._lab, self._lab.info.nodes[number].name, spec)
        self._fabric.ensure_port(spec)
        self._made += 1
        return spec

    def _network(self, pool: int) -> PublicNetworkSpec:
        cidr = IPv4Network((int(IPv4Address("198.18.0.0")) + pool * 2048, 21))
        return PublicNetworkSpec(
            switch=f"public-curve-{pool}",
            physical_network=self._lab.info.physical_network,
            vlan=100 + pool,
            ipv4_cidr=cidr,
            ipv4_gateway=cidr.network_address + 1,
            ipv6_cidr=None,
            ipv6_gateway=None,
            dns_servers=(),
        )

    def _settle(self) -> None:
        """Every node has all that there is, and the databases are at rest."""
        for node in self._lab.info.nodes:
            assert self._fabric.wait_applied(node.system_id, timeout_s=10 * TIMEOUT_S)
        time.sleep(REST_S)

    def _edit(self) -> tuple[list[float], list[float]]:
        """Seconds until the node had it, and of our own call alone, for each edit of one rule."""
        assert self._edited is not None
        firewall, took, calls = self._edited, [], []
        for number in range(EDITS):
            rules = (*firewall.rules[:-1], *make_rules(1, 1000 * (number + 1)))
            firewall = replace(firewall, revision=firewall.revision + 1, rules=rules)
            began_at = time.perf_counter()
            self._fabric.ensure_firewall(firewall)
            calls.append(time.perf_counter() - began_at)
            applied = self._fabric.wait_firewall_applied(firewall.firewall_id, timeout_s=TIMEOUT_S)
            assert applied, "the node does not confirm"
            took.append(time.perf_counter() - began_at)
        self._edited = firewall
        return took, calls

    def _time_new_port(self) -> float:
        """Seconds from the call that makes one port more, its interface waiting on the node, until it is up.

        It goes again afterwards.
        """
        node = self._lab.info.nodes[0]
        pool = (self._made - 1) // PORTS_PER_POOL
        firewall = FirewallSpec(uuid4(), uuid4(), 1)
        self._extra += 1
        number = PORTS_PER_POOL + self._extra
        spec = _port(self._network(pool), pool, number, firewall.firewall_id)
        bind(self._lab, node.name, spec)
        self._fabric.ensure_firewall(firewall)
        self._settle()
        began_at = time.perf_counter()
        self._fabric.ensure_port(spec)
        assert self._fabric.wait_port_up(spec.port_id, node.system_id, timeout_s=TIMEOUT_S)
        took = time.perf_counter() - began_at
        self._fabric.ensure_port_absent(spec.port_id)
        self._fabric.ensure_firewall_absent(firewall.firewall_id)
        unbind(self._lab, node.name, spec)
        return took

    @contextmanager
    def _northd_paused(self) -> Iterator[None]:
        """Inside, ports are made without a run of northd for each."""
        self._northd("pause")
        try:
            yield
        finally:
            # Now and then it does not get its lock in the southbound database back: then it is asked again.
            while "active" not in self._northd("status"):
                self._northd("pause")
                self._northd("resume")
                time.sleep(REST_S)

    def _northd(self, *command: str) -> str:
        socket = self._lab.layout.run_dir / "ovn" / "northd.ctl"
        return run_command(["ovn-appctl", "-t", str(socket), *command]).stdout

    def _northd_run_s(self) -> float:
        """How long northd takes for one run over everything, on average since the stopwatches were reset."""
        return sum(_average_s(self._northd("stopwatch/show", name)) for name in RUN_STOPWATCHES)

    def _pids(self) -> Mapping[str, int]:
        return {it.name: it.pid for it in self._lab.status().processes}


def _average_s(shown: str) -> float:
    found = re.search(r"Long term average: ([\d.]+)", shown)
    assert found, shown
    return float(found[1]) / 1000


def _port(network: PublicNetworkSpec, pool: int, number: int, firewall_id: UUID) -> PortSpec:
    return PortSpec(
        port_id=uuid4(),
        switch=network.switch,
        mac=f"02:bc:00:{pool:02x}:{number >> 8:02x}:{number & 255:02x}",
        ipv4=network.ipv4_cidr.network_address + 16 + number,
        ipv6=None,
        hostname=f"curve-{pool}-{number}",
        instance_id=uuid4(),
        account_id=uuid4(),
        operation_id=uuid4(),
        firewall_id=firewall_id,
    )


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


def _picture(points: list[Point]) -> str:
    return draw(
        "How long a change takes, by the ports of the location",
        "ports",
        "ms",
        [
            Line("port more → up, p95", [(it.ports, _p95_ms(it.new_ports)) for it in points]),
            Line("rule changed → node, p95", [(it.ports, _p95_ms(it.edits)) for it in points]),
            Line(
                "northd, processor time a change",
                [(it.ports, max(1.0, it.northd_cpu_s * 1000)) for it in points],
            ),
            Line("our own call, p95", [(it.ports, _p95_ms(it.calls)) for it in points]),
        ],
    )


def _p95_ms(values: list[float]) -> float:
    return percentile(values, 95) * 1000
