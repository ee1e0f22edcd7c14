"""Routed IPv6 prefixes of instances: given, used, named, taken away; and what agrees with what."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv6Address, IPv6Network
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text

from awan.engines.registry import sim_store
from awan.events import Event
from awan.kit.database import transaction
from awan.networks import names
from awan.networks.models import RoutedPrefix
from awan.networks.names import push_stale_names
from awan.networks.prefix_rules import (
    address_of_pointer,
    parse_prefix_pool,
    parse_router_address,
    prefixes_of,
)
from awan.networks.prefixes import end_prefix_quarantines
from awan.networks.rules import ipv6_of
from awan.reconcile import run_audit
from awan.reconcile.findings import FindingKind
from awan.reconcile.locations import check_location
from tests.support.guests import create_ready
from tests.support.in_process_worker import wait_until_idle
from tests.support.lock_waits import wait_for_waiters
from tests.support.simulated_cloud import ZONE, Customer, SimulatedCloud

ON_LINK = IPv6Network("2001:db8:0:1::/64")
RANGE = "2001:db8:0:100::/62"
ROUTER = "2001:db8:0:1::2"
FIRST, SECOND = "2001:db8:0:100::/64", "2001:db8:0:101::/64"
INSIDE = "2001:db8:0:100::25"
NAME = "mail.example.com"


@pytest.fixture(autouse=True)
def leads_here(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names that exist in the DNS -> their IPv6 address; the resolver is beyond our own code."""
    known = {NAME: INSIDE, "own.example.com": "", "elsewhere.example.com": "2001:db8::77"}

    def look_up(name: str, servers: object, *, timeout_s: float) -> frozenset[Any]:
        return frozenset({IPv6Address(known[name])} if known.get(name) else ())

    monkeypatch.setattr(names, "look_up_ipv6", look_up)
    return known


@pytest.fixture
def ranged(cloud: SimulatedCloud) -> SimulatedCloud:
    """The cloud with a range of four prefixes."""
    answer = cloud.admin.post("/admin/prefix-pools", json=pool_body(cloud))
    assert answer.status_code == 201, answer.text
    assert answer.json()["data"]["prefixes"] == {"available": 4}
    return cloud


def pool_body(cloud: SimulatedCloud, **changes: object) -> dict[str, object]:
    body = {"location_id": cloud.location_id, "cidr": RANGE, "router_address": ROUTER}
    return {**body, **changes}


def give(cloud: SimulatedCloud, uuid: str, customer: Customer | None = None) -> httpx.Response:
    return (customer or cloud.customer).http.post(f"/instances/{uuid}/ipv6/prefix")


def take(cloud: SimulatedCloud, uuid: str) -> httpx.Response:
    return cloud.customer.http.delete(f"/instances/{uuid}/ipv6/prefix")


def name_it(cloud: SimulatedCloud, uuid: str, address: str, rdns: str) -> httpx.Response:
    body = {"ip_address": address, "rdns": rdns}
    return cloud.customer.http.put(f"/instances/{uuid}/ipv6/rdns", json=body)


def shown(cloud: SimulatedCloud, uuid: str) -> dict[str, Any]:
    return dict(cloud.customer.http.get(f"/instances/{uuid}").json()["data"])


def ipv6(cloud: SimulatedCloud, uuid: str) -> dict[str, Any]:
    return dict(cloud.customer.http.get(f"/instances/{uuid}/ipv6").json()["data"])


def routes() -> dict[str, str]:
    """Prefix -> next hop, of the simulated fabric."""
    rows = sim_store().fetch_all("SELECT spec FROM sim.fabric_prefix_router")
    return {it["prefix"]: it["next_hop"] for row in rows for it in row["spec"]["routes"]}


def security() -> list[str]:
    """What ports may send from."""
    rows = sim_store().fetch_all("SELECT security_line FROM sim.fabric_port ORDER BY name")
    return [row["security_line"] for row in rows]


def pointers(address: str) -> list[str]:
    """The names that a reverse lookup gives."""
    query = "SELECT record_values FROM sim.name_record WHERE name = %s"
    row = sim_store().find_one(query, [IPv6Address(address).reverse_pointer])
    return [] if row is None else list(row["record_values"])


def delete(cloud: SimulatedCloud, uuid: str) -> None:
    body = {"remove_ip": True, "remove_block_storage": True}
    gone = cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=body)
    assert cloud.wait(gone.json()["operation"]["uuid"])["status"] == "succeeded"


def kinds() -> list[str]:
    """Kinds of what the audit finds."""
    return [str(it.kind) for it in run_audit()]


