"""One row per thing that a customer owns."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, one_of


class ResourceKind(StrEnum):
    """What can be owned."""

    FIREWALL_GROUP = "firewall_group"
    INSTANCE = "instance"
    PRIVATE_NETWORK = "private_network"
    PUBLIC_IP = "public_ip"
    SSH_KEY = "ssh_key"
    WEBHOOK = "webhook"


class Resource(Base):
    """Ownership, name, labels and what is happening to a thing. Its own table has the same uuid as key.

    `active_operation_id` is set while an operation changes the thing and cleared when it ends.
    """

    __tablename__ = "resource"
    __table_args__ = (
        one_of("kind", ResourceKind),
        Index(
            "uq_resource_live_instance_name",
            "account_id",
            text("lower(name)"),
            unique=True,
            postgresql_where=text("kind = 'instance' AND deleted_at IS NULL"),
        ),
        Index(
            "uq_resource_live_ssh_key_name",
            "account_id",
            "name",
            unique=True,
            postgresql_where=text("kind = 'ssh_key' AND deleted_at IS NULL"),
        ),
        Index(
            "uq_resource_live_private_network_name",
            "account_id",
            "location_id",
            "name",
            unique=True,
            postgresql_where=text("kind = 'private_network' AND deleted_at IS NULL"),
        ),
        Index(
            "uq_resource_live_firewall_group_name",
            "account_id",
            "location_id",
            "name",
            unique=True,
            postgresql_where=text("kind = 'firewall_group' AND deleted_at IS NULL"),
        ),
        Index(
            "ix_resource_live",
            "account_id",
            "kind",
            "created_at",
            "resource_id",
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index("ix_resource_active_operation_id", "active_operation_id"),
    )

    resource_id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str]
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    location_id: Mapped[int | None] = mapped_column(ForeignKey("location.location_id"))
    name: Mapped[str]
    labels: Mapped[dict[str, str]] = mapped_column(server_default=text("'{}'::jsonb"))
    is_protected: Mapped[bool] = mapped_column(server_default=text("false"))
    created_by_operation_id: Mapped[UUID | None]
    active_operation_id: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    deleted_at: Mapped[datetime | None]
