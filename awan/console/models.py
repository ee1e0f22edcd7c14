"""Consoles: one row per opening, from its ticket to its end."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, one_of


class ConsoleState(StrEnum):
    """How far an opening is. `opening`: the ticket was used; `ready`: the worker has unlocked the screen."""

    ISSUED = "issued"
    OPENING = "opening"
    READY = "ready"
    OPEN = "open"
    CLOSED = "closed"


LIVE = (ConsoleState.OPENING, ConsoleState.READY, ConsoleState.OPEN)
"""The states in which an API process holds the console; it says so in `seen_at` all the time."""


class Console(Base):
    """An opening of an instance's screen. Ticket and passwords are derived from its id and are stored nowhere.

    `account_id` is the instance's owner, `key_id` the API key that asked: its end is the console's end.
    """

    __tablename__ = "console"
    __table_args__ = (
        one_of("state", ConsoleState),
        Index(
            "ix_console_unclosed",
            "account_id",
            "instance_id",
            postgresql_where=text("state <> 'closed'"),
        ),
        Index(None, "closed_at"),
    )

    console_id: Mapped[UUID] = mapped_column(primary_key=True)
    instance_id: Mapped[UUID] = mapped_column(ForeignKey("instance.instance_id"))
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("api_key.key_id"))
    state: Mapped[str] = mapped_column(server_default="issued")
    ticket_expires_at: Mapped[datetime]
    host: Mapped[str | None]
    port: Mapped[int | None]
    requires_tls: Mapped[bool] = mapped_column(server_default=text("false"))
    seen_at: Mapped[datetime | None]
    opened_at: Mapped[datetime | None]
    closed_at: Mapped[datetime | None]
    closed_reason: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