@pytest.mark.usefixtures("worker")
def test_a_prefix_is_routed_to_an_instance_and_taken_away(ranged: SimulatedCloud) -> None:
    cloud = ranged
    one = cloud.create_running()
    uuid, own = one["uuid"], one["public_network"]["ipv6_address"]
    assert one["ipv6_prefix"] is None
    answer = give(cloud, uuid)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"]["ipv6_prefix"] == FIRST
    assert answer.json()["operation"]["kind"] == "instance.add_ipv6_prefix"
    assert routes() == {FIRST: own}
    assert security()[0].endswith(f" {FIRST}")
    assert give(cloud, uuid).status_code == 409
    wait_until_idle()
    assert run_audit() == []

    other = cloud.create_running()
    assert give(cloud, other["uuid"]).json()["data"]["ipv6_prefix"] == SECOND
    assert set(routes()) == {FIRST, SECOND}
    taken = take(cloud, uuid)
    assert (taken.status_code, taken.json()["data"]["ipv6_prefix"]) == (200, None)
    assert set(routes()) == {SECOND}
    assert sum(line.endswith("::/64") for line in security()) == 1
    assert take(cloud, uuid).status_code == 409
    wait_until_idle()
    assert run_audit() == []
    with transaction() as session:
        said = session.scalars(
            select(Event.data["ipv6_prefix"].astext)
            .where(Event.kind.like("instance.%ipv6_prefix"))
            .order_by(Event.event_id)
        ).all()
        assert said == [FIRST, SECOND, FIRST]


@pytest.mark.usefixtures("worker")
def test_a_prefix_rests_before_another_account_gets_it(ranged: SimulatedCloud) -> None:
    cloud = ranged
    uuid = cloud.create_running()["uuid"]
    give(cloud, uuid)
    take(cloud, uuid)
    stranger = cloud.new_customer("Stranger")
    theirs = cloud.create_running(stranger)["uuid"]
    assert give(cloud, theirs, stranger).json()["data"]["ipv6_prefix"] == SECOND
    with transaction() as session:
        rest = text("UPDATE routed_prefix SET state = 'quarantine' WHERE state = 'available'")
        session.execute(rest)
        session.execute(text("UPDATE routed_prefix SET quarantined_until = now() + '1 h'"))
    nobody = cloud.create_running(stranger)["uuid"]
    refused = give(cloud, nobody, stranger)
    assert (refused.status_code, refused.json()["type"]) == (503, "NO_CAPACITY")
    assert give(cloud, uuid).json()["data"]["ipv6_prefix"] == FIRST, "one's own comes back"
    with transaction() as session:
        assert end_prefix_quarantines(session) == 0
        session.execute(text("UPDATE routed_prefix SET quarantined_until = now() - interval '1 s'"))
        assert end_prefix_quarantines(session) == 2
    wait_until_idle()
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
def test_who_cannot_have_a_prefix(cloud: SimulatedCloud) -> None:
    public = cloud.create_running()["uuid"]
    assert give(cloud, public).status_code == 409, "the location has none"
    cloud.admin.post("/admin/prefix-pools", json=pool_body(cloud))
    private = cloud.create_running(use_public_ip=False)["uuid"]
    assert give(cloud, private).status_code == 409
    assert give(cloud, str(uuid4())).status_code == 404
    assert give(cloud, public, cloud.new_customer("Intruder")).status_code == 404
    assert routes() == {}


@pytest.mark.usefixtures("worker")
def test_a_deletion_takes_route_and_names_along(ranged: SimulatedCloud) -> None:
    cloud = ranged
    uuid = cloud.create_running()["uuid"]
    give(cloud, uuid)
    assert name_it(cloud, uuid, INSIDE, NAME).status_code == 200
    push_stale_names()
    assert pointers(INSIDE) == [NAME]
    delete(cloud, uuid)
    push_stale_names()
    assert routes() == {}
    assert pointers(INSIDE) == []
    with transaction() as session:
        states = session.scalars(select(RoutedPrefix.state).order_by(RoutedPrefix.cidr)).all()
        assert states == ["quarantine", "available", "available", "available"]
    assert run_audit() == []
    with transaction() as session:
        session.execute(text("UPDATE routed_prefix SET quarantined_until = now()"))
        end_prefix_quarantines(session)


