"""Network cards, address pools and addresses."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from uuid import UUID

from sqlalchemy import ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, CIDR, INET
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, hold_to_moves, one_of


class AddressState(StrEnum):
    """`available` in the pool; `free` = owned and unused; `quarantine` = released, not yet for another tenant."""

    AVAILABLE = "available"
    FREE = "free"
    ATTACHED = "attached"
    QUARANTINE = "quarantine"
    RESERVED = "reserved"


ADDRESS_MOVES: dict[AddressState, frozenset[AddressState]] = {
    AddressState.AVAILABLE: frozenset(
        {AddressState.FREE, AddressState.ATTACHED, AddressState.RESERVED}
    ),
    AddressState.FREE: frozenset({AddressState.ATTACHED, AddressState.QUARANTINE}),
    AddressState.ATTACHED: frozenset({AddressState.FREE, AddressState.QUARANTINE}),
    AddressState.QUARANTINE: frozenset(
        {AddressState.AVAILABLE, AddressState.FREE, AddressState.ATTACHED}
    ),
    AddressState.RESERVED: frozenset({AddressState.AVAILABLE}),
}


class NicRole(StrEnum):
    """Which side a card is on."""

    PUBLIC = "public"


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


class Nic(Base):
    """A network card of an instance; its uuid is the port's name in the fabric."""

    __tablename__ = "nic"
    __table_args__ = (
        one_of("role", NicRole),
        Index(None, "instance_id"),
        Index(None, "location_id"),
    )

    nic_id: Mapped[UUID] = mapped_column(primary_key=True)
    instance_id: Mapped[UUID]
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    role: Mapped[str]
    mac: Mapped[str] = mapped_column(unique=True)
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


hold_to_moves(Address.state, ADDRESS_MOVES)
