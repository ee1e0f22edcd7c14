"""Webhook endpoints, what is to be delivered to them, and each attempt."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import ForeignKey, Identity, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column

from awan.events.models import Xid8
from awan.kit.database import Base, one_of


class DeliveryState(StrEnum):
    """Pending: to be sent (again). Failed: given up."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class WebhookEndpoint(Base):
    """Where an account's events go. Its secrets are in the table `secret`; the old one still signs for a day.

    It gets the events of transactions from `from_xid` on, which is the one that made or enabled it.
    """

    __tablename__ = "webhook_endpoint"
    __table_args__ = (Index(None, "account_id", postgresql_where=text("deleted_at IS NULL")),)

    endpoint_id: Mapped[UUID] = mapped_column(ForeignKey("resource.resource_id"), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    url: Mapped[str]
    description: Mapped[str]
    event_types: Mapped[list[str]] = mapped_column(ARRAY(Text))
    is_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    disabled_reason: Mapped[str | None]
    from_xid: Mapped[int] = mapped_column(Xid8, server_default=text("pg_current_xact_id()"))
    secret_id: Mapped[UUID | None]
    old_secret_id: Mapped[UUID | None]
    old_secret_until: Mapped[datetime | None]
    last_success_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    deleted_at: Mapped[datetime | None]


class WebhookDelivery(Base):
    """One event for one endpoint. Its uuid is the message's id, in every attempt and replay.

    Due at `next_attempt_at` while pending. Who sends it sets a lease: `lease_id`, and a later `next_attempt_at`.
    `attempts` counts those of the present round, which a replay begins anew.
    """

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        one_of("state", DeliveryState),
        UniqueConstraint("endpoint_id", "event_id"),
        Index(
            "ix_webhook_delivery_due",
            "endpoint_id",
            "next_attempt_at",
            postgresql_where=text("state = 'pending'"),
        ),
        Index(
            "ix_webhook_delivery_leased",
            "account_id",
            postgresql_where=text("lease_id IS NOT NULL"),
        ),
        Index(None, "endpoint_id", "created_at", "delivery_id"),
        Index(None, "created_at"),
    )

    delivery_id: Mapped[UUID] = mapped_column(primary_key=True)
    endpoint_id: Mapped[UUID] = mapped_column(ForeignKey("webhook_endpoint.endpoint_id"))
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    event_id: Mapped[int] = mapped_column(ForeignKey("event.event_id"))
    kind: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="pending")
    attempts: Mapped[int] = mapped_column(server_default="0")
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    lease_id: Mapped[UUID | None]
    round_began_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    finished_at: Mapped[datetime | None]


class WebhookAttempt(Base):
    """One attempt of a delivery: the status of the answer, or why there was none."""

    __tablename__ = "webhook_attempt"

    attempt_id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    delivery_id: Mapped[UUID] = mapped_column(
        ForeignKey("webhook_delivery.delivery_id", ondelete="CASCADE"), index=True
    )
    started_at: Mapped[datetime]
    duration_ms: Mapped[int]
    status: Mapped[int | None]
    error: Mapped[str | None]


class WebhookCursor(Base):
    """How far events have been made deliveries of: one row, from the first endpoint on."""

    __tablename__ = "webhook_cursor"

    cursor_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    xid: Mapped[int] = mapped_column(Xid8)
    event_id: Mapped[int]
