"""What rules, ports and prefixes may look like. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from awan.engines.fabric.firewall import Direction, RuleAction, RuleProtocol
from awan.kit.inet import parse_network

RULES_MAX = 1000
IPSETS_MAX = 10
ENTRIES_MAX = 100
DESCRIPTION_MAX = 255
ALL_PORTS = 0
_RANGE = re.compile(r"([0-9]{1,5})(?:\s*-\s*([0-9]{1,5}))?")
_WITH_PORTS = (RuleProtocol.TCP, RuleProtocol.UDP)
_WITH_TYPES = (RuleProtocol.ICMP, RuleProtocol.ICMPV6)


@dataclass(frozen=True)
class RuleValues:
    """What a rule says, but for its description and whether it is enabled: two equal ones are one too many."""

    direction: Direction
    protocol: RuleProtocol
    ports: tuple[int, int] | None
    icmp_type: int | None
    ipset_id: int | None
    peer: IPv4Network | IPv6Network | None
    action: RuleAction


@dataclass(frozen=True)
class RuleType:
    """A service as the panel offers it. `destination_port` 0: none, or the user's own."""

    type: str
    label: str
    protocol: RuleProtocol
    destination_port: int


RULE_TYPES = (
    RuleType("ssh", "SSH", RuleProtocol.TCP, 22),
    RuleType("http", "HTTP", RuleProtocol.TCP, 80),
    RuleType("https", "HTTPS", RuleProtocol.TCP, 443),
    RuleType("mysql", "MySQL", RuleProtocol.TCP, 3306),
    RuleType("postgresql", "PostgreSQL", RuleProtocol.TCP, 5432),
    RuleType("rdp", "RDP", RuleProtocol.TCP, 3389),
    RuleType("dns", "DNS", RuleProtocol.UDP, 53),
    RuleType("icmp", "ICMP", RuleProtocol.ICMP, ALL_PORTS),
    RuleType("custom_tcp", "Custom TCP", RuleProtocol.TCP, ALL_PORTS),
    RuleType("custom_udp", "Custom UDP", RuleProtocol.UDP, ALL_PORTS),
    RuleType("any", "Any", RuleProtocol.ANY, ALL_PORTS),
)


def parse_ports(given: int | str) -> tuple[int, int] | None:
    """First and last of a port or a range such as `8000-8100`; None for 0, which is every port.

    Raises: ValueError with a sentence.
    """
    found = _RANGE.fullmatch(str(given).strip())
    if found is None:
        raise ValueError("The destination_port must be a port, or a range such as 8000-8100.")
    first, last = int(found[1]), int(found[2] or found[1])
    if (first, last) == (ALL_PORTS, ALL_PORTS):
        return None
    if not 1 <= first <= 65535 or not 1 <= last <= 65535:
        raise ValueError("The destination_port must be between 0 and 65535; 0 is every port.")
    if first > last:
        raise ValueError("The destination_port must not end before it begins.")
    return first, last


def check_protocol(
    protocol: RuleProtocol, ports: tuple[int, int] | None, icmp_type: int | None
) -> dict[str, list[str]]:
    """What of a rule does not go with its protocol, as sentences by field."""
    errors: dict[str, list[str]] = {}
    if ports is not None and protocol not in _WITH_PORTS:
        errors["destination_port"] = [f"The destination_port must be 0 for {protocol}."]
    if icmp_type is not None and protocol not in _WITH_TYPES:
        errors["icmp_type"] = ["The icmp_type needs the protocol icmp or icmpv6."]
    return errors


def parse_prefix(text: str) -> IPv4Network | IPv6Network:
    """An address or prefix of either family; host bits are cleared. Raises: ValueError with a sentence."""
    try:
        network = parse_network(text.strip(), strict=False)
    except ValueError:
        raise ValueError(
            "Give an IPv4 or IPv6 address or prefix, such as 198.51.100.7 or 2001:db8::/32."
        ) from None
    if network.prefixlen == 0:
        raise ValueError("A prefix of length 0 is everybody: leave the source out instead.")
    if network.version == 6 and network.network_address.ipv4_mapped is not None:
        raise ValueError("Give an IPv4 address as such, not mapped into IPv6.")
    return network


def show_ports(first: int | None, last: int | None) -> str:
    """`22`, `8000-8100`, or `all`."""
    if first is None:
        return "all"
    return str(first) if first == last else f"{first}-{last}"
