"""Names of addresses: by default, given by their owners, taken back; and a nameserver that is away."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import func, select, text

from awan.engines.registry import sim_store
from awan.errors import EngineRejected, EngineUnavailable
from awan.events import Event
from awan.kit.database import transaction
from awan.networks import names
from awan.networks.models import Address, StaleName
from awan.networks.names import push_stale_names
from awan.reconcile import run_audit
from awan.reconcile.locations import check_location
from awan.settings import Settings
from tests.support import proofs
from tests.support.changed_settings import changed_settings
from tests.support.simulated_cloud import ZONE, SimulatedCloud

NAME = "mail.example.com"
POINTER = "2.100.51.198.in-addr.arpa"
DEFAULT = f"ip-198-51-100-2.{ZONE}"


@pytest.fixture(autouse=True)
def leads_here(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names that exist in the DNS -> their address; the resolver is beyond our own code."""
    known = {NAME: "198.51.100.2", "elsewhere.example.com": "198.51.100.77"}

    def look_up(name: str, servers: object, *, timeout_s: float) -> frozenset[Any]:
        return frozenset({IPv4Address(known[name])} if name in known else ())

    monkeypatch.setattr(names, "look_up_ipv4", look_up)
    return known


def take(cloud: SimulatedCloud) -> dict[str, Any]:
    """The first address of the pool."""
    answer = cloud.customer.http.post("/networks/public", json={"location_id": cloud.location_id})
    assert answer.status_code == 201, answer.text
    return dict(answer.json()["data"])


def give(cloud: SimulatedCloud, uuid: str, rdns: str | None) -> httpx.Response:
    """Sets the name."""
    return cloud.customer.http.put(f"/networks/public/{uuid}/rdns", json={"rdns": rdns})


def records(name: str) -> list[str]:
    """What the nameserver has of a name."""
    row = sim_store().find_one("SELECT record_values FROM sim.name_record WHERE name = %s", [name])
    return [] if row is None else list(row["record_values"])


def marked() -> int:
    """Addresses whose names are still to be pushed."""
    with transaction() as session:
        return session.scalar(select(func.count()).select_from(StaleName)) or 0


def test_every_address_of_a_pool_has_a_name_that_leads_to_it(cloud: SimulatedCloud) -> None:
    assert records("254.100.51.198.in-addr.arpa") == [f"ip-198-51-100-254.{ZONE}"]
    assert records(f"ip-198-51-100-254.{ZONE}") == ["198.51.100.254"]
    made = cloud.admin.post(
        "/admin/pools",
        json={"location_id": cloud.location_id, "cidr": "198.18.9.0/29", "gateway": "198.18.9.1"},
    ).json()["data"]
    push_stale_names()
    assert records("6.9.18.198.in-addr.arpa") == [f"ip-198-18-9-6.{ZONE}"]
    assert cloud.admin.request("DELETE", f"/admin/pools/{made['id']}", json={}).status_code == 200
    push_stale_names()
    assert records("6.9.18.198.in-addr.arpa") == records(f"ip-198-18-9-6.{ZONE}") == []
    assert marked() == 0


@pytest.mark.usefixtures("worker")
def test_an_owner_names_an_address_and_its_release_takes_the_name_back(
    cloud: SimulatedCloud,
) -> None:
    address = take(cloud)
    assert address["rdns"] == DEFAULT
    answer = give(cloud, address["uuid"], "Mail.Example.com.")
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"] == NAME
    assert answer.json()["operation"]["kind"] == "public_ip.set_rdns"
    assert records(POINTER) == [NAME]
    assert records(DEFAULT) == ["198.51.100.2"]
    shown = cloud.customer.http.get("/networks/public").json()["data"]["data"][0]
    assert shown["rdns"] == NAME
    assert give(cloud, address["uuid"], "").json()["data"] == DEFAULT
    assert records(POINTER) == [DEFAULT]
    assert give(cloud, address["uuid"], NAME).status_code == 200
    assert cloud.customer.http.delete(f"/networks/public/{address['uuid']}").status_code == 200
    push_stale_names()
    assert records(POINTER) == [DEFAULT]
    with transaction() as session:
        said = session.scalars(
            select(Event.data["rdns"].astext)
            .where(Event.kind == "public_ip.rdns_changed")
            .order_by(Event.event_id)
        ).all()
        assert said == [NAME, DEFAULT, NAME]
        assert session.scalars(select(Address.rdns).where(Address.rdns.is_not(None))).all() == []
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
def test_the_addresses_of_an_instance_have_names(cloud: SimulatedCloud) -> None:
    shown = cloud.create_running()
    public = shown["public_network"]
    six = public["ipv6_address"]
    push_stale_names()
    assert public["rdns"] == DEFAULT
    assert records(public["ipv6_rdns"]) == [six]
    answer = cloud.customer.http.put(f"/instances/ips/{public['uuid']}/rdns", data={"rdns": NAME})
    assert (answer.status_code, answer.json()["data"]) == (200, NAME)
    detail = cloud.customer.http.get(f"/instances/{shown['uuid']}").json()["data"]
    assert detail["public_network"]["rdns"] == NAME
    gone = cloud.customer.http.request(
        "DELETE",
        f"/instances/{shown['uuid']}",
        json={"remove_ip": True, "remove_block_storage": True},
    )
    cloud.wait(gone.json()["operation"]["uuid"])
    push_stale_names()
    assert records(POINTER) == [DEFAULT]
    assert records(public["ipv6_rdns"]) == []
    assert run_audit() == []


