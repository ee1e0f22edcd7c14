"""Accounts (tenants), their people, API keys, quotas, rate counters and remembered idempotency keys."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import ForeignKey, LargeBinary, text
from sqlalchemy.dialects.postgresql import ARRAY, CIDR
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, one_of


class AccountKind(StrEnum):
    """Customers own resources; the operator's account holds the keys of the operator's API."""

    CUSTOMER = "customer"
    OPERATOR = "operator"


class AccountState(StrEnum):
    """A suspended account may read, pay and delete; a closed one nothing."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    CLOSED = "closed"


class KeyScope(StrEnum):
    """What an API key may do."""

    READ = "read"
    READ_WRITE = "read_write"
    BILLING = "billing"


class Account(Base):
    """A tenant. Every row a customer owns has an account."""

    __tablename__ = "account"
    __table_args__ = (one_of("kind", AccountKind), one_of("state", AccountState))

    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    kind: Mapped[str] = mapped_column(server_default="customer")
    state: Mapped[str] = mapped_column(server_default="active")
    currency: Mapped[str] = mapped_column(server_default="IDR")
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class ApiKey(Base):
    """A key `awan_<key_id>_<secret>`; only the SHA-256 of the secret is stored. Limits are per minute."""

    __tablename__ = "api_key"
    __table_args__ = (one_of("scope", KeyScope),)

    key_id: Mapped[str] = mapped_column(primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"), index=True)
    name: Mapped[str]
    secret_sha256: Mapped[bytes] = mapped_column(LargeBinary)
    scope: Mapped[str] = mapped_column(server_default="read_write")
    allowed_cidrs: Mapped[list[str] | None] = mapped_column(ARRAY(CIDR))
    reads_per_minute: Mapped[int] = mapped_column(server_default="600")
    writes_per_minute: Mapped[int] = mapped_column(server_default="60")
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))


class Quota(Base):
    """Limits of an account (semantics: semi-hard, raised by the operator). Memory and storage in GiB.

    The row also serves as the lock under which usage is counted and new things are admitted.
    """

    __tablename__ = "quota"

    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"), primary_key=True)
    instances_max: Mapped[int] = mapped_column(server_default="20")
    vcpus_max: Mapped[int] = mapped_column(server_default="64")
    memory_gib_max: Mapped[int] = mapped_column(server_default="256")
    storage_gib_max: Mapped[int] = mapped_column(server_default="4096")
    public_ips_max: Mapped[int] = mapped_column(server_default="20")
    private_networks_max: Mapped[int] = mapped_column(server_default="10")
    ssh_keys_max: Mapped[int] = mapped_column(server_default="50")
    instances_used: Mapped[int] = mapped_column(server_default="0")
    vcpus_used: Mapped[int] = mapped_column(server_default="0")
    memory_gib_used: Mapped[int] = mapped_column(server_default="0")
    storage_gib_used: Mapped[int] = mapped_column(server_default="0")
    public_ips_used: Mapped[int] = mapped_column(server_default="0")
    private_networks_used: Mapped[int] = mapped_column(server_default="0")
    ssh_keys_used: Mapped[int] = mapped_column(server_default="0")


class RateCounter(Base):
    """Calls of one key in one minute; one UPSERT per call.

    Unlogged: its commit waits for no disk, and after a crash of the database the counts may start again.
    """

    __tablename__ = "rate_counter"
    __table_args__ = {"prefixes": ["UNLOGGED"]}  # noqa: RUF012 SQLAlchemy's own form

    key_id: Mapped[str] = mapped_column(primary_key=True)
    bucket: Mapped[str] = mapped_column(primary_key=True)
    minute: Mapped[datetime]
    calls: Mapped[int]


class IdempotencyKey(Base):
    """A remembered mutating call: its request's hash, and status and ids of the answer, never a body with secrets."""

    __tablename__ = "idempotency_key"

    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[bytes] = mapped_column(LargeBinary)
    status: Mapped[int | None]
    message: Mapped[str | None]
    resource_id: Mapped[str | None]
    operation_id: Mapped[UUID | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"), index=True)
