"""Private networks and their gateways, as the fabric's contract speaks of them.

A private network is a logical switch that no provider network is joined to. Nodes carry it in Geneve tunnels, so two
networks of one prefix never meet. Its ports are those of `PortSpec`; its gateway is a logical router with one address
of a public network, behind which the members without a public address of their own speak to the outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol

from awan.engines.fabric.resolvers import MemberNames

PRIVATE_MTU = 1442
"""What is left of 1,500 bytes inside a Geneve tunnel over IPv4: 20 + 8 + 8 + 8 (OVN's option) + 14 less."""
GATEWAY_CHASSIS_MAX = 5
"""Nodes that may take a gateway over. Each watches the others (BFD), so more of them cost without end."""
PRIVATE_LEASE_S = 600
"""How long a guest may go on with a default route that is not its own any more."""


@dataclass(frozen=True)
class PrivateNetworkSpec:
    """A private network. `gateway_ip` is the first host of `cidr`, whether a gateway is there or not.

    `dns_servers` are told to members whose only way out is the gateway; `names`, if it has them, to all.
    """

    switch: str
    cidr: IPv4Network
    gateway_ip: IPv4Address
    dns_servers: tuple[IPv4Address, ...] = ()
    mtu: int = PRIVATE_MTU
    names: MemberNames | None = None


@dataclass(frozen=True)
class GatewaySpec:
    """The gateway of a private network. `chassis` may carry it: the first that is alive does.

    `public_ip` lies in `public_cidr`, the prefix of the public switch; `next_hop` is the provider's router there.
    """

    network: PrivateNetworkSpec
    public_switch: str
    public_ip: IPv4Address
    public_cidr: IPv4Network
    next_hop: IPv4Address
    chassis: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.chassis) <= GATEWAY_CHASSIS_MAX:
            raise ValueError(f"a gateway on {len(self.chassis)} chassis")
        if self.public_ip not in self.public_cidr:
            raise ValueError(f"{self.public_ip} is not in {self.public_cidr}")


@dataclass(frozen=True)
class PrivateNetworkFacts:
    """A private network found in the fabric. `public_ip` is its gateway's; None without a gateway.

    `active_chassis` is the node that carries the gateway now. `service_ip` is the address behind which members ask a
    resolver, and `resolver_chassis` the node that carries the way there; None without one.
    """

    switch: str
    public_ip: str | None
    active_chassis: str | None
    service_ip: str | None = None
    resolver_chassis: str | None = None


class PrivateNetworks(Protocol):
    """The part of `Fabric` that is about private networks. Idempotent; one transaction each."""

    def ensure_private_network(self, spec: PrivateNetworkSpec) -> bool:
        """The switch, its DHCP options and the rules for tenant ports exist as given. Whether anything changed."""
        ...

    def ensure_private_network_absent(self, switch: str) -> None:
        """The network is gone, with its gateway, its way to a resolver, and whatever ports are left on it.

        Absent: no effect.
        """
        ...

    def ensure_gateway(self, spec: GatewaySpec) -> bool:
        """The network has this gateway and no other. Whether anything changed.

        Raises EngineRejected when the network or the public network does not exist.
        """
        ...

    def ensure_gateway_absent(self, switch: str) -> bool:
        """The network has no gateway. Whether anything changed."""
        ...

    def wait_gateway_carried(self, switch: str, *, timeout_s: float) -> bool:
        """Waits until a chassis carries the network's gateway; False when none does within `timeout_s`."""
        ...

    def list_private_networks(self) -> list[PrivateNetworkFacts]:
        """All private networks of the location, by switch."""
        ...


def choose_gateway_chassis(switch: str, system_ids: Sequence[str]) -> tuple[str, ...]:
    """The chassis for a network's gateway, in the order of preference: another order for each network.

    A chassis that comes or goes moves no gateway that it does not carry (rendezvous hashing).
    """

    def weight(system_id: str) -> bytes:
        return hashlib.sha256(f"{switch} on {system_id}".encode()).digest()

    return tuple(sorted(system_ids, key=weight)[:GATEWAY_CHASSIS_MAX])


def gateway_policies(cidr: IPv4Network, outer_port: str) -> Mapping[int, tuple[str, str]]:
    """What a gateway forwards, as priority -> (match, action). `outer_port` is the router's on the public side.

    What comes in there for a member is an answer to it, of which connection tracking has found the flow and put the
    member's address in. Whoever writes that address himself (a neighbour with a route over the gateway) is not tracked.

    Addresses that exist inside organisations only are never looked for behind the provider's router: whatever
    else can be reached from there (the nodes' own network) is not the members' business. Source: RFC 6890.
    """
    own = f"ip4.dst == {cidr}"
    inside = ", ".join(
        (
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "100.64.0.0/10",
            "169.254.0.0/16",
            "127.0.0.0/8",
        )
    )
    return {
        300: (f'inport == "{outer_port}" && {own} && !ct.trk', "drop"),
        200: (own, "allow"),
        100: (f"ip4.dst == {{{inside}}}", "drop"),
    }
