"""Firewalls: rules replaced on many ports of a real location, and from the call of the API to the packets that obey."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from threading import Thread
from uuid import UUID, uuid4

from awan.engines.fabric import PortSpec, PublicNetworkSpec
from awan.engines.fabric.firewall import (
    Direction,
    FirewallGroupSpec,
    FirewallSpec,
    RuleAction,
    RuleProtocol,
    RuleSpec,
)
from awan.engines.fabric.ovn import OvnFabric
from benchmarks.real_cloud import real_cloud
from benchmarks.report import Row, percentile, publish, spread
from lab import Lab, acquire_free_slot
from tests.support.lab_cloud import LabCloud

TITLE = "Firewalls"
PORTS, RULES, ROUNDS = (1, 100, 500, 1000), 100, 20
PORTS_WITH_GOAL = 500
GROUP_MEMBERS = 500
NEW_PORTS = 10
TOGGLES, PING_INTERVAL_S, SETTLE_S = 20, 0.01, 1.2
REPLY = re.compile(r"\[(\d+\.\d+)\] \d+ bytes from")


def run(*, record: bool) -> None:
    """A lab slot without guests, then a whole cloud with one."""
    lab = Lab(acquire_free_slot(first=1))
    try:
        lab.up()
        rows = _measure_scale(lab)
    finally:
        lab.down()
    with real_cloud() as cloud:
        rows += _measure_packets(cloud)
    publish(TITLE, "python -m benchmarks firewall", rows, record=record)


def _measure_scale(lab: Lab) -> list[Row]:
    info = lab.info
    fabric = OvnFabric(info.ovn_nb, info.ovn_sb)
    network = PublicNetworkSpec(
        switch="public-bench",
        physical_network=info.physical_network,
        vlan=None,
        ipv4_cidr=IPv4Network("198.19.0.0/16"),
        ipv4_gateway=IPv4Address("198.19.0.1"),
        ipv6_cidr=None,
        ipv6_gateway=None,
        dns_servers=(),
    )
    firewall = FirewallSpec(uuid4(), uuid4(), 1, policy=RuleAction.DROP)
    rows: list[Row] = []
    made = 0
    try:
        fabric.ensure_public_network(network)
        fabric.ensure_firewall(firewall)
        for count in PORTS:
            while made < count:
                made += 1
                spec = _port(network, firewall.firewall_id, made)
                fabric.ensure_port(spec)
                if made <= len(info.nodes):
                    bind(lab, info.nodes[made - 1].name, spec)
                    node = info.nodes[made - 1].system_id
                    assert fabric.wait_port_up(spec.port_id, node, timeout_s=30)
            firewall, replaced = _replace_rounds(fabric, firewall, RULES)
            firewall, single = _replace_rounds(fabric, firewall, 1)
            goal = "≤ 1 s" if count == PORTS_WITH_GOAL else ""
            what = f"{count} {'port' if count == 1 else 'ports'}"
            rows += [
                Row(f"{RULES} rules replaced on {what} → confirmed by its nodes", spread(replaced)),
                Row("the same, p95", f"{percentile(replaced, 95):.2f} s", goal),
                Row(f"one of {RULES} rules changed on {what} → confirmed", spread(single)),
            ]
        fabric.ensure_firewall(
            replace(firewall, revision=firewall.revision + 1, rules=make_rules(200))
        )
        rows += _time_new_ports(lab, fabric, network, firewall.firewall_id, made)
        rows += _measure_group(lab, fabric, network)
    finally:
        fabric.close()
    return rows


def _port(network: PublicNetworkSpec, firewall_id: UUID, number: int) -> PortSpec:
    return PortSpec(
        port_id=uuid4(),
        switch=network.switch,
        mac=f"02:bb:00:00:{number >> 8:02x}:{number & 255:02x}",
        ipv4=network.ipv4_cidr.network_address + 256 + number,
        ipv6=None,
        hostname=f"bench-{number}",
        instance_id=uuid4(),
        account_id=uuid4(),
        operation_id=uuid4(),
        firewall_id=firewall_id,
    )


def bind(lab: Lab, node: str, spec: PortSpec) -> None:
    """An interface of the port on the node, without a guest behind it."""
    name = _interface(spec)
    add = ["add-port", "br-int", name, "--", "set", "Interface", name, "type=internal"]
    lab.node_exec(node, ["ovs-vsctl", *add, f"external_ids:iface-id={spec.port_id}"])


def unbind(lab: Lab, node: str, spec: PortSpec) -> None:
    """The interface goes again."""
    lab.node_exec(node, ["ovs-vsctl", "del-port", "br-int", _interface(spec)])


def _interface(spec: PortSpec) -> str:
    return f"b{spec.port_id.hex[:8]}"


def make_rules(count: int, offset: int = 0) -> tuple[RuleSpec, ...]:
    """So many rules, all different: one port of TCP from one address each."""
    return tuple(
        RuleSpec(
            rule_id=uuid4(),
            direction=Direction.IN,
            protocol=RuleProtocol.TCP,
            action=RuleAction.ACCEPT,
            ports=(1 + offset + number, 1 + offset + number),
            peers=(IPv4Network((0xC6120000 + offset + number, 32)),),
        )
        for number in range(count)
    )


def _replace_rounds(
    fabric: OvnFabric, firewall: FirewallSpec, count: int
) -> tuple[FirewallSpec, list[float]]:
    """Seconds for each round: the last `count` rules are others, in one transaction, and every node has them."""
    took = []
    for number in range(ROUNDS):
        kept = firewall.rules[: RULES - count]
        rules = (*kept, *make_rules(count, 1000 * (number + 1)))
        firewall = replace(firewall, revision=firewall.revision + 1, rules=rules)
        began_at = time.perf_counter()
        fabric.ensure_firewall(firewall)
        assert fabric.wait_firewall_applied(firewall.firewall_id, timeout_s=60)
        took.append(time.perf_counter() - began_at)
    return firewall, took


def _time_new_ports(
    lab: Lab, fabric: OvnFabric, network: PublicNetworkSpec, firewall_id: UUID, made: int
) -> list[Row]:
    """Ports that come up beside all the others."""
    node = lab.info.nodes[0]
    took = []
    for number in range(made + 1, made + 1 + NEW_PORTS):
        spec = _port(network, firewall_id, number)
        bind(lab, node.name, spec)
        began_at = time.perf_counter()
        fabric.ensure_port(spec)
        assert fabric.wait_port_up(spec.port_id, node.system_id, timeout_s=60)
        took.append((time.perf_counter() - began_at) * 1000)
    return [
        Row(f"a port more, beside {made} ports and 200 rules → up", spread(took, "ms", 0)),
        Row("the same, p95", f"{percentile(took, 95):.0f} ms", "≤ 300 ms"),
    ]


def _measure_group(lab: Lab, fabric: OvnFabric, network: PublicNetworkSpec) -> list[Row]:
    """A group that many firewalls share, each of one port: its rules replaced, and a firewall more that has it."""
    group = FirewallGroupSpec(uuid4(), uuid4(), 1, make_rules(RULES))
    joined = []
    for number in range(1, GROUP_MEMBERS + 1):
        firewall = FirewallSpec(uuid4(), uuid4(), 1, policy=RuleAction.DROP, groups=(group,))
        port = _port(network, firewall.firewall_id, 10_000 + number)
        began_at = time.perf_counter()
        fabric.ensure_firewall(firewall)
        fabric.ensure_port(port)
        joined.append((time.perf_counter() - began_at) * 1000)
        if number <= len(lab.info.nodes):
            node = lab.info.nodes[number - 1]
            bind(lab, node.name, port)
            assert fabric.wait_port_up(port.port_id, node.system_id, timeout_s=60)
    took = []
    for number in range(ROUNDS):
        rules = make_rules(RULES, 1000 * (number + 1))
        group = replace(group, revision=group.revision + 1, rules=rules)
        began_at = time.perf_counter()
        fabric.ensure_firewall_group(group)
        assert fabric.wait_firewall_group_applied(group.group_id, timeout_s=60)
        took.append(time.perf_counter() - began_at)
    what = f"{GROUP_MEMBERS} firewalls"
    return [
        Row(
            f"{RULES} rules of a group replaced for {what} → confirmed by their nodes", spread(took)
        ),
        Row("the same, p95", f"{percentile(took, 95):.2f} s", "≤ 1 s"),
        Row(
            f"a firewall more that has the group, and its port, up to {what} → committed",
            spread(joined, "ms", 0),
        ),
    ]


def _measure_packets(cloud: LabCloud) -> list[Row]:
    shown = cloud.create_instance()
    uuid, address = shown["uuid"], shown["ip_address"]
    cloud.wait_ready(uuid)
    path = f"/instances/{uuid}/firewall"
    assert cloud.client.put(path, json={"action": "DROP"}).is_success
    rule = cloud.client.post(
        f"{path}/rules",
        json={
            "destination_port": 0,
            "protocol": "icmp",
            "action": "ACCEPT",
            "description": "ping",
            "use_ipset": False,
            "source_ipset": 0,
        },
    ).json()["data"]
    opened, closed = [], []
    time.sleep(SETTLE_S)
    with _pinging(address) as replies:
        time.sleep(SETTLE_S)
        assert replies, f"{address} does not answer"
        for _ in range(TOGGLES):
            began_at = time.time()
            _switch(cloud, f"{path}/rules/{rule['uuid']}", "disable")
            time.sleep(SETTLE_S)
            closed.append((max(replies) - began_at) * 1000)
            began_at = time.time()
            _switch(cloud, f"{path}/rules/{rule['uuid']}", "enable")
            time.sleep(SETTLE_S)
            opened.append((min(at for at in replies if at > began_at) - began_at) * 1000)
    cloud.delete_all()
    resolution = f"resolution {PING_INTERVAL_S * 1000:.0f} ms"
    return [
        Row(
            f"call that enables a rule → first packet through ({resolution})",
            spread(opened, "ms", 0),
        ),
        Row("the same, p95", f"{percentile(opened, 95):.0f} ms", "≤ 500 ms"),
        Row("call that disables it → last packet through", spread(closed, "ms", 0)),
        Row("the same, p95", f"{percentile(closed, 95):.0f} ms", "≤ 500 ms"),
    ]


def _switch(cloud: LabCloud, path: str, action: str) -> None:
    answer = cloud.client.put(f"{path}/status", json={"action": action})
    assert answer.status_code == 200, answer.text


@contextmanager
def _pinging(address: str) -> Iterator[list[float]]:
    """The moments (of the wall clock) at which replies have come; it grows while the block runs."""
    argv = ["ping", "-D", "-n", "-i", str(PING_INTERVAL_S), address]
    replies: list[float] = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, bufsize=1) as ping:
        assert ping.stdout is not None
        output = ping.stdout

        def read() -> None:
            for line in output:
                if found := REPLY.match(line):
                    replies.append(float(found[1]))

        reader = Thread(target=read)
        reader.start()
        try:
            yield replies
        finally:
            ping.terminate()
            reader.join()
