"""Private networks shown by packets: across nodes, through their gateway, and never into another one."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any
from uuid import uuid4

import pytest
from scapy.layers.inet import TCP

from awan.engines.fabric import GatewaySpec, PrivateNetworkSpec
from awan.engines.fabric.firewall import FirewallSpec, RuleAction
from awan.engines.fabric.ovn_private import RouterNames, router_mac
from tests.engines.fabric_contract.conftest import Location, Tenant
from tests.engines.fabric_contract.test_firewall_contract import rule
from tests.engines.fabric_contract.test_firewall_packets import frame
from tests.engines.fabric_contract.test_packets import (
    Card,
    forged_addresses,
    legal_frames,
    rogue_services,
)

pytestmark = pytest.mark.lab

CIDR = IPv4Network("10.20.0.0/24")
SETTLE_S = 0.5
PING_INTERVAL_S = 0.1
WATCHED_S = 6
ICMP, ECHO_REPLY = 1, 0


class Private:
    """Private networks of a lab location, all of one prefix."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.switches: list[str] = []

    def add_network(self) -> PrivateNetworkSpec:
        spec = PrivateNetworkSpec(f"private-{uuid4()}", CIDR, CIDR.network_address + 1)
        self.switches.append(spec.switch)
        self.location.fabric.ensure_private_network(spec)
        return spec

    def add_member(
        self,
        network: PrivateNetworkSpec,
        node: int,
        host: int,
        firewall: FirewallSpec | None = None,
    ) -> Tenant:
        """A member with its address and a default route by way of the gateway; with its firewall, if there is one."""
        info = self.location.lab.info
        number = len(self.location.tenants)
        spec = replace(
            self.location.port_spec(node, host),
            switch=network.switch,
            mac=f"02:bb:00:{number:02x}:{node:02x}:{host:02x}",
            ipv4=CIDR.network_address + host,
            ipv6=None,
            firewall_id=firewall.firewall_id if firewall is not None else None,
            is_private=True,
        )
        if firewall is not None:
            self.location.fabric.ensure_firewall(firewall)
        tenant = Tenant(self.location.lab, info.nodes[node - 1].name, spec)
        self.location.tenants.append(tenant)
        tenant.plug()
        self.location.fabric.ensure_port(spec)
        tenant.attach()
        assert self.location.fabric.wait_port_up(spec.port_id, tenant.node, timeout_s=15)
        tenant.run("ip", "link", "set", "eth0", "mtu", str(network.mtu))
        tenant.run("ip", "address", "add", f"{spec.ipv4}/24", "dev", "eth0")
        tenant.run("ip", "route", "add", "default", "via", str(network.gateway_ip))
        return tenant

    def add_gateway(
        self, network: PrivateNetworkSpec, host: int, first_node: int = 1
    ) -> GatewaySpec:
        """A gateway on both nodes, the one of this number first."""
        public = self.location.network
        nodes = [node.system_id for node in self.location.lab.info.nodes]
        spec = GatewaySpec(
            network=network,
            public_switch=public.switch,
            public_ip=public.ipv4_cidr.network_address + host,
            public_cidr=public.ipv4_cidr,
            next_hop=public.ipv4_gateway,
            chassis=tuple(nodes if first_node == 1 else reversed(nodes)),
        )
        self.location.fabric.ensure_gateway(spec)
        assert self.location.fabric.wait_gateway_carried(network.switch, timeout_s=15)
        assert all(self.location.fabric.wait_applied(node) for node in nodes)
        return spec

    def active_chassis(self, network: PrivateNetworkSpec) -> str | None:
        found = {it.switch: it for it in self.location.fabric.list_private_networks()}
        return found[network.switch].active_chassis

    def router(self, *argv: str, check: bool = True) -> str:
        """What a command prints on the provider's router."""
        return self.location.lab.router_exec(list(argv), check=check).stdout


@pytest.fixture
def private(location: Location) -> Iterator[Private]:
    found = Private(location)
    yield found
    for switch in found.switches:
        location.fabric.ensure_private_network_absent(switch)


