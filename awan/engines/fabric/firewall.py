"""What a firewall is to the fabric: whole, and in the order in which its rules are tried.

The first rule that matches a packet decides: the firewall's own come first, then those of its groups in their order;
without one the policy of its direction does. Whatever the rules say, these pass: replies to what was let through, DHCP,
ARP, neighbour discovery and router advertisements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from typing import Protocol
from uuid import UUID


class Direction(StrEnum):
    """Seen from the guest: `in` is what reaches it, `out` what it sends."""

    IN = "in"
    OUT = "out"


class RuleProtocol(StrEnum):
    """`icmp` is that of both families, unless a rule names one of its types (which are ICMPv4's)."""

    TCP = "tcp"
    UDP = "udp"
    ICMP = "icmp"
    ICMPV6 = "icmpv6"
    ANY = "any"


class RuleAction(StrEnum):
    """`REJECT` answers: TCP with a reset, anything else with ICMP unreachable."""

    ACCEPT = "ACCEPT"
    DROP = "DROP"
    REJECT = "REJECT"


@dataclass(frozen=True)
class RuleSpec:
    """One rule. `ports` are the first and the last destination port; `icmp_type` a type of the protocol named.

    `set_id` names one of the firewall's sets, `peers` lists networks; with neither, every peer is meant. A peer is
    who sends what comes in, and who gets what goes out.
    Raises: ValueError for what no packet can be: ports without TCP or UDP, types without ICMP.
    """

    rule_id: UUID
    direction: Direction
    protocol: RuleProtocol
    action: RuleAction
    ports: tuple[int, int] | None = None
    icmp_type: int | None = None
    set_id: int | None = None
    peers: tuple[IPv4Network | IPv6Network, ...] = ()

    def __post_init__(self) -> None:
        if self.ports is not None:
            first, last = self.ports
            if self.protocol not in (RuleProtocol.TCP, RuleProtocol.UDP):
                raise ValueError(f"rule {self.rule_id}: {self.protocol} has no ports")
            if not 1 <= first <= last <= 65535:
                raise ValueError(f"rule {self.rule_id}: there are no ports {first} to {last}")
        if self.icmp_type is not None:
            if self.protocol not in (RuleProtocol.ICMP, RuleProtocol.ICMPV6):
                raise ValueError(f"rule {self.rule_id}: {self.protocol} has no types")
            if not 0 <= self.icmp_type <= 255:
                raise ValueError(f"rule {self.rule_id}: there is no type {self.icmp_type}")


@dataclass(frozen=True)
class AddressSetSpec:
    """A set that rules refer to. An empty one matches nothing; networks of it may overlap."""

    set_id: int
    networks: tuple[IPv4Network | IPv6Network, ...]


GROUPS_MAX = 8
"""Groups that a firewall may have."""
GROUP_RULES_MAX = 1000


@dataclass(frozen=True)
class FirewallGroupSpec:
    """Rules that firewalls share, in the order in which they are tried; `revision` rises with every change.

    Raises: ValueError for more rules than there is room for, and when one names a set: groups have none.
    """

    group_id: UUID
    account_id: UUID
    revision: int
    rules: tuple[RuleSpec, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rules) > GROUP_RULES_MAX:
            raise ValueError(f"a group has at most {GROUP_RULES_MAX} rules")
        for rule in self.rules:
            if rule.set_id is not None:
                raise ValueError(f"rule {rule.rule_id}: a group has no sets")


@dataclass(frozen=True)
class FirewallSpec:
    """A whole firewall. `rules` are in the order in which they are tried; `revision` rises with every change.

    With `apply_to_private` it also stands before the instance's ports on private networks. `groups` are tried after
    its own rules, one after the other.
    Raises: ValueError when a rule names a set that is not there, and for too many groups or one twice.
    """

    firewall_id: UUID
    account_id: UUID
    revision: int
    policy: RuleAction = RuleAction.ACCEPT
    outbound_policy: RuleAction = RuleAction.ACCEPT
    apply_to_private: bool = False
    rules: tuple[RuleSpec, ...] = ()
    sets: tuple[AddressSetSpec, ...] = ()
    groups: tuple[FirewallGroupSpec, ...] = ()

    def __post_init__(self) -> None:
        ids = {it.group_id for it in self.groups}
        if len(ids) < len(self.groups) or len(ids) > GROUPS_MAX:
            raise ValueError(f"a firewall has at most {GROUPS_MAX} groups, each once")
        known = {it.set_id for it in self.sets}
        for rule in self.rules:
            if rule.set_id is not None and rule.set_id not in known:
                raise ValueError(f"rule {rule.rule_id}: there is no set {rule.set_id}")


@dataclass(frozen=True)
class FirewallFacts:
    """A firewall found in the fabric. `lines` is all that it does, in the form of `acls.lines_of`.

    `firewall_id` is None for one whose name is none of ours.
    """

    name: str
    firewall_id: UUID | None
    revision: int
    lines: tuple[str, ...]
    port_ids: tuple[UUID, ...]


@dataclass(frozen=True)
class FirewallGroupFacts:
    """A group found in the fabric, at one of the places that it has among the groups of firewalls, counted from 0.

    `lines` as in `FirewallFacts`; `port_ids` are the ports of the firewalls that have it there. `group_id` is None for
    one whose name is none of ours.
    """

    name: str
    group_id: UUID | None
    place: int
    revision: int
    lines: tuple[str, ...]
    port_ids: tuple[UUID, ...]


class Firewalls(Protocol):
    """The part of the fabric's contract that is about firewalls. A port joins its firewall in `ensure_port`."""

    def ensure_firewall(self, spec: FirewallSpec) -> bool:
        """The firewall is exactly as given, changed in one transaction; whether anything had to be changed.

        One that is there in a newer revision stays: whoever was slow does not undo what came later. Ports that have
        joined stay in; others that somebody has put into it leave; those on private networks come and go with
        `apply_to_private`. Its groups exist, and its ports are in them; one that is there in a newer revision keeps
        that. Returns after the commit, see `wait_firewall_applied`.
        """
        ...

    def ensure_firewall_absent(self, firewall_id: UUID) -> None:
        """The firewall and its sets are gone. Absent: no effect."""
        ...

    def wait_firewall_applied(self, firewall_id: UUID, *, timeout_s: float) -> bool:
        """Waits until every node that has one of its ports has everything committed so far; False after `timeout_s`.

        True at once when no node has any.
        """
        ...

    def list_firewalls(self) -> Sequence[FirewallFacts]:
        """All firewalls of the location, by name."""
        ...

    def ensure_firewall_group(self, spec: FirewallGroupSpec) -> bool:
        """Wherever firewalls have the group, its rules are these, changed in one transaction; whether anything was.

        Where it is there in a newer revision, that stays. Places that no firewall has it at any more are gone.
        """
        ...

    def ensure_firewall_group_absent(self, group_id: UUID) -> None:
        """The group is gone, from whatever firewall had it. Absent: no effect."""
        ...

    def wait_firewall_group_applied(self, group_id: UUID, *, timeout_s: float) -> bool:
        """As `wait_firewall_applied`, of all ports in the group."""
        ...

    def list_firewall_groups(self) -> Sequence[FirewallGroupFacts]:
        """All groups of the location, by name: one for each place that firewalls have them at."""
        ...
