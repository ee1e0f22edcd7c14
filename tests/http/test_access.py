"""Keys: who gets in, from where, to what, how often."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import ip_network
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, select, update
from sqlalchemy.orm import Session

from awan.accounts import KeyScope
from awan.accounts.models import Account, ApiKey
from awan.accounts.rules import new_key_text, parse_key, source_address
from awan.kit.clock import now
from awan.kit.database import get_engine
from awan.settings import Settings
from tests.support.changed_settings import changed_settings
from tests.support.probe_app import make_probe_app
from tests.support.tenants import Tenant, make_tenant

FLAGS = {"remove_ip": "1", "remove_block_storage": "1"}


def change_key(session: Session, tenant: Tenant, **values: object) -> None:
    """Changes the tenant's key and commits."""
    key = parse_key(tenant.key)
    assert key is not None
    session.execute(update(ApiKey).where(ApiKey.key_id == key.key_id).values(**values))
    session.commit()


def change_state(session: Session, tenant: Tenant, state: str) -> None:
    """Changes the account's state and commits."""
    session.execute(
        update(Account).where(Account.account_id == tenant.account_id).values(state=state)
    )
    session.commit()


def test_who(probe: TestClient) -> None:
    tenant = make_tenant()
    answer = probe.get("/who", headers={**tenant.headers, "x-request-id": "r"})
    assert answer.status_code == 200
    assert answer.json()["data"]["id"] == "r"
    assert answer.json()["data"]["actor"].removeprefix("key:") in tenant.key


def test_every_bad_key_gets_the_same_words(probe: TestClient, session: Session) -> None:
    tenant, expired, revoked, closed = (make_tenant(name) for name in "abcd")
    change_key(session, expired, expires_at=now() - timedelta(seconds=1))
    change_key(session, revoked, revoked_at=now())
    change_state(session, closed, "closed")
    elsewhere = make_tenant(allowed_cidrs=[ip_network("198.51.100.0/24")])
    wrong_secret = tenant.key[:-1] + ("0" if tenant.key[-1] != "0" else "1")
    keys = [
        *["", "x", "awan_", new_key_text().plain_text, wrong_secret, tenant.key.upper()],
        *[tenant.key + "0", f" {tenant.key}0", "awan_é_x", f"{tenant.key}, {tenant.key}"],
        *[expired.key, revoked.key, closed.key, elsewhere.key],
    ]
    answers = [probe.get("/who", headers={"x-apikey": key.encode()}) for key in keys]
    answers.append(probe.get("/who"))
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json() == {
        "type": "UNAUTHENTICATED",
        "message": "The API key is missing or not valid: it goes into the header x-apikey.",
    }
    assert {answer.headers["www-authenticate"] for answer in answers} == {
        'ApiKey realm="awan", header="x-apikey"'
    }


def test_only_a_hash_is_stored(session: Session, settings: Settings) -> None:
    tenant = make_tenant()
    row = session.scalars(select(ApiKey)).one()
    secret = tenant.key.split("_")[2]
    assert bytes(row.secret_sha256) == hashlib.sha256(secret.encode()).digest()
    assert all(secret not in str(value) for value in vars(row).values())


def test_scopes(probe: TestClient) -> None:
    read = make_tenant("r", scope=KeyScope.READ).headers
    billing = make_tenant("b", scope=KeyScope.BILLING).headers
    write = make_tenant("w").headers
    assert probe.get("/who", headers=read).status_code == 200
    assert probe.post("/instances", headers=read, data={"name": "x"}).status_code == 403
    assert probe.post("/pay", headers=read).status_code == 403
    assert probe.delete(f"/instances/{uuid4()}", headers=read).status_code == 403
    assert probe.get("/who", headers=billing).status_code == 403
    assert probe.post("/instances", headers=billing, data={"name": "x"}).status_code == 403
    assert probe.post("/pay", headers=billing).status_code == 200
    assert probe.post("/pay", headers=write).status_code == 200
    assert probe.post("/instances", headers=write, data={"name": "x"}).status_code == 202


