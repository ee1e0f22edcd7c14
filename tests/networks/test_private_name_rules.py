"""Names inside private networks, and addresses in the services network."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awan.engines.nameserver import RecordKey, RecordKind
from awan.networks.private_name_rules import (
    choose_service_ip,
    domain_of,
    member_name,
    names_of_members,
    network_of_name,
)
from awan.networks.private_rules import (
    check_address,
    choose_address,
    count_free,
    gateway_of,
    resolver_of,
)

ZONE = "internal.jkt1.awan.example"
NETWORK = UUID("0f0e0d0c-0b0a-0908-0706-050403020100")
DOMAIN = f"0f0e0d0c0b0a09080706050403020100.{ZONE}"


def test_a_name_leads_back_to_its_network() -> None:
    assert domain_of(NETWORK, ZONE) == DOMAIN
    for name in (f"db.{DOMAIN}", f"a.b.{DOMAIN}", DOMAIN):
        assert network_of_name(name, ZONE) == NETWORK
    for name in (f"ns.{ZONE}", ZONE, f"db.{DOMAIN}.example", "db", f"{DOMAIN[:31]}.{ZONE}"):
        assert network_of_name(name, ZONE) is None


def test_the_oldest_of_one_hostname_has_the_name() -> None:
    members = [
        ("db", IPv4Address("10.20.0.9")),
        ("DB", IPv4Address("10.20.0.2")),
        ("Web.example.com", IPv4Address("10.20.0.3")),
        ("not_a_name", IPv4Address("10.20.0.4")),
    ]
    assert names_of_members(members, DOMAIN) == {
        RecordKey(f"db.{DOMAIN}", RecordKind.A): "10.20.0.9",
        RecordKey(f"web.example.com.{DOMAIN}", RecordKind.A): "10.20.0.3",
    }


def test_a_name_that_the_dns_cannot_hold_is_none() -> None:
    assert member_name("a" * 64, DOMAIN) is None
    assert member_name("a" * 63, DOMAIN) is not None
    assert member_name(".".join(["a" * 60] * 4), DOMAIN) is None


@given(st.integers(16, 28), st.integers(0, 2**16 - 1))
def test_first_and_last_host_are_no_members(length: int, number: int) -> None:
    network = IPv4Network(((10 << 24) | (number << 8 >> (32 - length) << (32 - length)), length))
    ends = (gateway_of(network), resolver_of(network))
    assert ends == (network[1], network[-2])
    for end in ends:
        assert check_address(network, (), end) is not None
    assert check_address(network, (), network[-3]) is None
    assert choose_address(network, ()) == network[2]
    assert count_free(network, 0) == network.num_addresses - 4


def test_a_network_is_full_before_its_last_host() -> None:
    network = IPv4Network("10.20.0.0/28")
    taken: list[IPv4Address] = []
    while (chosen := choose_address(network, taken)) is not None:
        taken.append(chosen)
    assert len(taken) == count_free(network, 0) == 12
    assert resolver_of(network) not in taken


def test_the_lowest_service_address_that_is_free() -> None:
    services = IPv4Network("100.64.0.0/28")
    resolver, taken = services[2], [services[1], services[4]]
    assert choose_service_ip(services, resolver, taken) == services[3]
    everything = list(services.hosts())
    assert choose_service_ip(services, resolver, everything) is None


@pytest.mark.parametrize("count", [0, 5])
def test_nobody_gets_the_resolvers_address(count: int) -> None:
    services = IPv4Network("100.64.0.0/16")
    taken = list(services.hosts())[:count]
    assert choose_service_ip(services, services[count + 1], taken) == services[count + 2]
