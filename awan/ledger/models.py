"""Usage: what is billed, from when to when, at which price, and because of which operation."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base


class LockedPrice(Base):
    """The price that a resource's component was sold at; a change of the catalogue never changes it."""

    __tablename__ = "locked_price"

    resource_id: Mapped[UUID] = mapped_column(ForeignKey("resource.resource_id"), primary_key=True)
    component: Mapped[str] = mapped_column(primary_key=True)
    price_id: Mapped[int | None] = mapped_column(ForeignKey("price.price_id"))
    currency: Mapped[str]
    monthly_minor: Mapped[int]
    quantity: Mapped[int]
    locked_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class UsageSpan(Base):
    """A component of a resource in use over [opened_at, closed_at). At most one is open per resource and component.

    `monthly_minor` is the price of one unit of quantity a month, in minor units of `currency`.
    """

    __tablename__ = "usage_span"
    __table_args__ = (
        CheckConstraint("quantity > 0", name="quantity"),
        CheckConstraint("closed_at IS NULL OR closed_at >= opened_at", name="order"),
        Index(
            "uq_usage_span_open",
            "resource_id",
            "component",
            unique=True,
            postgresql_where=text("closed_at IS NULL"),
        ),
        Index(None, "account_id", "opened_at"),
    )

    span_id: Mapped[int] = mapped_column(primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    resource_id: Mapped[UUID] = mapped_column(ForeignKey("resource.resource_id"))
    component: Mapped[str]
    quantity: Mapped[int]
    price_id: Mapped[int | None] = mapped_column(ForeignKey("price.price_id"))
    currency: Mapped[str]
    monthly_minor: Mapped[int]
    opened_at: Mapped[datetime]
    closed_at: Mapped[datetime | None]
    opened_by_operation_id: Mapped[UUID | None]
    closed_by_operation_id: Mapped[UUID | None]
    actor: Mapped[str]
