"""A firewall as OVN's access control lists and address sets. Pure: specs in, rows out.

| priority        | direction                | what                                                         |
| --------------- | ------------------------ | ------------------------------------------------------------ |
| 31002           | from-lport               | requests for an address, where anything outbound is ruled    |
| 31001 downwards | to-lport and from-lport  | the rules, one row each, in the order in which they are tried |
| 21001 downwards | to-lport and from-lport  | the rules of the first group, from 20001 those of the second, ... |
| 1000            | to-lport and from-lport  | the policy, where it is not what happens without             |
| 1               | from-lport               | all that is sent is tracked, where private ports may be in it |

A group is a port group of its own for each place that it has among the groups of firewalls: so its rules are rows once
for each place, not for each firewall.

Accepting rules are `allow-related`: replies pass, and a flow that a later rule forbids is marked as blocked at its
next packet. Whatever no row matches is let through and tracked: on public networks by `ovn_rows.tracking_acl`, on
private ones (where nothing is tracked without firewalls) by the firewall's own last row. OVN itself lets neighbour
discovery, router advertisements, and its own answers to DHCP through, above every row.
Source: ovn-nb(5), ovn-northd(8) of OVN 23.03.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from uuid import UUID

from awan.engines.fabric.firewall import (
    GROUP_RULES_MAX,
    GROUPS_MAX,
    Direction,
    FirewallGroupSpec,
    FirewallSpec,
    RuleAction,
    RuleProtocol,
    RuleSpec,
)

DHCP_PRIORITY = 31002
RULES_PRIORITY = 31001
POLICY_PRIORITY = 1000
TRACKING_PRIORITY = 1
RULES_MAX = 10_000
GROUPS_PRIORITY = RULES_PRIORITY - RULES_MAX
assert GROUPS_PRIORITY - GROUPS_MAX * GROUP_RULES_MAX > POLICY_PRIORITY

DHCP_KEY, POLICY_KEY, OUTBOUND_POLICY_KEY = "dhcp", "policy", "outbound_policy"
TRACKING_KEY = "track"
ACTIONS = {
    RuleAction.ACCEPT: "allow-related",
    RuleAction.DROP: "drop",
    RuleAction.REJECT: "reject",
}
PIPELINES = {Direction.IN: "to-lport", Direction.OUT: "from-lport"}
PROTOCOLS = {
    RuleProtocol.TCP: "tcp",
    RuleProtocol.UDP: "udp",
    RuleProtocol.ICMP: "icmp",
    RuleProtocol.ICMPV6: "icmp6",
    RuleProtocol.ANY: "ip",
}
DHCP_REQUEST = "udp && ((udp.src == 68 && udp.dst == 67) || (udp.src == 546 && udp.dst == 547))"


@dataclass(frozen=True)
class Acl:
    """A row of OVN's table ACL. `key` is the rule's uuid, or which of the firewall's own rows it is."""

    key: str
    priority: int
    direction: str
    match: str
    action: str

    @property
    def line(self) -> str:
        """The row in one line."""
        return f"{self.priority} {self.direction} {self.match} {self.action}"


def group_name(firewall_id: UUID) -> str:
    """Name of the firewall's port group; as `@name` it is usable in matches."""
    return f"fw_{firewall_id.hex}"


def place_name(group_id: UUID, place: int) -> str:
    """Name of a firewall group's port group at a place, counted from 0."""
    return f"fwg_{group_id.hex}_{place}"


def set_name(name: str, set_id: int, version: int) -> str:
    """Name of one family of a set of the firewall `name`; as `$name` it is usable in matches."""
    return f"{name}_{set_id}_v{version}"


def address_sets(spec: FirewallSpec) -> dict[str, list[str]]:
    """Name -> networks of every address set. A family without networks has none: OVN need not know of it."""
    return {
        set_name(group_name(spec.firewall_id), it.set_id, version): networks
        for it in spec.sets
        for version in (4, 6)
        if (networks := _of_family(it.networks, version))
    }


def render(spec: FirewallSpec) -> list[Acl]:
    """The firewall's own rows, by falling priority. Raises: ValueError for more rules than there are priorities."""
    if len(spec.rules) > RULES_MAX:
        raise ValueError(f"a firewall has at most {RULES_MAX} rules")
    name = group_name(spec.firewall_id)
    rows = _rule_rows(
        name,
        spec.rules,
        RULES_PRIORITY,
        address_sets(spec),
        is_closed=spec.outbound_policy is not RuleAction.ACCEPT,
    )
    for key, direction, policy in (
        (POLICY_KEY, Direction.IN, spec.policy),
        (OUTBOUND_POLICY_KEY, Direction.OUT, spec.outbound_policy),
    ):
        if policy is not RuleAction.ACCEPT:
            match = f"{_port(name, direction)} && ip"
            rows.append(Acl(key, POLICY_PRIORITY, PIPELINES[direction], match, ACTIONS[policy]))
    if spec.apply_to_private:
        rows.append(
            Acl(
                TRACKING_KEY,
                TRACKING_PRIORITY,
                PIPELINES[Direction.OUT],
                f"{_port(name, Direction.OUT)} && ip",
                ACTIONS[RuleAction.ACCEPT],
            )
        )
    return rows