@pytest.mark.usefixtures("worker")
def test_names_of_ipv6_addresses(ranged: SimulatedCloud, leads_here: dict[str, str]) -> None:
    cloud = ranged
    uuid = cloud.create_running()["uuid"]
    own = ipv6(cloud, uuid)["ip_address"]
    default = ipv6(cloud, uuid)["rdns"]
    assert default.endswith(f".{ZONE}")
    leads_here["own.example.com"] = own
    named = name_it(cloud, uuid, own, "Own.Example.com.")
    assert (named.status_code, named.json()["data"]) == (200, "own.example.com")
    push_stale_names()
    assert pointers(own) == ["own.example.com"]
    assert name_it(cloud, uuid, INSIDE, NAME).status_code == 422, "it is not the instance's yet"

    give(cloud, uuid)
    assert name_it(cloud, uuid, INSIDE, NAME).json()["data"] == NAME
    push_stale_names()
    assert pointers(INSIDE) == [NAME]
    assert ipv6(cloud, uuid) == {
        "ip_address": own,
        "rdns": "own.example.com",
        "prefix": FIRST,
        "names": [{"ip_address": INSIDE, "rdns": NAME}],
    }
    wait_until_idle()
    assert run_audit() == []
    assert name_it(cloud, uuid, own, "").json()["data"] == default
    assert name_it(cloud, uuid, INSIDE, "").json()["data"] is None
    push_stale_names()
    assert (pointers(own), pointers(INSIDE)) == ([default], [])
    wait_until_idle()
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
def test_names_that_are_refused(ranged: SimulatedCloud) -> None:
    uuid = ranged.create_running()["uuid"]
    give(ranged, uuid)
    for address, rdns, field in (
        (INSIDE, "elsewhere.example.com", "rdns"),
        (INSIDE, "nobody.example.com", "rdns"),
        (INSIDE, "mail", "rdns"),
        (INSIDE, f"mail.{ZONE}", "rdns"),
        ("2001:db8:0:101::25", NAME, "ip_address"),
        ("198.51.100.2", NAME, "ip_address"),
        ("x", NAME, "ip_address"),
        (f"{INSIDE}%eth0", NAME, "ip_address"),
    ):
        refused = name_it(ranged, uuid, address, rdns)
        assert refused.status_code == 422, refused.text
        assert list(refused.json()["errors"]) == [field]


@pytest.mark.usefixtures("worker")
def test_a_name_stays_when_the_public_address_changes(
    ranged: SimulatedCloud, leads_here: dict[str, str]
) -> None:
    cloud = ranged
    uuid = cloud.create_running()["uuid"]
    own = ipv6(cloud, uuid)["ip_address"]
    leads_here["own.example.com"] = own
    give(cloud, uuid)
    assert name_it(cloud, uuid, own, "own.example.com").status_code == 200
    spare = cloud.customer.http.post("/networks/public", json={"location_id": cloud.location_id})
    path = f"/instances/{uuid}/public-network"
    body = {"public_network": spare.json()["data"]["uuid"]}
    assert cloud.customer.http.put(path, json=body).status_code == 200
    assert shown(cloud, uuid)["ip_address"] == spare.json()["data"]["ip_address"]
    assert ipv6(cloud, uuid)["rdns"] == "own.example.com"
    assert security()[0].endswith(f" {FIRST}")
    push_stale_names()
    wait_until_idle()
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
def test_what_the_fabric_or_the_nameserver_lost_is_put_back(ranged: SimulatedCloud) -> None:
    cloud = ranged
    uuid = create_ready(cloud)
    give(cloud, uuid)
    name_it(cloud, uuid, INSIDE, NAME)
    push_stale_names()
    wait_until_idle()
    before = routes()
    fabric = "UPDATE sim.fabric_prefix_router SET spec = jsonb_set(spec, '{routes}', %s)"
    stranger = '[{"prefix": "2001:db8:0:102::/64", "next_hop": "2001:db8:0:1::99"}]'
    route, stray = FindingKind.PREFIX_ROUTE, FindingKind.PREFIX_STRAY
    for planted, wanted in (("[]", [route]), (stranger, [route, stray])):
        sim_store().execute(fabric, [planted])
        assert kinds() == wanted
        check_location(cloud.location_id)
        assert routes() == before
        wait_until_idle()
        assert run_audit() == []
    sim_store().execute(
        "DELETE FROM sim.name_record WHERE name = %s", [IPv6Address(INSIDE).reverse_pointer]
    )
    assert kinds() == [FindingKind.NAME_WRONG]
    check_location(cloud.location_id)
    push_stale_names()
    assert pointers(INSIDE) == [NAME]
    with transaction() as session:
        session.execute(text("DELETE FROM prefix_name"))
    assert kinds() == [FindingKind.NAME_STRAY]
    with transaction() as session:
        session.execute(text("UPDATE routed_prefix SET is_leaving = true WHERE state = 'assigned'"))
    assert FindingKind.PREFIX_STRAY in kinds()
    check_location(cloud.location_id)
    assert routes() == {}
    with transaction() as session:
        session.execute(
            text("UPDATE instance SET holds_quota = false WHERE instance_id = :uuid"),
            {"uuid": uuid},
        )
    assert FindingKind.PREFIX_ORPHAN in kinds()


