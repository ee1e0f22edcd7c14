"""Accounts: what a customer sees of its own, and what the operator does with all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient

from awan import events
from awan.accounts import KeyScope, quotas
from awan.accounts.models import AccountState
from awan.accounts.service import change_account
from awan.errors import AccountSuspended, QuotaExceeded
from awan.kit.database import transaction
from awan.kit.http import PATH_SHOWN_MAX
from tests.support.lock_waits import wait_for_waiters
from tests.support.tenants import make_tenant


def test_own_account(api: TestClient) -> None:
    tenant = make_tenant("Warung Kopi")
    with transaction() as session:
        quotas.take(session, tenant.account_id, instances=2, memory_gib=8)
    answer = api.get("/account", headers=tenant.headers)
    data = answer.json()["data"]
    assert (data["name"], data["state"], data["currency"]) == ("Warung Kopi", "active", "IDR")
    assert data["quotas"]["instances"] == {"used": 2, "max": 20}
    assert data["quotas"]["memory_gib"] == {"used": 8, "max": 256}
    assert tenant.key.split("_")[2] not in answer.text


def test_billing_keys_read_the_account_alone(api: TestClient) -> None:
    tenant = make_tenant(scope=KeyScope.BILLING)
    assert api.get("/account", headers=tenant.headers).status_code == 200
    assert api.get("/account/events", headers=tenant.headers).status_code == 403
    assert api.get("/api-keys", headers=tenant.headers).status_code == 403


def test_events_page_backwards(api: TestClient) -> None:
    tenant, other = make_tenant("a"), make_tenant("b")
    for _ in range(3):
        api.post("/api-keys", headers=tenant.headers, json={"name": "x"})
    path = "/account/events"
    everything = api.get(path, headers=tenant.headers).json()["data"]
    assert [row["kind"] for row in everything] == ["api_key.created"] * 4 + ["account.created"]
    first = api.get(f"{path}?limit=2", headers=tenant.headers).json()["data"]
    rest = api.get(f"{path}?before={first[-1]['id']}", headers=tenant.headers).json()["data"]
    assert first + rest == everything
    foreign = api.get(path, headers=other.headers).json()["data"][0]["id"]
    assert api.get(f"{path}?before={foreign}", headers=tenant.headers).json()["data"] == []
    assert api.get(f"{path}?resource_uuid={uuid4()}", headers=tenant.headers).json()["data"] == []


def test_operator_makes_and_changes_customers(api: TestClient) -> None:
    operator = make_tenant("o", is_operator=True).headers
    body = {"name": "Toko", "currency": "USD", "instances_max": 3}
    headers = {**operator, "Idempotency-Key": "k"}
    made = api.post("/admin/accounts", headers=headers, json=body)
    assert made.status_code == 201
    uuid = made.json()["data"]["uuid"]
    assert api.post("/admin/accounts", headers=headers, json=body).json() == made.json()
    keys = f"/admin/accounts/{uuid}/api-keys"
    key = api.post(keys, headers=operator, json={"name": "first", "writes_per_minute": 7}).json()
    assert key["data"]["writes_per_minute"] == 7
    mine = {"x-apikey": key["data"]["key"]}
    assert api.get("/account", headers=mine).json()["data"]["quotas"]["instances"]["max"] == 3
    path = f"/admin/accounts/{uuid}"
    changed = api.patch(path, headers=operator, json={"state": "suspended", "vcpus_max": 1})
    assert changed.json()["data"]["state"] == "suspended"
    assert changed.json()["data"]["quotas"]["vcpus"] == {"used": 0, "max": 1}
    assert api.post("/api-keys", headers=mine, json={"name": "x"}).status_code == 403
    assert api.patch(path, headers=operator, json={"state": "closed"}).status_code == 200
    assert api.get("/account", headers=mine).status_code == 401
    assert api.get(keys, headers=operator).json()["data"][0]["name"] == "first"
    assert api.delete(f"{keys}/{key['data']['id']}", headers=operator).status_code == 200


def test_an_account_that_holds_things_is_not_closed(api: TestClient) -> None:
    operator, tenant = make_tenant("o", is_operator=True), make_tenant()
    with transaction() as session:
        quotas.take(session, tenant.account_id, instances=1)
    for uuid in (tenant.account_id, operator.account_id):
        answer = api.patch(
            f"/admin/accounts/{uuid}", headers=operator.headers, data={"state": "closed"}
        )
        assert (answer.status_code, answer.json()["type"]) == (409, "INVALID_OPERATION")


def test_list_of_accounts(api: TestClient) -> None:
    operator = make_tenant("Operator", is_operator=True).headers
    for name in ("Alpha", "Beta", "alphabet"):
        make_tenant(name)
    found = api.get("/admin/accounts?search=ALPHA&limit=1&page=2", headers=operator).json()["data"]
    assert [row["name"] for row in found["data"]] == ["alphabet"]
    assert found["page"] == {
        "total": 2,
        "count": 1,
        "per_page": 1,
        "current_page": 2,
        "total_pages": 2,
    }
    assert api.get("/admin/accounts?page=99", headers=operator).json()["data"]["data"] == []


ROUTES: list[tuple[str, str]] = [
    ("GET", "/admin/accounts"),
    ("POST", "/admin/accounts"),
    ("GET", "/admin/accounts/{uuid}"),
    ("PATCH", "/admin/accounts/{uuid}"),
    ("GET", "/admin/accounts/{uuid}/api-keys"),
    ("POST", "/admin/accounts/{uuid}/api-keys"),
    ("DELETE", "/admin/accounts/{uuid}/api-keys/0123456789abcdef"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_customers_see_no_operator_route(api: TestClient, method: str, path: str) -> None:
    tenant = make_tenant()
    path = path.format(uuid=tenant.account_id)
    answer = api.request(method, path, headers=tenant.headers)
    words = f"There is no such route: {method} {f'/api/v1{path}'[:PATH_SHOWN_MAX]}"
    assert (answer.status_code, answer.json()["message"]) == (404, words)
    assert api.request(method, path).status_code == 401


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "x", "currency": "XXX"},
        {"name": "x", "instances_max": -1},
        {"name": "x", "instances_max": 1.5},
        {"name": "x", "state": "active"},
    ],
)
def test_wrong_accounts(api: TestClient, body: dict[str, Any]) -> None:
    operator = make_tenant("o", is_operator=True).headers
    assert api.post("/admin/accounts", headers=operator, json=body).status_code == 422


def test_unknown_account(api: TestClient) -> None:
    operator = make_tenant("o", is_operator=True).headers
    for path in (f"/admin/accounts/{uuid4()}", "/admin/accounts/x"):
        assert api.get(path, headers=operator).status_code == 404
        assert api.patch(path, headers=operator, json={"name": "x"}).status_code == 404


def test_quotas_are_all_or_nothing(api: TestClient) -> None:
    tenant = make_tenant(quotas={"instances": 2, "vcpus": 4})
    account_id = tenant.account_id
    with transaction() as session:
        quotas.take(session, account_id, instances=1, vcpus=3)
        with pytest.raises(QuotaExceeded) as caught:
            quotas.take(session, account_id, instances=1, vcpus=2)
        assert caught.value.message == (
            "The quota of vCPUs would be exceeded: 3 of 4 in use, 2 more requested."
        )
        assert quotas.limits(session, account_id)["instances"] == {"used": 1, "max": 2}
        quotas.take(session, account_id)
        quotas.give_back(session, account_id, instances=1, vcpus=9)
        assert quotas.limits(session, account_id)["vcpus"] == {"used": 0, "max": 4}


def test_who_waited_while_the_account_was_closed_gets_nothing(api: TestClient) -> None:
    tenant = make_tenant()

    def take() -> None:
        with transaction() as session:
            quotas.take(session, tenant.account_id, instances=1)

    with ThreadPoolExecutor(1) as threads:
        with transaction() as session:
            closed = AccountState.CLOSED
            change_account(session, tenant.account_id, state=closed, actor="test")
            taking = threads.submit(take)
            wait_for_waiters(session.connection())
            assert not taking.done()
        with pytest.raises(AccountSuspended):
            taking.result(timeout=30)
    with transaction() as session:
        assert quotas.limits(session, tenant.account_id)["instances"]["used"] == 0


def test_an_account_is_changed_while_something_of_it_is_made(api: TestClient) -> None:
    tenant = make_tenant()
    with ThreadPoolExecutor(1) as threads, transaction() as session:
        quotas.take(session, tenant.account_id, instances=1)

        def change() -> None:
            with transaction() as other:
                change_account(other, tenant.account_id, quotas={"instances": 7}, actor="test")

        changing = threads.submit(change)
        wait_for_waiters(session.connection())
        assert not changing.done()
        # It holds the account and waits for our quota; a row that refers to the account waits for nobody.
        events.record(
            session, kind="account.changed", actor="test", account_id=tenant.account_id, data={}
        )
        session.flush()
        session.commit()
        changing.result(timeout=30)
