"""The fabric's contract, kept by the fake and by OVN alike."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from uuid import UUID, uuid4

import pytest

from awan.engines.fabric import Fabric
from awan.errors import EngineRejected


def test_new_port_is_complete(fabric: Fabric, make_port_spec) -> None:
    spec = make_port_spec(10)
    fabric.ensure_port(spec)
    port = fabric.find_port(spec.port_id)
    assert port is not None
    assert port.name == str(spec.port_id)
    assert port.port_id == spec.port_id
    assert port.instance_id == spec.instance_id
    assert port.switch == spec.switch
    assert port.addresses == ("02:00:00:00:00:0a 198.18.200.10 2001:db8:200:1::a",)
    assert port.port_security == (
        "02:00:00:00:00:0a 198.18.200.10 2001:db8:200:1::a fe80::ff:fe00:a",
    )
    assert not port.is_up
    assert port.chassis is None
    assert port.dhcp_families == (4, 6)
    assert port.is_confined
    assert fabric.list_ports() == [port]


def test_port_with_one_family(fabric: Fabric, make_port_spec) -> None:
    only_ipv4 = make_port_spec(11, ipv6=None)
    only_ipv6 = make_port_spec(12, ipv4=None)
    fabric.ensure_port(only_ipv4)
    fabric.ensure_port(only_ipv6)
    assert [port.port_security for port in ports_of(fabric, only_ipv4, only_ipv6)] == [
        ("02:00:00:00:00:0b 198.18.200.11",),
        ("02:00:00:00:00:0c 2001:db8:200:1::c fe80::ff:fe00:c",),
    ]
    assert [port.dhcp_families for port in ports_of(fabric, only_ipv4, only_ipv6)] == [(4,), (6,)]


def test_port_on_a_network_without_ipv6(fabric: Fabric, make_network_spec, make_port_spec) -> None:
    fabric.ensure_public_network(make_network_spec(ipv6_cidr=None, ipv6_gateway=None))
    spec = make_port_spec(13)
    fabric.ensure_port(spec)
    (port,) = ports_of(fabric, spec)
    assert port.dhcp_families == (4,)


def test_port_without_address_cannot_be_named(make_port_spec) -> None:
    with pytest.raises(ValueError, match="no address"):
        make_port_spec(13, ipv4=None, ipv6=None)


@pytest.mark.parametrize(
    "hostname",
    ["", 'a"b', "a, router = 198.18.200.9", "a b", "-a", "a-", "a_b", "a\n", "ä", "a" * 254],
)
def test_hostname_that_is_no_name(make_port_spec, hostname: str) -> None:
    with pytest.raises(ValueError, match="hostname"):
        make_port_spec(13, hostname=hostname)


def test_ensure_port_twice_is_once(fabric: Fabric, make_port_spec) -> None:
    spec = make_port_spec(14)
    fabric.ensure_port(spec)
    first = fabric.list_ports()
    fabric.ensure_port(spec)
    assert fabric.list_ports() == first
    assert len(first) == 1


def test_ensure_port_corrects_what_differs(fabric: Fabric, make_port_spec) -> None:
    spec = make_port_spec(15)
    fabric.ensure_port(spec)
    moved = dataclasses.replace(spec, ipv4=IPv4Address("198.18.200.99"), operation_id=uuid4())
    fabric.ensure_port(moved)
    port = fabric.find_port(spec.port_id)
    assert port is not None
    assert "198.18.200.99" in port.addresses[0]
    assert "198.18.200.99" in port.port_security[0]
    assert "198.18.200.15" not in port.port_security[0]


def test_unknown_switch_is_rejected(fabric: Fabric, make_port_spec) -> None:
    with pytest.raises(EngineRejected) as raised:
        fabric.ensure_port(make_port_spec(16, switch="nowhere"))
    assert raised.value.engine == "fabric"
    assert "nowhere" in str(raised.value)
    assert fabric.list_ports() == []


def test_absent_port(fabric: Fabric, make_port_spec) -> None:
    spec, other = make_port_spec(17), make_port_spec(18)
    fabric.ensure_port(spec)
    fabric.ensure_port(other)
    fabric.ensure_port_absent(spec.port_id)
    assert fabric.find_port(spec.port_id) is None
    assert [port.port_id for port in fabric.list_ports()] == [other.port_id]
    fabric.ensure_port_absent(spec.port_id)
    fabric.ensure_port_absent(uuid4())
    assert [port.port_id for port in fabric.list_ports()] == [other.port_id]


def test_public_network_twice_is_once(fabric: Fabric, make_network_spec) -> None:
    assert not fabric.ensure_public_network(make_network_spec())
    assert fabric.ensure_public_network(make_network_spec(mtu=1400, vlan=7))
    assert not fabric.ensure_public_network(make_network_spec(mtu=1400, vlan=7))
    assert fabric.list_ports() == []  # the provider's own port is not a tenant's


def test_waits_on_live_chassis(fabric: Fabric, make_port_spec) -> None:
    fabric.ensure_port(make_port_spec(19))
    assert fabric.wait_applied("node-1")
    chassis = {found.system_id: found for found in fabric.list_chassis()}
    assert chassis["node-1"].is_alive


def test_absent_port_never_comes_up(fabric: Fabric) -> None:
    assert not fabric.wait_port_up(uuid4(), "node-1", timeout_s=0.1)


def test_many_workers_at_once(fabric: Fabric, make_port_spec) -> None:
    specs = [make_port_spec(100 + n) for n in range(48)]
    leaving = {spec.port_id for spec in specs[::3]}

    def work(port: int) -> None:
        spec = specs[port]
        fabric.ensure_port(spec)
        assert fabric.wait_applied("node-1")
        if spec.port_id in leaving:
            fabric.ensure_port_absent(spec.port_id)
            assert fabric.find_port(spec.port_id) is None

    with ThreadPoolExecutor(max_workers=12) as pool:
        list(pool.map(work, range(len(specs))))
    left = [port.port_id for port in fabric.list_ports()]
    assert set(left) == {spec.port_id for spec in specs} - leaving
    assert [str(port) for port in left] == sorted(str(port) for port in left)


def ports_of(fabric: Fabric, *specs):
    found = [fabric.find_port(spec.port_id) for spec in specs]
    assert all(found)
    return found


def test_find_of_unknown_port(fabric: Fabric) -> None:
    assert fabric.find_port(UUID(int=1)) is None
