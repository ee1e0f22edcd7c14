"""What every fabric does with private networks, simulated or real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from uuid import uuid4

import pytest

from awan.engines.fabric import Fabric, GatewaySpec, PortSpec, PrivateNetworkSpec
from awan.engines.fabric.private import choose_gateway_chassis
from awan.errors import EngineRejected
from tests.engines.fabric_contract.conftest import CENTRAL_SWITCH, OvnCentral

MakePort = Callable[..., PortSpec]


def private_spec(name: str = "private-a", cidr: str = "10.20.0.0/24") -> PrivateNetworkSpec:
    network = IPv4Network(cidr)
    return PrivateNetworkSpec(
        name, network, network.network_address + 1, (IPv4Address("198.18.200.1"),)
    )


def gateway_spec(network: PrivateNetworkSpec, host: int = 200) -> GatewaySpec:
    return GatewaySpec(
        network=network,
        public_switch=CENTRAL_SWITCH,
        public_ip=IPv4Address("198.18.200.0") + host,
        public_cidr=IPv4Network("198.18.200.0/24"),
        next_hop=IPv4Address("198.18.200.1"),
        chassis=("node-1", "node-2"),
    )


def found(fabric: Fabric) -> list[tuple[str, str | None]]:
    return [(it.switch, it.public_ip) for it in fabric.list_private_networks()]


def test_a_network_twice_is_once(fabric: Fabric) -> None:
    spec = private_spec()
    assert [fabric.ensure_private_network(spec) for _ in range(2)] == [True, False]
    assert fabric.ensure_private_network(replace(spec, mtu=1300))
    assert fabric.ensure_private_network(spec)
    assert found(fabric) == [("private-a", None)]


def test_two_networks_of_one_prefix(fabric: Fabric, make_port_spec: MakePort) -> None:
    for name in ("private-b", "private-a"):
        fabric.ensure_private_network(private_spec(name))
    assert found(fabric) == [("private-a", None), ("private-b", None)]
    ports = [
        make_port_spec(10 + number, switch=name, ipv4=IPv4Address("10.20.0.5"), ipv6=None)
        for number, name in enumerate(("private-a", "private-b"))
    ]
    for port in ports:
        fabric.ensure_port(port)
        facts = fabric.find_port(port.port_id)
        assert facts is not None
        assert (facts.switch, facts.addresses) == (port.switch, (port.address_line,))
        assert facts.port_security == (port.security_line,)
        assert (facts.dhcp_families, facts.is_confined) == ((4,), True)


@pytest.mark.parametrize("is_routed", [True, False])
def test_every_member_has_its_address_by_dhcp(
    fabric: Fabric, make_port_spec: MakePort, is_routed: bool
) -> None:
    fabric.ensure_private_network(private_spec())
    ip = IPv4Address("10.20.0.7")
    port = make_port_spec(switch="private-a", ipv4=ip, ipv6=None, is_routed=is_routed)
    fabric.ensure_port(port)
    for changed in (port, replace(port, is_routed=not is_routed)):
        fabric.ensure_port(changed)
        facts = fabric.find_port(port.port_id)
        assert facts is not None
        assert facts.dhcp_families == (4,)


def test_a_network_that_is_removed_takes_all_along(
    fabric: Fabric, make_port_spec: MakePort
) -> None:
    spec = private_spec()
    fabric.ensure_private_network(spec)
    fabric.ensure_private_network(private_spec("private-b"))
    fabric.ensure_gateway(gateway_spec(spec))
    fabric.ensure_gateway(gateway_spec(private_spec("private-b"), 201))
    port = make_port_spec(switch="private-a", ipv4=IPv4Address("10.20.0.5"), ipv6=None)
    other = make_port_spec(11)
    fabric.ensure_port(port)
    fabric.ensure_port(other)
    for _ in range(2):
        fabric.ensure_private_network_absent("private-a")
    assert found(fabric) == [("private-b", "198.18.200.201")]
    assert fabric.find_port(port.port_id) is None
    assert fabric.find_port(other.port_id) is not None


def test_a_gateway_comes_moves_and_goes(fabric: Fabric) -> None:
    spec = private_spec()
    fabric.ensure_private_network(spec)
    first, second = gateway_spec(spec), gateway_spec(spec, 201)
    assert [fabric.ensure_gateway(first) for _ in range(2)] == [True, False]
    assert found(fabric) == [("private-a", "198.18.200.200")]
    assert [fabric.ensure_gateway(second) for _ in range(2)] == [True, False]
    assert found(fabric) == [("private-a", "198.18.200.201")]
    for chassis in (("node-2", "node-1"), ("node-2",), ("node-3", "node-2")):
        assert fabric.ensure_gateway(replace(second, chassis=chassis))
        assert not fabric.ensure_gateway(replace(second, chassis=chassis))
    assert [fabric.ensure_gateway_absent(spec.switch) for _ in range(2)] == [True, False]
    assert found(fabric) == [("private-a", None)]
    assert not fabric.ensure_private_network(spec)


def test_a_gateway_needs_both_networks(fabric: Fabric) -> None:
    spec = private_spec()
    with pytest.raises(EngineRejected, match="private-a"):
        fabric.ensure_gateway(gateway_spec(spec))
    fabric.ensure_private_network(spec)
    with pytest.raises(EngineRejected, match="elsewhere"):
        fabric.ensure_gateway(replace(gateway_spec(spec), public_switch="elsewhere"))
    assert found(fabric) == [("private-a", None)]


@pytest.mark.parametrize("change", [{"chassis": ()}, {"public_ip": IPv4Address("192.88.0.1")}])
def test_impossible_gateways(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"gateway|is not in"):
        replace(gateway_spec(private_spec()), **change)  # type: ignore[arg-type]


def test_a_chassis_that_goes_moves_only_what_it_carried() -> None:
    nodes = [str(uuid4()) for _ in range(4)]
    switches = [f"private-{uuid4()}" for _ in range(200)]
    before = {switch: choose_gateway_chassis(switch, nodes) for switch in switches}
    assert len({chosen[0] for chosen in before.values()}) == 4
    for switch in switches:
        after = choose_gateway_chassis(switch, nodes[1:])
        assert after == tuple(node for node in before[switch] if node != nodes[0])


def test_rows_of_a_gateway(
    ovn_fabric: Fabric, ovn_central: OvnCentral, make_network_spec: Callable[..., object]
) -> None:
    """What was taken away or added by hand is put right, and nothing of a gateway is left behind."""
    ovn_fabric.ensure_public_network(make_network_spec())  # type: ignore[arg-type]
    spec = private_spec()
    gateway = gateway_spec(spec)
    ovn_fabric.ensure_private_network(spec)
    ovn_fabric.ensure_gateway(gateway)
    router = "gateway-private-a"
    nbctl = ovn_central.nbctl
    assert nbctl("lrp-get-gateway-chassis", f"{router}-outer").split() == [
        f"{router}-outer_node-1",
        "20",
        f"{router}-outer_node-2",
        "10",
    ]
    for damage in (
        ("lr-nat-del", router),
        ("lr-nat-add", router, "snat", "198.18.200.9", "10.0.0.0/8"),
        ("lr-route-del", router),
        ("lr-route-add", router, "10.99.0.0/16", "198.18.200.77"),
        ("lr-policy-del", router),
        ("lrp-del-gateway-chassis", f"{router}-outer", "node-1"),
        ("lrp-set-gateway-chassis", f"{router}-outer", "node-2", "90"),
        ("lsp-del", f"{router}-outer-peer"),
        ("lrp-del", f"{router}-inner"),
        ("lr-del", router),
    ):
        nbctl(*damage)
        assert ovn_fabric.ensure_gateway(gateway), damage
        assert not ovn_fabric.ensure_gateway(gateway), damage
    assert "10.20.0.0/24" in nbctl("lr-nat-list", router)
    ovn_fabric.ensure_private_network_absent(spec.switch)
    for table in (
        "Logical_Router",
        "Logical_Router_Port",
        "Gateway_Chassis",
        "NAT",
        "Logical_Router_Policy",
    ):
        assert nbctl("--bare", "--columns=_uuid", "list", table).split() == [], table
