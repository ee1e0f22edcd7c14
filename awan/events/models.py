"""The event log: one row per change, written in the change's own transaction."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Dialect, Identity, Index, text
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.types import UserDefinedType

from awan.kit.database import Base


class Xid8(UserDefinedType[int]):
    """PostgreSQL's 64-bit transaction id."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """The column's type in DDL."""
        return "xid8"

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], int | None]:
        """The driver knows no such type and gives its text."""
        return lambda value: None if value is None else int(value)


class Event(Base):
    """What happened to whom, by whom.

    Readers that must not miss an event read in the order (xid, event_id) and only below
    `pg_snapshot_xmin(pg_current_snapshot())`: identity values alone can become visible out of order.
    """

    __tablename__ = "event"
    __table_args__ = (
        Index(None, "account_id", "xid", "event_id"),
        Index(None, "resource_id", "event_id"),
        Index(None, "xid", "event_id"),
    )

    event_id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    xid: Mapped[int] = mapped_column(Xid8, server_default=text("pg_current_xact_id()"))
    account_id: Mapped[UUID | None]
    resource_id: Mapped[UUID | None]
    kind: Mapped[str]
    actor: Mapped[str]
    operation_id: Mapped[UUID | None]
    data: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
