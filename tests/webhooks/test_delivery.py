"""Webhooks to a real receiver: signed, repeated until taken, never lost, never in anybody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, text

from awan.events import Event
from awan.kit import outbound
from awan.kit.clock import now
from awan.kit.database import get_engine, transaction
from awan.kit.outbound import read_retry_after
from awan.settings import get_settings
from awan.webhooks import deliveries, sender
from awan.webhooks.models import WebhookEndpoint
from awan.webhooks.rules import RETRIES_S
from tests.support.event_horizon import wait_for_horizon
from tests.support.statements import recorded
from tests.support.webhook_deliveries import fan_out_all, first_delivery
from tests.webhooks.conftest import Site
from tests.webhooks.receiver import WAIT_S, Receiver


def test_an_event_arrives_signed(site: Site, receiver: Receiver) -> None:
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    site.until(lambda: receiver.received)
    [received] = receiver.wait_for(1)
    assert received.is_signed_with(webhook["secret"])
    assert not received.is_signed_with("whsec_" + "A" * 43 + "=")
    assert received.headers["content-type"] == "application/json"
    assert received.headers["host"] == receiver.url.split("/")[2]
    event = site.http.get("/account/events").json()["data"][0]
    assert received.json == {
        "type": "firewall.applied",
        "timestamp": event["created_at"],
        "data": event,
    }
    detail = site.until_attempted(webhook)
    assert (detail["state"], detail["attempts"], detail["next_attempt_at"]) == (
        "delivered",
        1,
        None,
    )
    assert detail["message_id"] == received.id
    assert [(row["status"], row["error"]) for row in detail["log"]] == [(204, None)]


def test_only_what_is_wanted_and_only_once(site: Site, receiver: Receiver) -> None:
    site.add(receiver.url, event_types=["firewall.*", "ssh_key.created"])
    other = site.add(f"{receiver.url}/all")
    kinds = ("firewall.applied", "firewall.pending", "firewall_group.applied")
    for kind in (*kinds, "ssh_key.created", "ssh_key.deleted"):
        site.record(kind)
    site.until(lambda: len(site.deliveries(other, state="delivered")) == 6)
    some = sorted(r.json["type"] for r in receiver.received if r.path == "/hook")
    assert some == ["firewall.applied", "firewall.pending", "ssh_key.created"]
    everything = [r for r in receiver.received if r.path == "/hook/all"]
    assert sorted(r.json["type"] for r in everything) == [
        *kinds,
        *("ssh_key.created", "ssh_key.deleted", "webhook.created"),
    ]
    assert len({r.id for r in receiver.received}) == len(receiver.received)


def test_nothing_of_before_nor_of_others(site: Site, receiver: Receiver) -> None:
    from tests.support.simulated_cloud import make_customer

    site.record("firewall.rule_created")
    stranger = make_customer("Stranger")
    webhook = site.add(receiver.url)
    Site(stranger.account_id, stranger.http).record("firewall.rule_deleted")
    site.record("firewall.rule_changed")
    site.until(lambda: len(site.deliveries(webhook, state="delivered")) == 2)
    assert {r.json["type"] for r in receiver.received} == {
        "webhook.created",
        "firewall.rule_changed",
    }


def test_an_older_transaction_that_commits_later_is_sent_too(
    site: Site, receiver: Receiver
) -> None:
    from sqlalchemy.orm import Session

    from awan import events

    webhook = site.add(receiver.url, event_types=["firewall.*"])
    with Session(get_engine()) as early:
        events.record(
            early, kind="firewall.rule_enabled", actor="key:a", account_id=site.account_id
        )
        site.record("firewall.rule_disabled")
        for _ in range(3):
            sender.deliver_due()
        assert site.deliveries(webhook) == []
        early.commit()
    site.until(lambda: len(site.deliveries(webhook, state="delivered")) == 2)
    assert {r.json["type"] for r in receiver.received} == {
        "firewall.rule_enabled",
        "firewall.rule_disabled",
    }


def test_the_log_is_read_from_the_cursor_on(site: Site, receiver: Receiver) -> None:
    """Once a second: the events of years must not be walked through."""
    site.add(receiver.url)
    with transaction() as session:
        session.execute(text("SET LOCAL enable_seqscan = off"))
        asked = {"most": 10, "test_kind": "webhook.test"}
        rows = session.execute(text(f"EXPLAIN {deliveries._FAN_OUT}"), asked).scalars()
        assert "Index Cond: ((ROW(xid, event_id) > ROW(" in "\n".join(rows)


def test_refused_and_tried_again_under_the_same_id(site: Site, receiver: Receiver) -> None:
    statuses = iter([500, 302, 404, 200])
    receiver.answer = lambda _: next(statuses)
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    for attempt in range(1, 5):
        detail = site.until_attempted(webhook, attempt)
        if attempt < 4:
            assert detail["state"] == "pending"
            wait = deliveries.retry_delay_s(attempt)
            with transaction() as session:
                left = session.scalar(
                    text(
                        "SELECT extract(epoch FROM next_attempt_at - now())::float8"
                        " FROM webhook_delivery"
                    )
                )
            assert wait is not None
            assert wait * 0.5 < left <= wait * 1.1 or wait < 10
            sender.deliver_due()
            assert len(receiver.received) == attempt, "sent before its time"
            site.make_due()
    assert detail["state"] == "delivered"
    assert [row["status"] for row in detail["log"]] == [200, 404, 302, 500]
    assert {r.id for r in receiver.received} == {detail["message_id"]}
    assert {r.path for r in receiver.received} == {"/hook"}, "a redirect was followed"
    assert len({r.body for r in receiver.received}) == 1
    assert all(r.is_signed_with(webhook["secret"]) for r in receiver.received)


def test_nobody_listens(site: Site) -> None:
    with Receiver() as gone:
        url = gone.url
    webhook = site.add(url, event_types=["firewall.applied"])
    site.record()
    detail = site.until_attempted(webhook)
    assert detail["state"] == "pending"
    assert [(r["status"], r["error"]) for r in detail["log"]] == [(None, "The connection failed.")]


def count_waiting() -> int:
    """Transactions that are open and do nothing."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()"
    )
    time.sleep(0.02)
    with get_engine().connect() as connection:
        return connection.scalar(text(query)) or 0


