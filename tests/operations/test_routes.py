"""`GET /operations` and `GET /operations/{uuid}`: fields, filters, pages, and whose they are."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from awan.accounts import create_account, create_key
from awan.accounts.models import Account, AccountKind
from awan.api import create_app
from awan.kit.clock import now
from awan.operations.models import Operation
from awan.settings import Settings

PREFIX = "/api/v1/operations"


@pytest.fixture
def http(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        yield client


class Tenant:
    """An account with a key and three operations of its own."""

    def __init__(self, session: Session, name: str, kind: AccountKind) -> None:
        self.account: Account = create_account(session, name, kind=kind)
        _, key = create_key(session, self.account.account_id, "test")
        self.headers = {"x-apikey": key}
        self.resource_id = uuid4()
        self.operation_ids = [
            self._add(session, "house.build", "succeeded", age_s=30),
            self._add(session, "house.build", "running", age_s=20),
            self._add(session, "house.raze", "failed", age_s=10),
        ]

    def _add(self, session: Session, kind: str, status: str, age_s: int) -> UUID:
        created_at = now() - timedelta(seconds=age_s)
        row = Operation(
            operation_id=uuid4(),
            kind=kind,
            resource_id=self.resource_id if status != "running" else None,
            resource_kind="instance",
            account_id=self.account.account_id,
            actor="key:1",
            request_id="r",
            status=status,
            step="walls",
            percent=40,
            deadline_at=created_at,
            created_at=created_at,
            started_at=created_at,
            finished_at=None if status == "running" else now(),
        )
        if status == "failed":
            row.error_type, row.error_message = "ENGINE_ERROR", "The infrastructure refused."
            row.error_detail = "libvirt: internal words"
        session.add(row)
        session.flush()
        return row.operation_id


@pytest.fixture
def mine(session: Session) -> Tenant:
    tenant = Tenant(session, "Mine", AccountKind.CUSTOMER)
    session.commit()
    return tenant


@pytest.fixture
def other(session: Session) -> Tenant:
    tenant = Tenant(session, "Other", AccountKind.CUSTOMER)
    session.commit()
    return tenant


@pytest.fixture
def operator(session: Session) -> Tenant:
    tenant = Tenant(session, "Operator", AccountKind.OPERATOR)
    session.commit()
    return tenant


def uuids(http: TestClient, tenant: Tenant, query: str = "") -> list[UUID]:
    response = http.get(f"{PREFIX}{query}", headers=tenant.headers)
    assert response.status_code == 200, response.text
    return [UUID(row["uuid"]) for row in response.json()["data"]["data"]]


def test_detail_shows_the_failure_without_the_engines_words(http: TestClient, mine: Tenant) -> None:
    response = http.get(f"{PREFIX}/{mine.operation_ids[2]}", headers=mine.headers)
    assert response.status_code == 200
    data = response.json()["data"]
    assert set(data) == {
        "uuid", "kind", "status", "resource", "step", "percent", "error",
        "created_at", "started_at", "finished_at",
    }  # fmt: skip
    assert data["kind"] == "house.raze"
    assert data["status"] == "failed"
    assert data["resource"] == {"kind": "instance", "uuid": str(mine.resource_id)}
    assert data["error"] == {"type": "ENGINE_ERROR", "message": "The infrastructure refused."}
    assert data["created_at"].endswith("Z")
    assert "internal words" not in response.text


def test_running_has_no_error_and_no_end(http: TestClient, mine: Tenant) -> None:
    data = http.get(f"{PREFIX}/{mine.operation_ids[1]}", headers=mine.headers).json()["data"]
    assert (data["error"], data["finished_at"], data["percent"]) == (None, None, 40)


def test_list_is_newest_first_in_pages(http: TestClient, mine: Tenant, other: Tenant) -> None:
    assert uuids(http, mine) == mine.operation_ids[::-1]
    assert uuids(http, mine, "?limit=2&page=2") == [mine.operation_ids[0]]
    assert uuids(http, mine, "?limit=2&page=9") == []
    page = http.get(f"{PREFIX}?limit=2", headers=mine.headers).json()["data"]["page"]
    assert page == {
        "total": 3, "count": 2, "per_page": 2, "current_page": 1, "total_pages": 2,
    }  # fmt: skip


def test_filters(http: TestClient, mine: Tenant, other: Tenant) -> None:
    first, second, third = mine.operation_ids
    assert uuids(http, mine, "?status=running") == [second]
    assert uuids(http, mine, "?kind=house.build") == [second, first]
    assert uuids(http, mine, f"?resource={mine.resource_id}") == [third, first]
    assert uuids(http, mine, f"?resource={other.resource_id}") == []


@pytest.mark.parametrize("query", ["?status=lost", "?resource=1", "?limit=0", "?page=0", "?x=1"])
def test_bad_filters_are_refused(http: TestClient, mine: Tenant, query: str) -> None:
    response = http.get(f"{PREFIX}{query}", headers=mine.headers)
    assert (response.status_code, response.json()["type"]) == (422, "VALIDATION_ERROR")


def test_anothers_and_an_unknown_operation_are_answered_alike(
    http: TestClient, mine: Tenant, other: Tenant
) -> None:
    answers = [
        http.get(f"{PREFIX}/{uuid}", headers=mine.headers)
        for uuid in (other.operation_ids[0], uuid4())
    ]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].json() == answers[1].json()


def test_without_a_key(http: TestClient, mine: Tenant) -> None:
    assert http.get(PREFIX).status_code == 401
    assert http.get(f"{PREFIX}/{mine.operation_ids[0]}").status_code == 401


def test_the_operator_sees_everyones(http: TestClient, mine: Tenant, operator: Tenant) -> None:
    assert set(mine.operation_ids) <= set(uuids(http, operator))
    uuid = mine.operation_ids[0]
    assert http.get(f"{PREFIX}/{uuid}", headers=operator.headers).status_code == 200