@pytest.mark.parametrize(
    ("rdns", "word"),
    [
        ("mail", "fully qualified"),
        ("elsewhere.example.com", "no A record with the address 198.51.100.2"),
        ("nowhere.example.com", "no A record"),
        (f"ip-198-51-100-9.{ZONE}", "given by us alone"),
        (ZONE, "given by us alone"),
        (f"www.{ZONE}", "given by us alone"),
    ],
)
def test_a_wrong_name_changes_nothing(cloud: SimulatedCloud, rdns: str, word: str) -> None:
    address = take(cloud)
    answer = give(cloud, address["uuid"], rdns)
    assert answer.status_code == 422
    assert word in answer.json()["errors"]["rdns"][0]
    assert records(POINTER) == [DEFAULT]
    with transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM operation WHERE kind LIKE 'public%'")) == 0


@pytest.mark.usefixtures("worker")
def test_the_operator_may_do_without_the_confirmation(cloud: SimulatedCloud) -> None:
    address = take(cloud)
    with changed_settings(rdns_forward_confirm="false"):
        assert give(cloud, address["uuid"], "nowhere.example.com").status_code == 200
        assert give(cloud, address["uuid"], f"ip-198-51-100-9.{ZONE}").status_code == 422


def test_others_do_not_learn_of_it(cloud: SimulatedCloud) -> None:
    address = take(cloud)
    stranger = cloud.new_customer().http
    for uuid in (address["uuid"], str(uuid4())):
        for path in (f"/networks/public/{uuid}/rdns", f"/instances/ips/{uuid}/rdns"):
            for body in ({"rdns": NAME}, {"rdns": "x"}, {}):
                answer = stranger.put(path, json=body)
                assert (answer.status_code, answer.json()["message"]) == (
                    404,
                    "Public network not found.",
                )


@pytest.mark.usefixtures("worker")
def test_a_name_changes_ten_times_an_hour_and_no_more(cloud: SimulatedCloud) -> None:
    address = take(cloud)
    with changed_settings(rdns_changes_per_hour="2"):
        for rdns in (NAME, ""):
            assert give(cloud, address["uuid"], rdns).status_code == 200
        refused = give(cloud, address["uuid"], NAME)
        assert (refused.status_code, refused.json()["type"]) == (429, "RATE_LIMITED")
        assert 3500 < int(refused.headers["retry-after"]) <= 3600
        with transaction() as session:
            session.execute(text("UPDATE operation SET created_at = created_at - interval '1 h'"))
        assert give(cloud, address["uuid"], NAME).status_code == 200


@pytest.mark.usefixtures("worker")
def test_a_repeat_is_answered_though_the_name_leads_elsewhere_now(
    cloud: SimulatedCloud, leads_here: dict[str, str]
) -> None:
    address = take(cloud)
    path, key = f"/networks/public/{address['uuid']}/rdns", {"Idempotency-Key": "k1"}
    first = cloud.customer.http.put(path, json={"rdns": NAME}, headers=key)
    leads_here.clear()
    again = cloud.customer.http.put(path, json={"rdns": NAME}, headers=key)
    assert (again.status_code, again.json()["operation"]) == (200, first.json()["operation"])
    assert give(cloud, address["uuid"], NAME).status_code == 422


