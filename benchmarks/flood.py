"""A guest that floods: how long new connections of its neighbour take meanwhile, and what the switch makes of it.

A and B are on one node, B behind a firewall that lets in nothing but answers; B's server is on the other node. The
machine is shared by both nodes, the sender and the client, so a row without the switch shows what that alone costs.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from uuid import uuid4

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from awan.engines.fabric.firewall import FirewallSpec, RuleAction
from benchmarks.processor import cpu_of_tree
from benchmarks.report import percentile, publish_table
from lab import Lab, acquire_free_slot
from lab.hypervisor import CONNECTIONS_PER_PORT
from tests.engines.fabric_contract.conftest import Location, Tenant, opened_location

TITLE = "A neighbour's new connections while a guest floods"
PHASE_S, PAUSE_S, REST_S, ALARM_S = 10.0, 0.01, 4.0, 5.0
SERVER_PORT, CONNECT_TIMEOUT_S = 8080, 10.0
# Nobody answers there: the router drops what goes to it (of the prefix for benchmarks, RFC 2544).
NOWHERE, NOWHERE_NETWORK = "198.19.255.1", "198.19.255.0/24"
ALARMS = "/var/log/openvswitch/conntrack-limits.log"
SWITCH_LOG = "/var/log/openvswitch/ovs-vswitchd.log"
RST_ON_CLOSE = struct.pack("ii", 1, 0)
HEAD = (
    "A sends",
    "sent a second",
    "taken in by the switch",
    "B's new connection, median",
    "p99",
    "p99 against the baseline (goal: < 2)",
    "A's tracked connections, of its limit",
    "taken in and not tracked",
    "alarms",
    "ovs-vswitchd, of a core",
)


@dataclass(frozen=True)
class Flood:
    """What A sends: `kind` and `rate` as in `flood_sender`, nothing without a kind."""

    what: str
    kind: str = ""
    rate: int = 0
    is_plugged: bool = True


FLOODS = (
    Flood("nothing: the baseline"),
    Flood("1,000 half-open flows a second", "flows", 1_000),
    Flood("5,000 half-open flows a second", "flows", 5_000),
    Flood("20,000 half-open flows a second", "flows", 20_000),
    Flood("50,000 half-open flows a second", "flows", 50_000),
    Flood("half-open flows, as many as go", "flows"),
    Flood("5,000 frames of forged cards a second", "cards", 5_000),
    Flood("frames of forged cards, as many as go", "cards"),
    Flood("as many as go, with its cable pulled", "flows", is_plugged=False),
    Flood("nothing, again"),
)


@dataclass(frozen=True)
class Measured:
    """What was seen during one flood. Connections in seconds, those that failed until they did."""

    flood: Flood
    connections: list[float]
    sent: int
    sent_s: float
    taken_in: int
    taken_in_s: float
    tracked: int
    alarms: int
    switch_cores: float

    def cells(self, baseline_p99: float) -> list[str]:
        """The row of the table."""
        p99 = percentile(self.connections, 99)
        row = [self.flood.what]
        row += [f"{self.sent / self.sent_s:,.0f} ({self.sent:,})"] if self.sent else [""]
        is_tracked = self.flood.kind == "flows" and self.flood.is_plugged
        taken_in = f"{self.taken_in / self.taken_in_s:,.0f} a second"
        row += [taken_in]
        row += [f"{percentile(self.connections, 50) * 1000:.2f} ms (n={len(self.connections)})"]
        row += [f"{p99 * 1000:.2f} ms", f"{p99 / baseline_p99:.1f}"]
        row += [f"{self.tracked:,} of {CONNECTIONS_PER_PORT:,}" if is_tracked else ""]
        row += [f"{max(0, self.taken_in - self.tracked):,}" if is_tracked else ""]
        return [*row, str(self.alarms), f"{self.switch_cores:.0%}"]


def run(*, record: bool) -> None:
    """A lab slot without guests; its switch limits connections by `deploy/conntrack-limits`."""
    lab = Lab(acquire_free_slot(first=1))
    loads = [os.getloadavg()[0]]
    found = []
    try:
        lab.up()
        lab.router_exec(["ip", "route", "add", "blackhole", NOWHERE_NETWORK])
        with opened_location(lab) as location, _neighbours(location) as place:
            for flood in FLOODS:
                found.append(place.measure(flood))
                loads.append(os.getloadavg()[0])
                print(*found[-1].cells(percentile(found[0].connections, 99)), sep=" | ", flush=True)
            falls = place.falls()
    finally:
        lab.down()
    baseline_p99 = percentile(found[0].connections, 99)
    publish_table(
        TITLE,
        "python -m benchmarks flood",
        HEAD,
        [it.cells(baseline_p99) for it in found],
        record=record,
        notes=[
            f"{PHASE_S:.0f} s each; B connects one after the other. The switch is the one in user space, with one"
            " thread for packets; sender, client and the switches of both nodes share"
            f" {os.cpu_count()} cores. Switches that ended themselves meanwhile: {falls}. Load while it ran (one"
            f" minute): {min(loads):.1f} to {max(loads):.1f}.",
        ],
    )


@dataclass
class Place:
    """A and B on one node, the server of B on the other."""

    location: Location
    a: Tenant
    b: Tenant
    server: socket.socket
    server_address: tuple[str, int]

    def falls(self) -> int:
        """How often a switch of the location has been started again."""
        lab = self.location.lab
        count = ["grep", "-c", "crashes: pid", SWITCH_LOG]
        return sum(int(lab.node_exec(it.name, count, check=False).stdout) for it in lab.info.nodes)

    def measure(self, flood: Flood) -> Measured:
        """B's connections and the node's figures while A sends that; nothing of it is left behind."""
        if not flood.is_plugged:
            self.a.run_on_node("ovs-vsctl", "del-port", "br-int", self.a.name)
        taken_in, alarms, cpu = self._taken_in(), self._alarms(), self._cpu_s()
        began_at = time.monotonic()
        with self._sending(flood) as sender:
            connections = self._connect(until=lambda: sender.poll() is not None)
            sent, sent_s = (float(it) for it in (sender.communicate()[0].split() or (0, 1)))
        passed = time.monotonic() - began_at
        cpu = self._cpu_s() - cpu
        taken_in, taken_in_s = self._taken_in() - taken_in, time.monotonic() - began_at
        tracked = self._tracked() if flood.is_plugged else 0
        deadline = time.monotonic() + ALARM_S
        while self._alarms() == alarms and flood.kind and time.monotonic() < deadline:
            time.sleep(0.5)
        alarms = self._alarms() - alarms
        if not flood.is_plugged:
            self.a.attach()
            fabric = self.location.fabric
            assert fabric.wait_port_up(self.a.spec.port_id, self.a.node, timeout_s=15)
        self.a.run_on_node("ovs-appctl", "dpctl/flush-conntrack")
        time.sleep(REST_S)
        return Measured(
            flood,
            connections,
            int(sent),
            sent_s,
            taken_in,
            taken_in_s,
            tracked,
            alarms,
            cpu / passed,
        )

    @contextmanager
    def _sending(self, flood: Flood) -> Iterator[subprocess.Popen[str]]:
        """The process that sends; without anything to send, one that only takes as long."""
        gateway = str(self.location.network.ipv4_gateway)
        self.a.ping(gateway, count=1)
        mac = self.a.run("ip", "neigh", "show", gateway).partition("lladdr ")[2][:17]
        frame = bytes(
            Ether(src=self.a.spec.mac, dst=mac or "ff:ff:ff:ff:ff:ff")
            / IP(src=str(self.a.spec.ipv4), dst=NOWHERE)
            / TCP(sport=0, dport=0, seq=0, flags="S")
        )
        argv = ["sleep", str(PHASE_S)]
        with self.a.open_socket() as sock:
            if flood.kind:
                argv = [sys.executable, "-m", "benchmarks.flood_sender", str(sock.fileno())]
                argv += [flood.kind, str(flood.rate), str(PHASE_S), frame.hex()]
            sender = subprocess.Popen(
                argv, stdout=subprocess.PIPE, text=True, pass_fds=(sock.fileno(),)
            )
        try:
            yield sender
        finally:
            sender.kill()
            sender.wait()

    def _connect(self, until: Callable[[], bool]) -> list[float]:
        """How long each new connection of B took, one after the other."""
        took = []
        while not until():
            with self.b.open_inside(socket.socket) as client:
                client.settimeout(CONNECT_TIMEOUT_S)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
                began_at = time.perf_counter()
                with contextlib.suppress(OSError):
                    client.connect(self.server_address)
                took.append(time.perf_counter() - began_at)
            with contextlib.suppress(BlockingIOError):
                while True:
                    self.server.accept()[0].close()
            time.sleep(PAUSE_S)
        return took

    def _taken_in(self) -> int:
        """Packets that the datapath of the node has had from all of its ports."""
        shown = self.a.run_on_node("ovs-appctl", "dpif-netdev/pmd-stats-show")
        return sum(int(it) for it in re.findall(r"packets received: (\d+)", shown))

    def _tracked(self) -> int:
        """The connections in A's zone."""
        key = f"external_ids:ct-zone-{self.a.spec.port_id}"
        zone = self.a.run_on_node("ovs-vsctl", "get", "bridge", "br-int", key).strip().strip('"')
        shown = self.a.run_on_node("ovs-appctl", "dpctl/ct-get-limits", f"zone={zone}")
        found = re.search(rf"zone={zone},limit=\d+,count=(\d+)", shown)
        assert found, shown
        return int(found[1])

    def _alarms(self) -> int:
        """Lines in the node's log that tell of A."""
        return self.a.run_on_node("cat", ALARMS).count(f"ALARM port {self.a.spec.port_id} ")

    def _cpu_s(self) -> float:
        """Processor time of the node's switch so far."""
        pids = {it.name: it.pid for it in self.location.lab.status().processes}
        return cpu_of_tree(pids[f"{self.a.node}.ovs-vswitchd"])


@contextmanager
def _neighbours(location: Location) -> Iterator[Place]:
    server = location.add_tenant(1, 90)
    a, b = location.prepare_tenant(2, 91), location.prepare_tenant(2, 92)
    # A firewall that lets everything pass has A tracked as well.
    firewalls = [
        FirewallSpec(uuid4(), uuid4(), 1, policy=policy)
        for policy in (RuleAction.ACCEPT, RuleAction.DROP)
    ]
    for tenant, firewall in zip((a, b), firewalls, strict=True):
        location.fabric.ensure_firewall(firewall)
        tenant.spec = replace(tenant.spec, firewall_id=firewall.firewall_id)
        location.fabric.ensure_port(tenant.spec)
        tenant.attach()
        assert location.fabric.wait_port_up(tenant.spec.port_id, tenant.node, timeout_s=15)
    for tenant in (server, a, b):
        tenant.configure()
    address = (str(server.spec.ipv4), SERVER_PORT)

    def listen() -> socket.socket:
        sock = socket.create_server(address, backlog=128)
        sock.setblocking(False)
        return sock

    assert b.ping(server.spec.ipv4)
    with server.open_inside(listen) as listener:
        yield Place(location, a, b, listener, address)
