"""Audits and what they found, who watches what, and what is quarantined."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import ForeignKey, Identity, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, one_of


class StrayKind(StrEnum):
    """What can lie on an engine without a row that explains it."""

    DOMAIN = "domain"
    PORT = "port"
    FIREWALL = "firewall"
    FILE = "file"
    NAME = "name"
    NETWORK = "network"


class WatchLease(Base):
    """Which worker looks after a thing, until when. `subject` is `node:<uuid>` or `location:<id>`."""

    __tablename__ = "watch_lease"

    subject: Mapped[str] = mapped_column(primary_key=True)
    executor_id: Mapped[str | None]
    leased_until: Mapped[datetime] = mapped_column(server_default=text("now()"))


class Quarantined(Base):
    """Something on an engine that no row explains: reported and left alone. Over when it is not seen any more.

    `subject` is its uuid or name; `node_id` is null for a port, a name or a network, which belong to the location.
    """

    __tablename__ = "quarantined"
    __table_args__ = (
        one_of("kind", StrayKind),
        Index(
            "uq_quarantined_present",
            "location_id",
            "kind",
            "subject",
            text("coalesce(CAST(node_id AS text), '')"),
            unique=True,
            postgresql_where=text("ended_at IS NULL"),
        ),
    )

    quarantined_id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    node_id: Mapped[UUID | None] = mapped_column(ForeignKey("node.node_id"))
    kind: Mapped[str]
    subject: Mapped[str]
    sentence: Mapped[str]
    found_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    seen_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    ended_at: Mapped[datetime | None]


class AuditRun(Base):
    """One audit. `finding_count` is null until it has ended well; how it goes is told by its operation."""

    __tablename__ = "audit_run"

    audit_id: Mapped[UUID] = mapped_column(primary_key=True)
    operation_id: Mapped[UUID] = mapped_column(ForeignKey("operation.operation_id"))
    finding_count: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"), index=True)
    finished_at: Mapped[datetime | None]


class AuditFinding(Base):
    """A difference that an audit found; see `findings.Finding`."""

    __tablename__ = "audit_finding"
    __table_args__ = (Index(None, "audit_id"),)

    finding_id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    audit_id: Mapped[UUID] = mapped_column(ForeignKey("audit_run.audit_id", ondelete="CASCADE"))
    kind: Mapped[str]
    location: Mapped[str | None]
    subject: Mapped[str]
    expected: Mapped[str]
    found: Mapped[str]
    sentence: Mapped[str]
