"""Arithmetic of addresses."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awan.engines.nameserver import RecordKey, RecordKind
from awan.networks.models import ADDRESS_MOVES, AddressState
from awan.networks.rules import (
    POOL_PREFIX_MIN,
    default_name,
    ipv6_of,
    is_default_name,
    parse_gateway,
    parse_prefix,
    parse_rdns,
    records_of,
    usable_addresses,
)


@st.composite
def pools(draw: st.DrawFn) -> tuple[IPv4Network, IPv4Address, set[IPv4Address]]:
    """A prefix, a gateway in it, and some reserved addresses in it."""
    length = draw(st.integers(22, 30))
    number = draw(st.integers(0, 2**32 - 1)) >> (32 - length) << (32 - length)
    network = IPv4Network((number, length))
    hosts = st.integers(int(network.network_address) + 1, int(network.broadcast_address) - 1)
    gateway = IPv4Address(draw(hosts))
    return network, gateway, {IPv4Address(n) for n in draw(st.lists(hosts, max_size=5))}


@given(pools())
def test_usable_addresses_are_all_hosts_but_gateway_and_reserved(
    pool: tuple[IPv4Network, IPv4Address, set[IPv4Address]],
) -> None:
    network, gateway, reserved = pool
    found = list(usable_addresses(network, gateway, reserved))
    assert len(found) == len(set(found)) == network.num_addresses - 2 - len({gateway, *reserved})
    assert not {gateway, *reserved, network.network_address, network.broadcast_address} & set(found)
    assert all(address in network for address in found)
    assert found == sorted(found)


@given(pools())
def test_a_pool_is_parsed_as_it_was_written(
    pool: tuple[IPv4Network, IPv4Address, set[IPv4Address]],
) -> None:
    network, gateway, _ = pool
    assert (parse_prefix(str(network)), parse_gateway(network, str(gateway))) == (network, gateway)


@pytest.mark.parametrize(
    ("cidr", "gateway"),
    [
        ("198.51.100.1/24", "198.51.100.1"),  # host bits
        ("198.51.100.0/24", "198.51.101.1"),  # outside
        ("198.51.100.0/24", "198.51.100.0"),  # the network itself
        ("198.51.100.0/24", "198.51.100.255"),  # broadcast
        ("198.51.100.0/31", "198.51.100.1"),
        (f"10.0.0.0/{POOL_PREFIX_MIN - 1}", "10.0.0.1"),
        ("198.51.100.0/24", "2001:db8::1"),
        ("198.51.100.0/24", "gateway"),
        ("198.51.100.0/24", ""),
        ("2001:db8::/48", "2001:db8::1"),
        ("2001:db8::/64", "198.51.100.1"),
        ("", ""),
        ("x", "y"),
    ],
)
def test_what_is_no_pool(cidr: str, gateway: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_gateway(parse_prefix(cidr), gateway)


@given(st.uuids(), st.integers(0, 2**64 - 1))
def test_ipv6_interface_is_in_the_prefix_and_never_reserved(nic: UUID, prefix: int) -> None:
    network = IPv6Network((prefix << 64, 64))
    address = ipv6_of(network, nic)
    interface = int(address) & (2**64 - 1)
    assert address in network
    assert interface > 2**32  # RFC 5453: the subnet-router anycast, and where gateways live
    assert interface < 0xFDFF_FFFF_FFFF_FF80  # RFC 5453: subnet anycast addresses
    assert ipv6_of(network, nic) == address


@given(st.lists(st.uuids(version=4), min_size=2, max_size=50, unique=True))
def test_cards_do_not_share_an_ipv6_address(nics: list[UUID]) -> None:
    network = IPv6Network("2001:db8::/64")
    assert len({ipv6_of(network, nic) for nic in nics}) == len(nics)


def test_moves_of_addresses_name_every_state() -> None:
    assert set(ADDRESS_MOVES) == set(AddressState)
    assert all(state not in moves for state, moves in ADDRESS_MOVES.items())
    reachable = {AddressState.AVAILABLE}
    for _ in AddressState:
        reachable |= {to for state in reachable for to in ADDRESS_MOVES[state]}
    assert reachable == set(AddressState)


ZONE = "jkt1.awan.example"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail.example.com", "mail.example.com"),
        ("Mail.Example.COM.", "mail.example.com"),
        ("a.b", "a.b"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.Example", "xn--bcher-kva.example"),
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        (
            ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61]),
            ".".join("abcd"[i] * n for i, n in enumerate((63, 63, 63, 61))),
        ),
    ],
)
def test_reverse_names_are_taken_as_dns_has_them(text: str, expected: str) -> None:
    assert parse_rdns(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "localhost", "mail", "mail..example", ".mail.example", "mail.example..",
        "-mail.example", "mail-.example", "ma_il.example", "mail.example com", "mail.example\n", "*.example.com",
        "198.51.100.7", "2001:db8::1", "a" * 64 + ".example", ".".join(["a" * 63] * 4), "<b>.example", "mail.example;x",
        "bü_cher.example", "\u200b.example", "mail.123",
    ],
)  # fmt: skip
def test_what_is_no_full_host_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="rdns"):
        parse_rdns(text)


@given(st.text(max_size=80))
def test_whatever_is_taken_is_a_host_name(text: str) -> None:
    try:
        name = parse_rdns(text)
    except ValueError:
        return
    assert parse_rdns(name) == name
    assert len(name) <= 253
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", label) for label in name.split("."))


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_default_names_are_host_names_of_one_address(address: IPv4Address | IPv6Address) -> None:
    name = default_name(address, ZONE)
    assert parse_rdns(name) == name
    assert is_default_name(name, ZONE)
    assert not is_default_name(name, "other.example")
    label = name.removesuffix(f".{ZONE}").removeprefix("ip-")
    assert ip_address(label.replace("-", "." if address.version == 4 else ":")) == address


def test_an_address_has_its_default_name_and_a_pointer() -> None:
    seven = ip_address("198.51.100.7")
    own, pointer = (
        RecordKey(f"ip-198-51-100-7.{ZONE}", RecordKind.A),
        RecordKey("7.100.51.198.in-addr.arpa", RecordKind.PTR),
    )
    assert records_of(seven, ZONE, None) == {own: "198.51.100.7", pointer: own.name}
    assert records_of(seven, ZONE, "m.example.com") == {
        own: "198.51.100.7",
        pointer: "m.example.com",
    }
