"""Address arithmetic. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from uuid import UUID

POOL_PREFIX_MIN = 18
"""The largest IPv4 pool: a /18 is 16,382 pre-generated rows."""


def usable_addresses(
    network: IPv4Network, gateway: IPv4Address, reserved: Iterable[IPv4Address]
) -> Iterator[IPv4Address]:
    """The addresses of the prefix that customers may get: no network, broadcast, gateway or reserved ones."""
    excluded = {gateway, *reserved}
    return (address for address in network.hosts() if address not in excluded)


def parse_prefix(cidr: str) -> IPv4Network | IPv6Network:
    """The prefix of a pool. Raises: ValueError with a sentence when it is none."""
    try:
        network = ip_network(cidr)
    except ValueError:
        raise ValueError(
            "The prefix must be in CIDR form without host bits, such as 198.51.100.0/24."
        ) from None
    if network.version == 4 and not POOL_PREFIX_MIN <= network.prefixlen <= 30:
        raise ValueError(f"An IPv4 pool has a prefix length from {POOL_PREFIX_MIN} to 30.")
    if network.version == 6 and network.prefixlen != 64:
        raise ValueError("An IPv6 pool is an on-link /64.")
    return network


def parse_gateway(network: IPv4Network | IPv6Network, gateway: str) -> IPv4Address | IPv6Address:
    """The router's address in the prefix. Raises: ValueError with a sentence when it is none."""
    try:
        address = type(network.network_address)(gateway)
    except ValueError:
        address = network.network_address
    if address not in network or address in (network.network_address, network.broadcast_address):
        raise ValueError("The gateway must be a host address of the prefix.")
    return address


def ipv6_of(network: IPv6Network, nic_id: UUID) -> IPv6Address:
    """The address of a card in an on-link /64: 64 bits of its uuid, never the reserved low or anycast ranges.

    Source: RFC 7217's aim (stable, opaque interface identifiers); RFC 5453 lists the reserved identifiers.
    """
    interface = (
        int.from_bytes(nic_id.bytes[8:], "big") & 0xBFFF_FFFF_FFFF_FFFF | 0x8000_0000_0000_0000
    )
    return IPv6Address(int(network.network_address) | interface)


def switch_name(pool_id: int) -> str:
    """The logical switch of a public pool."""
    return f"public-{pool_id}"
