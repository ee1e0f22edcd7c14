"""Wire shapes of operations."""

from __future__ import annotations

from typing import Self
from uuid import UUID

from pydantic import BaseModel, Field

from awan.kit.http import Timestamp
from awan.kit.pagination import LIMIT_DEFAULT, LIMIT_MAX, PageInfo
from awan.operations.models import Operation, OperationStatus


class OperationQuery(BaseModel):
    """Which operations."""

    status: OperationStatus | None = Field(None, description="Only operations in this state.")
    resource: UUID | None = Field(None, description="Only operations on this thing.")
    kind: str | None = Field(
        None, max_length=64, description="Only operations of this kind, such as `instance.create`."
    )
    page: int = Field(1, ge=1, le=1_000_000, description="Number of page.")
    limit: int = Field(LIMIT_DEFAULT, ge=1, le=LIMIT_MAX, description="Operations per page.")


class OperationResource(BaseModel):
    """What the operation works on."""

    kind: str
    uuid: UUID | None


class OperationError(BaseModel):
    """Why the operation failed: one of the API's error types, and a sentence."""

    type: str
    message: str


class OperationDetail(BaseModel):
    """One operation. `step` and `percent` tell how far it is; `error` is set when it failed or was cancelled."""

    uuid: UUID
    kind: str
    status: OperationStatus
    resource: OperationResource
    step: str | None
    percent: int
    error: OperationError | None
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None

    @classmethod
    def of(cls, row: Operation) -> Self:
        """The operation as its owner sees it; an engine's own words are not in it."""
        error = None
        if row.error_type is not None:
            error = OperationError(type=row.error_type, message=row.error_message or "")
        return cls(
            uuid=row.operation_id,
            kind=row.kind,
            status=OperationStatus(row.status),
            resource=OperationResource(kind=row.resource_kind, uuid=row.resource_id),
            step=row.step,
            percent=row.percent,
            error=error,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
        )


class OperationList(BaseModel):
    """A page of operations."""

    data: list[OperationDetail]
    page: PageInfo