def test_scope_comes_before_body_and_path(probe: TestClient) -> None:
    read = make_tenant("r", scope=KeyScope.READ).headers
    answer = probe.post("/instances", headers=read, content=b"{")
    assert (answer.status_code, answer.json()["type"]) == (403, "FORBIDDEN")


def test_suspended_accounts_read_pay_and_delete(probe: TestClient, session: Session) -> None:
    tenant = make_tenant()
    uuid = probe.post("/instances", headers=tenant.headers, data={"name": "x"}).json()["data"][
        "uuid"
    ]
    change_state(session, tenant, "suspended")
    answer = probe.post("/instances", headers=tenant.headers, data={"name": "y"})
    assert (answer.status_code, answer.json()["type"]) == (403, "ACCOUNT_SUSPENDED")
    assert probe.get("/who", headers=tenant.headers).status_code == 200
    assert probe.post("/pay", headers=tenant.headers).status_code == 200
    answer = probe.request("DELETE", f"/instances/{uuid}", headers=tenant.headers, data=FLAGS)
    assert answer.status_code == 200


def test_operator_routes_do_not_exist_for_customers(probe: TestClient) -> None:
    customer = make_tenant("c").headers
    for path in ("/admin/nothing", "/admin/things"):
        answer = probe.post(path, headers=customer, data=FLAGS)
        words = f"There is no such route: POST /api/v1{path}"
        assert (answer.status_code, answer.json()["message"]) == (404, words)
    assert probe.post("/admin/things", headers=customer, content=b"{").status_code == 404
    assert probe.post("/admin/things", data=FLAGS).status_code == 401
    reader = make_tenant("r", is_operator=True, scope=KeyScope.READ).headers
    assert probe.post("/admin/things", headers=reader, data=FLAGS).status_code == 403
    operator = make_tenant("o", is_operator=True).headers
    assert probe.post("/admin/things", headers=operator, data=FLAGS).status_code == 200
    assert probe.post("/admin/things", headers=operator, data={}).status_code == 422


def test_other_tenants_things_are_404_before_422(probe: TestClient) -> None:
    mine, other = make_tenant("a"), make_tenant("b")
    operator = make_tenant("o", is_operator=True)
    made = probe.post("/instances", headers=mine.headers, data={"name": "x"})
    path = f"/instances/{made.json()['data']['uuid']}"
    absent = probe.request("DELETE", f"/instances/{uuid4()}", headers=other.headers, data=FLAGS)
    assert absent.json() == {"type": "NOT_FOUND", "message": "Instance not found."}
    for body in ({}, FLAGS, {"remove_ip": "maybe"}):
        answer = probe.request("DELETE", path, headers=other.headers, data=body)
        assert (answer.status_code, answer.json()) == (404, absent.json())
    assert probe.request("DELETE", path, headers=mine.headers, data={}).status_code == 422
    assert probe.delete("/instances/no-uuid", headers=mine.headers).status_code == 404
    assert probe.delete(f"{path}?remove_ip=1", headers=mine.headers).status_code == 422
    # A POST that stands for DELETE, with one flag here and one there; the operator may do it for anyone.
    answer = probe.post(
        f"{path}?remove_ip=0",
        headers=operator.headers,
        data={"_method": "DELETE", "remove_block_storage": "off"},
    )
    assert answer.json()["data"] == {"remove_ip": False, "remove_block_storage": False}
    assert probe.request("DELETE", path, headers=mine.headers, data=FLAGS).status_code == 404


def test_flags_come_once(probe: TestClient) -> None:
    mine = make_tenant("a")
    uuid = probe.post("/instances", headers=mine.headers, data={"name": "x"}).json()["data"]["uuid"]
    answer = probe.request(
        "DELETE", f"/instances/{uuid}?remove_ip=1", headers=mine.headers, data=FLAGS
    )
    assert list(answer.json()["errors"]) == ["remove_ip"]


@pytest.fixture
def from_address(settings: Settings) -> Iterator[type[TestClient]]:
    """Clients of any address, with one trusted proxy network."""
    with changed_settings(trusted_proxies='["10.0.0.0/8"]'):
        yield TestClient