def private_card(tenant: Tenant) -> Card:
    return Card(tenant.spec.mac, str(tenant.spec.ipv4), f"2001:db8:77::{tenant.spec.mac[-2:]}")


def arrivals(sender: Tenant, receiver: Tenant, frames: dict[str, Any]) -> list[str]:
    """Names of the frames that arrive, legal ones being sent with them and arriving."""
    known = legal_frames(private_card(sender), private_card(receiver))
    legal = {name: bytes(known[name]) for name in ("udp4", "broadcast", "gratuitous_arp")}
    raw = {name: bytes(frame) for name, frame in frames.items()}
    with receiver.listen() as capture:
        for frame in [*legal.values(), *raw.values(), *legal.values()]:
            sender.send(frame)
        assert [name for name, frame in legal.items() if not capture.wait_for(frame)] == []
        time.sleep(SETTLE_S)
        return [name for name, frame in raw.items() if capture.has(frame)]


def test_members_meet_across_nodes_and_strangers_never(private: Private) -> None:
    """Two networks of one prefix: who has an address in one is not found from the other."""
    ours, theirs = private.add_network(), private.add_network()
    a, b = private.add_member(ours, 1, 10), private.add_member(ours, 2, 11)
    # In the other network the same addresses belong to others.
    x, y = private.add_member(theirs, 1, 11), private.add_member(theirs, 2, 10)
    only_theirs = private.add_member(theirs, 1, 12)
    assert until_reached(a, b.spec.ipv4)
    assert until_reached(y, x.spec.ipv4)
    assert not a.ping(only_theirs.spec.ipv4, count=1)
    large = ["ping", "-c", "2", "-W", "2", "-M", "do", "-s", str(ours.mtu - 28), str(b.spec.ipv4)]
    assert ", 0% packet loss" in a.run(*large, check=False)
    frames = {
        name: frame
        for name, frame in legal_frames(private_card(a), private_card(x)).items()
        if name in ("udp4", "broadcast", "gratuitous_arp")
    }
    for stranger in (x, y, only_theirs):
        with stranger.listen() as capture, b.listen() as friend:
            for frame in frames.values():
                a.send(bytes(frame))
            assert friend.wait_for(bytes(frames["broadcast"]))
            time.sleep(SETTLE_S)
            assert not any(capture.has(bytes(frame)) for frame in frames.values())
    router = Card(router_mac("any"), str(ours.gateway_ip), "2001:db8:77::1")
    neighbour = Card("02:bb:00:99:00:99", "10.20.0.99", "2001:db8:77::99")
    forged = forged_addresses(private_card(a), private_card(b), neighbour, router)
    forged |= rogue_services(private_card(a), private_card(b), router)
    assert arrivals(a, b, forged) == []


def test_the_way_out_and_back(private: Private, capsys: pytest.CaptureFixture[str]) -> None:
    """By the gateway's public address, from both nodes; nothing that is inside can be reached through it."""
    network = private.add_network()
    a, b = private.add_member(network, 1, 10), private.add_member(network, 2, 11)
    outside = private.location.network.ipv4_gateway
    assert not a.ping(outside, count=1)
    gateway = private.add_gateway(network, 150)
    for member in (a, b):
        assert until_reached(member, outside)
    with watched(private, f"icmp and src host {gateway.public_ip}") as seen:
        assert until_reached(b, outside)
    assert len(seen) > 0
    # It answers at its address, where the provider's network looks for it.
    ping = ["ping", "-c", "3", "-i", "0.2", "-W", "2", str(gateway.public_ip)]
    assert ", 0% packet loss" in private.router(*ping, check=False)
    neighbours = private.router("ip", "neigh", "show", str(gateway.public_ip))
    assert router_mac(RouterNames.of(network.switch).outer) in neighbours
    # A neighbour with a public address of its own is reached, and sees the gateway's.
    neighbour = private.location.add_tenant(2, 60)
    neighbour.configure()
    assert until_reached(a, neighbour.spec.ipv4)
    check_nobody_comes_in(private, a, neighbour, gateway)
    check_nothing_inside_is_reached(private, a)
    moved = private.add_gateway(network, 151)
    with watched(private, f"icmp and src host {moved.public_ip}") as seen:
        assert until_reached(a, outside)
    assert len(seen) > 0
    private.location.fabric.ensure_gateway_absent(network.switch)
    assert all(private.location.fabric.wait_applied(node) for node in moved.chassis)
    assert not a.ping(outside, count=1)


