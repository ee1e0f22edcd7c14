"""The rows that OVN is told, against a reference written separately: any firewall, any packet."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from awan.engines.fabric.acls import RULES_MAX, Acl, address_sets, render, render_group
from awan.engines.fabric.firewall import (
    GROUP_RULES_MAX,
    GROUPS_MAX,
    AddressSetSpec,
    Direction,
    FirewallGroupSpec,
    FirewallSpec,
    RuleAction,
    RuleProtocol,
    RuleSpec,
)
from awan.firewall.rules import RULES_MAX as RULES_SOLD
from tests.firewall.reference import Probe, decide, decide_by_rows

SET_IDS = (1, 2, 3)
# Few values, so that rules and packets meet.
PORTS = st.sampled_from([1, 22, 67, 68, 80, 443, 546, 547, 8000, 8050, 8100, 65535])
TYPES = st.sampled_from([0, 3, 8, 128, 129, 255])
PEERS = st.sampled_from(
    [
        *map(IPv4Address, ("10.0.0.1", "10.0.1.1", "198.18.0.9")),
        *map(IPv6Address, ("2001:db8::1", "2001:db8:1::1", "fe80::1")),
    ]
)
NETWORKS = st.sampled_from(
    [
        *map(IPv4Network, ("10.0.0.0/24", "10.0.0.1/32", "10.0.0.0/8", "0.0.0.0/1")),
        *map(IPv6Network, ("2001:db8::/32", "2001:db8::1/128", "2001:db8:1::/48")),
    ]
)


@st.composite
def rules(draw: st.DrawFn, number: int, *, of_group: bool = False) -> RuleSpec:
    """One rule that can be; those of groups name no sets."""
    protocol = draw(st.sampled_from(RuleProtocol))
    ports = icmp_type = None
    if protocol in (RuleProtocol.TCP, RuleProtocol.UDP) and draw(st.booleans()):
        first, last = sorted((draw(PORTS), draw(PORTS)))
        ports = (first, last)
    if protocol in (RuleProtocol.ICMP, RuleProtocol.ICMPV6):
        icmp_type = draw(st.none() | TYPES)
    source = draw(st.sampled_from(["any", "peers"] if of_group else ["any", "set", "peers"]))
    return RuleSpec(
        rule_id=UUID(int=number),
        direction=draw(st.sampled_from(Direction)),
        protocol=protocol,
        action=draw(st.sampled_from(RuleAction)),
        ports=ports,
        icmp_type=icmp_type,
        set_id=draw(st.sampled_from(SET_IDS)) if source == "set" else None,
        peers=tuple(draw(st.lists(NETWORKS, min_size=1, max_size=3))) if source == "peers" else (),
    )


@st.composite
def firewalls(draw: st.DrawFn) -> FirewallSpec:
    """Any firewall with a few rules, sets and groups, empty ones too."""
    count, shared = draw(st.integers(0, 6)), draw(st.lists(st.integers(0, 3), max_size=3))
    return FirewallSpec(
        firewall_id=UUID(int=7),
        account_id=UUID(int=8),
        revision=1,
        policy=draw(st.sampled_from(RuleAction)),
        outbound_policy=draw(st.sampled_from(RuleAction)),
        apply_to_private=draw(st.booleans()),
        rules=tuple(draw(rules(number)) for number in range(count)),
        sets=tuple(
            AddressSetSpec(set_id, tuple(draw(st.lists(NETWORKS, max_size=3))))
            for set_id in SET_IDS
        ),
        groups=tuple(
            FirewallGroupSpec(
                UUID(int=100 + number),
                UUID(int=8),
                1,
                tuple(draw(rules(1000 * number + it, of_group=True)) for it in range(length)),
            )
            for number, length in enumerate(shared, start=1)
        ),
    )


def all_rows(spec: FirewallSpec) -> list[Acl]:
    """Those of the firewall and of its groups, each at its place."""
    shared = [row for place, it in enumerate(spec.groups) for row in render_group(it, place)]
    return [*render(spec), *shared]


PROBES = st.builds(
    Probe,
    direction=st.sampled_from(["in", "out"]),
    protocol=st.sampled_from(["tcp", "udp", "icmp"]),
    peer=PEERS,
    port=PORTS,
    icmp_type=TYPES,
    source_port=st.sampled_from([40000, 68, 546]),
)


@settings(max_examples=400, deadline=None)
@given(firewalls(), st.lists(PROBES, min_size=1, max_size=12))
def test_rows_do_what_the_firewall_says(spec: FirewallSpec, probes: list[Probe]) -> None:
    rows, sets = all_rows(spec), address_sets(spec)
    assert [decide_by_rows(rows, sets, probe) for probe in probes] == [
        decide(spec, probe) for probe in probes
    ]


@settings(max_examples=100, deadline=None)
@given(firewalls())
def test_rows_are_no_more_than_rules(spec: FirewallSpec) -> None:
    """However many ports there are, and each at a priority of its own within its direction."""
    rows = render(spec)
    assert len(rows) <= len(spec.rules) + 4
    assert len({(row.direction, row.priority) for row in rows}) == len(rows)
    assert all(0 <= row.priority <= 32767 for row in rows)
    assert len({row.key for row in rows}) == len(rows)


@settings(max_examples=100, deadline=None)
@given(firewalls())
def test_rows_of_groups_lie_between_rules_and_policy(spec: FirewallSpec) -> None:
    """Whatever firewall has it at that place, and however many rules all have."""
    for place, it in enumerate(spec.groups):
        rows = render_group(it, place)
        assert len(rows) <= len(it.rules) + 1
        assert all(f"@fwg_{it.group_id.hex}_{place}" in row.match for row in rows)


def test_groups_that_are_full_do_not_meet() -> None:
    full = tuple(
        RuleSpec(UUID(int=it), Direction.IN, RuleProtocol.ANY, RuleAction.DROP)
        for it in range(GROUP_RULES_MAX)
    )
    groups = tuple(
        FirewallGroupSpec(UUID(int=it), UUID(int=8), 1, full) for it in range(GROUPS_MAX)
    )
    spec = FirewallSpec(
        UUID(int=7), UUID(int=8), 1, policy=RuleAction.DROP, rules=full * 10, groups=groups
    )
    priorities = [row.priority for row in all_rows(spec)]
    assert len(set(priorities)) == len(priorities)
    own, (policy, *shared) = priorities[: len(full) * 10], priorities[len(full) * 10 :]
    assert min(own) > max(shared)
    assert min(shared) > policy
    assert shared == sorted(shared, reverse=True)


def test_there_are_priorities_for_all_rules_that_are_sold() -> None:
    assert RULES_SOLD <= RULES_MAX
