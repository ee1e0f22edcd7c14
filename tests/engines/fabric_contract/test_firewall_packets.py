"""What a firewall lets through and what it stops, shown by packets between tenants of a lab location."""

from __future__ import annotations

import dataclasses
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from uuid import uuid4

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from awan.engines.fabric.firewall import (
    AddressSetSpec,
    Direction,
    FirewallGroupSpec,
    FirewallSpec,
    RuleAction,
    RuleProtocol,
    RuleSpec,
)
from tests.engines.fabric_contract.test_firewall_contract import rule
from tests.engines.fabric_contract.test_packets import UDHCPC_SCRIPT
from tests.firewall.reference import Probe, decide

pytestmark = pytest.mark.lab

CUT_S = 2.0
PURGED_S = 1.5  # after that, `deploy/datapath-flows` has seen to a change that is in force
QUIET_S = 0.5  # how long a frame is given to arrive after the last one that must
PORTS = (22, 80, 8050, 9999)
FIREWALLS, FIREWALLS_FULL = 5, 150
Network = IPv4Network | IPv6Network
ANY = {"protocol": RuleProtocol.ANY, "ports": None}


@dataclass
class Guarded:
    """B behind a firewall on one node; A on the other, C beside B."""

    location: object
    a: object
    b: object
    c: object
    spec: FirewallSpec

    def change(self, **changes: object) -> None:
        """Another firewall, in force when this returns."""
        self.spec = dataclasses.replace(self.spec, revision=self.spec.revision + 1, **changes)
        fabric = self.location.fabric  # type: ignore[attr-defined]
        fabric.ensure_firewall(self.spec)
        assert fabric.wait_firewall_applied(self.spec.firewall_id, timeout_s=5)


def add_guarded(location, node: int, host: int, spec: FirewallSpec):
    """A tenant that is in the firewall from its first instant."""
    location.fabric.ensure_firewall(spec)
    tenant = location.prepare_tenant(node, host)
    tenant.spec = dataclasses.replace(tenant.spec, firewall_id=spec.firewall_id)
    location.fabric.ensure_port(tenant.spec)
    return tenant


@pytest.fixture
def guarded(location) -> Iterator[Guarded]:
    a, c = location.add_tenant(1, 40), location.add_tenant(2, 42)
    spec = FirewallSpec(uuid4(), uuid4(), 1)
    b = add_guarded(location, 2, 41, spec)
    b.attach()
    assert location.fabric.wait_port_up(b.spec.port_id, b.node, timeout_s=15)
    for tenant in (a, b, c):
        tenant.configure()
    yield Guarded(location, a, b, c, spec)
    location.fabric.ensure_firewall_absent(spec.firewall_id)
    for it in location.fabric.list_firewall_groups():
        location.fabric.ensure_firewall_group_absent(it.group_id)


def frame(a, b, layer: Packet, version: int = 4) -> Packet:
    """A frame of A to B with `layer` on IP."""
    ip = (
        IP(src=str(a.spec.ipv4), dst=str(b.spec.ipv4))
        if version == 4
        else IPv6(src=str(a.spec.ipv6), dst=str(b.spec.ipv6))
    )
    return Ether(src=a.spec.mac, dst=b.spec.mac) / ip / layer / Raw(b"firewall" * 4)


def arrives(a, b, layer: Packet, version: int = 4) -> bool:
    """Whether A's packet gets to B."""
    wanted = bytes(frame(a, b, layer, version))
    with b.listen() as capture:
        a.send(wanted)
        return capture.wait_for(wanted, timeout_s=QUIET_S)