def check_nobody_comes_in(
    private: Private, member: Tenant, neighbour: Tenant, gateway: GatewaySpec
) -> None:
    """Who sends a member's address to the gateway is not let in, be it a neighbour or the provider's router."""
    target, by_way_of = str(member.spec.ipv4), str(gateway.public_ip)
    route = ["ip", "route", "add", f"{target}/32", "via", by_way_of]
    neighbour.run(*route)
    private.router(*route)
    try:
        with member.listen() as capture:
            assert not neighbour.ping(target)
            assert "100% packet loss" in private.router(
                "ping", "-c", "3", "-i", "0.2", "-W", "1", target, check=False
            )
            neighbour.run("timeout", "2", "busybox", "nc", "-w", "1", target, "22", check=False)
            # That it hears at all: of the answers to its own.
            assert member.ping(neighbour.spec.ipv4, count=1)
            outsiders = {neighbour.spec.ipv4, private.location.network.ipv4_gateway}
            heard = [frame for frame in capture.frames if came_from(frame, outsiders)]
        answers = [frame for frame in heard if frame[23] == ICMP and frame[34] == ECHO_REPLY]
        assert len(answers) == 1
        assert heard == answers
    finally:
        private.router("ip", "route", "del", f"{target}/32", "via", by_way_of)
        neighbour.run("ip", "route", "del", f"{target}/32", "via", by_way_of)


def came_from(frame: bytes, sources: set[Any]) -> bool:
    """Whether it is an IPv4 packet from one of these addresses."""
    return frame[12:14] == b"\x08\x00" and IPv4Address(frame[26:30]) in sources


def check_nothing_inside_is_reached(private: Private, member: Tenant) -> None:
    """Management network, libvirt, OVSDB, PostgreSQL: not one packet leaves the gateway in their direction."""
    info = private.location.lab.info
    inside = [node.mgmt_ip for node in info.nodes] + [f"10.77.{info.slot}.1"]
    with watched(
        private, "dst net 10.0.0.0/8 or dst net 172.16.0.0/12 or dst net 192.168.0.0/16"
    ) as seen:
        probes = [f"ping -c 1 -W 1 {address}" for address in (*inside, "192.168.1.1")]
        probes += [
            f"timeout 1 busybox nc -w 1 {inside[0]} {port}"
            for port in (16509, 16514, 6641, 6642, 5432, 22)
        ]
        said = member.run("sh", "-c", " & ".join(probes) + " & wait", check=False)
        assert "bytes from" not in said
    assert seen == []


