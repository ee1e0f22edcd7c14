"""Idempotency-Key: one effect and one answer, however often and however parallel a call is sent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from awan.accounts import forget_old_answers
from awan.accounts.models import IdempotencyKey, Quota
from awan.kit.clock import now
from awan.resources import Resource
from tests.support import probe_app
from tests.support.tenants import make_tenant

CONFLICT = (409, "IDEMPOTENCY_CONFLICT")


def kind(answer: Any) -> tuple[int, str]:
    """Status and type of an error."""
    return answer.status_code, answer.json()["type"]


def count(session: Session) -> int:
    """How many things there are."""
    session.rollback()
    return session.scalar(select(func.count()).select_from(Resource)) or 0


def test_a_repeat_gets_the_same_answer(probe: TestClient, session: Session) -> None:
    headers = {**make_tenant().headers, "Idempotency-Key": "k-1"}
    first = probe.post("/instances", headers=headers, json={"name": "x"})
    again = probe.post("/instances", headers=headers, data={"name": "x"})
    assert first.status_code == again.status_code == 202
    assert first.json() == again.json()
    assert count(session) == 1


def test_without_the_header_each_call_counts(probe: TestClient, session: Session) -> None:
    headers = make_tenant().headers
    assert probe.post("/instances", headers=headers, json={"name": "x"}).status_code == 202
    assert probe.post("/instances", headers=headers, json={"name": "x"}).status_code == 422
    assert probe.post("/instances", headers=headers, json={"name": "y"}).status_code == 202
    assert count(session) == 2


def test_another_call_under_the_same_key(probe: TestClient, session: Session) -> None:
    headers = {**make_tenant().headers, "Idempotency-Key": "k"}
    probe.post("/instances", headers=headers, json={"name": "x"})
    for body in ({"name": "y"}, {"name": "x", "password": "p"}, {"name": "x", "waits": False}):
        assert kind(probe.post("/instances", headers=headers, json=body)) == CONFLICT
    assert count(session) == 1


def test_accounts_have_their_own_keys(probe: TestClient, session: Session) -> None:
    for name in "ab":
        headers = {**make_tenant(name).headers, "Idempotency-Key": "k"}
        assert probe.post("/instances", headers=headers, json={"name": "x"}).status_code == 202
    assert count(session) == 2


def test_a_refused_call_is_not_remembered(probe: TestClient, session: Session) -> None:
    tenant = make_tenant(quotas={"instances": 0})
    headers = {**tenant.headers, "Idempotency-Key": "k"}
    assert kind(probe.post("/instances", headers=headers, json={"name": "x"})) == (
        403,
        "QUOTA_EXCEEDED",
    )
    session.execute(update(Quota).values(instances_max=1))
    session.commit()
    assert probe.post("/instances", headers=headers, json={"name": "x"}).status_code == 202


def test_malformed_keys(probe: TestClient) -> None:
    for key in ("", "x" * 256, "é"):
        headers = {**make_tenant().headers, "Idempotency-Key": key.encode()}
        answer = probe.post("/instances", headers=headers, json={"name": "x"})
        assert kind(answer) == (422, "VALIDATION_ERROR"), key
        assert list(answer.json()["errors"]) == ["Idempotency-Key"]


def test_while_in_flight(probe: TestClient, session: Session) -> None:
    headers = {**make_tenant().headers, "Idempotency-Key": "k"}
    body = {"name": "x", "waits": True}
    probe_app.entered.clear()
    probe_app.proceed.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(probe.post, "/instances", headers=headers, json=body)
        assert probe_app.entered.wait(10)
        answer = probe.post("/instances", headers=headers, json=body)
        assert kind(answer) == CONFLICT
        assert answer.headers["retry-after"] == "1"
        probe_app.proceed.set()
        assert first.result().status_code == 202
    assert probe.post("/instances", headers=headers, json=body).json() == first.result().json()
    assert count(session) == 1


def test_a_hundred_parallel_calls_have_one_effect(probe: TestClient, session: Session) -> None:
    headers = {**make_tenant().headers, "Idempotency-Key": "k"}
    with ThreadPoolExecutor(32) as pool:
        calls = [
            pool.submit(probe.post, "/instances", headers=headers, json={"name": "x"})
            for _ in range(100)
        ]
        answers = [call.result() for call in calls]
    assert {answer.status_code for answer in answers} <= {202, 409}
    made = {answer.json()["data"]["uuid"] for answer in answers if answer.status_code == 202}
    assert len(made) == 1
    assert count(session) == 1
    assert session.scalar(select(Quota.instances_used)) == 1


def test_two_hundred_parallel_creates_against_a_quota_of_five(
    probe: TestClient, session: Session
) -> None:
    headers = make_tenant(quotas={"instances": 5}).headers
    with ThreadPoolExecutor(32) as pool:
        calls = [
            pool.submit(probe.post, "/instances", headers=headers, json={"name": f"x{n}"})
            for n in range(200)
        ]
        answers = [call.result() for call in calls]
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(202), statuses.count(403)) == (5, 195)
    assert count(session) == 5


def test_after_a_day_a_key_is_free(probe: TestClient, session: Session) -> None:
    headers = {**make_tenant().headers, "Idempotency-Key": "k"}
    probe.post("/instances", headers=headers, json={"name": "x"})
    assert forget_old_answers(session) == 0
    session.execute(update(IdempotencyKey).values(created_at=now() - timedelta(hours=25)))
    session.commit()
    assert probe.post("/instances", headers=headers, json={"name": "y"}).status_code == 202
    assert count(session) == 2
    session.execute(update(IdempotencyKey).values(created_at=now() - timedelta(hours=25)))
    assert forget_old_answers(session) == 1


def test_what_is_kept_holds_no_body(probe: TestClient, session: Session) -> None:
    headers = {**make_tenant().headers, "Idempotency-Key": "k"}
    probe.post("/instances", headers=headers, json={"name": "x", "password": "marker"})
    row = session.scalars(select(IdempotencyKey)).one()
    assert "marker" not in str(vars(row))
