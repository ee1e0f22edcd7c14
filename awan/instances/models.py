"""Instances: what is wanted, what is seen, and what is happening, in three columns."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import ForeignKey, Identity, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, one_of


class DesiredState(StrEnum):
    """What the owner wants."""

    RUNNING = "running"
    STOPPED = "stopped"
    DELETED = "deleted"


class ObservedState(StrEnum):
    """What was last seen of the instance. A paused one holds its memory, and its guest stands still."""

    ABSENT = "absent"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    ERROR = "error"
    DELETED = "deleted"


class CpuMode(StrEnum):
    """Shared CPUs are over-committed with a weight; dedicated ones are pinned."""

    SHARED = "shared"
    DEDICATED = "dedicated"


class Instance(Base):
    """A virtual machine; its uuid is the resource's. Memory in MiB, storage in GiB.

    `status` as the API shows it is computed from desired state, observed state, the active operation and the node's
    health. `crashed_at` is when it was last restarted after a crash.
    `new_password_secret_id` is a password on its way to the guest, by its seed or by its agent; `seed_has_password`:
    the seed sets the password at the next boot, and whether that is over is looked at from `seed_look_at` on (the guest
    sends packets since `seed_heard_at`). `hostname` is what the engines know; while it is changed, the
    resource's name is already the new one. `hostname_is_pending`: the guest takes it at its next boot.
    """

    __tablename__ = "instance"
    __table_args__ = (
        one_of("desired_state", DesiredState),
        one_of("observed_state", ObservedState),
        one_of("cpu_mode", CpuMode),
        Index(None, "account_id", "observed_state"),
        # Asked for by each creation; an account may have thousands.
        Index(None, "account_id", "hostname"),
        Index(None, "node_id"),
        Index(None, "image_id"),
        Index(None, "seed_look_at", postgresql_where=text("seed_has_password")),
    )

    instance_id: Mapped[UUID] = mapped_column(ForeignKey("resource.resource_id"), primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("account.account_id"))
    location_id: Mapped[int] = mapped_column(ForeignKey("location.location_id"))
    tier_id: Mapped[int] = mapped_column(ForeignKey("tier.tier_id"))
    template_id: Mapped[int] = mapped_column(ForeignKey("template.template_id"))
    image_id: Mapped[UUID] = mapped_column(ForeignKey("template_image.image_id"))
    node_id: Mapped[UUID | None] = mapped_column(ForeignKey("node.node_id"))
    hostname: Mapped[str]
    username: Mapped[str]
    vcpus: Mapped[int]
    cpu_mode: Mapped[str]
    memory_mib: Mapped[int]
    storage_gib: Mapped[int]
    desired_state: Mapped[str]
    observed_state: Mapped[str] = mapped_column(server_default="absent")
    status_reason: Mapped[str | None]
    # Indexed: for each secret that is deleted, PostgreSQL looks for the rows that refer to it.
    password_secret_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("secret.secret_id", ondelete="SET NULL"), index=True
    )
    user_data_secret_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("secret.secret_id", ondelete="SET NULL"), index=True
    )
    new_password_secret_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("secret.secret_id", ondelete="SET NULL"), index=True
    )
    new_password_in_seed: Mapped[bool] = mapped_column(server_default=text("false"))
    seed_generation: Mapped[int] = mapped_column(server_default="1")
    seed_has_password: Mapped[bool] = mapped_column(server_default=text("false"))
    seed_look_at: Mapped[datetime | None]
    seed_heard_at: Mapped[datetime | None]
    hostname_is_pending: Mapped[bool] = mapped_column(server_default=text("false"))
    monthly_minor: Mapped[int] = mapped_column(server_default="0")
    currency: Mapped[str]
    create_operation_id: Mapped[UUID]
    holds_quota: Mapped[bool] = mapped_column(server_default=text("true"))
    stop_is_forced: Mapped[bool] = mapped_column(server_default=text("false"))
    releases_ips: Mapped[bool] = mapped_column(server_default=text("false"))
    ready_at: Mapped[datetime | None]
    crashed_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    updated_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    deleted_at: Mapped[datetime | None]


class PublicNetworkChange(Base):
    """What a running operation does to the public address of an instance: from one (or none) to another (or none).

    Until the operation has succeeded, cards and addresses are as before. Then, and when it has failed, this is gone.
    """

    __tablename__ = "public_network_change"
    __table_args__ = (Index(None, "instance_id"),)

    operation_id: Mapped[UUID] = mapped_column(primary_key=True)
    instance_id: Mapped[UUID] = mapped_column(ForeignKey("instance.instance_id"), primary_key=True)
    old_address_id: Mapped[UUID | None] = mapped_column(ForeignKey("address.address_id"))
    new_address_id: Mapped[UUID | None] = mapped_column(ForeignKey("address.address_id"))


class InstanceNote(Base):
    """What operators tell each other about an instance. Never shown to its owner."""

    __tablename__ = "instance_note"
    __table_args__ = (Index(None, "instance_id", "note_id"),)

    note_id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    instance_id: Mapped[UUID] = mapped_column(ForeignKey("instance.instance_id"))
    text: Mapped[str]
    actor: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class CaptureKind(StrEnum):
    """What of a guest is captured: a picture of its screen, or the end of what it printed on its serial console."""

    SCREEN = "screen"
    SERIAL_LOG = "serial_log"


class InstanceCapture(Base):
    """The capture of each kind that was asked for last, for the moment until it is fetched.

    `secret_id` holds the content (a PNG, or bytes of the serial console), in base64, once it was taken.
    """

    __tablename__ = "instance_capture"
    __table_args__ = (one_of("kind", CaptureKind),)

    instance_id: Mapped[UUID] = mapped_column(ForeignKey("instance.instance_id"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    capture_id: Mapped[UUID]
    requested_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]
    secret_id: Mapped[UUID | None] = mapped_column(
        ForeignKey("secret.secret_id", ondelete="SET NULL")
    )
    error_type: Mapped[str | None]


class InstanceSshKey(Base):
    """A key that was installed at creation; kept as it was, also when the credential is deleted."""

    __tablename__ = "instance_ssh_key"

    instance_id: Mapped[UUID] = mapped_column(ForeignKey("instance.instance_id"), primary_key=True)
    ssh_key_id: Mapped[int] = mapped_column(ForeignKey("ssh_key.ssh_key_id"), primary_key=True)
    position: Mapped[int]