def render_group(spec: FirewallGroupSpec, place: int) -> list[Acl]:
    """The group's rows at a place, by falling priority."""
    highest = GROUPS_PRIORITY - place * GROUP_RULES_MAX
    return _rule_rows(place_name(spec.group_id, place), spec.rules, highest, {}, is_closed=False)


def _rule_rows(
    name: str,
    rules: Sequence[RuleSpec],
    highest: int,
    sets: dict[str, list[str]],
    *,
    is_closed: bool,
) -> list[Acl]:
    """Rows of rules from the priority `highest` down. `is_closed`: the guest may not send what no rule is about."""
    rows = []
    if is_closed or any(rule.direction is Direction.OUT for rule in rules):
        rows.append(
            Acl(
                DHCP_KEY,
                DHCP_PRIORITY,
                PIPELINES[Direction.OUT],
                f"{_port(name, Direction.OUT)} && {DHCP_REQUEST}",
                ACTIONS[RuleAction.ACCEPT],
            )
        )
    for number, rule in enumerate(rules):
        match = _match(name, rule, sets)
        if match is not None:
            rows.append(
                Acl(
                    str(rule.rule_id),
                    highest - number,
                    PIPELINES[rule.direction],
                    match,
                    ACTIONS[rule.action],
                )
            )
    return rows


def lines_of(rows: Sequence[Acl], sets: dict[str, list[str]]) -> tuple[str, ...]:
    """All that a firewall does, in comparable form."""
    described = [f"{name}: {', '.join(sorted(networks))}" for name, networks in sets.items()]
    return (*sorted(row.line for row in rows), *sorted(described))


def firewall_lines(spec: FirewallSpec) -> tuple[str, ...]:
    """As `lines_of`, of the firewall as it should be."""
    return lines_of(render(spec), address_sets(spec))


def group_lines(spec: FirewallGroupSpec, place: int) -> tuple[str, ...]:
    """As `lines_of`, of the group at a place as it should be."""
    return lines_of(render_group(spec, place), {})


def _port(name: str, direction: Direction) -> str:
    return f"{'outport' if direction is Direction.IN else 'inport'} == @{name}"


def _match(name: str, rule: RuleSpec, sets: dict[str, list[str]]) -> str | None:
    """The packets that the rule is about; None when its set is empty, so that it is about none."""
    parts = [_port(name, rule.direction)]
    if rule.icmp_type is not None:
        family = "icmp4" if rule.protocol is RuleProtocol.ICMP else "icmp6"
        parts.append(f"{family}.type == {rule.icmp_type}")
    else:
        parts.append(PROTOCOLS[rule.protocol])
    if rule.ports is not None:
        first, last = rule.ports
        field = f"{PROTOCOLS[rule.protocol]}.dst"
        if first == last:
            parts.append(f"{field} == {first}")
        elif (first, last) != (1, 65535):
            parts.append(f"{field} >= {first} && {field} <= {last}")
    if rule.set_id is not None or rule.peers:
        peers = list(_peers(name, rule, sets))
        if not peers:
            return None
        parts.append(peers[0] if len(peers) == 1 else f"({' || '.join(peers)})")
    return " && ".join(parts)


def _peers(name: str, rule: RuleSpec, sets: dict[str, list[str]]) -> Iterator[str]:
    end = "src" if rule.direction is Direction.IN else "dst"
    for version in (4, 6):
        if rule.set_id is not None:
            known = set_name(name, rule.set_id, version)
            if known in sets:
                yield f"ip{version}.{end} == ${known}"
        elif networks := _of_family(rule.peers, version):
            yield f"ip{version}.{end} == {{{', '.join(networks)}}}"


def _of_family(networks: Sequence[IPv4Network | IPv6Network], version: int) -> list[str]:
    """The networks of one family without overlaps, which OVN would turn into rows that contend."""
    if version == 4:
        found4 = collapse_addresses(it for it in networks if isinstance(it, IPv4Network))
        return [str(it) for it in found4]
    found6 = collapse_addresses(it for it in networks if isinstance(it, IPv6Network))
    return [str(it) for it in found6]
