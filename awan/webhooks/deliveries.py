"""What is to be sent, by whom, and what became of it. None of the transactions is open while a receiver is called."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from pydantic_core import to_json
from sqlalchemy import delete, func, select, text
from sqlalchemy.orm import Session

from awan.accounts.models import Account, AccountState
from awan.events import Event
from awan.events.schemas import EventView
from awan.kit.clock import iso, now
from awan.kit.database import transaction
from awan.kit.outbound import Outcome
from awan.kit.secrets import delete_secret
from awan.webhooks import service
from awan.webhooks.models import DeliveryState, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from awan.webhooks.rules import (
    GONE,
    JITTER,
    TEST_KIND,
    asked_delay_s,
    is_success,
    retry_delay_s,
    signature,
)
from awan.webhooks.schemas import message_id

FAN_OUT_EVENTS = 1000
# Longer than an attempt can take, with the time to record it.
LEASE_S = 60
IN_FLIGHT_PER_ENDPOINT = 2
IN_FLIGHT_PER_ACCOUNT = 8
KEPT_DAYS = 30
FORGET_BATCH = 1000

# One statement, one snapshot: what it takes from the log, and how far the cursor moves, agree. Events are complete
# below the oldest running transaction (see `events.follow`). SKIP LOCKED: another worker is at it. Subselects, not a
# join: only they become a condition of the index. A test has its delivery already, and is nobody else's.
_FAN_OUT = text(
    """
    WITH cursor AS (
        SELECT xid, event_id FROM webhook_cursor FOR UPDATE SKIP LOCKED
    ), batch AS MATERIALIZED (
        SELECT event.xid, event.event_id, event.account_id, event.kind FROM event
        WHERE (event.xid, event.event_id) > ((SELECT xid FROM cursor), (SELECT event_id FROM cursor))
            AND event.xid < pg_snapshot_xmin(pg_current_snapshot())
        ORDER BY event.xid, event.event_id LIMIT :most
    ), made AS (
        INSERT INTO webhook_delivery (delivery_id, endpoint_id, account_id, event_id, kind)
        SELECT gen_random_uuid(), endpoint.endpoint_id, endpoint.account_id, batch.event_id, batch.kind
        FROM batch JOIN webhook_endpoint AS endpoint ON endpoint.account_id = batch.account_id
        JOIN account ON account.account_id = endpoint.account_id AND account.state = 'active'
        WHERE endpoint.is_enabled AND endpoint.deleted_at IS NULL AND batch.xid >= endpoint.from_xid
            AND batch.kind <> :test_kind
            AND endpoint.event_types && ARRAY['*', batch.kind, split_part(batch.kind, '.', 1) || '.*']
        ON CONFLICT (endpoint_id, event_id) DO NOTHING
    ), last AS (
        SELECT xid, event_id FROM batch ORDER BY xid DESC, event_id DESC LIMIT 1
    ), moved AS (
        UPDATE webhook_cursor SET xid = last.xid, event_id = last.event_id FROM last
    )
    SELECT count(*) FROM batch
    """
)

# A hanging receiver takes a few places of its account at most; the rest of them is for others.
_CLAIM = text(
    """
    WITH busy AS (
        SELECT account_id, endpoint_id, count(*) AS number FROM webhook_delivery
        WHERE lease_id IS NOT NULL AND state = 'pending' AND next_attempt_at > now()
        GROUP BY account_id, endpoint_id
    ), candidate AS (
        SELECT due.delivery_id, due.next_attempt_at, endpoint.account_id,
            row_number() OVER (PARTITION BY endpoint.account_id ORDER BY due.next_attempt_at)
                + coalesce((SELECT sum(number) FROM busy WHERE busy.account_id = endpoint.account_id), 0) AS place
        FROM webhook_endpoint AS endpoint
        JOIN account ON account.account_id = endpoint.account_id AND account.state = 'active'
        CROSS JOIN LATERAL (
            SELECT delivery_id, next_attempt_at FROM webhook_delivery AS delivery
            WHERE delivery.endpoint_id = endpoint.endpoint_id AND state = 'pending' AND next_attempt_at <= now()
            ORDER BY next_attempt_at
            LIMIT greatest(0, :per_endpoint - coalesce(
                (SELECT number FROM busy WHERE busy.endpoint_id = endpoint.endpoint_id), 0))
        ) AS due
        WHERE endpoint.is_enabled AND endpoint.deleted_at IS NULL
    ), wanted AS (
        SELECT delivery_id FROM candidate WHERE place <= :per_account ORDER BY next_attempt_at LIMIT :most
    ), mine AS (
        SELECT delivery_id FROM webhook_delivery
        WHERE delivery_id IN (SELECT delivery_id FROM wanted) AND state = 'pending' AND next_attempt_at <= now()
        FOR UPDATE SKIP LOCKED
    )
    UPDATE webhook_delivery AS delivery
    SET lease_id = gen_random_uuid(), attempts = attempts + 1,
        next_attempt_at = now() + make_interval(secs => :lease_s)
    FROM mine WHERE delivery.delivery_id = mine.delivery_id
    RETURNING delivery.delivery_id, delivery.lease_id
    """
)


@dataclass(frozen=True)
class Lease:
    """The right to send a delivery for a while."""

    delivery_id: UUID
    lease_id: UUID


@dataclass(frozen=True)
class Message:
    """What is posted where."""

    url: str
    body: bytes
    headers: dict[str, str]


def fan_out() -> int:
    """Makes deliveries of the next events, each once for every endpoint that wants it; gives the number of events."""
    with transaction() as session:
        asked = {"most": FAN_OUT_EVENTS, "test_kind": TEST_KIND}
        return int(session.scalar(_FAN_OUT, asked) or 0)


def claim(most: int) -> list[Lease]:
    """Leases at most so many deliveries that are due. A lease that runs out leaves its delivery due again."""
    with transaction() as session:
        rows = session.execute(
            _CLAIM,
            {
                "most": most,
                "per_endpoint": IN_FLIGHT_PER_ENDPOINT,
                "per_account": IN_FLIGHT_PER_ACCOUNT,
                "lease_s": LEASE_S,
            },
        )
        return [Lease(row.delivery_id, row.lease_id) for row in rows]


def prepare(lease: Lease) -> Message | None:
    """The message of a leased delivery, signed now; None when it is not to be sent any more."""
    with transaction() as session:
        delivery = session.get_one(WebhookDelivery, lease.delivery_id)
        endpoint = session.get_one(WebhookEndpoint, delivery.endpoint_id)
        account = session.get_one(Account, endpoint.account_id)
        is_wanted = endpoint.is_enabled and account.state == AccountState.ACTIVE
        if delivery.lease_id != lease.lease_id or not is_wanted:
            return None
        body = message_body(session.get_one(Event, delivery.event_id))
        secrets = service.signing_secrets(session, endpoint)
        url = endpoint.url
    message, timestamp = message_id(lease.delivery_id), int(now().timestamp())
    return Message(
        url,
        body,
        {
            "content-type": "application/json",
            "user-agent": "Awan-Webhooks/1",
            "webhook-id": message,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(secrets, message, timestamp, body),
        },
    )


def message_body(event: Event) -> bytes:
    """The event as every attempt sends it: `type`, `timestamp`, and the event as the API shows it in `data`."""
    view = EventView.of(event)
    return to_json({"type": event.kind, "timestamp": iso(event.created_at), "data": view})


def record_attempt(lease: Lease, started_at: datetime, outcome: Outcome) -> None:
    """Writes the attempt down and what follows from it: delivered, another attempt later, or given up.

    A failure whose lease was lost is only logged: whoever has the lease now goes on. A message that is given up, with
    nothing received since its first attempt, disables its endpoint; so does the answer 410 (Gone), at once.
    """
    with transaction() as session:
        endpoint_id = session.scalar(
            select(WebhookDelivery.endpoint_id).where(
                WebhookDelivery.delivery_id == lease.delivery_id
            )
        )
        if endpoint_id is None:
            return
        endpoint = session.get_one(WebhookEndpoint, endpoint_id, with_for_update=True)
        delivery = session.get_one(WebhookDelivery, lease.delivery_id, with_for_update=True)
        session.add(
            WebhookAttempt(
                delivery_id=delivery.delivery_id,
                started_at=started_at,
                duration_ms=outcome.duration_ms,
                status=outcome.status,
                error=outcome.error,
            )
        )
        if is_success(outcome.status):
            delivery.state, delivery.finished_at, delivery.lease_id = (
                DeliveryState.DELIVERED,
                now(),
                None,
            )
            endpoint.last_success_at = now()
        elif delivery.lease_id == lease.lease_id:
            _follow_failure(session, endpoint, delivery, outcome)


def _follow_failure(
    session: Session, endpoint: WebhookEndpoint, delivery: WebhookDelivery, outcome: Outcome
) -> None:
    delivery.lease_id = None
    delay_s = None if outcome.status == GONE else retry_delay_s(delivery.attempts)
    if delay_s is not None:
        # Spread, so that a receiver that comes back is not met by all of its messages at once.
        spread = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret
        asked_s = asked_delay_s(outcome.status, outcome.retry_after_s)
        delivery.next_attempt_at = now() + timedelta(seconds=max(delay_s * spread, asked_s))
        return
    delivery.state, delivery.finished_at = DeliveryState.FAILED, now()
    if not endpoint.is_enabled:
        return
    if outcome.status == GONE:
        service.disable(session, endpoint, "The receiver answered 410 (Gone).")
    elif endpoint.last_success_at is None or endpoint.last_success_at < delivery.round_began_at:
        service.disable(session, endpoint, "The receiver took no message for about a day.")


def forget_old() -> int:
    """Deletes deliveries that ended `KEPT_DAYS` ago, with their attempts, and old secrets that sign no more."""
    with transaction() as session:
        for endpoint in session.scalars(
            select(WebhookEndpoint)
            .where(WebhookEndpoint.old_secret_until < func.now())
            .with_for_update(skip_locked=True)
        ):
            if endpoint.old_secret_id is not None:
                delete_secret(session, endpoint.old_secret_id)
            endpoint.old_secret_id = endpoint.old_secret_until = None
    forgotten = 0
    while count := _forget_batch():
        forgotten += count
    return forgotten


def _forget_batch() -> int:
    old = (
        select(WebhookDelivery.delivery_id)
        .where(
            WebhookDelivery.created_at < now() - timedelta(days=KEPT_DAYS),
            WebhookDelivery.state != DeliveryState.PENDING,
        )
        .limit(FORGET_BATCH)
    )
    with transaction() as session:
        gone = session.execute(
            delete(WebhookDelivery)
            .where(WebhookDelivery.delivery_id.in_(old))
            .returning(WebhookDelivery.delivery_id)
        ).all()
    return len(gone)
