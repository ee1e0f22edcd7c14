"""Wire shape of an event: the same in lists, streams and webhooks."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from pydantic import BaseModel, Field

from awan.events.kinds import CUSTOMER_KINDS
from awan.events.models import Event
from awan.events.position import Position
from awan.kit.http import Timestamp


class EventView(BaseModel):
    """One change: what (`kind`), by whom (`actor`), to what."""

    id: int
    kind: str = Field(description="One of `GET /events/kinds`.")
    actor: str
    resource_uuid: UUID | None
    operation_uuid: UUID | None
    data: dict[str, Any]
    created_at: Timestamp
    position: str = Field(description="Where the event stands: `after` of `GET /events`.")

    @classmethod
    def of(cls, event: Event) -> EventView:
        """The view of a row."""
        return cls(
            id=event.event_id,
            kind=event.kind,
            actor=event.actor,
            resource_uuid=event.resource_id,
            operation_uuid=event.operation_id,
            data=event.data,
            created_at=event.created_at,
            position=str(Position(event.xid, event.event_id)),
        )


class EventKindView(BaseModel):
    """A kind of event and what it says happened."""

    kind: str = Field(
        description="\n".join(f"- `{kind}`: {it}" for kind, it in sorted(CUSTOMER_KINDS.items()))
    )
    description: str
