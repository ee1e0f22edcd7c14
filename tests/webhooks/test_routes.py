"""`/webhooks` over HTTP: fields, refusals, secrets shown once, and whose they are."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from awan.kit.database import transaction
from awan.webhooks.service import ENDPOINTS_MAX
from tests.support.changed_settings import changed_settings
from tests.support.simulated_cloud import make_customer
from tests.support.webhook_deliveries import first_delivery
from tests.webhooks.conftest import Site

URL = "https://example.com/hooks?a=b"


def test_a_secret_is_shown_once(site: Site) -> None:
    headers = {"Idempotency-Key": "k"}
    created = site.http.post("/webhooks", json={"url": URL}, headers=headers)
    secret = created.json()["data"]["secret"]
    assert secret.startswith("whsec_")
    again = site.http.post("/webhooks", json={"url": URL}, headers=headers)
    assert again.json()["data"] == {**created.json()["data"], "secret": None}
    path = f"/webhooks/{created.json()['data']['uuid']}"
    shown = [
        site.http.get("/webhooks"),
        site.http.get(path),
        site.http.patch(path, json={"description": "x"}),
        site.http.get("/account/events"),
    ]
    rotated = site.http.post(f"{path}/rotate-secret", headers={"Idempotency-Key": "r"})
    repeated = site.http.post(f"{path}/rotate-secret", headers={"Idempotency-Key": "r"})
    assert rotated.json()["data"]["secret"] not in (None, secret)
    assert repeated.json()["data"]["secret"] is None
    assert [secret in answer.text for answer in [*shown, rotated, repeated]] == [False] * 6
    assert len(site.http.get("/webhooks").json()["data"]) == 1
    with transaction() as session:
        stored = session.execute(text("SELECT ciphertext FROM secret")).scalars().all()
        rows = session.scalar(text("SELECT string_agg(e::text, '') FROM webhook_endpoint e"))
    assert len(stored) == 2
    assert all(secret.encode() not in one for one in stored)
    assert secret not in rows


def test_fields_and_their_changes(site: Site) -> None:
    webhook = site.add(URL)
    assert (webhook["event_types"], webhook["is_enabled"], webhook["description"]) == (
        ["*"],
        True,
        "",
    )
    path = f"/webhooks/{webhook['uuid']}"
    changes: dict[str, Any] = {
        "url": "https://example.org/",
        "event_types": ["instance.*"],
        "description": "d",
        "is_enabled": False,
    }
    changed = site.http.patch(path, json=changes).json()["data"]
    assert {name: changed[name] for name in changes} == changes
    kinds = [row["kind"] for row in site.http.get("/account/events").json()["data"]]
    assert kinds[:2] == ["webhook.changed", "webhook.created"]
    assert site.http.delete(path).status_code == 200
    assert site.http.delete(path).status_code == 404


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("event_types", []),
        ("event_types", ["instance"]),
        ("event_types", ["*.created"]),
        ("event_types", ["Instance.created"]),
        ("event_types", ["bogus.event"]),
        ("event_types", ["*", "bogus.*"]),
        ("event_types", ["instance.noted"]),
        ("event_types", ["node.*"]),
        ("description", "x" * 201),
        ("url", "https://10.0.0.1/"),
        ("url", "ftp://example.com/"),
        ("url", "x"),
    ],
)
def test_bad_fields(site: Site, field: str, value: Any) -> None:
    answer = site.http.post("/webhooks", json={"url": URL, field: value})
    assert answer.status_code == 422, answer.text
    assert [name.partition(".")[0].partition("[")[0] for name in answer.json()["errors"]] == [field]


def test_local_names_are_refused_at_once(site: Site) -> None:
    """As addresses are, and not only when the first message is sent."""
    with changed_settings(outbound_allowed_networks="[]"):
        answers = [
            site.http.post("/webhooks", json={"url": f"https://{host}/h"})
            for host in ("localhost", "a.localhost", "intranet", "127.0.0.1")
        ]
    assert [answer.status_code for answer in answers] == [422] * 4
    assert {
        answer.json()["errors"]["url"][0].partition(" not allowed")[0] for answer in answers
    } == {
        "The name of the host is",
        "The address of the host is",
    }


def test_how_many(site: Site) -> None:
    for _ in range(ENDPOINTS_MAX):
        site.add(URL)
    refused = site.http.post("/webhooks", json={"url": URL})
    assert (refused.status_code, refused.json()["type"]) == (403, "QUOTA_EXCEEDED")


def test_a_delivery_is_found_under_its_own_webhook_only(site: Site) -> None:
    mine, other = site.add(URL), site.add(URL)
    delivery = first_delivery(site.http, mine["uuid"])
    stranger = make_customer("Stranger").http
    theirs = stranger.post("/webhooks", json={"url": URL}).json()["data"]
    answers = [
        site.http.get(f"/webhooks/{other['uuid']}/deliveries/{delivery}"),
        stranger.get(f"/webhooks/{theirs['uuid']}/deliveries/{delivery}"),
        stranger.post(f"/webhooks/{theirs['uuid']}/deliveries/{delivery}/replay"),
        stranger.get(f"/webhooks/{theirs['uuid']}/deliveries/{mine['uuid']}"),
    ]
    assert {(answer.status_code, answer.text) for answer in answers} == {
        (404, '{"type":"NOT_FOUND","message":"Delivery not found."}')
    }
    assert site.http.get(f"/webhooks/{mine['uuid']}/deliveries/{delivery}").status_code == 200