def test_a_hanging_receiver_is_given_up_and_holds_up_nobody(
    site: Site, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "TOTAL_MAX_S", 3.0)
    let_go = threading.Event()

    def hang(_: object) -> int:
        let_go.wait(WAIT_S)
        return 200

    with Receiver(answer=hang) as hanging:
        slow = site.add(hanging.url, event_types=["firewall.applied"])
        site.add(receiver.url, event_types=["firewall.applied"])
        site.record(count=6)
        site.until(lambda: len(hanging.received) >= deliveries.IN_FLIGHT_PER_ENDPOINT)
        site.until(lambda: len(receiver.received) == 6)
        # No transaction waits with the receiver; between two of its statements one may be seen for a moment.
        assert min(count_waiting() for _ in range(20)) == 0
        detail = site.until(
            lambda: next(
                (
                    found
                    for row in site.deliveries(slow)
                    if (found := site.delivery(slow, row["uuid"]))["log"]
                ),
                None,
            )
        )
        assert detail["log"][0]["error"] == "There was no answer in time."
        assert detail["log"][0]["status"] is None
        site.http.patch(f"/webhooks/{slow['uuid']}", json={"is_enabled": False})
        let_go.set()


def test_an_answer_without_end_is_not_read(site: Site) -> None:
    """Only the status counts: a receiver that sends for ever does not hold the sender."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:

        def pour() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n")
                try:
                    while True:
                        connection.sendall(b"x" * 65536)
                except OSError:
                    pass

        threading.Thread(target=pour, daemon=True).start()
        webhook = site.add(
            f"http://127.0.0.1:{server.getsockname()[1]}/", event_types=["firewall.applied"]
        )
        site.record()
        assert site.until_attempted(webhook)["state"] == "delivered"


def test_a_sender_that_dies_after_sending_sends_again_under_the_same_id(
    site: Site, receiver: Receiver
) -> None:
    hang = threading.Event()
    receiver.answer = lambda _: (hang.wait(WAIT_S), 200)[1]
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    code = "import time; from awan.webhooks.sender import deliver_due\nwhile True: deliver_due(); time.sleep(.05)"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    try:
        receiver.wait_for(1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    hang.set()
    assert sender.deliver_due() == 0, "the lease of the dead one still holds"
    [row] = site.deliveries(webhook)
    assert row["state"] == "pending"
    assert site.delivery(webhook, row["uuid"])["log"] == []
    site.make_due()
    detail = site.until_attempted(webhook)
    assert detail["state"] == "delivered"
    first, second = receiver.wait_for(2)
    assert first.id == second.id == detail["message_id"]
    assert first.body == second.body


def test_state_and_log_are_of_one_moment(site: Site, receiver: Receiver) -> None:
    """Who looks while an attempt is being recorded sees it in both or in neither: one statement, one snapshot."""
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    detail = site.until_attempted(webhook)
    with recorded(lambda context: "request_id" in context) as sent:
        assert site.delivery(webhook, detail["uuid"]) == detail
    [both] = [statement for statement in sent if "webhook_attempt" in statement]
    assert [statement for statement in sent if "webhook_delivery" in statement] == [both]


def test_a_late_failure_changes_nothing_of_its_successors_lease(
    site: Site, receiver: Receiver
) -> None:
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    fan_out_all()
    [first] = deliveries.claim(10)
    site.make_due()
    [second] = deliveries.claim(10)
    assert deliveries.prepare(first) is None
    deliveries.record_attempt(first, now(), outbound.Outcome(500, None, 1))
    assert deliveries.claim(10) == []
    assert deliveries.prepare(second) is not None
    deliveries.record_attempt(second, now(), outbound.Outcome(200, None, 1))
    detail = site.until_attempted(webhook, 2)
    assert (detail["state"], [row["status"] for row in detail["log"]]) == ("delivered", [200, 500])


def test_two_senders_never_lease_the_same(site: Site, receiver: Receiver) -> None:
    for number in range(4):
        site.add(f"{receiver.url}/{number}", event_types=["firewall.applied"])
    site.record(count=5)
    fan_out_all()
    with ThreadPoolExecutor(4) as pool:
        found = [lease for part in pool.map(deliveries.claim, [10] * 4) for lease in part]
    assert len(found) == len({lease.delivery_id for lease in found})
    assert 2 <= len(found) <= deliveries.IN_FLIGHT_PER_ACCOUNT + 6


def test_given_up_after_a_day_and_disabled(site: Site, receiver: Receiver) -> None:
    assert 20 * 3600 < sum(RETRIES_S) < 30 * 3600
    receiver.answer = lambda _: 500
    webhook = site.add(receiver.url, event_types=["firewall.applied", "webhook.*"])
    with transaction() as session:
        session.execute(text("UPDATE webhook_endpoint SET event_types = '{firewall.applied}'"))
    site.record()
    site.until_attempted(webhook)
    with transaction() as session:
        session.execute(text("UPDATE webhook_delivery SET attempts = :n"), {"n": len(RETRIES_S)})
    site.make_due()
    detail = site.until_attempted(webhook, 2)
    assert (detail["state"], detail["next_attempt_at"]) == ("failed", None)
    shown = site.http.get(f"/webhooks/{webhook['uuid']}").json()["data"]
    assert shown["is_enabled"] is False
    assert "about a day" in shown["disabled_reason"]
    event = site.http.get("/account/events").json()["data"][0]
    assert (event["kind"], event["resource_uuid"]) == ("webhook.disabled", webhook["uuid"])
    # Nothing more is sent, until it is enabled: then what happens from there on.
    site.record()
    wait_for_horizon()
    sender.deliver_due()
    assert len(site.deliveries(webhook)) == 1
    receiver.answer = lambda _: 200
    changed = site.http.patch(f"/webhooks/{webhook['uuid']}", json={"is_enabled": True})
    assert (changed.json()["data"]["is_enabled"], changed.json()["data"]["disabled_reason"]) == (
        True,
        None,
    )
    site.record()
    site.until(lambda: len(site.deliveries(webhook, state="delivered")) == 1)
    assert len(site.deliveries(webhook)) == 2


def test_one_bad_message_does_not_disable_a_receiver_that_takes_others(
    site: Site, receiver: Receiver
) -> None:
    receiver.answer = lambda received: 500 if received.json["type"] == "firewall.applied" else 200
    webhook = site.add(receiver.url, event_types=["firewall.applied", "ssh_key.created"])
    site.record()
    site.until_attempted(webhook)
    site.record("ssh_key.created")
    site.until(lambda: site.deliveries(webhook, state="delivered"))
    with transaction() as session:
        session.execute(
            text("UPDATE webhook_delivery SET attempts = :n WHERE state = 'pending'"),
            {"n": len(RETRIES_S)},
        )
    site.make_due()
    assert site.until_attempted(webhook, 2)["state"] == "failed"
    assert site.http.get(f"/webhooks/{webhook['uuid']}").json()["data"]["is_enabled"]


def test_gone_means_gone(site: Site, receiver: Receiver) -> None:
    receiver.answer = lambda _: 410
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    assert site.until_attempted(webhook)["state"] == "failed"
    shown = site.http.get(f"/webhooks/{webhook['uuid']}").json()["data"]
    assert (shown["is_enabled"], "410" in shown["disabled_reason"]) == (False, True)


def test_rotation_signs_with_both_for_a_day(site: Site, receiver: Receiver) -> None:
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    path = f"/webhooks/{webhook['uuid']}"
    rotated = site.http.post(f"{path}/rotate-secret").json()["data"]
    assert rotated["secret"] != webhook["secret"]
    assert rotated["old_secret_until"] is not None
    site.record()
    site.until(lambda: receiver.received)
    assert receiver.received[0].is_signed_with(rotated["secret"])
    assert receiver.received[0].is_signed_with(webhook["secret"])
    again = site.http.post(f"{path}/rotate-secret").json()["data"]
    site.record()
    site.until(lambda: len(receiver.received) == 2)
    signed = [
        receiver.received[1].is_signed_with(secret)
        for secret in (again["secret"], rotated["secret"], webhook["secret"])
    ]
    assert signed == [True, True, False]
    with transaction() as session:
        endpoint = session.scalars(select(WebhookEndpoint)).one()
        assert endpoint.old_secret_until is not None
        assert timedelta(hours=23) < endpoint.old_secret_until - now() <= timedelta(hours=24)
        endpoint.old_secret_until = now()
    site.record()
    site.until(lambda: len(receiver.received) == 3)
    assert receiver.received[2].is_signed_with(again["secret"])
    assert not receiver.received[2].is_signed_with(rotated["secret"])
    deliveries.forget_old()
    with transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM secret")) == 1


def test_replay_of_what_was_delivered(site: Site, receiver: Receiver) -> None:
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    delivered = site.until_attempted(webhook)
    path = f"/webhooks/{webhook['uuid']}/deliveries/{delivered['uuid']}/replay"
    answers = [site.http.post(path, headers={"Idempotency-Key": "r"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    detail = site.until_attempted(webhook, 2)
    assert detail["state"] == "delivered"
    first, second = receiver.wait_for(2)
    assert (first.id, first.body) == (second.id, second.body)
    site.http.patch(f"/webhooks/{webhook['uuid']}", json={"is_enabled": False})
    refused = site.http.post(path)
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")


def test_a_test_goes_to_its_webhook_only(site: Site, receiver: Receiver) -> None:
    """Whatever it wants; as any other message it is signed, logged, sent again, and can be replayed."""
    statuses = iter([500, 204, 204])
    receiver.answer = lambda _: next(statuses)
    webhook = site.add(receiver.url, event_types=["ssh_key.created"])
    other = site.add(f"{receiver.url}/all", event_types=["webhook.test", "firewall.*"])
    path = f"/webhooks/{webhook['uuid']}/test"
    answers = [site.http.post(path, headers={"Idempotency-Key": "t"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    begun = answers[0].json()["data"]
    assert (begun["kind"], begun["state"], begun["attempts"]) == ("webhook.test", "pending", 0)
    assert answers[1].json()["data"]["uuid"] == begun["uuid"]

    def attempts(number: int) -> dict[str, Any]:
        def find() -> dict[str, Any] | None:
            detail = site.delivery(webhook, begun["uuid"])
            return detail if len(detail["log"]) == number else None

        return dict(site.until(find))

    assert attempts(1)["state"] == "pending"
    site.make_due()
    assert attempts(2)["state"] == "delivered"
    site.http.post(f"/webhooks/{webhook['uuid']}/deliveries/{begun['uuid']}/replay")
    assert attempts(3)["state"] == "delivered"
    fan_out_all()
    assert site.deliveries(other) == []
    assert [row["uuid"] for row in site.deliveries(webhook)] == [begun["uuid"]]
    received = receiver.wait_for(3)
    assert {(r.path, r.id) for r in received} == {("/hook", begun["message_id"])}
    assert all(r.is_signed_with(webhook["secret"]) for r in received)
    event = received[0].json["data"]
    assert event in site.http.get("/account/events").json()["data"]
    assert (received[0].json["type"], event["resource_uuid"]) == ("webhook.test", webhook["uuid"])


def test_a_disabled_webhook_cannot_be_tried(site: Site, receiver: Receiver) -> None:
    webhook = site.add(receiver.url)
    site.http.patch(f"/webhooks/{webhook['uuid']}", json={"is_enabled": False})
    refused = site.http.post(f"/webhooks/{webhook['uuid']}/test")
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    kinds = [row["kind"] for row in site.http.get("/account/events").json()["data"]]
    assert "webhook.test" not in kinds


def test_deleted_means_silent(site: Site, receiver: Receiver) -> None:
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    first_delivery(site.http, webhook["uuid"])
    assert site.http.delete(f"/webhooks/{webhook['uuid']}").status_code == 200
    assert sender.deliver_due() == 0
    assert site.http.get(f"/webhooks/{webhook['uuid']}").status_code == 404
    with transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM secret")) == 0
        assert (
            session.scalar(text("SELECT string_agg(state, ',') FROM webhook_delivery")) == "failed"
        )


def test_a_closed_account_gets_nothing(site: Site, receiver: Receiver) -> None:
    site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    with transaction() as session:
        session.execute(text("UPDATE account SET state = 'closed'"))
    fan_out_all()
    assert deliveries.claim(10) == []


def test_a_suspended_account_gets_nothing_until_it_is_active_again(
    site: Site, receiver: Receiver
) -> None:
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record(count=2)
    fan_out_all()
    (leased,) = deliveries.claim(1)
    with transaction() as session:
        session.execute(text("UPDATE account SET state = 'suspended'"))
    assert deliveries.prepare(leased) is None, "also what was about to be sent"
    site.make_due()
    assert deliveries.claim(10) == []
    site.record(kind="firewall.applied")
    fan_out_all()
    assert len(site.deliveries(webhook)) == 2, "what happens meanwhile passes by"
    with transaction() as session:
        session.execute(text("UPDATE account SET state = 'active'"))
    site.until(lambda: len(receiver.received) == 2)
    assert len(site.deliveries(webhook)) == 2


@pytest.mark.parametrize(
    ("status", "asked", "least_s", "most_s"),
    [
        (503, "900", 890, 915),
        (429, "99999999", 4 * 3600 - 10, 4 * 3600 + 15),
        (503, "1", 3, 20),
        (503, "soon", 3, 20),
        (500, "900", 3, 20),
    ],
)
def test_a_busy_receiver_says_when_to_come_again(
    site: Site, receiver: Receiver, status: int, asked: str, least_s: float, most_s: float
) -> None:
    receiver.answer, receiver.retry_after = lambda _: status, asked
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    site.until_attempted(webhook)
    # From the attempt on, so that a slow test does not eat it up.
    query = (
        "SELECT extract(epoch FROM next_attempt_at - (SELECT max(started_at) FROM webhook_attempt))::float8"
        " FROM webhook_delivery"
    )
    with transaction() as session:
        left = session.scalar(text(query))
    assert least_s < left < most_s


def test_a_date_to_come_again() -> None:
    moment = datetime(2026, 11, 24, 12, tzinfo=UTC)
    assert read_retry_after("Tue, 24 Nov 2026 12:01:30 GMT", moment) == 90
    assert read_retry_after("Tue, 24 Nov 2026 11:00:00 GMT", moment) == 0
    for nonsense in ("", "-5", "1.5", "Tue, 24 Nov", "9" * 50, "Tue, 24 Nov 2026 12:01:30 -0000"):
        assert read_retry_after(nonsense, moment) is None


def test_old_deliveries_are_forgotten(site: Site, receiver: Receiver) -> None:
    webhook = site.add(receiver.url, event_types=["firewall.applied"])
    site.record()
    site.until_attempted(webhook)
    assert deliveries.forget_old() == 0
    with transaction() as session:
        session.execute(text("UPDATE webhook_delivery SET created_at = now() - interval '31 days'"))
    assert deliveries.forget_old() == 1
    with transaction() as session:
        assert session.scalar(text("SELECT count(*) FROM webhook_attempt")) == 0
        assert session.scalars(select(Event)).first() is not None
    # The event is not sent anew, though its delivery is gone.
    assert fan_out_all() == 0
    assert get_settings().outbound_allow_http