def test_where_there_is_no_nameserver_there_are_no_names(cloud: SimulatedCloud) -> None:
    with transaction() as session:
        session.execute(text("DELETE FROM location_engine WHERE kind = 'nameserver'"))
    address = take(cloud)
    assert address["rdns"] is None
    refused = give(cloud, address["uuid"], NAME)
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    assert refused.json()["message"] == names.NO_NAMES
    assert cloud.customer.http.delete(f"/networks/public/{address['uuid']}").status_code == 200
    assert marked() == 0


@pytest.mark.usefixtures("worker")
def test_an_address_that_something_is_done_to_is_neither_released_nor_named_again(
    cloud: SimulatedCloud, settings: Settings
) -> None:
    address = take(cloud)
    sim_store().faults.fail_at(1, EngineUnavailable)
    with changed_settings(operation_wait_s="0"):
        answer = give(cloud, address["uuid"], NAME)
        assert answer.status_code == 202
        assert answer.json()["data"] == NAME
        busy = give(cloud, address["uuid"], "")
        gone = cloud.customer.http.delete(f"/networks/public/{address['uuid']}")
    if busy.status_code == gone.status_code == 409:
        assert "public_ip.set_rdns" in busy.json()["message"]
    else:
        pytest.skip("the operation was faster than the calls")
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    assert records(POINTER) == [NAME]


def test_a_nameserver_that_is_away_is_told_later(cloud: SimulatedCloud) -> None:
    address = take(cloud)
    assert cloud.customer.http.delete(f"/networks/public/{address['uuid']}").status_code == 200
    assert marked() == 1
    for error in (EngineUnavailable, EngineRejected):
        sim_store().faults.fail_at(1, error)
        push_stale_names()
        sim_store().faults.clear()
        assert marked() == 1
        with transaction() as session:
            session.execute(text("UPDATE stale_name SET retry_at = now()"))
    push_stale_names()
    assert marked() == 0


