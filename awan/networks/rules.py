"""Address arithmetic, and the names of addresses. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from uuid import UUID

import idna

from awan.engines.nameserver import RecordKey, RecordKind
from awan.kit.inet import parse_address, parse_network

NAME_MAX = 253
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

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
        network = parse_network(cidr)
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
        address = parse_address(gateway)
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


def default_name(address: IPv4Address | IPv6Address, zone: str) -> str:
    """The name that an address has unless its owner gives it another: `ip-198-51-100-7.<zone>`; IPv6 in full."""
    return f"ip-{re.sub('[.:]', '-', address.exploded)}.{zone}"


def is_default_name(name: str, zone: str) -> bool:
    """Whether a name has the form that we alone give in the zone."""
    label, _, rest = name.partition(".")
    return rest == zone and re.fullmatch(r"ip-[0-9a-f]+(-[0-9a-f]+)+", label) is not None


def parse_rdns(text: str) -> str:
    """A fully qualified name as DNS has it: lower case, international labels in Punycode, no dot at the end.

    Raises: ValueError with a sentence. Source: RFC 1123 section 2.1, RFC 5891, UTS 46 for upper case and wide forms.
    """
    name = text.removesuffix(".").lower()
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode().removesuffix(".")
        except idna.IDNAError:
            raise ValueError("The rdns is not a valid international domain name.") from None
    labels = name.split(".")
    if len(labels) < 2:
        raise ValueError("The rdns must be fully qualified, such as mail.example.com.")
    if len(name) > NAME_MAX or not all(LABEL.fullmatch(label) for label in labels):
        raise ValueError(
            "The rdns must be a host name: labels of 1 to 63 letters, digits and hyphens, 253 characters in all."
        )
    if labels[-1].isdigit():
        raise ValueError("The rdns must be a name, not an address.")
    return name


def pointer_key(address: IPv4Address | IPv6Address) -> RecordKey:
    """What a reverse lookup of the address asks for."""
    return RecordKey(address.reverse_pointer, RecordKind.PTR)


def records_of(
    address: IPv4Address | IPv6Address, zone: str, rdns: str | None
) -> dict[RecordKey, str]:
    """What the nameserver has of an address: its default name, which always leads to it, and the name it leads to."""
    name = default_name(address, zone)
    kind = RecordKind.A if address.version == 4 else RecordKind.AAAA
    return {RecordKey(name, kind): str(address), pointer_key(address): rdns or name}
