"""`/webhooks`: endpoints, deliveries and their replay."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, idempotent, replay
from awan.kit.database import transaction
from awan.kit.http import Answer, EmptyForm, Envelope, Request, answer, form_body, query_of
from awan.kit.pagination import PageRequest, paged
from awan.resources import ResourceKind, in_path
from awan.webhooks import service
from awan.webhooks.models import WebhookDelivery, WebhookEndpoint
from awan.webhooks.schemas import (
    AttemptView,
    DeliveryDetail,
    DeliveryList,
    DeliveryQuery,
    DeliveryView,
    SecretWebhookView,
    WebhookChange,
    WebhookCreate,
    WebhookView,
)

router = APIRouter(prefix="/webhooks", tags=["Webhook"])

own_webhook = in_path(ResourceKind.WEBHOOK, "webhook_uuid")


@router.get("", response_model=Envelope[list[WebhookView]])
def list_webhooks(caller: Caller = Depends(authenticated("read"))) -> Answer:
    """The account's webhooks, oldest first."""
    with transaction() as session:
        rows = service.list_endpoints(session, caller.account_id)
        return answer("Webhooks", [WebhookView.of(row) for row in rows])


@router.post("", status_code=201, response_model=Envelope[SecretWebhookView])
def create_webhook(
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: WebhookCreate = Depends(form_body(WebhookCreate)),
) -> Answer:
    """Posts the account's events to a URL from now on, signed as standardwebhooks.com describes.

    `secret` is shown this once. A message is sent until the receiver answers 2xx within 15 s, for about a day, and can
    arrive twice: `webhook-id` says so. A receiver that takes nothing for a day is disabled.
    """
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            row = session.get_one(WebhookEndpoint, UUID(call.earlier.resource_id))
            return replay(call.earlier, SecretWebhookView.shown(row, None))
        row, secret = service.create_endpoint(
            session, caller, body.url, body.event_types, body.description
        )
        created = answer(
            "Webhook successfully created", SecretWebhookView.shown(row, secret), status=201
        )
        return call.keep(created, row.endpoint_id)


@router.get("/{webhook_uuid}", response_model=Envelope[WebhookView])
def get_webhook(webhook_uuid: UUID, caller: Caller = Depends(authenticated("read"))) -> Answer:
    """One webhook."""
    with transaction() as session:
        row = service.get_endpoint(session, caller, webhook_uuid)
        return answer("Webhook detail", WebhookView.of(row))


@router.patch("/{webhook_uuid}", response_model=Envelope[WebhookView])
def change_webhook(
    webhook_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: WebhookChange = Depends(form_body(WebhookChange, path_check=own_webhook)),
) -> Answer:
    """Changes what is given. While it is disabled new events pass it by; what waits is sent when it is enabled."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, WebhookView.of(_again(session, webhook_uuid)))
        row = service.change_endpoint(
            session, caller, webhook_uuid, body.model_dump(exclude_none=True)
        )
        return call.keep(answer("Webhook successfully changed", WebhookView.of(row)), webhook_uuid)


@router.delete("/{webhook_uuid}", response_model=Envelope[WebhookView])
def delete_webhook(
    webhook_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("delete")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=own_webhook)),
) -> Answer:
    """Ends a webhook. What waits for it is given up."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, WebhookView.of(_again(session, webhook_uuid)))
        row = service.delete_endpoint(session, caller, webhook_uuid)
        return call.keep(answer("Webhook successfully deleted", WebhookView.of(row)), webhook_uuid)


@router.post("/{webhook_uuid}/rotate-secret", response_model=Envelope[SecretWebhookView])
def rotate_webhook_secret(
    webhook_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=own_webhook)),
) -> Answer:
    """A new secret, shown this once. For 24 hours messages are signed with the present one too."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            row = _again(session, webhook_uuid)
            return replay(call.earlier, SecretWebhookView.shown(row, None))
        row, secret = service.rotate_secret(session, caller, webhook_uuid)
        rotated = answer(
            "Webhook secret successfully rotated", SecretWebhookView.shown(row, secret)
        )
        return call.keep(rotated, webhook_uuid)


@router.get("/{webhook_uuid}/deliveries", response_model=Envelope[DeliveryList])
def list_webhook_deliveries(
    webhook_uuid: UUID,
    caller: Caller = Depends(authenticated("read")),
    query: DeliveryQuery = Depends(query_of(DeliveryQuery, path_check=own_webhook)),
) -> Answer:
    """What was sent, is being sent or was given up, newest first. Kept for 30 days."""
    page = PageRequest(query.page, query.limit)
    with transaction() as session:
        rows, total = service.list_deliveries(session, caller, webhook_uuid, query.state, page)
        return answer(
            "Webhook deliveries", paged([DeliveryView.of(row) for row in rows], page, total)
        )


@router.get("/{webhook_uuid}/deliveries/{delivery_uuid}", response_model=Envelope[DeliveryDetail])
def get_webhook_delivery(
    webhook_uuid: UUID,
    delivery_uuid: UUID,
    caller: Caller = Depends(authenticated("read")),
) -> Answer:
    """One delivery with its latest attempts."""
    with transaction() as session:
        row, attempts = service.get_delivery(session, caller, webhook_uuid, delivery_uuid)
        log = [AttemptView.of(attempt) for attempt in attempts]
        return answer(
            "Webhook delivery detail", DeliveryDetail(**dict(DeliveryView.of(row)), log=log)
        )


@router.post(
    "/{webhook_uuid}/deliveries/{delivery_uuid}/replay", response_model=Envelope[DeliveryView]
)
def replay_webhook_delivery(
    webhook_uuid: UUID,
    delivery_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=own_webhook)),
) -> Answer:
    """Sends a delivery again under the same id, whatever became of it."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            earlier = session.get(WebhookDelivery, delivery_uuid)
            return replay(
                call.earlier, DeliveryView.of(earlier) if earlier else call.earlier.remains
            )
        row = service.replay(session, caller, webhook_uuid, delivery_uuid)
        return call.keep(
            answer("Webhook delivery will be sent again", DeliveryView.of(row)), delivery_uuid
        )


def _again(session: Session, webhook_uuid: UUID) -> WebhookEndpoint:
    """The endpoint of a repeated call, deleted or not: the first one showed that it is the caller's."""
    return session.get_one(WebhookEndpoint, webhook_uuid)
