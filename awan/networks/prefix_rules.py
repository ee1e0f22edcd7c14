"""Arithmetic of routed IPv6 prefixes. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv6Address, IPv6Network

from awan.kit.inet import parse_ipv6, parse_network

PREFIX_POOL_MIN = 50
"""The largest pool of prefixes: a /50 is 16,384 pre-generated rows."""
PREFIX_LENGTH = 64
NAMES_MAX = 256
"""Names of one prefix."""
CUSTOMERS_BIT = 1 << 63
"""Set in the interface identifier of every address that an instance has in an on-link pool: see `rules.ipv6_of`."""


def parse_prefix_pool(cidr: str) -> IPv6Network:
    """The range of prefixes. Raises: ValueError with a sentence when it is none."""
    try:
        network = parse_network(cidr)
    except ValueError:
        raise ValueError(
            "The prefix must be in CIDR form without host bits, such as 2001:db8:100::/56."
        ) from None
    if network.version != 6 or not PREFIX_POOL_MIN <= network.prefixlen <= PREFIX_LENGTH:
        raise ValueError(
            f"A pool of routed prefixes is an IPv6 prefix of length {PREFIX_POOL_MIN} to {PREFIX_LENGTH}."
        )
    return network


def parse_router_address(on_link: IPv6Network, gateway: object, text: str) -> IPv6Address:
    """The address that the provider's router sends a pool to. Raises: ValueError with a sentence.

    It is none that an instance may have, nor that router's own.
    """
    try:
        address = parse_ipv6(text)
    except ValueError:
        raise ValueError("The router_address must be an IPv6 address.") from None
    if address not in on_link or address in (on_link.network_address, gateway):
        raise ValueError(
            f"The router_address must be a free address of {on_link}, not the gateway's."
        )
    if int(address) & CUSTOMERS_BIT:
        raise ValueError(
            "The upper half of the on-link prefix belongs to instances: choose a low router_address."
        )
    return address


def prefixes_of(network: IPv6Network) -> Iterator[IPv6Network]:
    """The /64s of a pool, in order."""
    return network.subnets(new_prefix=PREFIX_LENGTH)


def router_name(pool_id: int) -> str:
    """The router of the prefixes whose instances are in this on-link pool."""
    return f"prefixes-{pool_id}"


def address_of_pointer(name: str) -> IPv6Address | None:
    """The IPv6 address that a reverse name stands for; None for other names. Source: RFC 3596 section 2.5."""
    nibbles = name.removesuffix(".ip6.arpa").split(".")
    if not name.endswith(".ip6.arpa") or len(nibbles) != 32:
        return None
    try:
        return IPv6Address(int("".join(reversed(nibbles)), 16))
    except ValueError:
        return None
