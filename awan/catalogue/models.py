"""What is sold and where: locations and their engines, tiers, templates and their images, sizes, prices."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, one_of


class EngineKind(StrEnum):
    """The engines of a location. It can do without a nameserver: then its addresses have no names."""

    HYPERVISOR = "hypervisor"
    FABRIC = "fabric"
    VOLUMES = "volumes"
    NAMESERVER = "nameserver"


REQUIRED_ENGINES = frozenset(EngineKind) - {EngineKind.NAMESERVER}


class Component(StrEnum):
    """What has a price. Memory, storage, snapshot and backup per GiB; CPUs and licences per vCPU; addresses each."""

    CPU_SHARED = "cpu_shared"
    CPU_DEDICATED = "cpu_dedicated"
    MEMORY = "memory"
    STORAGE = "storage"
    SNAPSHOT = "snapshot"
    BACKUP = "backup"
    PUBLIC_IP = "public_ip"
    LICENSE = "license"


class ImageState(StrEnum):
    """An image is checked before it may be used. Of a removed one, file and copies are gone; the row stays."""

    CHECKING = "checking"
    READY = "ready"
    REFUSED = "refused"
    REMOVING = "removing"
    REMOVED = "removed"


class OsFamily(StrEnum):
    """Families of guest systems."""

    LINUX = "linux"
    WINDOWS = "windows"


class Location(Base):
    """A data centre with its own engines, nodes and storage: the unit of scale."""

    __tablename__ = "location"
    __table_args__ = (
        Index(
            "uq_location_default", "is_default", unique=True, postgresql_where=text("is_default")
        ),
    )

    location_id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    code: Mapped[str] = mapped_column(unique=True)
    country: Mapped[str]
    is_default: Mapped[bool] = mapped_column(server_default=text("false"))
    is_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class LocationEngine(Base):
    """Which driver serves an engine of a location, and how to reach it. `options` is validated per driver.

    The secret ones among them are in `secret_id`, as JSON.
    """

    __tablename__ = "location_engine"
    __table_args__ = (one_of("kind", EngineKind),)

    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    driver: Mapped[str]
    options: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    secret_id: Mapped[UUID | None] = mapped_column(ForeignKey("secret.secret_id"))


class Tier(Base):
    """A class of servers. Limits bound what a customer may order; ratios say how far a node is over-committed.

    Memory in MiB, storage in GiB; ratios in percent (400 = four vCPUs per hardware thread).
    """

    __tablename__ = "tier"
    __table_args__ = (
        CheckConstraint("offers_shared OR offers_dedicated", name="offers_something"),
        CheckConstraint("cpu_min <= cpu_max AND memory_mib_min <= memory_mib_max", name="limits"),
    )

    tier_id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    description: Mapped[str] = mapped_column(server_default="")
    cpu_model: Mapped[str]
    offers_shared: Mapped[bool] = mapped_column(server_default=text("true"))
    offers_dedicated: Mapped[bool] = mapped_column(server_default=text("false"))
    cpu_min: Mapped[int] = mapped_column(server_default="1")
    cpu_max: Mapped[int] = mapped_column(server_default="16")
    memory_mib_min: Mapped[int] = mapped_column(server_default="1024")
    memory_mib_max: Mapped[int] = mapped_column(server_default="65536")
    storage_gib_min: Mapped[int] = mapped_column(server_default="20")
    storage_gib_max: Mapped[int] = mapped_column(server_default="1000")
    storage_gib_step: Mapped[int] = mapped_column(server_default="10")
    cpu_overcommit_percent: Mapped[int] = mapped_column(server_default="400")
    memory_overcommit_percent: Mapped[int] = mapped_column(server_default="100")
    storage_overcommit_percent: Mapped[int] = mapped_column(server_default="100")
    is_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class TierLocation(Base):
    """In which locations a tier is offered."""

    __tablename__ = "tier_location"

    tier_id: Mapped[int] = mapped_column(ForeignKey("tier.tier_id"), primary_key=True)
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"), primary_key=True)


class Template(Base):
    """A system that can be installed: the product. Its builds are `template_image` rows.

    The row of a removed one stays, because instances of the past refer to it.
    """

    __tablename__ = "template"
    __table_args__ = (
        one_of("family", OsFamily),
        Index(
            "uq_template_name_version",
            "name",
            "version",
            unique=True,
            postgresql_where=text("removed_at IS NULL"),
        ),
    )

    template_id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[str]
    family: Mapped[str] = mapped_column(server_default="linux")
    logo: Mapped[str] = mapped_column(server_default="")
    default_username: Mapped[str] = mapped_column(server_default="root")
    cpu_min: Mapped[int] = mapped_column(server_default="1")
    memory_mib_min: Mapped[int] = mapped_column(server_default="512")
    storage_gib_min: Mapped[int] = mapped_column(server_default="1")
    license_monthly_minor: Mapped[int] = mapped_column(server_default="0")
    is_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    is_deprecated: Mapped[bool] = mapped_column(server_default=text("false"))
    removal_operation_id: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    removed_at: Mapped[datetime | None]


class TemplateImage(Base):
    """An immutable build of a template, content-addressed. Sizes in bytes; a customer gets the newest ready one.

    `refusal` says why it was refused, or why its last removal failed. Two builds may have the same content, and then
    share file and copies.
    """

    __tablename__ = "template_image"
    __table_args__ = (
        one_of("state", ImageState),
        Index(None, "template_id", "state", "created_at"),
    )

    image_id: Mapped[UUID] = mapped_column(primary_key=True)
    template_id: Mapped[int] = mapped_column(ForeignKey("template.template_id"))
    state: Mapped[str] = mapped_column(server_default="checking")
    declared_format: Mapped[str]
    format: Mapped[str | None]
    sha256: Mapped[str | None]
    size_bytes: Mapped[int | None]
    virtual_size_bytes: Mapped[int | None]
    has_agent: Mapped[bool] = mapped_column(server_default=text("false"))
    refusal: Mapped[str | None]
    removal_operation_id: Mapped[UUID | None] = mapped_column(index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class Size(Base):
    """A suggested size ("size template"). Memory and storage in GiB, as the API shows them."""

    __tablename__ = "size"

    size_id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)
    cpu: Mapped[int]
    memory_gib: Mapped[int]
    storage_gib: Mapped[int]
    is_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    updated_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class Price(Base):
    """A component's price in a tier from a moment on, in minor units a month. Rows are never changed."""

    __tablename__ = "price"
    __table_args__ = (
        one_of("component", Component),
        CheckConstraint("monthly_minor >= 0", name="not_negative"),
        UniqueConstraint("tier_id", "component", "currency", "valid_from"),
    )

    price_id: Mapped[int] = mapped_column(primary_key=True)
    tier_id: Mapped[int] = mapped_column(ForeignKey("tier.tier_id"))
    component: Mapped[str]
    currency: Mapped[str]
    monthly_minor: Mapped[int]
    valid_from: Mapped[datetime]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
