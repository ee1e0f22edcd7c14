"""A guest that takes more than its share of a node's tables, shown by packets on the userspace datapath of the lab."""

from __future__ import annotations

import dataclasses
import random
import struct
import time
from collections.abc import Callable
from uuid import uuid4

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import ARP, Ether

from awan.engines.fabric.firewall import FirewallSpec, RuleAction
from lab.hypervisor import CONNECTIONS_PER_PORT
from tests.engines.fabric_contract.conftest import Location, Tenant
from tests.engines.fabric_contract.test_firewall_packets import add_guarded

pytestmark = pytest.mark.lab

TABLE = CONNECTIONS_PER_PORT + 10_000
FLOWS = TABLE + 5_000
SENT_MAX_S = 60.0
FLOODS_MAX = 4
NOBODYS_MAC = "02:aa:ff:ff:ff:fe"
LOG = "/var/log/openvswitch/conntrack-limits.log"
# More than a bridge of Open vSwitch learns, 8192 by default.
FORGED_CARDS = 10_000


def dpctl(tenant: Tenant, *argv: str) -> str:
    """What a command of the datapath prints on the tenant's node."""
    return tenant.run_on_node("ovs-appctl", f"dpctl/{argv[0]}", *argv[1:])


def zone_of(tenant: Tenant) -> int:
    """The zone in which the port's connections are tracked."""
    key = f"external_ids:ct-zone-{tenant.spec.port_id}"
    return int(tenant.run_on_node("ovs-vsctl", "get", "bridge", "br-int", key).strip().strip('"'))


def held(tenant: Tenant) -> tuple[int | None, int]:
    """The limit of the port's zone, None without one, and how many connections it has."""
    shown = dpctl(tenant, "ct-get-limits", f"zone={zone_of(tenant)}")
    lines = [it for it in shown.splitlines() if it.startswith(f"zone={zone_of(tenant)},")]
    if not lines:
        return None, 0
    limit, count = (int(part.partition("=")[2]) for part in lines[0].split(",")[1:])
    return limit, count


def flood(tenant: Tenant, target: str, mac: str) -> None:
    """One datagram of each of many flows: half-open connections for the node."""
    template = bytearray(
        bytes(
            Ether(src=tenant.spec.mac, dst=mac) / IP(src=str(tenant.spec.ipv4), dst=target) / UDP()
        )
    )
    template[40:42] = b"\0\0"  # without a checksum
    deadline = time.monotonic() + SENT_MAX_S
    first = random.randrange(1024, 20_000)
    for number in range(FLOWS):
        template[34:38] = struct.pack("!HH", first + number // 1000, 1000 + number % 1000)
        tenant.send(bytes(template))
        if number % 500 == 0:
            # As fast as the datapath takes it: what its queue drops would open nothing.
            time.sleep(0.005)
            assert time.monotonic() < deadline


def flood_until(seen: Callable[[], bool], tenant: Tenant, target: str) -> bool:
    """Floods until that is seen, a few times: a busy machine does not take in all that is sent. Whether it was seen."""
    for _ in range(FLOODS_MAX):
        flood(tenant, target, NOBODYS_MAC)
        if seen():
            return True
    return False


def wait_for_alarm(tenant: Tenant) -> None:
    """Returns when the port is told of as near its limit."""
    deadline = time.monotonic() + 20
    while f"ALARM port {tenant.spec.port_id} " not in tenant.run_on_node("cat", LOG):
        assert time.monotonic() < deadline, "no alarm"
        time.sleep(0.5)


def learned(tenant: Tenant) -> tuple[set[str], int]:
    """The cards that the bridge of the provider network knows on the tenant's node, and what OVN has learned."""
    shown = tenant.run_on_node("ovs-appctl", "fdb/show", "br-ex").splitlines()[1:]
    argv = ["ovn-sbctl", f"--db={tenant.lab.info.ovn_sb}", "--bare", "--columns=_uuid", "list"]
    rows = [tenant.run_on_node(*argv, table).split() for table in ("FDB", "MAC_Binding")]
    return {line.split()[2] for line in shown}, sum(map(len, rows))


def test_a_flood_of_forged_cards_fills_no_table(location: Location) -> None:
    """A guest that answers for ten thousand cards: no bridge and no router of the location learns one of them."""
    a, b = location.add_tenant(2, 92), location.add_tenant(2, 93)
    for tenant in (a, b):
        tenant.configure()
    gateway = location.network.ipv4_gateway
    assert a.ping(gateway)
    _, before = learned(a)
    forged = set()
    for number in range(FORGED_CARDS):
        mac = f"06:{random.randrange(2**40):010x}"
        mac = ":".join((mac[:2], *(mac[at : at + 2] for at in range(3, 13, 2))))
        claim = ARP(op=2, hwsrc=mac, psrc=f"198.51.100.{number % 250}", pdst=str(gateway))
        a.send(bytes(Ether(src=mac, dst="ff:ff:ff:ff:ff:ff") / claim))
        forged.add(mac)
        if number % 500 == 0:
            time.sleep(0.005)
    assert b.ping(gateway)
    assert a.ping(gateway)
    cards, after = learned(a)
    assert a.spec.mac in cards, "what may be learned is"
    assert not forged & cards
    assert after <= before + 1


def test_a_flood_leaves_others_their_connections(location: Location) -> None:
    """A opens more flows than the whole table holds: B, closed but for what it begins, goes on beginning."""
    a = location.add_tenant(2, 90)
    spec = FirewallSpec(uuid4(), uuid4(), 1, policy=RuleAction.DROP)
    b = add_guarded(location, 2, 91, spec)
    b.attach()
    assert location.fabric.wait_port_up(b.spec.port_id, b.node, timeout_s=15)
    # A is tracked too, by a firewall that lets everything pass.
    open_spec = dataclasses.replace(spec, firewall_id=uuid4(), policy=RuleAction.ACCEPT)
    location.fabric.ensure_firewall(open_spec)
    location.fabric.ensure_port(dataclasses.replace(a.spec, firewall_id=open_spec.firewall_id))
    for tenant in (a, b):
        tenant.configure()
    gateway = location.network.ipv4_gateway
    before = dpctl(b, "ct-get-maxconns").strip()
    try:
        assert b.ping(gateway, count=2)
        dpctl(b, "ct-set-maxconns", str(TABLE))
        full = 0.9 * CONNECTIONS_PER_PORT
        assert flood_until(lambda: held(a)[1] > full, a, str(gateway))
        limit, count = held(a)
        print(f"\nflood of {FLOWS} flows: {count} of {limit} tracked", end="")
        assert limit == CONNECTIONS_PER_PORT
        assert count <= CONNECTIONS_PER_PORT
        wait_for_alarm(a)
        assert b.ping(gateway, count=3)
        # That is what the limit is for: without it the same flood shuts B out.
        dpctl(a, "ct-del-limits", f"zone={zone_of(a)}")
        assert flood_until(lambda: not b.ping(gateway, count=3), a, str(gateway))
    finally:
        dpctl(b, "ct-set-maxconns", before)
        dpctl(b, "flush-conntrack")
        # As a switch that was started again: whoever watches over the limits puts them back.
        dpctl(b, "ct-del-limits", "zone=4095")
        deadline = time.monotonic() + 20
        while held(a)[0] != CONNECTIONS_PER_PORT:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for it in (spec, open_spec):
            location.fabric.ensure_firewall_absent(it.firewall_id)
