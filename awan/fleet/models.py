"""Hypervisor nodes and what is placed on them. Memory in MiB, disk in GiB."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, CheckConstraint, ForeignKey, Index, Integer, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, one_of


class NodeState(StrEnum):
    """A node is probed while `adding`. A cordoned one keeps its instances and takes no new ones.

    While it is `removing`, what is left on it is taken away; it takes nothing new any more. A `lost` one was abandoned:
    nothing is asked of it any more, and should it come back, its domains are stopped.
    """

    ADDING = "adding"
    ACTIVE = "active"
    CORDONED = "cordoned"
    REMOVING = "removing"
    LOST = "lost"
    REMOVED = "removed"


class NodeHealth(StrEnum):
    """Whether the node's libvirt answers. Where it does not, nothing is placed, and nothing is known of the guests."""

    REACHABLE = "reachable"
    UNREACHABLE = "unreachable"


class Node(Base):
    """A hypervisor. Capacity is what the probe found, capped by the operator's values.

    `health` is what the watch over it has found, since `health_since` and (of one that is unreachable) why; `seen_at`
    is its last answer. A node that was abandoned is never taken into service again under its identity (host uuid and
    OVN system-id), also after it was removed.
    `*_used` count what is placed here (`vcpus_used` the shared ones only) and change in one conditional UPDATE.
    """

    __tablename__ = "node"
    __table_args__ = (
        one_of("state", NodeState),
        one_of("health", NodeHealth),
        CheckConstraint(
            "vcpus_used >= 0 AND memory_mib_used >= 0 AND disk_gib_used >= 0", name="used"
        ),
        Index(None, "location_id", "state"),
        Index(
            "uq_node_name",
            "location_id",
            "name",
            unique=True,
            postgresql_where=text("state <> 'removed'"),
        ),
        Index(
            "uq_node_host",
            "libvirt_host_uuid",
            unique=True,
            postgresql_where=text("state <> 'removed'"),
        ),
        Index(
            "uq_node_system",
            "ovn_system_id",
            unique=True,
            postgresql_where=text("state <> 'removed'"),
        ),
    )

    node_id: Mapped[UUID] = mapped_column(primary_key=True)
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    name: Mapped[str]
    libvirt_uri: Mapped[str]
    libvirt_host_uuid: Mapped[UUID | None]
    ovn_system_id: Mapped[str | None]
    mgmt_ip: Mapped[str | None]
    state: Mapped[str] = mapped_column(server_default="active")
    cpu_model: Mapped[str] = mapped_column(server_default="")
    has_kvm: Mapped[bool] = mapped_column(server_default=text("false"))
    cpu_threads_cap: Mapped[int | None]
    memory_mib_cap: Mapped[int | None]
    disk_gib_cap: Mapped[int | None]
    cpu_threads: Mapped[int] = mapped_column(server_default="0")
    memory_mib: Mapped[int] = mapped_column(server_default="0")
    disk_gib: Mapped[int] = mapped_column(server_default="0")
    vcpus_used: Mapped[int] = mapped_column(server_default="0")
    dedicated_threads_used: Mapped[int] = mapped_column(server_default="0")
    memory_mib_used: Mapped[int] = mapped_column(server_default="0")
    disk_gib_used: Mapped[int] = mapped_column(server_default="0")
    facts: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'::jsonb"))
    health: Mapped[str] = mapped_column(server_default="reachable")
    health_since: Mapped[datetime] = mapped_column(server_default=text("now()"))
    health_reason: Mapped[str | None]
    seen_at: Mapped[datetime | None]
    probed_at: Mapped[datetime | None]
    abandoned_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class NodeTier(Base):
    """Which tiers a node serves."""

    __tablename__ = "node_tier"

    node_id: Mapped[UUID] = mapped_column(ForeignKey("node.node_id"), primary_key=True)
    tier_id: Mapped[int] = mapped_column(ForeignKey("tier.tier_id"), primary_key=True)


class NodeImage(Base):
    """A template image that was uploaded to a node."""

    __tablename__ = "node_image"

    node_id: Mapped[UUID] = mapped_column(ForeignKey("node.node_id"), primary_key=True)
    image_id: Mapped[UUID] = mapped_column(
        ForeignKey("template_image.image_id"), primary_key=True, index=True
    )
    uploaded_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class Placement(Base):
    """An instance's reservation on a node: made with the instance, gone when its last trace is."""

    __tablename__ = "placement"
    __table_args__ = (
        UniqueConstraint("instance_id"),
        CheckConstraint(
            "cardinality(threads) = CASE WHEN is_dedicated THEN vcpus ELSE 0 END", name="threads"
        ),
        Index(None, "node_id"),
        Index(None, "account_id"),
    )

    placement_id: Mapped[int] = mapped_column(primary_key=True)
    instance_id: Mapped[UUID]
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    node_id: Mapped[UUID] = mapped_column(ForeignKey("node.node_id"))
    tier_id: Mapped[int] = mapped_column(ForeignKey("tier.tier_id"))
    vcpus: Mapped[int]
    is_dedicated: Mapped[bool]
    # Numbers of the node's threads that are this instance's alone; none when it shares.
    threads: Mapped[list[int]] = mapped_column(ARRAY(Integer), server_default="{}")
    memory_mib: Mapped[int]
    disk_gib: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
