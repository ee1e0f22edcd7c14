"""Firewalls, their rules, and the sets of addresses that rules refer to."""

from __future__ import annotations

from datetime import datetime
from ipaddress import IPv4Network, IPv6Network
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Identity, Index, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import CIDR, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from awan.engines.fabric.firewall import Direction, RuleAction, RuleProtocol
from awan.kit.database import Base, one_of


class Firewall(Base):
    """The firewall of an instance, made and deleted with it.

    Three revisions tell how far a change has come: `wanted_revision` rises in the transaction of each change,
    `pushed_revision` is the one that was committed to the fabric, `applied_revision` the one that the nodes confirmed.
    `apply_operation_id` is the operation that was last asked to bring it there.
    """

    __tablename__ = "firewall"
    __table_args__ = (
        one_of("policy", RuleAction),
        one_of("outbound_policy", RuleAction),
        CheckConstraint(
            "applied_revision <= pushed_revision AND pushed_revision <= wanted_revision",
            name="revisions",
        ),
        Index(
            "ix_firewall_pending",
            "location_id",
            postgresql_where=text("applied_revision < wanted_revision AND deleted_at IS NULL"),
        ),
    )

    firewall_id: Mapped[UUID] = mapped_column(primary_key=True)
    instance_id: Mapped[UUID] = mapped_column(ForeignKey("resource.resource_id"), unique=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    policy: Mapped[str] = mapped_column(server_default="ACCEPT")
    outbound_policy: Mapped[str] = mapped_column(server_default="ACCEPT")
    apply_to_private: Mapped[bool] = mapped_column(server_default=text("false"))
    wanted_revision: Mapped[int] = mapped_column(server_default="1")
    pushed_revision: Mapped[int] = mapped_column(server_default="0")
    applied_revision: Mapped[int] = mapped_column(server_default="0")
    apply_operation_id: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    deleted_at: Mapped[datetime | None]


class Ipset(Base):
    """A set of addresses of one firewall."""

    __tablename__ = "ipset"
    __table_args__ = (UniqueConstraint("firewall_id", "name"),)

    ipset_id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    firewall_id: Mapped[UUID] = mapped_column(ForeignKey("firewall.firewall_id"))
    name: Mapped[str]
    description: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class IpsetEntry(Base):
    """An address or prefix in a set, without host bits."""

    __tablename__ = "ipset_entry"
    __table_args__ = (UniqueConstraint("ipset_id", "cidr"),)

    entry_id: Mapped[UUID] = mapped_column(primary_key=True)
    ipset_id: Mapped[int] = mapped_column(ForeignKey("ipset.ipset_id", ondelete="CASCADE"))
    cidr: Mapped[IPv4Network | IPv6Network] = mapped_column(CIDR)
    description: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class Rule(Base):
    """A rule. Positions of a firewall are 1, 2, 3 ... without gaps; the firewall's lock keeps them so.

    `port_first` and `port_last` are null for every port, `icmp_type` for every type. A peer is an `ipset_id`, a `peer`
    or (both null) anybody.
    """

    __tablename__ = "firewall_rule"
    __table_args__ = (
        one_of("direction", Direction),
        one_of("protocol", RuleProtocol),
        one_of("action", RuleAction),
        Index(None, "firewall_id", "position"),
        Index(None, "ipset_id"),
    )

    rule_id: Mapped[UUID] = mapped_column(primary_key=True)
    firewall_id: Mapped[UUID] = mapped_column(ForeignKey("firewall.firewall_id"))
    position: Mapped[int]
    direction: Mapped[str]
    protocol: Mapped[str]
    port_first: Mapped[int | None]
    port_last: Mapped[int | None]
    icmp_type: Mapped[int | None]
    ipset_id: Mapped[int | None] = mapped_column(ForeignKey("ipset.ipset_id"))
    peer: Mapped[IPv4Network | IPv6Network | None] = mapped_column(CIDR)
    action: Mapped[str]
    description: Mapped[str]
    is_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class FirewallTrial(Base):
    """While it is there, what was changed goes back to `before` at `ends_at`."""

    __tablename__ = "firewall_trial"

    firewall_id: Mapped[UUID] = mapped_column(ForeignKey("firewall.firewall_id"), primary_key=True)
    before: Mapped[dict[str, Any]]
    ends_at: Mapped[datetime] = mapped_column(index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class FirewallGroup(Base):
    """Rules that firewalls of a location share. Revisions as in `Firewall`.

    `rules` are in the order in which they are tried, in the form of `groups.as_stored`. Instances that have all
    `member_labels` are behind the group, too; with none it is for those alone that it is attached to.
    """

    __tablename__ = "firewall_group"
    __table_args__ = (
        CheckConstraint(
            "applied_revision <= pushed_revision AND pushed_revision <= wanted_revision",
            name="revisions",
        ),
        Index(None, "account_id", "location_id", postgresql_where=text("deleted_at IS NULL")),
    )

    group_id: Mapped[UUID] = mapped_column(ForeignKey("resource.resource_id"), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    description: Mapped[str]
    rules: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    member_labels: Mapped[dict[str, str]]
    wanted_revision: Mapped[int] = mapped_column(server_default="1")
    pushed_revision: Mapped[int] = mapped_column(server_default="0")
    applied_revision: Mapped[int] = mapped_column(server_default="0")
    apply_operation_id: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    deleted_at: Mapped[datetime | None]


class FirewallAttachment(Base):
    """A group that a firewall has; `position` is its place among them, from 1."""

    __tablename__ = "firewall_attachment"
    __table_args__ = (Index(None, "group_id"),)

    firewall_id: Mapped[UUID] = mapped_column(ForeignKey("firewall.firewall_id"), primary_key=True)
    group_id: Mapped[UUID] = mapped_column(ForeignKey("firewall_group.group_id"), primary_key=True)
    position: Mapped[int]
