"""The verbs of webhooks. Each works in the caller's transaction and commits nothing.

Locks in the order resource, endpoint, delivery.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from awan import events, resources
from awan.accounts import Caller
from awan.errors import Conflict, NotFound, QuotaExceeded
from awan.kit.clock import now
from awan.kit.ids import new_id
from awan.kit.pagination import PageRequest
from awan.kit.secrets import delete_secret, get_secret, put_secret
from awan.resources import ResourceKind
from awan.webhooks.models import (
    DeliveryState,
    WebhookAttempt,
    WebhookCursor,
    WebhookDelivery,
    WebhookEndpoint,
)
from awan.webhooks.rules import TEST_KIND, new_secret

ENDPOINTS_MAX = 10
SECRET_PURPOSE = "webhook.signing"  # noqa: S105 - what the secret is for
OLD_SECRET_S = 24 * 3600
LOG_MAX = 50
NO_DELIVERY = "Delivery not found."
DISABLED = "The webhook is disabled: enable it first."

# Under it the number of an account's endpoints is true.
_LOCK_ACCOUNT = text("SELECT FROM quota WHERE account_id = :account_id FOR UPDATE")


def create_endpoint(
    session: Session, caller: Caller, url: str, event_types: list[str], description: str
) -> tuple[WebhookEndpoint, str]:
    """A new endpoint and its secret, which can be shown this once. It gets what happens from now on.

    Raises: QuotaExceeded.
    """
    session.execute(_LOCK_ACCOUNT, {"account_id": caller.account_id})
    if len(list_endpoints(session, caller.account_id)) >= ENDPOINTS_MAX:
        raise QuotaExceeded(f"An account can have {ENDPOINTS_MAX} webhooks.")
    endpoint_id = new_id()
    resources.create(
        session,
        kind=ResourceKind.WEBHOOK,
        resource_id=endpoint_id,
        account_id=caller.account_id,
        name=url,
        location_id=None,
        operation_id=None,
    )
    secret = new_secret()
    endpoint = WebhookEndpoint(
        endpoint_id=endpoint_id,
        account_id=caller.account_id,
        url=url,
        event_types=event_types,
        description=description,
        secret_id=put_secret(session, SECRET_PURPOSE, secret),
    )
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    session.execute(
        insert(WebhookCursor)
        .values(cursor_id=1, xid=func.pg_current_xact_id(), event_id=0)
        .on_conflict_do_nothing()
    )
    _record(session, endpoint, "webhook.created", caller.actor, {"url": url})
    return endpoint, secret


def list_endpoints(session: Session, account_id: UUID) -> list[WebhookEndpoint]:
    """The account's endpoints, oldest first."""
    query = select(WebhookEndpoint).where(
        WebhookEndpoint.account_id == account_id, WebhookEndpoint.deleted_at.is_(None)
    )
    return list(
        session.scalars(query.order_by(WebhookEndpoint.created_at, WebhookEndpoint.endpoint_id))
    )


def get_endpoint(session: Session, caller: Caller, endpoint_id: UUID) -> WebhookEndpoint:
    """The caller's endpoint. Raises: NotFound."""
    resources.get_owned(session, caller, ResourceKind.WEBHOOK, endpoint_id)
    return session.get_one(WebhookEndpoint, endpoint_id)


def _lock(session: Session, caller: Caller, endpoint_id: UUID) -> WebhookEndpoint:
    resources.lock_owned(session, caller, ResourceKind.WEBHOOK, endpoint_id)
    return session.get_one(
        WebhookEndpoint, endpoint_id, with_for_update=True, populate_existing=True
    )


def change_endpoint(
    session: Session, caller: Caller, endpoint_id: UUID, changes: Mapping[str, Any]
) -> WebhookEndpoint:
    """Sets `url`, `event_types`, `description`, `is_enabled`. Raises: NotFound.

    While it is disabled, nothing is sent to it and new events pass it by; what waits is sent when it is enabled again.
    """
    endpoint = _lock(session, caller, endpoint_id)
    if changes.get("is_enabled") and not endpoint.is_enabled:
        endpoint.disabled_reason = None
        endpoint.from_xid = func.pg_current_xact_id()
    for name, value in changes.items():
        setattr(endpoint, name, value)
    session.flush()
    session.refresh(endpoint)
    if changes:
        _record(session, endpoint, "webhook.changed", caller.actor, dict(changes))
    return endpoint


def delete_endpoint(session: Session, caller: Caller, endpoint_id: UUID) -> WebhookEndpoint:
    """Ends it with its secrets; what waits is given up. Raises: NotFound."""
    endpoint = _lock(session, caller, endpoint_id)
    for secret_id in (endpoint.secret_id, endpoint.old_secret_id):
        if secret_id is not None:
            delete_secret(session, secret_id)
    endpoint.secret_id = endpoint.old_secret_id = endpoint.old_secret_until = None
    endpoint.is_enabled, endpoint.deleted_at = False, now()
    resources.retire(session, endpoint_id)
    session.flush()
    session.execute(
        update(WebhookDelivery)
        .where(
            WebhookDelivery.endpoint_id == endpoint_id,
            WebhookDelivery.state == DeliveryState.PENDING,
        )
        .values(state=DeliveryState.FAILED, finished_at=now(), lease_id=None)
        .execution_options(synchronize_session=False)
    )
    _record(session, endpoint, "webhook.deleted", caller.actor, {"url": endpoint.url})
    return endpoint