def test_closed_but_for_what_the_guest_begins(guarded: Guarded) -> None:
    """Replies, ARP and neighbour discovery pass; nothing else does, whether it was let in before or not."""
    a, b, location = guarded.a, guarded.b, guarded.location
    assert a.ping(b.spec.ipv4, count=1)
    old = UDP(sport=1000, dport=53)
    assert arrives(a, b, old)
    guarded.change(policy=RuleAction.DROP)
    for version in (4, 6):
        assert not arrives(a, b, UDP(sport=1001, dport=53), version)
        assert not arrives(a, b, TCP(sport=1001, dport=22, flags="S"), version)
    assert not arrives(a, b, old)
    assert not a.ping(b.spec.ipv4, count=1)
    assert not a.ping(b.spec.ipv6, count=1)
    b.run("ip", "neigh", "flush", "all")
    a.run("ip", "neigh", "flush", "all")
    assert b.ping(a.spec.ipv4, count=2)
    assert b.ping(a.spec.ipv6, count=2)
    assert b.ping(location.network.ipv6_gateway, count=2)
    guarded.change(policy=RuleAction.ACCEPT)
    assert arrives(a, b, old)


def test_dhcp_passes_where_nothing_else_does(guarded: Guarded) -> None:
    tenant = guarded.b
    shut = {"policy": RuleAction.DROP, "outbound_policy": RuleAction.DROP}
    guarded.change(**shut, rules=(rule(1, direction=Direction.OUT, action=RuleAction.DROP, **ANY),))
    assert not tenant.ping(guarded.location.network.ipv4_gateway, count=1)
    script = f"/tmp/{tenant.name}.sh"
    tenant.run_on_node("sh", "-c", f"cat > {script} && chmod +x {script}", stdin=UDHCPC_SCRIPT)
    client = ["busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "5", "-T", "1"]
    assert f"ip={tenant.spec.ipv4}" in tenant.run(*client, "-s", script)


def test_reject_answers(guarded: Guarded) -> None:
    a, b = guarded.a, guarded.b
    guarded.change(policy=RuleAction.REJECT)
    with a.listen() as answers, b.listen() as capture:
        for version in (4, 6):
            a.send(bytes(frame(a, b, TCP(sport=1100, dport=22, flags="S", seq=7), version)))
            reset = answers.wait_for_packet(
                lambda it, v=version: it.haslayer(TCP) and it[1].version == v
            )
            assert "R" in reset[TCP].flags
            a.send(bytes(frame(a, b, UDP(sport=1100, dport=53), version)))
        answers.wait_for_packet(lambda it: it.haslayer(ICMP) and it[ICMP].type == 3)
        answers.wait_for_packet(lambda it: it.haslayer(ICMPv6DestUnreach))
        sent = [Ether(it) for it in capture.frames]
    assert not any(it.haslayer(Raw) and b"firewall" in it[Raw].load for it in sent)


def test_outbound_rules(guarded: Guarded) -> None:
    a, b = guarded.a, guarded.b
    dns = rule(1, direction=Direction.OUT, protocol=RuleProtocol.UDP, ports=(53, 53))
    guarded.change(outbound_policy=RuleAction.DROP, rules=(dns,))
    for version in (4, 6):
        assert arrives(b, a, UDP(sport=1200, dport=53), version)
        assert not arrives(b, a, UDP(sport=1200, dport=54), version)
        assert not arrives(b, a, TCP(sport=1200, dport=53, flags="S"), version)
    # What others begin is answered: a reply is not the guest's own flow.
    assert a.ping(b.spec.ipv4, count=2)
    assert a.ping(b.spec.ipv6, count=2)


def test_an_edited_set_counts_at_once(guarded: Guarded) -> None:
    a, b, c = guarded.a, guarded.b, guarded.c
    inside = rule(1, set_id=1, **ANY)

    def set_of(*texts: object) -> tuple[AddressSetSpec, ...]:
        return (AddressSetSpec(1, tuple(ip_network(str(text)) for text in texts)),)

    guarded.change(policy=RuleAction.DROP, rules=(inside,), sets=set_of())
    assert not arrives(a, b, UDP(sport=1300, dport=1))
    guarded.change(sets=set_of(a.spec.ipv4, c.spec.ipv6))
    assert arrives(a, b, UDP(sport=1301, dport=1))
    assert not arrives(a, b, UDP(sport=1301, dport=1), 6)
    assert arrives(c, b, UDP(sport=1301, dport=1), 6)
    assert not arrives(c, b, UDP(sport=1301, dport=1))
    guarded.change(sets=set_of(c.spec.ipv6))
    assert not arrives(a, b, UDP(sport=1301, dport=1))


def test_groups_are_tried_in_their_order_and_an_edit_reaches_all(guarded: Guarded) -> None:
    """Own rules first, then the groups one after the other, then the policy; C has the same group at another place."""
    a, b, c, fabric = guarded.a, guarded.b, guarded.c, guarded.location.fabric
    udp, web = (rule(n, protocol=RuleProtocol.UDP, ports=(n, n)) for n in (53, 80))
    shut = dataclasses.replace(udp, action=RuleAction.DROP)
    shared = FirewallGroupSpec(uuid4(), uuid4(), 1, (udp, web))
    other = FirewallGroupSpec(uuid4(), uuid4(), 1, (shut,))
    beside = FirewallSpec(uuid4(), uuid4(), 1, policy=RuleAction.DROP, groups=(other, shared))
    fabric.ensure_firewall(beside)
    try:
        fabric.ensure_port(dataclasses.replace(c.spec, firewall_id=beside.firewall_id))
        guarded.change(policy=RuleAction.DROP, groups=(shared, other))
        assert fabric.wait_firewall_applied(beside.firewall_id, timeout_s=5)
        sport = iter(range(1500, 1600))

        def reached(*ports: int) -> list[tuple[bool, bool]]:
            time.sleep(PURGED_S)
            return [
                (
                    arrives(a, b, UDP(sport=next(sport), dport=port)),
                    arrives(a, c, UDP(sport=next(sport), dport=port)),
                )
                for port in ports
            ]

        assert reached(53, 80, 81) == [(True, False), (True, True), (False, False)]
        edited = dataclasses.replace(shared, revision=2, rules=(udp,))
        began_at = time.monotonic()
        fabric.ensure_firewall_group(edited)
        assert fabric.wait_firewall_group_applied(shared.group_id, timeout_s=5)
        print(f"\nedit of a group in force after {time.monotonic() - began_at:.3f} s", end="")
        assert reached(53, 80) == [(True, False), (False, False)]
        guarded.change(rules=(shut,), groups=(edited, other))
        assert reached(53) == [(False, False)]
        guarded.change(rules=(), groups=(other, edited))
        assert reached(53) == [(False, False)]
        guarded.change(groups=(edited,))
        assert reached(53) == [(True, False)]
    finally:
        fabric.ensure_port(c.spec)
        fabric.ensure_firewall_absent(beside.firewall_id)
        guarded.change(groups=())
        for it in (shared, other):
            fabric.ensure_firewall_group(it)
        left = {it.group_id for it in fabric.list_firewall_groups()}
        assert not left & {shared.group_id, other.group_id}


@pytest.mark.parametrize("talks", ["client", "server"])
def test_a_live_connection_is_cut(guarded: Guarded, talks: str) -> None:
    """A rule that had let a connection in goes while bytes flow, from either side: they stop within two seconds."""
    a, b = guarded.a, guarded.b
    guarded.change(policy=RuleAction.DROP, rules=(rule(1, ports=(2222, 2222)),))
    address = (str(b.spec.ipv4), 2222)

    def listen() -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
        return sock

    with (
        b.open_inside(listen) as listener,
        a.open_inside(lambda: socket.create_connection(address, timeout=5)) as client,
    ):
        server, _ = listener.accept()
        with server:
            sender, receiver = (client, server) if talks == "client" else (server, client)
            flow = Flow(sender, receiver)
            flow.begin()
            time.sleep(0.5)
            assert flow.received > 0
            began_at = time.monotonic()
            guarded.change(rules=())
            applied_s = time.monotonic() - began_at
            time.sleep(CUT_S - applied_s)
            at_limit = flow.received
            time.sleep(1.0)
            after = flow.received
            flow.end()
    print(f"\n{talks} talks: cut {flow.last_at - began_at:.3f} s after the rule went", end="")
    assert after == at_limit


def test_a_flow_of_the_switch_follows_the_rules_behind_a_wider_one(guarded: Guarded) -> None:
    """Open vSwitch 3.1 changes a flow by looking for its packet: it may find another, and leave the flow as it was."""
    b, c = guarded.b, guarded.c

    def send(layer: Packet) -> bytes:
        c.send(sent := bytes(frame(c, b, layer)))
        return sent

    def reached(source_port: int) -> list[int]:
        with b.listen() as capture:
            sent = {it: send(UDP(sport=source_port, dport=it)) for it in (80, 300, 8000)}
            time.sleep(QUIET_S)
            return [port for port, it in sent.items() if capture.has(it)]

    # Being there all the time, it makes each flow one of a single protocol.
    echo = rule(1, protocol=RuleProtocol.ICMP, ports=None, icmp_type=8)
    passing = rule(2, protocol=RuleProtocol.UDP, ports=(80, 8050))
    guarded.change(policy=RuleAction.DROP, rules=(echo, passing))
    # The first flow of any port: among such the switch looks from now on before it does among those of one port.
    send(TCP(sport=1600, dport=22, flags="S"))
    assert reached(1600) == [80, 300, 8000]
    b.run_on_node("ovs-appctl", "revalidator/pause")
    try:
        guarded.change(rules=(echo,))
        send(UDP(sport=1600, dport=22))
        time.sleep(0.1)
    finally:
        b.run_on_node("ovs-appctl", "revalidator/resume")
    b.run_on_node("ovs-appctl", "revalidator/wait")
    # The wider flow goes, since ports count again; what it has hidden comes to light.
    guarded.change(rules=(echo, rule(3, protocol=RuleProtocol.UDP, ports=(9000, 9000))))
    time.sleep(CUT_S)
    assert reached(1601) == []


class Flow:
    """A byte every 10 ms, as long as it goes."""

    def __init__(self, sender: socket.socket, receiver: socket.socket) -> None:
        self.received = 0
        self.last_at = 0.0
        self._sender, self._receiver = sender, receiver
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._send, self._receive)]

    def begin(self) -> None:
        for sock in (self._sender, self._receiver):
            sock.settimeout(0.1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while not self._is_over.wait(0.01):
            try:
                self._sender.send(b"x")
            except OSError:
                continue

    def _receive(self) -> None:
        while not self._is_over.is_set():
            try:
                self.received += len(self._receiver.recv(4096))
                self.last_at = time.monotonic()
            except OSError:
                continue


def test_no_packet_comes_before_the_firewall(location) -> None:
    """A sends from before the port exists: not one gets to B behind a firewall that is closed."""
    a = location.add_tenant(1, 43)
    spec = FirewallSpec(uuid4(), uuid4(), 1, policy=RuleAction.DROP)
    legal = dataclasses.replace(spec, rules=(rule(1, protocol=RuleProtocol.UDP, ports=(7, 7)),))
    try:
        for host in range(44, 48):
            b = location.prepare_tenant(2, host)
            wanted = bytes(frame(a, b, UDP(sport=1400, dport=7)))
            forbidden = bytes(frame(a, b, UDP(sport=1400, dport=8)))
            is_over = threading.Event()

            def flood(frames: tuple[bytes, ...], is_over: threading.Event) -> None:
                while not is_over.wait(0.001):
                    for it in frames:
                        a.send(it)

            with b.listen() as capture:
                sender = threading.Thread(target=flood, args=((forbidden, wanted), is_over))
                sender.start()
                location.fabric.ensure_firewall(legal)
                b.spec = dataclasses.replace(b.spec, firewall_id=spec.firewall_id)
                b.attach()
                location.fabric.ensure_port(b.spec)
                try:
                    assert capture.wait_for(wanted, timeout_s=15)
                    time.sleep(0.3)
                finally:
                    is_over.set()
                    sender.join()
                assert not capture.has(forbidden)
    finally:
        location.fabric.ensure_firewall_absent(spec.firewall_id)


def random_firewall(dice: random.Random, guarded: Guarded) -> dict[str, object]:
    """Rules over few values, so that they and the packets meet; some of them in groups."""
    a, c = guarded.a.spec, guarded.c.spec
    networks = [ip_network(str(it)) for it in (a.ipv4, a.ipv6, c.ipv4, c.ipv6)]
    rules = random_rules(dice, networks, dice.randint(0, 6), ["any", "set", "peer"])
    members = tuple(it for it in networks if dice.random() < 0.5)
    return {
        "policy": dice.choice(list(RuleAction)),
        "rules": rules,
        "sets": (AddressSetSpec(1, members),),
        "groups": tuple(
            FirewallGroupSpec(
                uuid4(),
                uuid4(),
                1,
                random_rules(dice, networks, dice.randint(0, 3), ["any", "peer"]),
            )
            for _ in range(dice.randint(0, 2))
        ),
    }


def random_rules(
    dice: random.Random, networks: list[Network], count: int, sources: list[str]
) -> tuple[RuleSpec, ...]:
    """So many rules, about anybody, the set 1 or a peer."""
    rules = []
    for number in range(count):
        protocol = dice.choice(list(RuleProtocol))
        ports = dice.choice([None, (22, 22), (80, 8050), (8000, 8100), (1, 65535)])
        source = dice.choice(sources)
        rules.append(
            rule(
                number + 1,
                protocol=protocol,
                ports=ports if protocol in ("tcp", "udp") else None,
                icmp_type=dice.choice([None, 8, 128]) if protocol.startswith("icmp") else None,
                action=dice.choice(list(RuleAction)),
                set_id=1 if source == "set" else None,
                peers=(dice.choice(networks),) if source == "peer" else (),
            )
        )
    return tuple(rules)


def probes(guarded: Guarded, source_port: int) -> Iterator[tuple[object, Probe, bytes]]:
    """Who sends, what it is, and the frame: protocol x port x family x source."""
    b = guarded.b
    for sender in (guarded.a, guarded.c):
        for version, peer in ((4, sender.spec.ipv4), (6, sender.spec.ipv6)):
            for port in PORTS:
                for name, layer in (
                    ("tcp", TCP(sport=source_port, dport=port, flags="S")),
                    ("udp", UDP(sport=source_port, dport=port)),
                ):
                    yield (
                        sender,
                        Probe("in", name, peer, port=port, source_port=source_port),
                        bytes(frame(sender, b, layer, version)),
                    )
            echo = ICMP(id=source_port) if version == 4 else ICMPv6EchoRequest(id=source_port)
            yield (
                sender,
                Probe("in", "icmp", peer, icmp_type=8 if version == 4 else 128),
                bytes(frame(sender, b, echo, version)),
            )


@pytest.mark.timeout(900)
def test_packets_obey_as_the_reference_says(
    guarded: Guarded, request: pytest.FixtureRequest
) -> None:
    """Any firewall, each kind of packet, from two sources of both families: what arrives is what should."""
    is_full = request.config.getoption("--full")
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    for number in range(FIREWALLS_FULL if is_full else FIREWALLS):
        guarded.change(**random_firewall(dice, guarded))
        time.sleep(PURGED_S)
        sent = list(probes(guarded, 20000 + number))
        with guarded.b.listen() as capture:
            for sender, _, raw in sent:
                sender.send(raw)
            due = [raw for _, probe, raw in sent if decide(guarded.spec, probe) == "ACCEPT"]
            lost = [raw for raw in due if not capture.wait_for(raw, timeout_s=2)]
            time.sleep(QUIET_S)
            wrong = [
                (probe, decide(guarded.spec, probe))
                for _, probe, raw in sent
                if capture.has(raw) != (decide(guarded.spec, probe) == "ACCEPT")
            ]
        assert (lost, wrong) == ([], []), f"seed {seed}, firewall {number}: {guarded.spec}"