@contextmanager
def watched(private: Private, what: str) -> Iterator[list[str]]:
    """The packets on the public segment that match, once the block has ended."""
    lab = private.location.lab
    argv = ["tcpdump", "-lnn", "--immediate-mode", "-i", "pub", what]
    process = subprocess.Popen(
        lab.machine_argv(f"aw{lab.info.slot}-up", argv),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "listening on" not in process.stderr.readline():
        assert process.poll() is None
    seen: list[str] = []
    try:
        yield seen
        time.sleep(SETTLE_S)
    finally:
        lab.router_exec(["sh", "-c", "kill $(pidof tcpdump)"], check=False)
        output, _ = process.communicate(timeout=10)
        seen += [line for line in output.splitlines() if " IP " in line]


def test_the_gateways_node_dies(private: Private, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints for how long members on the other node had no way out: controller dead, then the whole node.

    Of two nodes the one that is left cannot tell whether it is the one that is cut off, so it takes nothing over by
    itself: the gateway moves when it is told to be on the living node alone.
    """
    network = private.add_network()
    member = private.add_member(network, 2, 11)
    outside = private.location.network.ipv4_gateway
    gateway = private.add_gateway(network, 152)
    first, second = private.location.lab.info.nodes
    assert until_reached(member, outside)
    assert private.active_chassis(network) == first.system_id
    lab = private.location.lab
    try:
        controller_s = gap_of(
            member,
            outside,
            lambda: lab.node_exec(first.name, ["sh", "-c", "kill -9 $(pidof ovn-controller)"]),
        )

        def lose_node() -> None:
            lab.kill_node_processes(first.name)
            private.location.fabric.ensure_gateway(replace(gateway, chassis=(second.system_id,)))

        node_s = gap_of(member, outside, lose_node)
        assert private.active_chassis(network) == second.system_id
    finally:
        lab.up()
    with capsys.disabled():
        print(
            f"\ngateway: ovn-controller killed, {controller_s:.1f} s without a way out;"
            f" its node dead, {node_s:.1f} s",
            end="",
        )
    assert controller_s < 5
    assert node_s < 8


def until_reached(member: Tenant, target: IPv4Address) -> bool:
    """Whether the target answers within ten seconds: paths are learned by the first packets, which may be lost."""
    deadline = time.monotonic() + 10
    while not member.ping(target, count=1):
        if time.monotonic() > deadline:
            return False
    return True


def gap_of(member: Tenant, target: IPv4Address, event: Any) -> float:
    """The longest time without an answer around an event, in steps of a tenth of a second."""
    argv = ["ping", "-n", "-i", str(PING_INTERVAL_S), "-w", str(WATCHED_S), str(target)]
    lab = member.lab
    process = subprocess.Popen(
        lab.machine_argv(member.node, ["ip", "netns", "exec", member.name, *argv]),
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(2)
    event()
    output, _ = process.communicate(timeout=60)
    numbers = [int(found) for found in re.findall(r"icmp_seq=(\d+) ttl=", output)]
    assert len(numbers) > 20, output
    last = max(int(WATCHED_S / PING_INTERVAL_S), numbers[-1])
    steps = [b - a - 1 for a, b in zip(numbers, [*numbers[1:], last], strict=True)]
    return max(steps) * PING_INTERVAL_S


def test_a_firewall_that_applies_to_private_ports(private: Private) -> None:
    """The same port of a private network, before, while and after a firewall stands before it."""
    network, location = private.add_network(), private.location
    spec = FirewallSpec(uuid4(), uuid4(), 1, policy=RuleAction.DROP)
    a = private.add_member(network, 1, 30)
    b = private.add_member(network, 2, 31, spec)
    try:
        assert until_reached(a, b.spec.ipv4)
        assert until_reached(b, a.spec.ipv4)
        ssh = (rule(1, ports=(22, 22)),)
        changes: list[tuple[dict[str, Any], list[str]]] = [
            ({"apply_to_private": True}, []),
            ({"apply_to_private": True, "rules": ssh}, ["ssh"]),
            ({}, ["ssh", "http"]),
        ]
        for number, (changed, expected) in enumerate(changes):
            location.fabric.ensure_firewall(replace(spec, revision=number + 2, **changed))
            # A firewall that applies to no port is waited for nowhere.
            assert all(location.fabric.wait_applied(it.system_id) for it in location.lab.info.nodes)
            frames = {
                name: bytes(frame(a, b, TCP(sport=1500 + number, dport=port, flags="S")))
                for name, port in (("ssh", 22), ("http", 80))
            }
            with b.listen() as capture:
                for raw in frames.values():
                    a.send(raw)
                assert all(capture.wait_for(frames[name]) for name in expected)
                time.sleep(SETTLE_S)
                assert [name for name, raw in frames.items() if capture.has(raw)] == expected
            assert a.ping(b.spec.ipv4, count=1) == (number == 2)
            assert b.ping(a.spec.ipv4, count=1)
    finally:
        location.fabric.ensure_firewall_absent(spec.firewall_id)
