"""API keys: made, shown once, bounded by their maker, revoked."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import ip_network
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from awan.accounts import KeyScope, init_operator
from awan.accounts.models import ApiKey
from awan.accounts.service import KEYS_PER_ACCOUNT_MAX
from awan.errors import Conflict
from awan.events import Event
from awan.kit.clock import iso, now
from awan.kit.database import transaction
from tests.support.tenants import make_tenant


def make(api: TestClient, headers: dict[str, str], **body: Any) -> Any:
    """Asks for a new key."""
    return api.post("/api-keys", headers=headers, json={"name": "new", **body})


def test_a_key_is_shown_once(api: TestClient) -> None:
    headers = {**make_tenant().headers, "Idempotency-Key": "k"}
    made = make(api, headers)
    assert made.status_code == 201
    key = made.json()["data"]["key"]
    listed = api.get("/api-keys", headers={"x-apikey": key})
    assert [row["name"] for row in listed.json()["data"]] == ["test", "new"]
    assert key not in listed.text
    again = make(api, headers)
    assert (again.status_code, again.json()["data"]["key"]) == (201, None)
    assert again.json()["data"]["id"] == made.json()["data"]["id"]


def test_a_revoked_key_ends_at_once(api: TestClient, session: Session) -> None:
    headers = make_tenant().headers
    made = make(api, headers, scope="read").json()["data"]
    mine = {"x-apikey": made["key"]}
    assert api.get("/account", headers=mine).json()["data"]["api_key"]["scope"] == "read"
    answer = api.delete(f"/api-keys/{made['id']}", headers=headers)
    assert answer.json()["message"] == "API key successfully revoked"
    assert api.get("/account", headers=mine).status_code == 401
    assert api.delete(f"/api-keys/{made['id']}", headers=headers).status_code == 404
    kinds = session.scalars(select(Event.kind).order_by(Event.event_id)).all()
    assert kinds[-2:] == ["api_key.created", "api_key.revoked"]


def test_other_accounts_keys(api: TestClient) -> None:
    mine, other = make_tenant("a"), make_tenant("b")
    key_id = make(api, mine.headers).json()["data"]["id"]
    answers = [
        api.delete(f"/api-keys/{name}", headers=other.headers) for name in (key_id, "0" * 16)
    ]
    assert {answer.status_code for answer in answers} == {404}
    assert answers[0].text == answers[1].text
    assert api.delete("/api-keys/no%00key", headers=mine.headers).status_code == 404


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("name", value) for value in ("", " ", "x" * 65, " x", 5, None)],
        *[("scope", value) for value in ("admin", "READ", 1)],
        *[("expires_at", value) for value in ("2020-01-01T00:00:00Z", "2099-01-01", 1, "soon")],
        *[("allowed_cidrs", value) for value in (["x"], ["10.0.0.1/8"], [], "10.0.0.0/8", [1])],
        ("reads_per_minute", 5),
        ("account_id", "x"),
    ],
)
def test_wrong_fields(api: TestClient, field: str, value: Any) -> None:
    answer = make(api, make_tenant().headers, **{field: value})
    assert answer.status_code == 422, answer.text
    assert all(name.startswith(field) for name in answer.json()["errors"])


def test_a_name_that_is_too_long_is_told_its_characters(api: TestClient) -> None:
    answer = make(api, make_tenant().headers, name="x" * 65)
    assert answer.json()["errors"] == {"name": ["The name must have 64 characters or fewer."]}


def test_a_key_makes_no_stronger_key(api: TestClient, session: Session) -> None:
    ends_at = now() + timedelta(days=1)
    bound = make_tenant(allowed_cidrs=[ip_network("127.0.0.0/8")], reads_per_minute=77)
    session.execute(update(ApiKey).values(expires_at=ends_at))
    session.commit()
    client = TestClient(api.app, base_url="http://api.test/api/v1", client=("127.0.0.1", 1))
    inside = {"expires_at": iso(ends_at), "allowed_cidrs": ["127.1.0.0/16"]}
    assert make(client, bound.headers).json()["errors"].keys() == {"expires_at"}
    for body in (
        {"expires_at": iso(ends_at + timedelta(seconds=2))},
        {"expires_at": iso(ends_at)},
        {"expires_at": iso(ends_at), "allowed_cidrs": ["0.0.0.0/0"]},
        {"expires_at": iso(ends_at), "allowed_cidrs": ["127.1.0.0/16", "::1/128"]},
    ):
        assert make(client, bound.headers, **body).status_code == 422
    made = make(client, bound.headers, **inside)
    assert made.status_code == 201, made.text
    assert made.json()["data"]["reads_per_minute"] == 77
    reader = make_tenant("r", scope=KeyScope.READ)
    assert make(api, reader.headers, scope="read").status_code == 403


def test_keys_are_counted(api: TestClient) -> None:
    headers = make_tenant().headers
    for _ in range(KEYS_PER_ACCOUNT_MAX - 1):
        assert make(api, headers).status_code == 201
    answer = make(api, headers)
    assert (answer.status_code, answer.json()["type"]) == (403, "QUOTA_EXCEEDED")


def test_the_first_operator_key(api: TestClient, session: Session) -> None:
    with transaction() as own:
        key = init_operator(own)
    assert api.get("/admin/accounts", headers={"x-apikey": key}).status_code == 200
    with pytest.raises(Conflict), transaction() as own:
        init_operator(own)
    # The last usable key stays.
    key_id = key.split("_")[1]
    answer = api.delete(f"/api-keys/{key_id}", headers={"x-apikey": key})
    assert (answer.status_code, answer.json()["type"]) == (409, "INVALID_OPERATION")
    make(api, {"x-apikey": key})
    assert api.delete(f"/api-keys/{key_id}", headers={"x-apikey": key}).status_code == 200
