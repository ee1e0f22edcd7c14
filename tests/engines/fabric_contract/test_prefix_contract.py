"""What every fabric does with routed IPv6 prefixes, simulated or real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network

import pytest

from awan.engines.fabric import Fabric, PortSpec, PrefixRoute, PrefixRouterSpec
from awan.errors import EngineRejected
from tests.engines.fabric_contract.conftest import CENTRAL_SWITCH, OvnCentral

ON_LINK = IPv6Network("2001:db8:200:1::/64")


def route(number: int, host: int | None = None) -> PrefixRoute:
    """The prefix of this number, which belongs to the instance of host number `host`."""
    prefix = IPv6Network(f"2001:db8:200:{0x100 + number:x}::/64")
    return PrefixRoute(prefix, ON_LINK.network_address + (number if host is None else host))


def router_spec(*routes: PrefixRoute) -> PrefixRouterSpec:
    return PrefixRouterSpec(
        name="prefixes-a",
        public_switch=CENTRAL_SWITCH,
        address=ON_LINK.network_address + 2,
        on_link=ON_LINK,
        routes=routes,
        chassis=("node-1", "node-2"),
    )


def routes_of(fabric: Fabric) -> dict[str, list[str]]:
    return {
        it.name: [f"{prefix} {next_hop}" for prefix, next_hop in it.routes]
        for it in fabric.list_prefix_routers()
    }


def test_a_router_twice_is_once(fabric: Fabric) -> None:
    spec = router_spec(route(10), route(11))
    assert [fabric.ensure_prefix_router(spec) for _ in range(2)] == [True, False]
    (facts,) = fabric.list_prefix_routers()
    assert (facts.name, facts.address) == ("prefixes-a", "2001:db8:200:1::2")
    assert facts.routes == (
        ("2001:db8:200:10a::/64", "2001:db8:200:1::a"),
        ("2001:db8:200:10b::/64", "2001:db8:200:1::b"),
    )
    assert fabric.ensure_prefix_router(replace(spec, chassis=("node-2",)))
    assert fabric.ensure_prefix_router(spec)
    assert not fabric.ensure_prefix_router(spec)


def test_routes_come_move_and_go(fabric: Fabric) -> None:
    fabric.ensure_prefix_router(router_spec(route(10)))
    for routes in ((route(10), route(11)), (route(11),), (route(11, 12), route(13))):
        assert fabric.ensure_prefix_router(router_spec(*routes))
        assert not fabric.ensure_prefix_router(router_spec(*routes))
        wanted = [f"{it.prefix} {it.next_hop}" for it in routes]
        assert routes_of(fabric) == {"prefixes-a": wanted}
    assert [fabric.ensure_prefix_router_absent("prefixes-a") for _ in range(2)] == [True, False]
    assert routes_of(fabric) == {}


def test_a_router_needs_its_network(fabric: Fabric) -> None:
    with pytest.raises(EngineRejected, match="elsewhere"):
        fabric.ensure_prefix_router(replace(router_spec(route(10)), public_switch="elsewhere"))
    assert routes_of(fabric) == {}


def test_a_router_is_no_private_network(fabric: Fabric) -> None:
    fabric.ensure_prefix_router(router_spec(route(10)))
    assert fabric.list_private_networks() == []
    assert fabric.list_ports() == []


def test_a_port_may_use_its_prefix(fabric: Fabric, make_port_spec: Callable[..., PortSpec]) -> None:
    plain = make_port_spec(10)
    fabric.ensure_port(plain)
    spec = replace(plain, ipv6_prefix=route(10).prefix)
    for wanted in (spec, plain, spec):
        fabric.ensure_port(wanted)
        facts = fabric.find_port(spec.port_id)
        assert facts is not None
        assert facts.addresses == (plain.address_line,)
        assert facts.port_security == (wanted.security_line,)
    assert spec.security_line == f"{plain.security_line} 2001:db8:200:10a::/64"


@pytest.mark.parametrize(
    "change",
    [
        {"chassis": ()},
        {"address": IPv6Address("2001:db8:201::1")},
        {"routes": (PrefixRoute(route(10).prefix, IPv6Address("2001:db8:201::1")),)},
        {"routes": (route(10), route(10, 11))},
    ],
)
def test_impossible_routers(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"chassis|is not in|two routes"):
        replace(router_spec(route(10)), **change)  # type: ignore[arg-type]


def test_a_prefix_needs_an_address(make_port_spec: Callable[..., PortSpec]) -> None:
    with pytest.raises(ValueError, match="no IPv6 address"):
        make_port_spec(10, ipv6=None, ipv6_prefix=route(10).prefix)


def test_rows_of_a_router(
    ovn_fabric: Fabric, ovn_central: OvnCentral, make_network_spec: Callable[..., object]
) -> None:
    """What was taken away or added by hand is put right, and nothing of a router is left behind."""
    ovn_fabric.ensure_public_network(make_network_spec())  # type: ignore[arg-type]
    spec = router_spec(route(10), route(11))
    ovn_fabric.ensure_prefix_router(spec)
    router, nbctl = "prefixes-a", ovn_central.nbctl
    for damage in (
        ("lr-route-del", router, "2001:db8:200:10a::/64"),
        ("lr-route-add", router, "2001:db8:200:1ff::/64", "2001:db8:200:1::99"),
        ("lr-policy-add", router, "10", "ip6", "drop"),
        ("lrp-del-gateway-chassis", f"{router}-outer", "node-1"),
        ("lsp-del", f"{router}-outer-peer"),
        ("lrp-del", f"{router}-outer"),
        ("lr-del", router),
    ):
        nbctl(*damage)
        assert ovn_fabric.ensure_prefix_router(spec), damage
        assert not ovn_fabric.ensure_prefix_router(spec), damage
    assert len(nbctl("lr-route-list", router).splitlines()) >= 2
    ovn_fabric.ensure_prefix_router_absent(router)
    for table in ("Logical_Router", "Logical_Router_Port", "Logical_Router_Static_Route"):
        assert nbctl("--bare", "--columns=_uuid", "list", table).split() == [], table
