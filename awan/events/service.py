"""Writing and reading the event log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Text, cast, func, select, text
from sqlalchemy.orm import Session

from awan.events.kinds import check_kind
from awan.events.models import Event
from awan.events.position import Position
from awan.kit.notifications import Channel

CHANNEL = "awan_event"
"""NOTIFY channel. The payload is the account's uuid, or empty for the operator's own events."""

changes = Channel(CHANNEL)

_RECORD = text(
    """
    WITH recorded AS (
        INSERT INTO event (account_id, resource_id, kind, actor, operation_id, data)
        VALUES (:account_id, :resource_id, :kind, :actor, :operation_id, CAST(:data AS jsonb))
        RETURNING event_id
    )
    SELECT event_id, pg_notify(:channel, :payload) FROM recorded
    """
)

_OLDER = text(
    """
    (event.xid, event.event_id) < (
        SELECT cursor_event.xid, cursor_event.event_id FROM event AS cursor_event
        WHERE cursor_event.event_id = :before AND cursor_event.account_id = :owner
    )
    """
)

# Parameters are text, because the driver knows no xid8.
_NEWER = text(
    "(event.xid, event.event_id) > (CAST(CAST(:after_xid AS text) AS xid8), CAST(:after_id AS bigint))"
)


@dataclass(frozen=True)
class Settled:
    """Events that no transaction still under way can come before, in their order.

    `is_behind`: there are later ones, committed already, for which that is not yet true. Ask again shortly: nothing
    announces the end of the transaction that they wait for.
    """

    events: Sequence[Event]
    is_behind: bool


def record(
    session: Session,
    *,
    kind: str,
    actor: str,
    account_id: UUID | None,
    resource_id: UUID | None = None,
    operation_id: UUID | None = None,
    data: dict[str, Any] | None = None,
) -> int:
    """Writes one event in the session's transaction and wakes the followers when that commits; gives its id.

    `kind` is one of the catalogue (`kinds`); `actor` is `key:<id>`, `operation:<uuid>` or `operator`. `data` is small,
    JSON, and holds no secret: customers can read it. `account_id=None`: the operator's own events.
    Raises: ValueError for a kind that the catalogue has not, or has for the operator only.
    """
    check_kind(kind, is_for_customer=account_id is not None)
    event_id = session.scalar(
        _RECORD,
        {
            "account_id": account_id,
            "resource_id": resource_id,
            "kind": kind,
            "actor": actor,
            "operation_id": operation_id,
            "data": json.dumps(data or {}),
            "channel": CHANNEL,
            "payload": str(account_id or ""),
        },
    )
    assert isinstance(event_id, int)
    return event_id


def history(session: Session, resource_id: UUID, limit: int = 100) -> list[Event]:
    """What happened to one thing, newest first, at most `limit` events."""
    query = select(Event).where(Event.resource_id == resource_id)
    return list(session.scalars(query.order_by(Event.event_id.desc()).limit(limit)))


def account_events(
    session: Session,
    account_id: UUID,
    *,
    before: int | None = None,
    resource_id: UUID | None = None,
    limit: int = 50,
) -> list[Event]:
    """An account's events, newest first: at most `limit`, older than the event `before` (absent: from the newest).

    The order is (xid, event_id), which is also that of the account's index. An unknown `before` gives nothing.
    """
    query = select(Event).where(Event.account_id == account_id)
    if before is not None:
        query = query.where(_OLDER.bindparams(before=before, owner=account_id))
    if resource_id is not None:
        query = query.where(Event.resource_id == resource_id)
    newest_first = query.order_by(Event.xid.desc(), Event.event_id.desc())
    return list(session.scalars(newest_first.limit(limit)))


def present_position(session: Session) -> Position:
    """Before everything that may still be recorded: who follows from here misses nothing that commits from now on."""
    xid = session.scalar(select(cast(func.pg_snapshot_xmin(func.pg_current_snapshot()), Text)))
    return Position(int(xid or 0), 0)


def follow(session: Session, account_id: UUID, after: Position, limit: int) -> Settled:
    """The account's next events, oldest first, at most `limit`: each once, whatever the order of commits.

    Order is (xid, event_id). A transaction can commit after one with a higher xid, so only what lies below all
    running transactions is given: there, nothing can appear any more.
    """
    is_settled = Event.xid < func.pg_snapshot_xmin(func.pg_current_snapshot())
    newer = _NEWER.bindparams(after_xid=str(after.xid), after_id=after.event_id)
    rows = session.execute(
        select(Event, is_settled)
        .where(Event.account_id == account_id, newer)
        .order_by(Event.xid, Event.event_id)
        .limit(limit)
    ).all()
    settled = [event for event, is_below in rows if is_below]
    return Settled(settled, is_behind=len(settled) < len(rows))
