"""Wire shapes of webhooks."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from awan.accounts.schemas import PageQuery
from awan.kit import outbound
from awan.kit.http import Timestamp
from awan.kit.pagination import PageInfo
from awan.webhooks.models import DeliveryState, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from awan.webhooks.rules import EVERYTHING, check_event_type

EVENT_TYPES_MAX = 50
DESCRIPTION_MAX = 200


def check_url(text: str) -> str:
    """The text itself. Raises: ValueError when nothing may be sent there."""
    outbound.parse_url(text)
    return text


Url = Annotated[
    str,
    AfterValidator(check_url),
    Field(
        min_length=1,
        max_length=outbound.URL_MAX,
        description="Where to POST: an https URL of a public address.",
    ),
]
EventTypes = Annotated[
    list[Annotated[str, Field(max_length=100), AfterValidator(check_event_type)]],
    Field(
        min_length=1,
        max_length=EVENT_TYPES_MAX,
        description="Which events: a kind of `GET /events/kinds` (`instance.created`), all of one noun (`instance.*`),"
        " or all there are (`*`).",
    ),
]
Description = Annotated[str, Field(max_length=DESCRIPTION_MAX)]


class WebhookCreate(BaseModel):
    """A new endpoint."""

    model_config = ConfigDict(extra="forbid")

    url: Url
    event_types: EventTypes = [EVERYTHING]
    description: Description = ""


class WebhookChange(BaseModel):
    """What should be different. Absent fields stay."""

    model_config = ConfigDict(extra="forbid")

    url: Url | None = None
    event_types: EventTypes | None = None
    description: Description | None = None
    is_enabled: bool | None = None


class DeliveryQuery(PageQuery):
    """Which deliveries."""

    state: DeliveryState | None = None


class WebhookView(BaseModel):
    """An endpoint without its secret. `old_secret_until`: until then the secret before this one signs too."""

    uuid: UUID
    url: str
    description: str
    event_types: list[str]
    is_enabled: bool
    disabled_reason: str | None
    old_secret_until: Timestamp | None
    last_success_at: Timestamp | None
    created_at: Timestamp

    @classmethod
    def of(cls, row: WebhookEndpoint) -> WebhookView:
        """The view of a row."""
        return cls(
            uuid=row.endpoint_id,
            url=row.url,
            description=row.description,
            event_types=row.event_types,
            is_enabled=row.is_enabled,
            disabled_reason=row.disabled_reason,
            old_secret_until=row.old_secret_until,
            last_success_at=row.last_success_at,
            created_at=row.created_at,
        )


class SecretWebhookView(WebhookView):
    """An endpoint with its new secret, which is shown this once: a repeated call shows null."""

    secret: str | None

    @classmethod
    def shown(cls, row: WebhookEndpoint, secret: str | None) -> SecretWebhookView:
        """The view of a row with its secret."""
        return cls(**dict(WebhookView.of(row)), secret=secret)


class DeliveryView(BaseModel):
    """An event on its way to an endpoint. `message_id` is the header `webhook-id` of each attempt."""

    uuid: UUID
    message_id: str
    event_id: int
    kind: str
    state: DeliveryState
    attempts: int
    next_attempt_at: Timestamp | None
    created_at: Timestamp
    finished_at: Timestamp | None

    @classmethod
    def of(cls, row: WebhookDelivery) -> DeliveryView:
        """The view of a row."""
        is_pending = row.state == DeliveryState.PENDING
        return cls(
            uuid=row.delivery_id,
            message_id=message_id(row.delivery_id),
            event_id=row.event_id,
            kind=row.kind,
            state=DeliveryState(row.state),
            attempts=row.attempts,
            next_attempt_at=row.next_attempt_at if is_pending else None,
            created_at=row.created_at,
            finished_at=row.finished_at,
        )


class AttemptView(BaseModel):
    """One attempt: the status of the answer, or why there was none."""

    started_at: Timestamp
    duration_ms: int
    status: int | None
    error: str | None

    @classmethod
    def of(cls, row: WebhookAttempt) -> AttemptView:
        """The view of a row."""
        return cls(
            started_at=row.started_at,
            duration_ms=row.duration_ms,
            status=row.status,
            error=row.error,
        )


class DeliveryDetail(DeliveryView):
    """A delivery with its latest attempts, newest first."""

    log: list[AttemptView]


class DeliveryList(BaseModel):
    """A page of deliveries."""

    data: list[DeliveryView]
    page: PageInfo


def message_id(delivery_id: UUID) -> str:
    """The id that a receiver recognises a repeated message by."""
    return f"msg_{delivery_id.hex}"
