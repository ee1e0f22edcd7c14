"""What a firewall does to a packet, written for the tests alone and without a look at how OVN is told.

And the other way round: what OVN's rows do to a packet, read from their text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_network

from awan.engines.fabric.acls import Acl
from awan.engines.fabric.firewall import FirewallSpec, RuleSpec


@dataclass(frozen=True)
class Probe:
    """The first packet of a flow. `peer` is its source when it comes in, its destination when it goes out."""

    direction: str
    protocol: str
    peer: IPv4Address | IPv6Address
    port: int = 0
    icmp_type: int = 0
    source_port: int = 40000


def decide(spec: FirewallSpec, probe: Probe) -> str:
    """ACCEPT, DROP or REJECT."""
    is_dhcp = probe.protocol == "udp" and (probe.source_port, probe.port) in ((68, 67), (546, 547))
    if probe.direction == "out" and is_dhcp:
        return "ACCEPT"
    shared = [rule for group in spec.groups for rule in group.rules]
    for rule in (*spec.rules, *shared):
        if matches(spec, rule, probe):
            return str(rule.action)
    return str(spec.policy if probe.direction == "in" else spec.outbound_policy)


def matches(spec: FirewallSpec, rule: RuleSpec, probe: Probe) -> bool:
    """Whether the rule is about the packet."""
    if rule.direction != probe.direction:
        return False
    family = "icmp" if probe.peer.version == 4 else "icmpv6"
    if rule.protocol in ("tcp", "udp") and probe.protocol != rule.protocol:
        return False
    if rule.protocol in ("icmp", "icmpv6"):
        if probe.protocol != "icmp":
            return False
        # Without a type, `icmp` is that of both families.
        is_both = rule.protocol == "icmp" and rule.icmp_type is None
        if not is_both and rule.protocol != family:
            return False
        if rule.icmp_type not in (None, probe.icmp_type):
            return False
    if rule.ports is not None and not rule.ports[0] <= probe.port <= rule.ports[1]:
        return False
    if rule.set_id is None and not rule.peers:
        return True
    networks = list(rule.peers)
    for it in spec.sets:
        if it.set_id == rule.set_id:
            networks += it.networks
    return any(probe.peer.version == it.version and probe.peer in it for it in networks)


def decide_by_rows(rows: Iterable[Acl], sets: Mapping[str, Sequence[str]], probe: Probe) -> str:
    """What the rows say, the highest priority first; what none is about is let through."""
    pipeline = "to-lport" if probe.direction == "in" else "from-lport"
    hits = [
        row
        for row in rows
        if row.direction == pipeline and evaluate(row.match, sets, probe, pipeline)
    ]
    if not hits:
        return "ACCEPT"
    highest = max(row.priority for row in hits)
    (action,) = {row.action for row in hits if row.priority == highest}
    return {"allow-related": "ACCEPT", "drop": "DROP", "reject": "REJECT"}[action]


_TOKEN = re.compile(r"\s*(&&|\|\||==|>=|<=|\(|\)|\{[^}]*\}|[@$]?[\w.:/-]+)")


def evaluate(match: str, sets: Mapping[str, Sequence[str]], probe: Probe, pipeline: str) -> bool:
    """Whether a match of OVN's language, as far as it is used here, is about the packet."""
    tokens = _TOKEN.findall(match)
    assert "".join(tokens).replace(" ", "") == match.replace(" ", ""), match
    value, rest = _either(tokens, sets, _fields(probe, pipeline))
    assert rest == [], match
    return value


Fields = dict[str, object]


def _fields(probe: Probe, pipeline: str) -> Fields:
    version, end = probe.peer.version, "src" if probe.direction == "in" else "dst"
    fields: Fields = {
        "outport" if pipeline == "to-lport" else "inport": "port",
        "ip": True,
        f"ip{version}.{end}": probe.peer,
        probe.protocol: True,
    }
    if probe.protocol == "icmp":
        family = "icmp4" if version == 4 else "icmp6"
        fields |= {family: True, f"{family}.type": probe.icmp_type}
    else:
        fields |= {f"{probe.protocol}.dst": probe.port, f"{probe.protocol}.src": probe.source_port}
    return fields


def _either(
    tokens: list[str], sets: Mapping[str, Sequence[str]], fields: Fields
) -> tuple[bool, list[str]]:
    value, rest = _all(tokens, sets, fields)
    while rest[:1] == ["||"]:
        other, rest = _all(rest[1:], sets, fields)
        value = value or other
    return value, rest


def _all(
    tokens: list[str], sets: Mapping[str, Sequence[str]], fields: Fields
) -> tuple[bool, list[str]]:
    value, rest = _one(tokens, sets, fields)
    while rest[:1] == ["&&"]:
        other, rest = _one(rest[1:], sets, fields)
        value = value and other
    return value, rest


def _one(
    tokens: list[str], sets: Mapping[str, Sequence[str]], fields: Fields
) -> tuple[bool, list[str]]:
    if tokens[0] == "(":
        value, rest = _either(tokens[1:], sets, fields)
        assert rest[0] == ")"
        return value, rest[1:]
    name = tokens[0]
    if tokens[1:2] not in (["=="], [">="], ["<="]):
        return bool(fields.get(name, False)), tokens[1:]
    operator, wanted, rest = tokens[1], tokens[2], tokens[3:]
    if wanted.startswith("@"):
        return name in fields, rest
    if name not in fields:
        return False, rest
    have = fields[name]
    if isinstance(have, IPv4Address | IPv6Address):
        networks = sets[wanted[1:]] if wanted.startswith("$") else wanted.strip("{}").split(", ")
        return any(have in ip_network(text) for text in networks), rest
    assert isinstance(have, int)
    number = int(wanted)
    return {"==": have == number, ">=": have >= number, "<=": have <= number}[operator], rest
