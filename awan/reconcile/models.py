"""Audits that were run, and what they found."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKey, Identity, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base


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
