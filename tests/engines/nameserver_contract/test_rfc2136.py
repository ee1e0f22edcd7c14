"""What only a real nameserver has: keys, connections, and words on the wire."""

from __future__ import annotations

import base64
import stat

import pytest

from awan.engines.nameserver import Nameserver, RecordKey, RecordKind
from awan.engines.registry import check_options
from awan.errors import EngineError, EngineRejected, EngineUnavailable, Invalid
from awan.kit.resolving import LookupFailed, look_up_ipv4, split_server
from lab.layout import LabNameserver
from lab.processes import run
from tests.engines.nameserver_contract.conftest import connect

NAME = {RecordKey("web.jkt1.awan.example", RecordKind.A): "198.18.7.9"}
WRONG_SECRET = base64.b64encode(b"w" * 32).decode()


def test_a_wrong_key_is_refused(knot: LabNameserver) -> None:
    stranger = connect(knot, secret=WRONG_SECRET)
    with pytest.raises(EngineRejected):
        stranger.ensure_records(NAME)
    with pytest.raises(EngineRejected):
        stranger.list_records()


def test_a_nameserver_that_is_away_may_come_back(knot: LabNameserver) -> None:
    nobody = connect(knot, port=9)
    with pytest.raises(EngineUnavailable):
        nobody.ensure_records(NAME)
    with pytest.raises(EngineUnavailable):
        nobody.list_records()


def test_the_key_is_for_its_owner_alone(knot: LabNameserver) -> None:
    assert stat.S_IMODE(knot.key_file.stat().st_mode) == 0o600


def test_lookups_ask_the_resolver_of_our_choice(knot: LabNameserver, rfc2136: Nameserver) -> None:
    rfc2136.ensure_records(NAME)
    found = look_up_ipv4("web.jkt1.awan.example", [knot.server], timeout_s=5)
    assert {str(address) for address in found} == {"198.18.7.9"}
    assert look_up_ipv4("none.jkt1.awan.example", [knot.server], timeout_s=5) == frozenset()
    with pytest.raises(LookupFailed):
        look_up_ipv4("web.elsewhere.example", [knot.server], timeout_s=5)
    with pytest.raises(LookupFailed):
        look_up_ipv4("web.jkt1.awan.example", ["127.0.0.1:9"], timeout_s=0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", ("10.0.0.1", 53)),
        ("10.0.0.1:5300", ("10.0.0.1", 5300)),
        ("2001:db8::1", ("2001:db8::1", 53)),
        ("[2001:db8::1]:5300", ("2001:db8::1", 5300)),
    ],
)
def test_servers_are_addresses_with_or_without_a_port(text: str, expected: tuple[str, int]) -> None:
    assert split_server(text) == expected


@pytest.mark.parametrize("text", ["", "ns.example", "10.0.0.1:0", "10.0.0.1:x", "[2001:db8::1]"])
def test_anything_else_is_no_server(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        split_server(text)


def test_options_are_checked_when_they_are_stored() -> None:
    options = {
        "server": "10.0.0.1:5300",
        "forward_zone": "JKT1.awan.example",
        "reverse_zones": ["7.18.198.in-addr.arpa"],
        "key_name": "awan",
        "key_secret": WRONG_SECRET,
    }
    assert check_options("nameserver", "rfc2136", options)["forward_zone"] == "jkt1.awan.example"
    for wrong in (
        {"server": "ns.example"},
        {"key_secret": "c2hvcnQ="},
        {"key_secret": "not base64!"},
        {"forward_zone": "example.com."},
        {"reverse_zones": []},
        {"key_algorithm": "hmac-md5"},
    ):
        with pytest.raises(Invalid):
            check_options("nameserver", "rfc2136", {**options, **wrong})


def test_other_clients_see_what_was_set(knot: LabNameserver, rfc2136: Nameserver) -> None:
    """Knot's own client, which shares no code with ours."""
    rfc2136.ensure_records(NAME)
    config = knot.key_file.parent / "run" / "knot.conf"
    shown = run(["knotc", "-c", str(config), "zone-read", knot.forward_zone, "web"]).stdout
    assert "A 198.18.7.9" in shown


def test_a_zone_that_is_refused_does_not_hold_up_the_others(
    knot: LabNameserver, rfc2136: Nameserver
) -> None:
    reverse = (rfc2136.zones.reverse[0], "2.0.192.in-addr.arpa")
    partly = connect(knot, reverse=reverse)
    wanted = {
        RecordKey("1.2.0.192.in-addr.arpa", RecordKind.PTR): "a.example",
        RecordKey("mail.jkt1.awan.example", RecordKind.A): "198.18.7.10",
        RecordKey(f"9.{reverse[0]}", RecordKind.PTR): "b.example",
    }
    with pytest.raises(EngineError):
        partly.ensure_records(wanted)
    found = rfc2136.list_records()
    assert {key.name for key in wanted if key in found} == {
        "mail.jkt1.awan.example",
        f"9.{reverse[0]}",
    }