def test_pools_of_prefixes(cloud: SimulatedCloud) -> None:
    def post(**changes: object) -> tuple[int, list[str]]:
        answer = cloud.admin.post("/admin/prefix-pools", json=pool_body(cloud, **changes))
        return answer.status_code, list(answer.json().get("errors", {}))

    assert post(cidr="2001:db8::/48") == (422, ["cidr"])
    assert post(cidr="198.18.0.0/24") == (422, ["cidr"])
    assert post(router_address="2001:db8:7::2") == (422, ["router_address"])
    assert post(router_address="2001:db8:0:1::1") == (422, ["router_address"])
    assert post(router_address="2001:db8:0:1:8000::2") == (422, ["router_address"])
    assert post(cidr="2001:db8:0:1::/64") == (409, [])
    assert post() == (201, [])
    assert post() == (409, [])
    assert post(cidr="2001:db8:0:200::/60", router_address="2001:db8:0:1::3") == (409, [])
    body = {
        "location_id": cloud.location_id,
        "cidr": "2001:db8:0:100::/64",
        "gateway": "2001:db8:0:100::1",
    }
    assert cloud.admin.post("/admin/pools", json=body).status_code == 409
    (pool,) = cloud.admin.get("/admin/prefix-pools").json()["data"]
    assert (pool["cidr"], pool["router_address"]) == (RANGE, ROUTER)
    assert cloud.admin.delete(f"/admin/pools/{pool['pool_id']}").status_code == 409
    assert cloud.admin.delete(f"/admin/prefix-pools/{pool['id']}").status_code == 200
    assert cloud.admin.delete(f"/admin/prefix-pools/{pool['id']}").status_code == 404


@pytest.mark.usefixtures("worker")
def test_a_pool_in_use_stays(ranged: SimulatedCloud) -> None:
    give(ranged, ranged.create_running()["uuid"])
    (pool,) = ranged.admin.get("/admin/prefix-pools").json()["data"]
    assert pool["prefixes"] == {"available": 3, "assigned": 1}
    assert ranged.admin.delete(f"/admin/prefix-pools/{pool['id']}").status_code == 409


@given(st.uuids())
def test_no_instance_gets_the_routers_address(nic_id: UUID) -> None:
    own = ipv6_of(ON_LINK, nic_id)
    with pytest.raises(ValueError, match="upper half"):
        parse_router_address(ON_LINK, IPv6Address("2001:db8:0:1::1"), str(own))


@given(st.integers(0, 2**128 - 1).map(IPv6Address))
def test_reverse_names_lead_back(address: IPv6Address) -> None:
    assert address_of_pointer(address.reverse_pointer) == address
    assert address_of_pointer(address.reverse_pointer.partition(".")[2]) is None


@pytest.mark.parametrize(("length", "count"), [(50, 16384), (60, 16), (64, 1)])
def test_prefixes_of_a_range(length: int, count: int) -> None:
    network = parse_prefix_pool(f"2001:db8:4000::/{length}")
    found = list(prefixes_of(network))
    assert len(found) == len(set(found)) == count
    assert all(it.prefixlen == 64 and it.subnet_of(network) for it in found)


def test_a_pool_is_not_removed_under_a_prefix_that_is_just_assigned(ranged: SimulatedCloud) -> None:
    (pool,) = ranged.admin.get("/admin/prefix-pools").json()["data"]
    with ThreadPoolExecutor(1) as threads:
        with transaction() as session:
            session.execute(
                text(
                    "UPDATE routed_prefix SET state = 'assigned', account_id = :account,"
                    " operation_id = :some, next_hop = '2001:db8:0:1::99', instance_id = :instance"
                    " WHERE cidr = '2001:db8:0:100::/64'"
                ),
                {
                    "account": ranged.customer.account_id,
                    "some": uuid4(),
                    "instance": ranged.create()["data"]["uuid"],
                },
            )
            removal = threads.submit(ranged.admin.delete, f"/admin/prefix-pools/{pool['id']}")
            wait_for_waiters(session.connection())
            assert not removal.done()
        answer = removal.result(timeout=30)
    assert (answer.status_code, answer.json()["type"]) == (409, "INVALID_OPERATION")


@pytest.mark.usefixtures("worker")
def test_a_key_that_is_old_names_a_call_anew(ranged: SimulatedCloud) -> None:
    uuid = create_ready(ranged)
    give(ranged, uuid)
    http, path = ranged.customer.http, f"/instances/{uuid}/ipv6/rdns"
    body, headers = {"ip_address": INSIDE, "rdns": NAME}, {"Idempotency-Key": "name-1"}
    assert http.put(path, json=body, headers=headers).status_code == 200
    with transaction() as session:
        session.execute(text("UPDATE idempotency_key SET created_at = now() - interval '25 hours'"))
    assert http.put(path, json=body, headers=headers).status_code == 200
