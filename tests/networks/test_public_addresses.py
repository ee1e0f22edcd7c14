"""Addresses of one's own: getting, listing, releasing, and who gets them afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text, update

from awan.catalogue.models import Price
from awan.kit.clock import now
from awan.kit.database import get_engine, transaction
from awan.ledger import spans_of
from awan.networks.addresses import end_quarantines
from awan.networks.models import ADDRESS_MOVES, Address, AddressState
from tests.support.in_process_worker import InProcessWorker
from tests.support.lock_waits import wait_for_waiters
from tests.support.simulated_cloud import Customer, SimulatedCloud

VIEW = {
    "uuid", "ip_address", "version", "gateway", "prefix", "rdns", "location", "instance", "vswitch", "status",
    "price_per_hour", "price_per_month", "created_at",
}  # fmt: skip


def take(cloud: SimulatedCloud, customer: Customer | None = None) -> dict[str, str]:
    """A new address of the customer."""
    owner = customer or cloud.customer
    answer = owner.http.post("/networks/public", json={"location_id": cloud.location_id})
    assert answer.status_code == 201, answer.text
    return dict(answer.json()["data"])


def leave_free(cloud: SimulatedCloud, number: int) -> None:
    """Only so many addresses are still in the pool."""
    with transaction() as session:
        kept = session.scalars(
            select(Address.address_id)
            .where(Address.state == AddressState.AVAILABLE)
            .order_by(Address.inet)
            .limit(number)
        ).all()
        session.execute(
            update(Address)
            .where(Address.state == AddressState.AVAILABLE, Address.address_id.not_in(kept))
            .values(state=AddressState.RESERVED)
        )


def test_an_address_is_mine_billed_and_listed(cloud: SimulatedCloud) -> None:
    made = take(cloud)
    assert set(made) == VIEW
    assert made["ip_address"] == "198.51.100.2"
    assert (made["gateway"], made["prefix"], made["version"]) == ("198.51.100.1", 24, 4)
    assert (made["status"], made["instance"]) == ("free", None)
    assert (made["price_per_month"], made["price_per_hour"]) == (15000, "20.83")
    http = cloud.customer.http
    listed = http.get("/networks/public").json()["data"]
    assert listed["data"] == [made]
    assert listed["page"]["total"] == 1
    options = http.get("/networks/public/options", params={"location_id": cloud.location_id})
    assert options.json()["data"] == [{"uuid": made["uuid"], "ip_address": made["ip_address"]}]
    with transaction() as session:
        (span,) = spans_of(session, UUID(made["uuid"]))
    assert (span.component, span.quantity, span.monthly_minor) == ("public_ip", 1, 15000)
    assert span.closed_at is None
    used = http.get("/account").json()["data"]["quotas"]["public_ips"]["used"]
    assert used == 1


def test_pages(cloud: SimulatedCloud) -> None:
    made = [take(cloud)["uuid"] for _ in range(3)]
    http = cloud.customer.http
    pages = [http.get(f"/networks/public?limit=2&page={n}").json()["data"] for n in (1, 2, 3)]
    assert [row["uuid"] for page in pages for row in page["data"]] == made
    assert pages[2]["page"] == {
        "total": 3, "count": 0, "per_page": 2, "current_page": 3, "total_pages": 2,
    }  # fmt: skip


def test_releasing_ends_the_bill_and_starts_a_rest(cloud: SimulatedCloud) -> None:
    made, http = take(cloud), cloud.customer.http
    gone = http.delete(f"/networks/public/{made['uuid']}")
    assert gone.status_code == 200
    assert gone.json()["data"] == {**made, "status": "releasing"}
    assert http.delete(f"/networks/public/{made['uuid']}").status_code == 404
    assert http.get("/networks/public").json()["data"]["data"] == []
    assert http.get("/account").json()["data"]["quotas"]["public_ips"]["used"] == 0
    with transaction() as session:
        (span,) = spans_of(session, UUID(made["uuid"]))
        assert span.closed_at is not None
        row = session.scalars(select(Address).where(Address.inet == made["ip_address"])).one()
        assert row.state == AddressState.QUARANTINE
        assert row.account_id is None
        assert row.resource_id is None


def test_a_resting_address_returns_to_its_owner_only(cloud: SimulatedCloud) -> None:
    leave_free(cloud, 1)
    other = cloud.new_customer()
    made = take(cloud)
    assert cloud.customer.http.delete(f"/networks/public/{made['uuid']}").is_success
    refused = other.http.post("/networks/public", json={"location_id": cloud.location_id})
    assert (refused.status_code, refused.json()["type"]) == (503, "NO_CAPACITY")
    assert other.http.get("/account").json()["data"]["quotas"]["public_ips"]["used"] == 0
    again = take(cloud)
    assert again["ip_address"] == made["ip_address"]
    assert again["uuid"] != made["uuid"]
    assert cloud.customer.http.delete(f"/networks/public/{again['uuid']}").is_success
    with transaction() as session:
        session.execute(update(Address).values(quarantined_until=now() - timedelta(seconds=1)))
    assert take(cloud, other)["ip_address"] == made["ip_address"]


def test_a_rest_ends_by_itself(cloud: SimulatedCloud) -> None:
    made = take(cloud)
    assert cloud.customer.http.delete(f"/networks/public/{made['uuid']}").is_success
    with transaction() as session:
        assert end_quarantines(session) == 0
        session.execute(
            update(Address)
            .where(Address.state == AddressState.QUARANTINE)
            .values(quarantined_until=now() - timedelta(seconds=1))
        )
        assert end_quarantines(session) == 1
        row = session.scalars(select(Address).where(Address.inet == made["ip_address"])).one()
        assert (row.state, row.previous_account_id) == (AddressState.AVAILABLE, None)


def test_an_attached_address_is_kept(cloud: SimulatedCloud) -> None:
    network = cloud.create()["data"]["public_network"]
    refused = cloud.customer.http.delete(f"/networks/public/{network['uuid']}")
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    row = cloud.customer.http.get("/networks/public").json()["data"]["data"][0]
    assert row["status"] == "attached"
    assert set(row["instance"]) == {"uuid", "hostname"}
    options = cloud.customer.http.get(
        "/networks/public/options", params={"location_id": cloud.location_id}
    )
    assert options.json()["data"] == []


def test_a_brought_address_is_used(cloud: SimulatedCloud) -> None:
    take(cloud)
    mine = take(cloud)
    data = cloud.create(public_network=mine["uuid"])["data"]
    assert data["ip_address"] == mine["ip_address"]
    assert data["public_network"]["uuid"] == mine["uuid"]
    used = cloud.customer.http.get("/account").json()["data"]["quotas"]["public_ips"]["used"]
    assert used == 2
    again = cloud.customer.http.post("/instances", json=cloud.order(public_network=mine["uuid"]))
    assert set(again.json()["errors"]) == {"public_network"}


def test_quota_and_unknown_location(cloud: SimulatedCloud) -> None:
    path = f"/admin/accounts/{cloud.customer.account_id}"
    assert cloud.admin.patch(path, json={"public_ips_max": 1}).is_success
    take(cloud)
    body = {"location_id": cloud.location_id}
    refused = cloud.customer.http.post("/networks/public", json=body)
    assert (refused.status_code, refused.json()["type"]) == (403, "QUOTA_EXCEEDED")
    for query in ({"location_id": 2**40}, {"location_id": "x"}, {}):
        for answer in (
            cloud.customer.http.post("/networks/public", json=query),
            cloud.customer.http.get("/networks/public/options", params=query),
        ):
            assert set(answer.json()["errors"]) == {"location_id"}, answer.text


def test_the_price_is_the_one_it_was_taken_at(cloud: SimulatedCloud) -> None:
    take(cloud)
    path = f"/admin/tiers/{cloud.tier_id}/prices"
    changed = cloud.admin.post(path, json={"component": "public_ip", "monthly_minor": 99})
    assert changed.is_success
    assert take(cloud)["price_per_month"] == 99
    rows = cloud.customer.http.get("/networks/public").json()["data"]["data"]
    assert [row["price_per_month"] for row in rows] == [15000, 99]
    with transaction() as session:
        assert len(session.scalars(select(Price).where(Price.component == "public_ip")).all()) == 2


def test_repeats_under_one_key_have_one_effect(cloud: SimulatedCloud) -> None:
    http, body = cloud.customer.http, {"location_id": cloud.location_id}
    first, second = (
        http.post("/networks/public", json=body, headers={"Idempotency-Key": "a"}) for _ in range(2)
    )
    assert first.json() == second.json()
    path = f"/networks/public/{first.json()['data']['uuid']}"
    gone, again = (http.delete(path, headers={"Idempotency-Key": "b"}) for _ in range(2))
    assert (gone.status_code, again.status_code) == (200, 200)
    assert again.json() == gone.json()
    assert http.delete(path, headers={"Idempotency-Key": "c"}).status_code == 404


@pytest.mark.usefixtures("worker")
def test_addresses_move_only_as_they_may(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    """Every change of state in a life with all its turns, as the database saw it, is an allowed move."""
    with get_engine().begin() as connection:
        connection.execute(text("CREATE TABLE sim.address_move (was text, became text)"))
        connection.execute(
            text(
                "CREATE FUNCTION sim.note_move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " IF old.state <> new.state THEN INSERT INTO sim.address_move VALUES (old.state, new.state);"
                " END IF; RETURN new; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE TRIGGER note_move BEFORE UPDATE ON address FOR EACH ROW"
                " EXECUTE FUNCTION sim.note_move()"
            )
        )
    try:
        mine, http = take(cloud), cloud.customer.http
        uuid = cloud.create_running(public_network=mine["uuid"])["uuid"]
        keep = {"remove_ip": False, "remove_block_storage": False}
        cloud.wait(
            http.request("DELETE", f"/instances/{uuid}", json=keep).json()["operation"]["uuid"]
        )
        assert http.delete(f"/networks/public/{mine['uuid']}").is_success
        uuid = cloud.create_running()["uuid"]
        drop = {"remove_ip": True, "remove_block_storage": False}
        cloud.wait(
            http.request("DELETE", f"/instances/{uuid}", json=drop).json()["operation"]["uuid"]
        )
        with transaction() as session:
            session.execute(update(Address).values(quarantined_until=now() - timedelta(seconds=1)))
            end_quarantines(session)
        with get_engine().connect() as connection:
            moves = {
                tuple(row) for row in connection.execute(text("SELECT * FROM sim.address_move"))
            }
    finally:
        with get_engine().begin() as connection:
            connection.execute(text("DROP TRIGGER note_move ON address"))
            connection.execute(text("DROP FUNCTION sim.note_move"))
            connection.execute(text("DROP TABLE sim.address_move"))
    allowed = {(was, became) for was, moves_ in ADDRESS_MOVES.items() for became in moves_}
    assert moves <= allowed
    assert len(moves) >= 5


def test_pools_refuse_what_does_not_fit(cloud: SimulatedCloud) -> None:
    def post(**changes: object) -> tuple[int, set[str]]:
        body = {"location_id": cloud.location_id, "cidr": "198.18.1.0/24", "gateway": "198.18.1.1"}
        answer = cloud.admin.post("/admin/pools", json={**body, **changes})
        return answer.status_code, set(answer.json().get("errors", {}))

    assert post(cidr="198.51.100.128/25", gateway="198.51.100.129") == (409, set())
    assert post(location_id=2**40) == (422, {"location_id"})
    assert post(cidr="198.18.1.5/24") == (422, {"cidr"})
    assert post(gateway="198.18.2.1") == (422, {"gateway"})
    assert post(gateway="x") == (422, {"gateway"})
    assert post(dns_servers=["x"]) == (422, {"dns_servers"})
    assert post(reserved=["x"]) == (422, {"reserved"})
    assert post(reserved=["2001:db8::1"]) == (422, {"reserved"})
    assert post(vlan=5000) == (422, {"vlan"})
    assert post(reserved=["198.18.1.9"], dns_servers=["198.18.1.1", "2001:db8::53"]) == (201, set())


def test_a_pool_goes_when_nobody_has_an_address_of_it(cloud: SimulatedCloud) -> None:
    mine = take(cloud)
    assert cloud.admin.delete(f"/admin/pools/{cloud.pool_id}").status_code == 409
    assert cloud.customer.http.delete(f"/networks/public/{mine['uuid']}").is_success
    assert cloud.admin.delete(f"/admin/pools/{cloud.pool_id}").status_code == 200
    assert cloud.admin.delete(f"/admin/pools/{cloud.pool_id}").status_code == 404
    refused = cloud.customer.http.post("/networks/public", json={"location_id": cloud.location_id})
    assert refused.status_code == 503
    assert cloud.customer.http.delete(f"/networks/public/{uuid4()}").status_code == 404


def test_a_pool_is_not_removed_under_an_address_that_is_just_taken(cloud: SimulatedCloud) -> None:
    (pool,) = [
        row for row in cloud.admin.get("/admin/pools").json()["data"] if row["cidr"].endswith("/24")
    ]
    with ThreadPoolExecutor(1) as threads:
        with transaction() as session:
            address = session.scalars(
                select(Address).where(Address.state == AddressState.AVAILABLE).limit(1)
            ).one()
            address.account_id = cloud.customer.account_id
            session.flush()
            removal = threads.submit(cloud.admin.delete, f"/admin/pools/{pool['id']}")
            wait_for_waiters(session.connection())
            assert not removal.done()
        answer = removal.result(timeout=30)
    assert (answer.status_code, answer.json()["type"]) == (409, "INVALID_OPERATION")


def test_an_operator_releases_an_address_for_its_owner(cloud: SimulatedCloud) -> None:
    made = take(cloud)
    assert cloud.admin.delete(f"/networks/public/{made['uuid']}").status_code == 200
    assert cloud.customer.http.get("/networks/public").json()["data"]["data"] == []
    limits = cloud.customer.http.get("/account").json()["data"]["quotas"]
    assert limits["public_ips"]["used"] == 0
