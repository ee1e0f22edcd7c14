"""Prefixes and addresses of private networks. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from ipaddress import IPv4Address, IPv4Network

from awan.engines.fabric import MemberNames, PrivateNetworkSpec
from awan.kit.inet import PRIVATE_USE

PREFIX_MIN, PREFIX_MAX = 16, 28
FIRST_OCTET, SECOND_OCTETS = 10, range(20, 256)
"""Where the system looks for a prefix: 10.20.0.0/24 is the first."""


def parse_private_prefix(cidr: str) -> IPv4Network:
    """The prefix of a private network. Raises: ValueError with a sentence when it is none."""
    try:
        network = IPv4Network(cidr)
    except ValueError:
        raise ValueError(
            "The prefix must be IPv4, in CIDR form without host bits, such as 10.20.3.0/24."
        ) from None
    if not PREFIX_MIN <= network.prefixlen <= PREFIX_MAX:
        raise ValueError(f"The prefix length is from {PREFIX_MIN} to {PREFIX_MAX}.")
    if not any(network.subnet_of(inside) for inside in PRIVATE_USE):
        raise ValueError("The prefix must lie in 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16.")
    return network


def choose_prefix(taken: Collection[IPv4Network]) -> IPv4Network | None:
    """The first /24 that overlaps none of `taken`; None when there is none left."""
    for second in SECOND_OCTETS:
        for third in range(256):
            network = IPv4Network(((FIRST_OCTET << 24) | (second << 16) | (third << 8), 24))
            if not any(network.overlaps(other) for other in taken):
                return network
    return None


def gateway_of(network: IPv4Network) -> IPv4Address:
    """The address of the network's gateway: its first host."""
    return network.network_address + 1


def resolver_of(network: IPv4Network) -> IPv4Address:
    """The address of the network's way to the resolver: its last host, whether it has names or not."""
    return network.broadcast_address - 1


def choose_address(network: IPv4Network, taken: Iterable[IPv4Address]) -> IPv4Address | None:
    """The lowest address that a card may get; None when the network is full."""
    used = set(taken) | {gateway_of(network), resolver_of(network)}
    return next((address for address in network.hosts() if address not in used), None)


def check_address(
    network: IPv4Network, taken: Iterable[IPv4Address], wanted: IPv4Address
) -> str | None:
    """What speaks against a chosen address, as a sentence; None when it may be used."""
    ends = (network.network_address, network.broadcast_address)
    if wanted not in network or wanted in (*ends, gateway_of(network), resolver_of(network)):
        return f"The address must be a host address of {network}, neither its first (the gateway) nor its last."
    if wanted in set(taken):
        return "The address has already been taken."
    return None


def count_free(network: IPv4Network, used: int) -> int:
    """How many addresses cards can still get."""
    return max(0, network.num_addresses - 4 - used)


def private_switch(network_id: object) -> str:
    """The logical switch of a private network, after its uuid."""
    return f"private-{network_id}"


def private_spec(
    resource_id: object,
    cidr: IPv4Network,
    dns_servers: tuple[IPv4Address, ...],
    names: MemberNames | None = None,
) -> PrivateNetworkSpec:
    """The network as the fabric must have it."""
    switch = private_switch(resource_id)
    return PrivateNetworkSpec(switch, cidr, gateway_of(cidr), dns_servers, names=names)
