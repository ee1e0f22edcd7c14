"""Ways to the resolver shown by packets: questions and their answers pass, and nothing else, in neither direction."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.update
import pytest

from awan.engines.fabric import PrivateNetworkSpec, ResolverSpec, ServicesSpec
from lab.layout import PHYSICAL_NETWORK, RESOLVER, SERVICES_CIDR
from tests.engines.fabric_contract.conftest import Location, Tenant
from tests.engines.fabric_contract.test_private_packets import Private, until_reached, watched

pytestmark = pytest.mark.lab

STRANGER = "100.64.200.200"
# A question for a name of no zone: the resolver answers that it will not. Prints over what an answer came.
ASK = """
import socket, struct, sys
question = struct.pack(">HHHHHH", 7, 0, 1, 0, 0, 0) + b"\\x07example\\x00" + struct.pack(">HH", 1, 1)
server = (sys.argv[1], 53)
for _ in range(int(sys.argv[2])):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(2)
        try:
            udp.sendto(question, server)
            print("udp" if udp.recv(512)[:2] == question[:2] else "other", end=" ")
            break
        except OSError:
            pass
try:
    with socket.create_connection(server, 2) as tcp:
        tcp.sendall(struct.pack(">H", len(question)) + question)
        print("tcp" if tcp.recv(512)[2:4] == question[:2] else "other")
except OSError:
    pass
"""

# Sends a message given in hex, over TCP, and prints the answer.
SEND = """
import socket, struct, sys
message = bytes.fromhex(sys.argv[2])
with socket.create_connection((sys.argv[1], 53), 5) as tcp:
    tcp.sendall(struct.pack(">H", len(message)) + message)
    with tcp.makefile("rb") as answer:
        print(answer.read(struct.unpack(">H", answer.read(2))[0]).hex())
"""


def ask(member: Tenant, server: str = RESOLVER, tries: int = 10) -> list[str]:
    """Over which protocols the server answers; the first packets, by which paths are learned, may be lost."""
    return member.run("/usr/bin/python3", "-c", ASK, server, str(tries)).split()


def add_way(private: Private, network: PrivateNetworkSpec, outer: str) -> ResolverSpec:
    nodes = [node.system_id for node in private.location.lab.info.nodes]
    spec = ResolverSpec(
        switch=network.switch,
        cidr=network.cidr,
        inner=network.cidr.broadcast_address - 1,
        outer=IPv4Address(outer),
        resolver=IPv4Address(RESOLVER),
        services=ServicesSpec(IPv4Network(SERVICES_CIDR), PHYSICAL_NETWORK, None),
        chassis=tuple(nodes),
    )
    private.location.fabric.ensure_resolver(spec)
    assert all(private.location.fabric.wait_applied(node) for node in nodes)
    return spec


@pytest.fixture
def private(location: Location) -> Iterator[Private]:
    found = Private(location)
    yield found
    for switch in found.switches:
        location.fabric.ensure_private_network_absent(switch)


def test_members_ask_the_resolver_and_reach_nothing_else(private: Private) -> None:
    """Two networks of one prefix, without gateways; a stranger in the services network has every port of its open."""
    ours, theirs = private.add_network(), private.add_network()
    a, b = private.add_member(ours, 1, 10), private.add_member(ours, 2, 11)
    x = private.add_member(theirs, 2, 10)
    for member in (a, b, x):
        way = ["via", str(ours.cidr.broadcast_address - 1)]
        member.run("ip", "route", "add", SERVICES_CIDR, *way)
    assert ask(a, tries=1) == []
    spec = add_way(private, ours, "100.64.0.1")
    add_way(private, theirs, "100.64.0.2")
    for member in (a, b, x):
        assert ask(member) == ["udp", "tcp"]
    # Also who takes it for a neighbour, as systemd-networkd does.
    b.run("ip", "route", "replace", f"{RESOLVER}/32", "dev", "eth0")
    assert ask(b) == ["udp", "tcp"]
    private.router("ip", "address", "add", f"{STRANGER}/16", "dev", "pub")
    try:
        check_nothing_else(private, a, spec)
        check_nobody_comes_in(private, a, spec)
        assert ask(a) == ["udp", "tcp"]
    finally:
        private.router("ip", "address", "del", f"{STRANGER}/16", "dev", "pub")
    private.location.fabric.ensure_resolver_absent(ours.switch)
    assert all(private.location.fabric.wait_applied(node) for node in spec.chassis)
    assert ask(a, tries=2) == []
    assert ask(x) == ["udp", "tcp"]


def check_nothing_else(private: Private, member: Tenant, spec: ResolverSpec) -> None:
    """No packet of a member but its questions is seen in the services network."""
    with watched(
        private, f"src host {spec.outer} and not (dst host {RESOLVER} and port 53)"
    ) as seen:
        others = (STRANGER, str(private.location.network.ipv4_gateway), "100.64.0.2")
        probes = [f"ping -c 2 -W 1 {it}" for it in (RESOLVER, *others)]
        probes += [f"timeout 2 busybox nc -w 1 {RESOLVER} {port}" for port in (22, 80, 5300)]
        probes += [f"echo x | timeout 2 busybox nc -w 1 {it} 53" for it in others]
        said = member.run("sh", "-c", " & ".join(probes) + " & wait", check=False)
        assert "bytes from" not in said
        assert ask(member, STRANGER, tries=2) == []
    assert seen == []


def check_nobody_comes_in(private: Private, member: Tenant, spec: ResolverSpec) -> None:
    """Who is in the services network and sends a member's address to the router is not let in."""
    route = [f"{member.spec.ipv4}/32", "via", str(spec.outer)]
    private.router("ip", "route", "add", *route)
    try:
        for source in (RESOLVER, STRANGER):
            ping = ["ping", "-I", source, "-c", "3", "-i", "0.2", "-W", "1", str(member.spec.ipv4)]
            assert "100% packet loss" in private.router(*ping, check=False)
    finally:
        private.router("ip", "route", "del", *route)