def test_networks(from_address: type[TestClient]) -> None:
    bound = make_tenant(allowed_cidrs=[ip_network("198.51.100.0/24"), ip_network("2001:db8::/32")])
    cases = [
        ("198.51.100.7", None, 200),
        ("2001:db8::1", None, 200),
        ("::ffff:198.51.100.7", None, 200),
        ("198.51.101.7", None, 401),
        ("2001:db9::1", None, 401),
        (
            "198.51.101.7",
            "198.51.100.7",
            401,
        ),  # not a trusted proxy: what it says counts for nothing
        ("10.0.0.1", None, 401),
        ("10.0.0.1", "198.51.100.7", 200),
        ("10.0.0.1", "198.51.100.7, 203.0.113.9", 401),  # the right-most that is no proxy counts
        ("10.0.0.1", "1.2.3.4, 198.51.100.7, 10.9.9.9", 200),
        ("10.0.0.1", "198.51.100.7, nonsense", 401),
        ("not-an-address", None, 401),
    ]
    app = make_probe_app()
    for peer, forwarded, status in cases:
        headers = {**bound.headers, **({"x-forwarded-for": forwarded} if forwarded else {})}
        client = from_address(app, base_url="http://api.test/api/v1", client=(peer, 1))
        assert client.get("/who", headers=headers).status_code == status, (peer, forwarded)


def test_source_address_without_peer() -> None:
    assert source_address(None, ["1.2.3.4"], []) is None
    assert str(source_address("fe80::1%eth0", [], [])) == "fe80::1"


def test_rates(probe: TestClient) -> None:
    tenant = make_tenant(reads_per_minute=3, writes_per_minute=1)
    if now().second > 55:
        time.sleep(61 - now().second)  # the count starts again with each minute
    answers = [probe.get("/who", headers=tenant.headers) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    refused = answers[-1]
    assert refused.json()["type"] == "RATE_LIMITED"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    # Writes have a count of their own; a refused call comes before everything else.
    assert probe.post("/pay", headers=tenant.headers).status_code == 200
    assert probe.post("/instances", headers=tenant.headers, content=b"{").status_code == 429
    # Who has only the key's id cannot use its calls up.
    fresh = make_tenant("f", reads_per_minute=2)
    wrong = fresh.key[:-4] + "0000"
    for _ in range(5):
        assert probe.get("/who", headers={"x-apikey": wrong}).status_code == 401
    assert probe.get("/who", headers=fresh.headers).status_code == 200


def test_a_new_minute_starts_a_new_count(probe: TestClient, session: Session) -> None:
    from sqlalchemy import text

    tenant = make_tenant(reads_per_minute=1)
    assert probe.get("/who", headers=tenant.headers).status_code == 200
    session.execute(
        text("UPDATE rate_counter SET minute = minute - interval '1 minute', calls = 50")
    )
    session.commit()
    assert probe.get("/who", headers=tenant.headers).status_code == 200


def test_last_use_is_noted_once_a_minute(probe: TestClient, session: Session) -> None:
    tenant = make_tenant()
    query = select(ApiKey.last_used_at)
    assert session.scalar(query) is None
    session.rollback()
    probe.get("/who", headers=tenant.headers)
    first = session.scalar(query)
    session.rollback()
    assert first is not None
    probe.get("/who", headers=tenant.headers)
    assert session.scalar(query) == first
    session.rollback()
    change_key(session, tenant, last_used_at=first - timedelta(seconds=61))
    probe.get("/who", headers=tenant.headers)
    later = session.scalar(query)
    assert later is not None
    assert later > first


def test_one_statement_proves_counts_and_notes(probe: TestClient) -> None:
    tenant = make_tenant()
    probe.get("/who", headers=tenant.headers)
    statements: list[str] = []

    def note(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(get_engine(), "before_cursor_execute", note)
    try:
        probe.get("/who", headers=tenant.headers)
    finally:
        event.remove(get_engine(), "before_cursor_execute", note)
    assert len(statements) == 1
