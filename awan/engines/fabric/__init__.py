"""Fabric engine: the virtual network of one location.

Every change is one transaction and idempotent. A port is complete from its first instant: addresses, port security
and membership in the tenants' port group come in the transaction that creates it. Raises `EngineUnavailable` when the
databases do not answer, `EngineRejected` when they refuse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Protocol
from uuid import UUID

from awan.engines.fabric.firewall import Firewalls
from awan.engines.fabric.prefixes import (
    PrefixRoute,
    PrefixRouterFacts,
    PrefixRouters,
    PrefixRouterSpec,
)
from awan.engines.fabric.private import (
    GatewaySpec,
    PrivateNetworkFacts,
    PrivateNetworks,
    PrivateNetworkSpec,
)
from awan.engines.fabric.resolvers import MemberNames, Resolvers, ResolverSpec, ServicesSpec

__all__ = [
    "APPLY_TIMEOUT_S",
    "ChassisFacts",
    "Fabric",
    "GatewaySpec",
    "MemberNames",
    "PortFacts",
    "PortSpec",
    "PrefixRoute",
    "PrefixRouterFacts",
    "PrefixRouterSpec",
    "PrivateNetworkFacts",
    "PrivateNetworkSpec",
    "PublicNetworkSpec",
    "ResolverSpec",
    "ServicesSpec",
]

APPLY_TIMEOUT_S = 5.0
HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True)
class PublicNetworkSpec:
    """A location's public network: one logical switch joined to a provider network by a localnet port.

    Addresses come from static DHCP reservations; router advertisements come from the provider's router.
    """

    switch: str
    physical_network: str
    vlan: int | None
    ipv4_cidr: IPv4Network
    ipv4_gateway: IPv4Address
    ipv6_cidr: IPv6Network | None
    ipv6_gateway: IPv6Address | None
    dns_servers: tuple[IPv4Address | IPv6Address, ...]
    mtu: int = 1500


@dataclass(frozen=True)
class PortSpec:
    """A tenant's port on a public or a private switch. `ipv4` and `ipv6` are single addresses, given out by DHCP.

    At least one is needed: a port known by its MAC alone might use every address. `hostname` goes out by DHCP; OVN
    puts it into a program of its own, so only names after RFC 1123 are taken. A port that is not `is_routed` is told
    of no router and no nameservers: its guest has another way out. With `firewall_id` the port is in that firewall,
    which exists already, from its first instant; one that `is_private` only while that firewall applies to such. With
    `ipv6_prefix` the port may use every address of it.
    Raises: ValueError without an address, with another hostname, or with a prefix but no IPv6 address.
    """

    port_id: UUID
    switch: str
    mac: str
    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    hostname: str
    instance_id: UUID
    account_id: UUID
    operation_id: UUID
    is_routed: bool = True
    firewall_id: UUID | None = None
    is_private: bool = False
    ipv6_prefix: IPv6Network | None = None

    def __post_init__(self) -> None:
        if self.ipv4 is None and self.ipv6 is None:
            raise ValueError(f"port {self.port_id} has no address")
        if HOSTNAME.fullmatch(self.hostname) is None:
            raise ValueError(f"port {self.port_id} has an impossible hostname")
        if self.ipv6_prefix is not None and self.ipv6 is None:
            raise ValueError(f"port {self.port_id} has a prefix and no IPv6 address")

    @property
    def dhcpv4_role(self) -> str:
        """Which of its switch's DHCP options the port gets."""
        return "dhcpv4" if self.is_routed else "dhcpv4_local"

    @property
    def address_line(self) -> str:
        """MAC and addresses in one element, as in `PortFacts.addresses`."""
        listed = (self.mac.lower(), self.ipv4, self.ipv6)
        return " ".join(str(part) for part in listed if part is not None)

    @property
    def security_line(self) -> str:
        """What the port may send from, as in `PortFacts.port_security`: `address_line`, with IPv6 also its link-local
        address, and the prefix that is routed to it.

        A guest that makes up another link-local address (RFC 7217 instead of the MAC's EUI-64) has no IPv6.
        """
        if self.ipv6 is None:
            return self.address_line
        line = f"{self.address_line} {link_local_address(self.mac)}"
        return line if self.ipv6_prefix is None else f"{line} {self.ipv6_prefix}"


def link_local_address(mac: str) -> IPv6Address:
    """The IPv6 link-local address with the MAC's EUI-64 (RFC 4291, appendix A)."""
    octets = bytearray.fromhex(mac.replace(":", ""))
    octets[0] ^= 0x02
    return IPv6Address(b"\xfe\x80" + bytes(6) + octets[:3] + b"\xff\xfe" + octets[3:])


@dataclass(frozen=True)
class PortFacts:
    """A port found in the fabric. `chassis` is the node that claims it. Ports without our ids have None there.

    `dhcp_families` (4, 6) are those whose addresses are given out by DHCP. `is_confined`: the rules that hold for all
    tenant ports of its switch hold for it. `firewall_ids` are those that it is in.
    """

    name: str
    switch: str
    port_id: UUID | None
    instance_id: UUID | None
    addresses: tuple[str, ...]
    port_security: tuple[str, ...]
    is_up: bool
    chassis: str | None
    dhcp_families: tuple[int, ...] = (4, 6)
    is_confined: bool = True
    firewall_ids: tuple[UUID, ...] = ()


@dataclass(frozen=True)
class ChassisFacts:
    """A node as the fabric sees it. `nb_cfg` is the last configuration that it confirmed.

    `is_alive`: it has confirmed everything committed before the call (or was given two seconds to do so).
    """

    system_id: str
    hostname: str
    encap_ip: str
    nb_cfg: int
    is_alive: bool


class Fabric(Firewalls, PrefixRouters, PrivateNetworks, Resolvers, Protocol):
    """The contract. One object per location."""

    def ensure_public_network(self, spec: PublicNetworkSpec) -> bool:
        """The switch, its localnet port, DHCP options and the ACLs for tenant ports exist as given.

        Returns whether anything of it had to be changed.
        """
        ...

    def ensure_port(self, spec: PortSpec) -> None:
        """The port exists exactly as given, in its firewall where that applies, and in no other.

        Wrong columns are corrected.

        Returns after the commit, not after the effect: see `wait_applied`. Raises: EngineRejected when its switch or
        its firewall does not exist.
        """
        ...

    def ensure_port_absent(self, port_id: UUID) -> None:
        """The port is gone. Absent: no effect."""
        ...

    def wait_applied(self, chassis: str, *, timeout_s: float = APPLY_TIMEOUT_S) -> bool:
        """Waits until the chassis has everything committed so far; False when it did not within `timeout_s`."""
        ...

    def wait_port_up(self, port_id: UUID, chassis: str, *, timeout_s: float) -> bool:
        """Waits until the port is bound to `chassis`, up, and its flows are in place; False after `timeout_s`."""
        ...

    def find_port(self, port_id: UUID) -> PortFacts | None:
        """The port, or None."""
        ...

    def list_ports(self) -> list[PortFacts]:
        """All tenant-type ports of the location, by name (no localnet or router ports)."""
        ...

    def list_chassis(self) -> list[ChassisFacts]:
        """All chassis that have registered, by system-id."""
        ...

    def close(self) -> None:
        """Ends connections and threads."""
        ...