def answer_to(member: Tenant, message: dns.message.Message) -> dns.message.Message:
    """What the resolver answers to a message of the member, over TCP."""
    said = member.run("/usr/bin/python3", "-c", SEND, RESOLVER, message.to_wire().hex())
    return dns.message.from_wire(bytes.fromhex(said))


def test_members_neither_read_whole_zones_nor_change_them(private: Private) -> None:
    """The resolver is for questions: the names of all other networks are in the same zone."""
    network = private.add_network()
    member = private.add_member(network, 1, 10)
    way = ["via", str(network.cidr.broadcast_address - 1)]
    member.run("ip", "route", "add", SERVICES_CIDR, *way)
    add_way(private, network, "100.64.0.1")
    assert ask(member) == ["udp", "tcp"]
    zone = dns.name.from_text(private.location.lab.info.nameserver.private_zone)
    known = answer_to(member, dns.message.make_query(zone, "SOA"))
    assert (known.rcode(), len(known.answer)) == (dns.rcode.NOERROR, 1), "the zone is served there"
    change = dns.update.UpdateMessage(zone)
    change.add("stray", 60, "A", "198.51.100.66")
    told = dns.message.make_query(zone, "SOA")
    told.set_opcode(dns.opcode.NOTIFY)
    for message in (dns.message.make_query(zone, "AXFR"), change, told):
        refused = answer_to(member, message)
        assert refused.rcode() in (dns.rcode.REFUSED, dns.rcode.NOTAUTH), refused
        assert refused.answer == []
    stray = answer_to(member, dns.message.make_query(dns.name.from_text("stray", zone), "A"))
    assert stray.rcode() == dns.rcode.NXDOMAIN


def test_public_instances_do_not_ask_the_resolver(private: Private) -> None:
    """Also one that has given itself a route to it."""
    tenant = private.location.add_tenant(1, 61)
    tenant.configure()
    assert until_reached(tenant, private.location.network.ipv4_gateway)
    tenant.run("ip", "route", "add", f"{RESOLVER}/32", "dev", "eth0")
    assert ask(tenant, tries=2) == []
