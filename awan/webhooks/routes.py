"""`/webhooks`: endpoints, their tests, deliveries and their replay."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, once, replay
from awan.accounts.idempotency import EarlierAnswer
from awan.kit.database import transaction
from awan.kit.http import (
    Answer,
    EmptyForm,
    Envelope,
    Remains,
    Request,
    answer,
    form_body,
    query_of,
)
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
    arrive twice: `webhook-id` says so. A receiver that takes nothing for a day is disabled. One that answers 429 or 503
    with `Retry-After` is left alone for so long, four hours at most. While the account is suspended nothing is sent:
    new events pass by, and what waits is sent afterwards.
    """

    def create(session: Session) -> tuple[Answer, UUID]:
        row, secret = service.create_endpoint(
            session, caller, body.url, body.event_types, body.description
        )
        shown = SecretWebhookView.shown(row, secret)
        return answer("Webhook successfully created", shown, status=201), row.endpoint_id

    return once(request, caller, create, _without_secret)


@router.get("/{webhook_uuid:uuid}", response_model=Envelope[WebhookView])
def get_webhook(webhook_uuid: UUID, caller: Caller = Depends(authenticated("read"))) -> Answer:
    """One webhook."""
    with transaction() as session:
        row = service.get_endpoint(session, caller, webhook_uuid)
        return answer("Webhook detail", WebhookView.of(row))


@router.patch("/{webhook_uuid:uuid}", response_model=Envelope[WebhookView])
def change_webhook(
    webhook_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: WebhookChange = Depends(form_body(WebhookChange, path_check=own_webhook)),
) -> Answer:
    """Changes what is given. While it is disabled new events pass it by; what waits is sent when it is enabled."""
    changes = body.model_dump(exclude_none=True)

    def change(session: Session) -> tuple[Answer, UUID]:
        row = service.change_endpoint(session, caller, webhook_uuid, changes)
        return answer("Webhook successfully changed", WebhookView.of(row)), webhook_uuid

    return once(request, caller, change, _again)


@router.delete("/{webhook_uuid:uuid}", response_model=Envelope[WebhookView])
def delete_webhook(
    webhook_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("delete")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=own_webhook)),
) -> Answer:
    """Ends a webhook. What waits for it is given up."""

    def end(session: Session) -> tuple[Answer, UUID]:
        row = service.delete_endpoint(session, caller, webhook_uuid)
        return answer("Webhook successfully deleted", WebhookView.of(row)), webhook_uuid

    return once(request, caller, end, _again)


@router.post("/{webhook_uuid:uuid}/rotate-secret", response_model=Envelope[SecretWebhookView])
def rotate_webhook_secret(
    webhook_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=own_webhook)),
) -> Answer:
    """A new secret, shown this once. For 24 hours messages are signed with the present one too."""

    def rotate(session: Session) -> tuple[Answer, UUID]:
        row, secret = service.rotate_secret(session, caller, webhook_uuid)
        shown = SecretWebhookView.shown(row, secret)
        return answer("Webhook secret successfully rotated", shown), webhook_uuid

    return once(request, caller, rotate, _without_secret)


@router.post("/{webhook_uuid:uuid}/test", response_model=Envelope[DeliveryView | Remains])
def send_webhook_test(
    webhook_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=own_webhook)),
) -> Answer:
    """Sends an event `webhook.test` to this webhook, signed as all messages are, so that the receiver can be tried.

    It is sent whatever the webhook's `event_types` are, to no other webhook, and again while the receiver does not take
    it. `GET /webhooks/{webhook_uuid}/deliveries/{delivery_uuid}` tells what the receiver answered.
    """

    def send(session: Session) -> tuple[Answer, UUID]:
        row = service.send_test(session, caller, webhook_uuid)
        return answer("Webhook test will be sent", DeliveryView.of(row)), row.delivery_id

    return once(request, caller, send, _delivery_again)


@router.get("/{webhook_uuid:uuid}/deliveries", response_model=Envelope[DeliveryList])
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


@router.get(
    "/{webhook_uuid:uuid}/deliveries/{delivery_uuid:uuid}", response_model=Envelope[DeliveryDetail]
)
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
    "/{webhook_uuid:uuid}/deliveries/{delivery_uuid:uuid}/replay",
    response_model=Envelope[DeliveryView | Remains],
)
def replay_webhook_delivery(
    webhook_uuid: UUID,
    delivery_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=own_webhook)),
) -> Answer:
    """Sends a delivery again under the same id, whatever became of it."""

    def send_again(session: Session) -> tuple[Answer, UUID]:
        row = service.replay(session, caller, webhook_uuid, delivery_uuid)
        return answer("Webhook delivery will be sent again", DeliveryView.of(row)), delivery_uuid

    return once(request, caller, send_again, _delivery_again)


def _again(session: Session, earlier: EarlierAnswer) -> Answer:
    """The repeat of a call, with the endpoint, deleted or not: the first one showed that it is the caller's."""
    row = session.get_one(WebhookEndpoint, UUID(earlier.resource_id))
    return replay(earlier, WebhookView.of(row))


def _delivery_again(session: Session, earlier: EarlierAnswer) -> Answer:
    """The repeat of a call that sends something, with the delivery, or what is known of one that was forgotten."""
    row = session.get(WebhookDelivery, UUID(earlier.resource_id))
    return replay(earlier, DeliveryView.of(row) if row else earlier.remains)


def _without_secret(session: Session, earlier: EarlierAnswer) -> Answer:
    """As `_again`, of a call that has shown a secret: it is not shown again."""
    row = session.get_one(WebhookEndpoint, UUID(earlier.resource_id))
    return replay(earlier, SecretWebhookView.shown(row, None))
