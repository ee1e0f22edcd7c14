"""The contract of nameserver engines."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from awan.engines.nameserver import Nameserver, RecordKey, RecordKind
from awan.errors import EngineRejected
from awan.networks.rules import records_of

SEVEN = ip_address("198.18.7.7")
SIX = ip_address("2001:db8:7:1:8000::7")
ZONE = "jkt1.awan.example"


def ours(nameserver: Nameserver) -> dict[RecordKey, tuple[str, ...]]:
    """What there is beside the nameserver's own address."""
    return {
        key: values
        for key, values in nameserver.list_records().items()
        if not key.name.startswith("ns.")
    }


def test_names_are_there_as_they_were_asked_for(nameserver: Nameserver) -> None:
    wanted = {**records_of(SEVEN, ZONE, "mail.example.com"), **records_of(SIX, ZONE, None)}
    for _ in range(2):
        nameserver.ensure_records(wanted)
        assert ours(nameserver) == {key: (value,) for key, value in wanted.items()}


def test_a_name_takes_the_place_of_another_and_leaves_the_rest_alone(
    nameserver: Nameserver,
) -> None:
    nameserver.ensure_records(records_of(SEVEN, ZONE, "mail.example.com"))
    pointer = RecordKey("7.7.18.198.in-addr.arpa", RecordKind.PTR)
    nameserver.ensure_records({pointer: "www.example.com"})
    forward = RecordKey(f"ip-198-18-7-7.{ZONE}", RecordKind.A)
    assert ours(nameserver) == {pointer: ("www.example.com",), forward: ("198.18.7.7",)}


def test_the_zone_inside_another_is_one_of_its_own(nameserver: Nameserver) -> None:
    inside = RecordKey(f"db.0f.internal.{ZONE}", RecordKind.A)
    nameserver.ensure_records({inside: "10.20.0.2", **records_of(SEVEN, ZONE, None)})
    own = nameserver.list_records(f"internal.{ZONE}")
    assert {key: own[key] for key in own if not key.name.startswith("ns.")} == {
        inside: ("10.20.0.2",)
    }
    assert inside not in nameserver.list_records(ZONE)
    assert ours(nameserver)[inside] == ("10.20.0.2",)
    nameserver.ensure_records({inside: None})
    assert inside not in ours(nameserver)


def test_names_are_taken_away_also_when_they_are_gone_already(nameserver: Nameserver) -> None:
    wanted = records_of(SIX, ZONE, None)
    nameserver.ensure_records(wanted)
    for _ in range(2):
        nameserver.ensure_records(dict.fromkeys(wanted))
        assert ours(nameserver) == {}


def test_many_names_at_once(nameserver: Nameserver) -> None:
    wanted = {
        key: value
        for last in range(1, 255)
        for key, value in records_of(ip_address(f"198.18.7.{last}"), ZONE, None).items()
    }
    nameserver.ensure_records(wanted)
    assert ours(nameserver) == {key: (value,) for key, value in wanted.items()}


def test_a_name_outside_of_the_zones_is_refused_and_nothing_is_changed(
    nameserver: Nameserver,
) -> None:
    wanted = {**records_of(SEVEN, ZONE, None), **records_of(ip_address("10.0.0.1"), ZONE, None)}
    with pytest.raises(EngineRejected, match="in none of the zones"):
        nameserver.ensure_records(wanted)
    assert ours(nameserver) == {}
