"""SSH public keys of accounts."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base


class SshKey(Base):
    """A public key. Immutable; a deleted key stays as a row, because instances tell which keys they got."""

    __tablename__ = "ssh_key"
    __table_args__ = (
        Index(
            "uq_ssh_key_live_fingerprint",
            "account_id",
            "fingerprint",
            unique=True,
            postgresql_where=text("deleted_at IS NULL"),
        ),
    )

    ssh_key_id: Mapped[int] = mapped_column(primary_key=True)
    resource_id: Mapped[UUID] = mapped_column(ForeignKey("resource.resource_id"), unique=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    title: Mapped[str]
    key: Mapped[str]
    type: Mapped[str]
    fingerprint: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    deleted_at: Mapped[datetime | None]
