"""Operations: everything that takes time, and the workers that carry it out."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base, hold_to_moves, one_of


class OperationStatus(StrEnum):
    """States of an operation."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({OperationStatus.SUCCEEDED, OperationStatus.FAILED, OperationStatus.CANCELLED})
MOVES: dict[OperationStatus, frozenset[OperationStatus]] = {
    OperationStatus.QUEUED: frozenset(
        {OperationStatus.RUNNING, OperationStatus.CANCELLED, OperationStatus.FAILED}
    ),
    OperationStatus.RUNNING: FINAL,
    OperationStatus.SUCCEEDED: frozenset(),
    OperationStatus.FAILED: frozenset(),
    OperationStatus.CANCELLED: frozenset(),
}


class Operation(Base):
    """One change that a worker carries out; its id is also the workflow's id.

    `error_message` is one sentence for the customer; what the engine said is in `error_detail`, for the operator.
    `account_id` is null for the operator's own operations (a template's import). `execution` counts how often a worker
    began to carry it out: only the newest one may go on. With `holds_resource` it is the resource's active operation,
    and nothing else is begun on it; others work on a part of it, beside whatever is done to the whole.
    """

    __tablename__ = "operation"
    __table_args__ = (
        one_of("status", OperationStatus),
        Index("ix_operation_account_id_created_at", "account_id", "created_at", "operation_id"),
        Index("ix_operation_resource_id_created_at", "resource_id", "created_at"),
        Index(
            "ix_operation_unfinished",
            "status",
            "deadline_at",
            postgresql_where=text("status IN ('queued', 'running')"),
        ),
    )

    operation_id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str]
    resource_id: Mapped[UUID | None]
    resource_kind: Mapped[str]
    account_id: Mapped[UUID | None] = mapped_column(ForeignKey("account.account_id"))
    actor: Mapped[str]
    request_id: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="queued")
    step: Mapped[str | None]
    percent: Mapped[int] = mapped_column(server_default="0")
    error_type: Mapped[str | None]
    error_message: Mapped[str | None]
    error_detail: Mapped[str | None]
    cancel_requested_at: Mapped[datetime | None]
    execution: Mapped[int] = mapped_column(server_default="0")
    holds_resource: Mapped[bool] = mapped_column(server_default=text("true"))
    deadline_at: Mapped[datetime]
    alarmed_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=text("now()"))
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


hold_to_moves(Operation.status, MOVES)


class Worker(Base):
    """Heartbeat of a worker process; `executor_id` is what the workflow engine knows it by."""

    __tablename__ = "worker"

    executor_id: Mapped[str] = mapped_column(primary_key=True)
    hostname: Mapped[str]
    pid: Mapped[int]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime] = mapped_column(index=True)
