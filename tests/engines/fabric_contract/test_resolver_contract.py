"""The contract of ways to resolvers: on the fake, and on OVN's databases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from awan.engines.fabric import (
    Fabric,
    MemberNames,
    PrivateNetworkSpec,
    ResolverSpec,
    ServicesSpec,
)
from awan.engines.fabric.ovn_private import private_dhcp_options
from awan.errors import EngineRejected
from tests.engines.fabric_contract.conftest import OvnCentral

RESOLVER = IPv4Address("100.64.0.53")
NAMES = MemberNames("0f.internal.jkt1.awan.example", RESOLVER, IPv4Address("10.20.0.254"))
SERVICES = ServicesSpec(IPv4Network("100.64.0.0/16"), "public", 64)


def private_spec(
    name: str = "private-a", *, names: MemberNames | None = NAMES
) -> PrivateNetworkSpec:
    cidr = IPv4Network("10.20.0.0/24")
    outside = (IPv4Address("198.18.200.1"),)
    return PrivateNetworkSpec(name, cidr, cidr.network_address + 1, outside, names=names)


def resolver_spec(name: str = "private-a", outer: str = "100.64.0.1") -> ResolverSpec:
    return ResolverSpec(
        switch=name,
        cidr=IPv4Network("10.20.0.0/24"),
        inner=IPv4Address("10.20.0.254"),
        outer=IPv4Address(outer),
        resolver=RESOLVER,
        services=SERVICES,
        chassis=("node-1", "node-2"),
    )


def found(fabric: Fabric) -> list[tuple[str, str | None, str | None]]:
    return [(it.switch, it.service_ip, it.public_ip) for it in fabric.list_private_networks()]


def test_a_way_is_made_changed_and_taken_away(fabric: Fabric) -> None:
    for name in ("private-a", "private-b"):
        fabric.ensure_private_network(private_spec(name))
    assert not fabric.ensure_resolver_absent("private-a")
    assert fabric.ensure_resolver(resolver_spec())
    assert not fabric.ensure_resolver(resolver_spec())
    assert fabric.ensure_resolver(resolver_spec("private-b", "100.64.0.2"))
    assert found(fabric) == [
        ("private-a", "100.64.0.1", None),
        ("private-b", "100.64.0.2", None),
    ]
    assert fabric.ensure_resolver(resolver_spec(outer="100.64.0.9"))
    assert fabric.ensure_resolver_absent("private-b")
    assert found(fabric) == [("private-a", "100.64.0.9", None), ("private-b", None, None)]


def test_a_network_takes_its_way_along(fabric: Fabric) -> None:
    fabric.ensure_private_network(private_spec())
    fabric.ensure_resolver(resolver_spec())
    fabric.ensure_private_network_absent("private-a")
    assert found(fabric) == []
    fabric.ensure_private_network(private_spec())
    assert found(fabric) == [("private-a", None, None)]
    assert fabric.ensure_resolver(resolver_spec())


def test_a_way_needs_its_network(fabric: Fabric) -> None:
    with pytest.raises(EngineRejected, match="private-a"):
        fabric.ensure_resolver(resolver_spec())


def test_a_network_may_get_names_and_lose_them(fabric: Fabric) -> None:
    assert fabric.ensure_private_network(private_spec(names=None))
    assert fabric.ensure_private_network(private_spec())
    assert not fabric.ensure_private_network(private_spec())
    assert fabric.ensure_private_network(private_spec(names=None))


@pytest.mark.parametrize(
    "change",
    [
        {"chassis": ()},
        {"outer": IPv4Address("100.65.0.1")},
        {"resolver": IPv4Address("10.20.0.53")},
        {"inner": IPv4Address("10.21.0.254")},
    ],
)
def test_impossible_ways(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"router on|is not in"):
        replace(resolver_spec(), **change)  # type: ignore[arg-type]


def test_what_members_are_told() -> None:
    routed = private_dhcp_options(private_spec(), is_routed=True)
    local = private_dhcp_options(private_spec(), is_routed=False)
    for options in (routed, local):
        assert options["domain_search_list"] == '"0f.internal.jkt1.awan.example"'
    assert routed["dns_server"] == "{100.64.0.53, 198.18.200.1}"
    assert routed["classless_static_route"] == "{100.64.0.53/32,10.20.0.254, 0.0.0.0/0,10.20.0.1}"
    assert routed["router"] == "10.20.0.1"
    assert local["dns_server"] == "100.64.0.53"
    assert local["classless_static_route"] == "{100.64.0.53/32,10.20.0.254}"
    assert "router" not in local
    plain = private_dhcp_options(private_spec(names=None), is_routed=True)
    assert plain["dns_server"] == "198.18.200.1"
    assert not plain.keys() & {"domain_search_list", "classless_static_route"}


def test_rows_of_a_way(
    ovn_fabric: Fabric, ovn_central: OvnCentral, make_network_spec: Callable[..., object]
) -> None:
    """What was taken away or added by hand is put right, and nothing of a way is left behind."""
    spec = resolver_spec()
    ovn_fabric.ensure_private_network(private_spec())
    ovn_fabric.ensure_resolver(spec)
    router, nbctl = "resolver-private-a", ovn_central.nbctl
    assert nbctl("lrp-get-gateway-chassis", f"{router}-outer").split() == [
        *(f"{router}-outer_node-1", "20", f"{router}-outer_node-2", "10")
    ]
    assert nbctl("--bare", "get", "Logical_Switch_Port", "services-localnet", "tag").split() == [
        "64"
    ]
    for damage in (
        ("lr-nat-del", router),
        ("lr-nat-add", router, "snat", "100.64.9.9", "10.0.0.0/8"),
        ("lr-route-add", router, "0.0.0.0/0", "100.64.0.77"),
        ("lr-policy-del", router),
        ("lr-policy-add", router, "900", "ip4", "allow"),
        ("lrp-del-gateway-chassis", f"{router}-outer", "node-1"),
        ("lsp-del", f"{router}-outer-peer"),
        ("lsp-set-options", f"{router}-inner-peer", f"router-port={router}-inner"),
        ("lsp-del", "services-localnet"),
        ("lsp-set-options", "services-localnet", "network_name=elsewhere"),
        ("ls-del", "services"),
        ("lrp-del", f"{router}-inner"),
        ("set", "Logical_Router", router, "options={}"),
        ("lr-del", router),
    ):
        nbctl(*damage)
        assert ovn_fabric.ensure_resolver(spec), damage
        assert not ovn_fabric.ensure_resolver(spec), damage
    ovn_fabric.ensure_private_network_absent("private-a")
    for table in (
        *("Logical_Router", "Logical_Router_Port", "Gateway_Chassis", "NAT"),
        *("Logical_Router_Policy", "DHCP_Options"),
    ):
        assert nbctl("--bare", "--columns=_uuid", "list", table).split() == [], table
