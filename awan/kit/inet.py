"""Addresses and prefixes as people write them.

Python's `ipaddress` takes a zone (`fe80::1%eth0`, RFC 4007 section 11) for a part of the address, and compares and
prints it, while the database and the wire drop it: then two that are equal look different. Nobody's zone is ours.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

PRIVATE_USE = tuple(IPv4Network(it) for it in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
"""For use inside organisations; customers choose the prefixes of their private networks here. Source: RFC 1918."""


def parse_address(text: str) -> IPv4Address | IPv6Address:
    """The address. Raises: ValueError when it is none, or has a zone."""
    return ip_address(_without_zone(text))


def parse_ipv6(text: str) -> IPv6Address:
    """The IPv6 address. Raises: ValueError when it is none, or has a zone."""
    return IPv6Address(_without_zone(text))


def parse_network(text: str, *, strict: bool = True) -> IPv4Network | IPv6Network:
    """The prefix; not `strict`: host bits are cleared. Raises: ValueError when it is none, or has a zone."""
    return ip_network(_without_zone(text), strict=strict)


def _without_zone(text: str) -> str:
    if "%" in text:
        raise ValueError(f"{text!r} has a zone.")
    return text