def rotate_secret(
    session: Session, caller: Caller, endpoint_id: UUID
) -> tuple[WebhookEndpoint, str]:
    """A new secret, to be shown this once; the present one signs beside it for a day. Raises: NotFound.

    A secret that was still signing beside the present one stops at once.
    """
    endpoint = _lock(session, caller, endpoint_id)
    if endpoint.old_secret_id is not None:
        delete_secret(session, endpoint.old_secret_id)
    secret = new_secret()
    endpoint.old_secret_id = endpoint.secret_id
    endpoint.old_secret_until = now() + timedelta(seconds=OLD_SECRET_S)
    endpoint.secret_id = put_secret(session, SECRET_PURPOSE, secret)
    session.flush()
    _record(session, endpoint, "webhook.secret_rotated", caller.actor, {})
    return endpoint, secret


def signing_secrets(session: Session, endpoint: WebhookEndpoint) -> list[str]:
    """The secrets that sign a message at present, the newest first."""
    found = []
    if endpoint.secret_id is not None:
        found.append(get_secret(session, endpoint.secret_id, SECRET_PURPOSE))
    if (
        endpoint.old_secret_id is not None
        and endpoint.old_secret_until is not None
        and endpoint.old_secret_until > now()
    ):
        found.append(get_secret(session, endpoint.old_secret_id, SECRET_PURPOSE))
    return found


def disable(session: Session, endpoint: WebhookEndpoint, reason: str) -> None:
    """Nothing is sent to it any more, and its account learns why. The row is locked by the caller."""
    endpoint.is_enabled, endpoint.disabled_reason = False, reason
    session.flush()
    _record(session, endpoint, "webhook.disabled", "operator", {"reason": reason})


def list_deliveries(
    session: Session,
    caller: Caller,
    endpoint_id: UUID,
    state: DeliveryState | None,
    page: PageRequest,
) -> tuple[list[WebhookDelivery], int]:
    """A page of an endpoint's deliveries, newest first, and how many there are. Raises: NotFound."""
    get_endpoint(session, caller, endpoint_id)
    query = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    if state is not None:
        query = query.where(WebhookDelivery.state == state)
    total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
    newest_first = query.order_by(
        WebhookDelivery.created_at.desc(), WebhookDelivery.delivery_id.desc()
    )
    return list(session.scalars(newest_first.limit(page.limit).offset(page.offset))), total


def get_delivery(
    session: Session, caller: Caller, endpoint_id: UUID, delivery_id: UUID
) -> tuple[WebhookDelivery, list[WebhookAttempt]]:
    """A delivery of the endpoint and its latest attempts, newest first. Raises: NotFound."""
    get_endpoint(session, caller, endpoint_id)
    # In one statement: an attempt that is being recorded shows in both or in neither.
    rows = session.execute(
        select(WebhookDelivery, WebhookAttempt)
        .outerjoin(WebhookAttempt, WebhookAttempt.delivery_id == WebhookDelivery.delivery_id)
        .where(
            WebhookDelivery.delivery_id == delivery_id, WebhookDelivery.endpoint_id == endpoint_id
        )
        .order_by(WebhookAttempt.attempt_id.desc())
        .limit(LOG_MAX)
        .execution_options(populate_existing=True)
    ).all()
    if not rows:
        raise NotFound(NO_DELIVERY)
    return rows[0][0], [attempt for _, attempt in rows if attempt is not None]


def send_test(session: Session, caller: Caller, endpoint_id: UUID) -> WebhookDelivery:
    """Sends an event `webhook.test` to the endpoint, whatever events it wants, and to no other; with all its retries.

    Raises: NotFound; Conflict when the endpoint is disabled.
    """
    endpoint = _lock(session, caller, endpoint_id)
    if not endpoint.is_enabled:
        raise Conflict(DISABLED)
    delivery = WebhookDelivery(
        delivery_id=new_id(),
        endpoint_id=endpoint_id,
        account_id=endpoint.account_id,
        event_id=_record(session, endpoint, TEST_KIND, caller.actor, {}),
        kind=TEST_KIND,
    )
    session.add(delivery)
    session.flush()
    session.refresh(delivery)
    return delivery


def replay(
    session: Session, caller: Caller, endpoint_id: UUID, delivery_id: UUID
) -> WebhookDelivery:
    """Sends a delivery again, whatever became of it, under the same id and with all its retries.

    Raises: NotFound; Conflict while it is being sent, or when the endpoint is disabled.
    """
    endpoint = _lock(session, caller, endpoint_id)
    delivery = _delivery_of(session, endpoint_id, delivery_id)
    session.refresh(delivery, with_for_update=True)
    if not endpoint.is_enabled:
        raise Conflict(DISABLED)
    if delivery.lease_id is not None and delivery.next_attempt_at > now():
        raise Conflict("The delivery is being sent at the moment.")
    delivery.state = DeliveryState.PENDING
    delivery.attempts, delivery.lease_id, delivery.finished_at = 0, None, None
    delivery.next_attempt_at = delivery.round_began_at = now()
    session.flush()
    _record(
        session, endpoint, "webhook.replayed", caller.actor, {"delivery_uuid": str(delivery_id)}
    )
    return delivery


def _delivery_of(session: Session, endpoint_id: UUID, delivery_id: UUID) -> WebhookDelivery:
    delivery = session.get(WebhookDelivery, delivery_id)
    if delivery is None or delivery.endpoint_id != endpoint_id:
        raise NotFound(NO_DELIVERY)
    return delivery


def _record(
    session: Session, endpoint: WebhookEndpoint, kind: str, actor: str, data: dict[str, Any]
) -> int:
    return events.record(
        session,
        kind=kind,
        actor=actor,
        account_id=endpoint.account_id,
        resource_id=endpoint.endpoint_id,
        data=data,
    )
