"""The way from a private network to a resolver, as the fabric's contract speaks of it.

A private network has no way out unless it has a gateway, and even then none to the provider's own addresses. So each
has a router of its own to the location's services network, through which members ask one resolver and do nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol

SERVICES_SWITCH = "services"
DNS_PORT = 53
ROUTER_CHASSIS_MAX = 5


@dataclass(frozen=True)
class MemberNames:
    """What the members of a private network are told by DHCP, so that they find each other by name.

    `router` is the address in the network by way of which `resolver` is reached.
    """

    domain: str
    resolver: IPv4Address
    router: IPv4Address


@dataclass(frozen=True)
class ServicesSpec:
    """The network on which the location's resolver is: one switch joined to a provider network by a localnet port."""

    cidr: IPv4Network
    physical_network: str
    vlan: int | None


@dataclass(frozen=True)
class ResolverSpec:
    """The router from a private network to the resolver. `chassis` may carry it: the first that is alive does.

    `inner` is its address in the network, `outer` the one in the services network behind which all members ask.
    Raises: ValueError when an address is not where it belongs, or with no or too many chassis.
    """

    switch: str
    cidr: IPv4Network
    inner: IPv4Address
    outer: IPv4Address
    resolver: IPv4Address
    services: ServicesSpec
    chassis: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.chassis) <= ROUTER_CHASSIS_MAX:
            raise ValueError(f"a router on {len(self.chassis)} chassis")
        homes = ((self.inner, self.cidr), *((it, self.services.cidr) for it in self._outside))
        for address, home in homes:
            if address not in home:
                raise ValueError(f"{address} is not in {home}")

    @property
    def _outside(self) -> tuple[IPv4Address, IPv4Address]:
        return self.outer, self.resolver


class Resolvers(Protocol):
    """The part of `Fabric` that is about ways to resolvers. Idempotent; one transaction each."""

    def ensure_resolver(self, spec: ResolverSpec) -> bool:
        """The network has this way to the resolver and no other. Whether anything changed.

        The services network is made with the first of them. Raises EngineRejected when the network does not exist.
        """
        ...

    def ensure_resolver_absent(self, switch: str) -> bool:
        """The network has no way to a resolver. Whether anything changed."""
        ...


def resolver_policies(spec: ResolverSpec, inner: str, outer: str) -> Mapping[int, tuple[str, str]]:
    """What the router forwards, as priority -> (match, action); `inner` and `outer` are its ports.

    A question of a member to the resolver, and its answer, of which connection tracking has found the flow and put
    the member's address in. Whoever writes that address himself is not tracked. Nothing else is forwarded at all.
    """
    question = (
        f'inport == "{inner}" && ip4.src == {spec.cidr} && ip4.dst == {spec.resolver}'
        f" && (udp.dst == {DNS_PORT} || tcp.dst == {DNS_PORT})"
    )
    reply = f'inport == "{outer}" && ip4.src == {spec.resolver} && ip4.dst == {spec.cidr}'
    return {
        300: (f"{reply} && !ct.trk", "drop"),
        200: (reply, "allow"),
        150: (question, "allow"),
        100: ("ip", "drop"),
    }
