"""Network cards, address pools and addresses."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Identity, Index, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, CIDR, INET
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, hold_to_moves, one_of


class AddressState(StrEnum):
    """`available` in the pool; `free` = owned and unused; `quarantine` = released, not yet for another tenant.

    `attached` to a card, or the `gateway` of a private network.
    """

    AVAILABLE = "available"
    FREE = "free"
    ATTACHED = "attached"
    GATEWAY = "gateway"
    QUARANTINE = "quarantine"
    RESERVED = "reserved"


ADDRESS_MOVES: dict[AddressState, frozenset[AddressState]] = {
    AddressState.AVAILABLE: frozenset(
        {AddressState.FREE, AddressState.ATTACHED, AddressState.RESERVED}
    ),
    AddressState.FREE: frozenset(
        {AddressState.ATTACHED, AddressState.GATEWAY, AddressState.QUARANTINE}
    ),
    AddressState.GATEWAY: frozenset({AddressState.FREE}),
    AddressState.ATTACHED: frozenset({AddressState.FREE, AddressState.QUARANTINE}),
    AddressState.QUARANTINE: frozenset(
        {AddressState.AVAILABLE, AddressState.FREE, AddressState.ATTACHED}
    ),
    AddressState.RESERVED: frozenset({AddressState.AVAILABLE}),
}


class PrefixState(StrEnum):
    """As `AddressState`, of routed IPv6 prefixes: an instance has it while it is `assigned`."""

    AVAILABLE = "available"
    ASSIGNED = "assigned"
    QUARANTINE = "quarantine"


PREFIX_MOVES: dict[PrefixState, frozenset[PrefixState]] = {
    PrefixState.AVAILABLE: frozenset({PrefixState.ASSIGNED}),
    PrefixState.ASSIGNED: frozenset({PrefixState.QUARANTINE}),
    PrefixState.QUARANTINE: frozenset({PrefixState.AVAILABLE, PrefixState.ASSIGNED}),
}


class NicRole(StrEnum):
    """Which side a card is on."""

    PUBLIC = "public"
    PRIVATE = "private"


class PrivateNetworkState(StrEnum):
    """`error`: not made, or its gateway could not be changed; the reason is stored."""

    CREATING = "creating"
    ACTIVE = "active"
    UPDATING = "updating"
    DELETING = "deleting"
    ERROR = "error"
    DELETED = "deleted"


class Pool(Base):
    """A public prefix of a location. IPv4 addresses are pre-generated rows; an IPv6 /64 is drawn from as needed."""

    __tablename__ = "pool"
    __table_args__ = (UniqueConstraint("location_id", "cidr"),)

    pool_id: Mapped[int] = mapped_column(primary_key=True)
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    family: Mapped[int]
    cidr: Mapped[IPv4Network | IPv6Network] = mapped_column(CIDR)
    gateway: Mapped[IPv4Address | IPv6Address] = mapped_column(INET)
    physical_network: Mapped[str]
    vlan: Mapped[int | None]
    dns_servers: Mapped[list[IPv4Address | IPv6Address]] = mapped_column(ARRAY(INET))
    is_enabled: Mapped[bool] = mapped_column(server_default=text("true"))
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class PrivateNetwork(Base):
    """A private network ("vswitch"); `resource_id` is its uuid, and its name is the resource's.

    `made_at`: since when the fabric has it. `gateway_address_id` is the public address of its gateway. While that is
    changed, `next_gateway_address_id` is the one to be (none: no gateway) if `is_changing_gateway`; afterwards one that
    the fabric may still hold, which is given free once it does not. `service_ip` is its own in the services network,
    behind which its members ask the location's resolver.
    """

    __tablename__ = "private_network"
    __table_args__ = (
        one_of("state", PrivateNetworkState),
        UniqueConstraint("location_id", "service_ip"),
        Index(None, "account_id", "location_id"),
        Index(None, "location_id"),
    )

    network_id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    resource_id: Mapped[UUID] = mapped_column(ForeignKey("resource.resource_id"), unique=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    cidr: Mapped[IPv4Network] = mapped_column(CIDR)
    state: Mapped[str] = mapped_column(server_default="creating")
    status_reason: Mapped[str | None]
    made_at: Mapped[datetime | None]
    # No foreign keys: addresses refer to cards, and cards to networks. The audit looks.
    gateway_address_id: Mapped[UUID | None]
    next_gateway_address_id: Mapped[UUID | None]
    is_changing_gateway: Mapped[bool] = mapped_column(server_default=text("false"))
    service_ip: Mapped[IPv4Address | None] = mapped_column(INET)
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    deleted_at: Mapped[datetime | None]


class Nic(Base):
    """A network card of an instance; its uuid is the port's name in the fabric.

    A private one has its one address here, unique in its network; `is_leaving` while it is being taken away.
    """

    __tablename__ = "nic"
    __table_args__ = (
        one_of("role", NicRole),
        CheckConstraint(
            "(role = 'private') = (network_id IS NOT NULL)"
            " AND (role = 'private') = (private_ip IS NOT NULL)",
            name="private",
        ),
        Index(
            "uq_nic_private_ip",
            "network_id",
            "private_ip",
            unique=True,
            postgresql_where=text("deleted_at IS NULL"),
        ),
        Index(None, "instance_id"),
        Index(None, "location_id"),
        Index(None, "network_id"),
    )

    nic_id: Mapped[UUID] = mapped_column(primary_key=True)
    instance_id: Mapped[UUID]
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    role: Mapped[str]
    mac: Mapped[str] = mapped_column(unique=True)
    network_id: Mapped[int | None] = mapped_column(ForeignKey("private_network.network_id"))
    private_ip: Mapped[IPv4Address | None] = mapped_column(INET)
    is_leaving: Mapped[bool] = mapped_column(server_default=text("false"))
    operation_id: Mapped[UUID]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    deleted_at: Mapped[datetime | None]


class Address(Base):
    """An address. `previous_account_id` lets a tenant get its own address back while others must wait.

    A public IPv4 that a customer owns is also a resource with the same uuid (`resource_id`).
    `rdns` is the name that its owner gave it, null for the default name; `new_rdns` the one it is getting.
    """

    __tablename__ = "address"
    __table_args__ = (
        one_of("state", AddressState),
        UniqueConstraint("pool_id", "inet"),
        Index(
            "ix_address_available", "pool_id", "inet", postgresql_where=text("state = 'available'")
        ),
        Index(None, "nic_id"),
        Index(None, "account_id", "state"),
    )

    address_id: Mapped[UUID] = mapped_column(primary_key=True)
    pool_id: Mapped[int] = mapped_column(ForeignKey("pool.pool_id"))
    family: Mapped[int]
    inet: Mapped[IPv4Address | IPv6Address] = mapped_column(INET)
    state: Mapped[str] = mapped_column(server_default="available")
    resource_id: Mapped[UUID | None] = mapped_column(ForeignKey("resource.resource_id"))
    account_id: Mapped[UUID | None] = mapped_column(ForeignKey("account.account_id"))
    nic_id: Mapped[UUID | None] = mapped_column(ForeignKey("nic.nic_id"))
    operation_id: Mapped[UUID | None]
    previous_account_id: Mapped[UUID | None]
    quarantined_until: Mapped[datetime | None]
    allocated_at: Mapped[datetime | None]
    rdns: Mapped[str | None]
    new_rdns: Mapped[str | None]


class PrefixPool(Base):
    """IPv6 /64s that the provider's router sends to `router_address`, one for each instance that wants one.

    `router_address` lies in the on-link pool `pool_id`: there a router of ours takes packets on to the instances.
    """

    __tablename__ = "prefix_pool"

    prefix_pool_id: Mapped[int] = mapped_column(primary_key=True)
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    pool_id: Mapped[int] = mapped_column(ForeignKey("pool.pool_id"))
    cidr: Mapped[IPv6Network] = mapped_column(CIDR, unique=True)
    router_address: Mapped[IPv6Address] = mapped_column(INET)
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class RoutedPrefix(Base):
    """A /64 that is, or may be, routed to an instance. Its rows are made with its pool.

    `next_hop` is the instance's own address in the on-link pool. `is_leaving` while it is being taken away: then the
    fabric shall not have it any more. `previous_account_id` and `quarantined_until` as of `Address`.
    """

    __tablename__ = "routed_prefix"
    __table_args__ = (
        one_of("state", PrefixState),
        CheckConstraint(
            "(state = 'assigned') = (instance_id IS NOT NULL)"
            " AND (state = 'assigned') = (account_id IS NOT NULL)"
            " AND (state = 'assigned') = (next_hop IS NOT NULL)",
            name="assigned",
        ),
        Index(
            "ix_routed_prefix_available",
            "prefix_pool_id",
            "cidr",
            postgresql_where=text("state = 'available'"),
        ),
        Index("uq_routed_prefix_instance", "instance_id", unique=True),
    )

    prefix_id: Mapped[UUID] = mapped_column(primary_key=True)
    prefix_pool_id: Mapped[int] = mapped_column(ForeignKey("prefix_pool.prefix_pool_id"))
    cidr: Mapped[IPv6Network] = mapped_column(CIDR, unique=True)
    state: Mapped[str] = mapped_column(server_default="available")
    account_id: Mapped[UUID | None] = mapped_column(ForeignKey("account.account_id"))
    instance_id: Mapped[UUID | None] = mapped_column(ForeignKey("resource.resource_id"))
    next_hop: Mapped[IPv6Address | None] = mapped_column(INET)
    is_leaving: Mapped[bool] = mapped_column(server_default=text("false"))
    operation_id: Mapped[UUID | None]
    previous_account_id: Mapped[UUID | None]
    quarantined_until: Mapped[datetime | None]
    assigned_at: Mapped[datetime | None]


class PrefixName(Base):
    """The name that an owner gave to an address of a routed prefix. Others have none."""

    __tablename__ = "prefix_name"
    __table_args__ = (Index(None, "prefix_id"),)

    inet: Mapped[IPv6Address] = mapped_column(INET, primary_key=True)
    prefix_id: Mapped[UUID] = mapped_column(ForeignKey("routed_prefix.prefix_id"))
    rdns: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class StaleName(Base):
    """An address whose names the nameserver may not have as the rows say: they are pushed, then this is forgotten.

    `marked_at` tells a mark that came while an earlier one was being pushed. The address itself may be gone.
    """

    __tablename__ = "stale_name"
    __table_args__ = (Index(None, "retry_at"),)

    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"), primary_key=True)
    inet: Mapped[IPv4Address | IPv6Address] = mapped_column(INET, primary_key=True)
    marked_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    attempts: Mapped[int] = mapped_column(server_default="0")
    retry_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class StalePrivateNetwork(Base):
    """A private network whose members' names the nameserver may not have as the rows say. As `StaleName`."""

    __tablename__ = "stale_private_network"
    __table_args__ = (Index(None, "retry_at"),)

    network_id: Mapped[int] = mapped_column(
        ForeignKey("private_network.network_id"), primary_key=True, autoincrement=False
    )
    marked_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    attempts: Mapped[int] = mapped_column(server_default="0")
    retry_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


hold_to_moves(Address.state, ADDRESS_MOVES)
hold_to_moves(RoutedPrefix.state, PREFIX_MOVES)
