"""Disks of instances."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, one_of


class VolumeRole(StrEnum):
    """A root disk lives and dies with its instance; a data disk has a life of its own."""

    ROOT = "root"
    DATA = "data"


class VolumeState(StrEnum):
    """`creating` until the engine has it; `deleting` until the engine does not have it any more."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"
    DELETED = "deleted"


class Volume(Base):
    """A disk. Its format is known here and passed explicitly everywhere. Size in GiB."""

    __tablename__ = "volume"
    __table_args__ = (
        one_of("role", VolumeRole),
        one_of("state", VolumeState),
        Index(None, "instance_id"),
        Index(None, "node_id", "state"),
        Index(None, "image_id"),
    )

    volume_id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    instance_id: Mapped[UUID | None]
    node_id: Mapped[UUID | None] = mapped_column(ForeignKey("node.node_id"))
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    image_id: Mapped[UUID | None] = mapped_column(ForeignKey("template_image.image_id"))
    role: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="creating")
    engine: Mapped[str]
    format: Mapped[str]
    size_gib: Mapped[int]
    operation_id: Mapped[UUID]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    deleted_at: Mapped[datetime | None]
