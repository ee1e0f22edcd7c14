"""Locked prices and usage spans. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from awan.catalogue import Component, PricedItem, PriceTag
from awan.kit.database import execute_directly
from awan.ledger.models import LockedPrice, UsageSpan

_INSERTED = insert(LockedPrice)
_LOCK = _INSERTED.on_conflict_do_update(
    index_elements=["resource_id", "component"],
    set_={
        name: _INSERTED.excluded[name]
        for name in ("price_id", "currency", "monthly_minor", "quantity")
    },
)

# Sent for each new instance and address; as text, since a statement that selects what it inserts takes no parameters.
_OPEN = text(
    """
    INSERT INTO usage_span (component, quantity, price_id, currency, monthly_minor, account_id, resource_id, opened_at,
        opened_by_operation_id, actor)
    SELECT component, quantity, price_id, currency, monthly_minor, :account_id, resource_id, :at,
        CAST(:operation_id AS uuid), :actor
    FROM locked_price WHERE resource_id = ANY(:resource_ids) ORDER BY resource_id, component
    ON CONFLICT (resource_id, component) WHERE closed_at IS NULL DO NOTHING
    """
)


def lock_prices(session: Session, sold: Mapping[UUID, Iterable[PricedItem]]) -> None:
    """Remembers at which prices each resource was sold; later changes of the catalogue do not touch it."""
    rows = [
        {
            "resource_id": resource_id,
            "component": item.tag.component,
            "price_id": item.tag.price_id,
            "currency": item.tag.currency,
            "monthly_minor": item.tag.monthly_minor,
            "quantity": item.quantity,
        }
        for resource_id, items in sold.items()
        for item in items
    ]
    execute_directly(session, _LOCK, rows)


def locked_prices(session: Session, resource_id: UUID) -> list[PricedItem]:
    """What a resource was sold as, and at which prices, by component."""
    rows = session.scalars(
        select(LockedPrice)
        .where(LockedPrice.resource_id == resource_id)
        .order_by(LockedPrice.component)
    )
    return [
        PricedItem(
            PriceTag(Component(row.component), row.currency, row.monthly_minor, row.price_id),
            row.quantity,
        )
        for row in rows
    ]


def monthly_prices(session: Session, resource_ids: Sequence[UUID]) -> dict[UUID, tuple[int, str]]:
    """Resource id -> what it costs a month in minor units, and the currency, in one query."""
    if not resource_ids:
        return {}
    rows = session.execute(
        select(
            LockedPrice.resource_id,
            func.sum(LockedPrice.monthly_minor * LockedPrice.quantity),
            func.min(LockedPrice.currency),
        )
        .where(LockedPrice.resource_id.in_(resource_ids))
        .group_by(LockedPrice.resource_id)
    )
    return {resource_id: (int(minor), currency) for resource_id, minor, currency in rows}


def open_spans(
    session: Session,
    *,
    account_id: UUID,
    resource_ids: Sequence[UUID],
    at: datetime,
    operation_id: UUID | None,
    actor: str,
) -> None:
    """Opens a usage span for each locked price of the resources. Spans that are open already stay as they are."""
    session.execute(
        _OPEN,
        {
            "account_id": account_id,
            "resource_ids": list(resource_ids),
            "at": at,
            "operation_id": operation_id,
            "actor": actor,
        },
    )


def close_spans(
    session: Session, resource_id: UUID, *, at: datetime, operation_id: UUID | None
) -> None:
    """Closes the open spans of the resource. None open: no effect."""
    session.execute(
        update(UsageSpan)
        .where(UsageSpan.resource_id == resource_id, UsageSpan.closed_at.is_(None))
        .values(closed_at=at, closed_by_operation_id=operation_id)
    )


def spans_of(session: Session, resource_id: UUID) -> Sequence[UsageSpan]:
    """All spans of a resource, oldest first."""
    return session.scalars(
        select(UsageSpan).where(UsageSpan.resource_id == resource_id).order_by(UsageSpan.span_id)
    ).all()