def test_a_mark_that_comes_while_names_are_pushed_is_kept(
    cloud: SimulatedCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = take(cloud)
    with transaction() as session:
        location, inet = cloud.location_id, "198.51.100.2"
        names.mark_stale(session, location, [IPv4Address(inet)])
    push = names._push

    def push_and_mark(location_id: int, wanted: Any) -> None:
        push(location_id, wanted)
        with transaction() as session:
            session.execute(
                text("UPDATE address SET rdns = 'later.example.com' WHERE inet = '198.51.100.2'")
            )
            names.mark_stale(session, location_id, [IPv4Address(inet)])
        monkeypatch.setattr(names, "_push", push)

    monkeypatch.setattr(names, "_push", push_and_mark)
    push_stale_names()
    assert (records(POINTER), marked()) == ([DEFAULT], 1)
    push_stale_names()
    assert (records(POINTER), marked()) == (["later.example.com"], 0)
    assert address["rdns"] == DEFAULT


def test_a_look_at_the_location_puts_names_back_and_quarantines_strays(
    cloud: SimulatedCloud,
) -> None:
    take(cloud)
    stray = f"ip-198-51-101-9.{ZONE}"
    store = sim_store()
    store.execute("DELETE FROM sim.name_record WHERE name = %s", [POINTER])
    store.execute(
        "UPDATE sim.name_record SET record_values = '{192.0.2.1}' WHERE name = %s", [DEFAULT]
    )
    store.execute(
        "INSERT INTO sim.name_record VALUES (%s, %s, 'A', '{198.51.101.9}')",
        [str(cloud.location_id), stray],
    )
    check_location(cloud.location_id)
    push_stale_names()
    assert (records(POINTER), records(DEFAULT)) == ([DEFAULT], ["198.51.100.2"])
    found = cloud.admin.get("/admin/quarantine").json()["data"]
    assert [(row["kind"], row["subject"]) for row in found] == [("name", stray)]
    assert records(stray) == ["198.51.101.9"]


def test_names_appear_when_a_nameserver_is_configured_later(cloud: SimulatedCloud) -> None:
    sim_store().execute("DELETE FROM sim.name_record")
    check_location(cloud.location_id)
    assert marked() == 253
    push_stale_names()
    assert records("254.100.51.198.in-addr.arpa") == [f"ip-198-51-100-254.{ZONE}"]


def test_locations_share_no_zone_at_a_server(cloud: SimulatedCloud) -> None:
    """Each would take the records of the other for strays."""
    other = cloud.admin.post(
        "/admin/locations", json={"name": "Bandung", "code": "bdg", "country": "ID"}
    ).json()["data"]["id"]

    def put(location: int, server: str, forward: str, reverse: str) -> httpx.Response:
        options = {
            "server": server,
            "forward_zone": forward,
            "reverse_zones": [reverse],
            "key_name": "awan",
            "key_secret": "c2VjcmV0LXNlY3JldC1zZWNyZXQ=",
        }
        path = f"/admin/locations/{location}/engines/nameserver"
        return cloud.admin.put(path, json={"driver": "rfc2136", "options": options})

    reverse = "100.51.198.in-addr.arpa"
    for _ in range(2):
        assert put(cloud.location_id, "10.0.0.1", ZONE, reverse).status_code == 200
    for forward, back in ((ZONE, "7.18.198.in-addr.arpa"), ("bdg.awan.example", reverse)):
        refused = put(other, "10.0.0.1:53", forward, back)
        assert refused.status_code == 422, refused.text
        assert "Jakarta" in refused.json()["errors"]["options"][0]
    assert put(other, "10.0.0.2", ZONE, reverse).status_code == 200, "another server, another zone"
    apart = put(other, "10.0.0.1", "bdg.awan.example", "7.18.198.in-addr.arpa")
    assert apart.status_code == 200, apart.text


def test_the_key_is_kept_as_a_secret_and_never_shown(cloud: SimulatedCloud) -> None:
    secrets = ["c2VjcmV0LXNlY3JldC1zZWNyZXQ=", "b3RoZXItb3RoZXItb3RoZXItb3RoZXI="]
    path = f"/admin/locations/{cloud.location_id}/engines/nameserver"
    for secret in secrets:
        options = {
            "server": "10.0.0.1",
            "forward_zone": ZONE,
            "reverse_zones": ["100.51.198.in-addr.arpa"],
            "key_name": "awan",
            "key_secret": secret,
        }
        answer = cloud.admin.put(path, json={"driver": "rfc2136", "options": options})
        assert answer.status_code == 200, answer.text
        assert secret not in answer.text
    shown = cloud.admin.get("/admin/locations").text
    assert '"key_name":"awan"' in shown.replace(" ", "")
    assert not any(secret in shown for secret in secrets)
    with transaction() as session:
        assert (
            session.scalar(text("SELECT count(*) FROM secret WHERE purpose LIKE 'engine.%'")) == 1
        )
        dump = session.scalars(text("SELECT CAST(options AS text) FROM location_engine")).all()
        assert not any(secret in row for secret in secrets for row in dump)
    assert cloud.admin.put(
        path,
        json={
            "driver": "fake",
            "options": {k: options[k] for k in ("forward_zone", "reverse_zones")},
        },
    ).is_success
    with transaction() as session:
        assert (
            session.scalar(text("SELECT count(*) FROM secret WHERE purpose LIKE 'engine.%'")) == 0
        )


# --- proofs ---


def naming(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[str]:
    """A free address with its default name gets another."""

    def prepare() -> str:
        http = cloud.customer.http
        for row in http.get("/networks/public").json()["data"]["data"]:
            assert http.delete(f"/networks/public/{row['uuid']}").is_success
        push_stale_names()
        return str(take(cloud)["uuid"])

    def begin(uuid: str) -> UUID:
        with changed_settings(operation_wait_s="0", rdns_forward_confirm="false"):
            return UUID(give(cloud, uuid, NAME).json()["operation"]["uuid"])

    def has_name(name: str) -> Callable[[str], None]:
        def check(uuid: str) -> None:
            shown = cloud.customer.http.get("/networks/public").json()["data"]["data"][0]
            assert (shown["uuid"], shown["rdns"]) == (uuid, name)
            (pointer,) = sim_store().fetch_all(
                "SELECT record_values FROM sim.name_record WHERE name = (SELECT"
                " array_to_string(ARRAY(SELECT x FROM unnest(string_to_array(%s, '.')) WITH"
                " ORDINALITY AS t(x, n) ORDER BY n DESC), '.') || '.in-addr.arpa')",
                [shown["ip_address"]],
            )
            assert pointer["record_values"] == [name or shown["rdns"]]

        return check

    def has_default(uuid: str) -> None:
        shown = cloud.customer.http.get("/networks/public").json()["data"]["data"][0]
        has_name(f"ip-{shown['ip_address'].replace('.', '-')}.{ZONE}")(uuid)

    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=prepare,
        begin=begin,
        succeeded=has_name(NAME),
        undone=has_default,
    )


@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_outage_at_each_call,
        proofs.survives_death_at_each_call,
    ],
)
def test_naming_is_durable(
    proof: Callable[..., None], settings: Settings, cloud: SimulatedCloud
) -> None:
    proof(naming(settings, cloud))
