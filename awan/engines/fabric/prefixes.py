"""Routed IPv6 prefixes, as the fabric's contract speaks of them.

The provider's router sends a whole range of prefixes to one address of a public network. There a logical router takes
each packet on to the instance that has the prefix. What instances send from their prefixes goes to the provider's
router directly: the logical router has no way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from typing import Protocol

from awan.engines.fabric.private import GATEWAY_CHASSIS_MAX


@dataclass(frozen=True, order=True)
class PrefixRoute:
    """A prefix and the instance's own address in the public network, which its packets are sent to."""

    prefix: IPv6Network
    next_hop: IPv6Address


@dataclass(frozen=True)
class PrefixRouterSpec:
    """A router of prefixes. `chassis` may carry it: the first that is alive does.

    `address` lies in `on_link`, the IPv6 prefix of the public switch, and so do all next hops.
    Raises: ValueError for addresses outside, a prefix that has two routes, no chassis or too many.
    """

    name: str
    public_switch: str
    address: IPv6Address
    on_link: IPv6Network
    routes: tuple[PrefixRoute, ...]
    chassis: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.chassis) <= GATEWAY_CHASSIS_MAX:
            raise ValueError(f"a router of prefixes on {len(self.chassis)} chassis")
        for address in (self.address, *(route.next_hop for route in self.routes)):
            if address not in self.on_link:
                raise ValueError(f"{address} is not in {self.on_link}")
        if len({route.prefix for route in self.routes}) < len(self.routes):
            raise ValueError("a prefix has two routes")


@dataclass(frozen=True)
class PrefixRouterFacts:
    """A router of prefixes found in the fabric. `address` is None when it is not whole.

    `routes` are (prefix, next hop), by text. `active_chassis` is the node that carries it now.
    """

    name: str
    address: str | None
    routes: tuple[tuple[str, str], ...]
    active_chassis: str | None


class PrefixRouters(Protocol):
    """The part of `Fabric` that is about routed prefixes. Idempotent; one transaction each."""

    def ensure_prefix_router(self, spec: PrefixRouterSpec) -> bool:
        """The router exists with these routes and no others. Whether anything changed.

        Raises EngineRejected when the public network does not exist.
        """
        ...

    def ensure_prefix_router_absent(self, name: str) -> bool:
        """There is no such router. Whether anything changed."""
        ...

    def wait_prefix_router_carried(self, name: str, *, timeout_s: float) -> bool:
        """Waits until a chassis carries the router; False when none does within `timeout_s`."""
        ...

    def list_prefix_routers(self) -> list[PrefixRouterFacts]:
        """All routers of prefixes of the location, by name."""
        ...
