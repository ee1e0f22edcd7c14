"""Wire shapes of audits, traces and the quarantine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from pydantic import BaseModel, Field
from pydantic_core import to_jsonable_python
from sqlalchemy import RowMapping

from awan.kit.http import Timestamp
from awan.operations import Operation
from awan.operations.models import OperationStatus
from awan.operations.runner import outcome_of
from awan.reconcile.models import AuditFinding, AuditRun, Quarantined, StrayKind
from awan.reconcile.trace import Trace, Workflow, columns


class FindingView(BaseModel):
    """One difference: `sentence` says it all, the rest is for programs."""

    kind: str
    location: str | None
    subject: str
    expected: str
    found: str
    sentence: str

    @classmethod
    def of(cls, row: AuditFinding) -> FindingView:
        """The row as it is."""
        return cls(
            kind=row.kind,
            location=row.location,
            subject=row.subject,
            expected=row.expected,
            found=row.found,
            sentence=row.sentence,
        )


class QuarantinedView(BaseModel):
    """Something on an engine that no row explains, seen from `found_at` to `seen_at`. It is left alone."""

    id: int
    location_id: int
    node_uuid: UUID | None
    kind: StrayKind
    subject: str
    sentence: str
    found_at: Timestamp
    seen_at: Timestamp

    @classmethod
    def of(cls, row: Quarantined) -> QuarantinedView:
        """The row as the operator sees it."""
        return cls(
            id=row.quarantined_id,
            location_id=row.location_id,
            node_uuid=row.node_id,
            kind=StrayKind(row.kind),
            subject=row.subject,
            sentence=row.sentence,
            found_at=row.found_at,
            seen_at=row.seen_at,
        )


class AuditView(BaseModel):
    """An audit. `is_green` is null until it has succeeded; a failed one says why in `error`."""

    uuid: UUID
    status: OperationStatus
    is_green: bool | None
    error: str | None
    created_at: Timestamp
    finished_at: Timestamp | None
    findings: list[FindingView]

    @classmethod
    def of(cls, run: AuditRun, operation: Operation, findings: Sequence[AuditFinding]) -> AuditView:
        """The audit as the operator sees it; findings of one that has not succeeded are not shown."""
        has_ended_well = run.finding_count is not None
        return cls(
            uuid=run.audit_id,
            status=OperationStatus(operation.status),
            is_green=run.finding_count == 0 if has_ended_well else None,
            error=operation.error_detail,
            created_at=run.created_at,
            finished_at=run.finished_at,
            findings=[FindingView.of(row) for row in findings] if has_ended_well else [],
        )


class TraceRow(BaseModel):
    """A row of the database; empty columns are left out."""

    table: str
    columns: dict[str, Any]


class TraceEvent(BaseModel):
    """An entry of the event log."""

    at: Timestamp
    kind: str
    actor: str
    operation: UUID | None
    data: dict[str, Any]


class TracePart(BaseModel):
    """A step of a plan that shares a checkpoint with others, as its last execution ran it."""

    name: str
    duration_s: float


class TraceStep(BaseModel):
    """A checkpoint of a workflow: a step of its, or several.

    `result` is what it stored, as text; null when it was nothing. `parts`: the steps that share it, in their order, and
    `failure`: what the last of these ended with, null when with nothing.
    """

    name: str
    started_at: Timestamp | None
    finished_at: Timestamp | None
    duration_s: float | None
    parts: list[TracePart]
    failure: str | None
    result: str | None
    error: str | None

    @classmethod
    def of(cls, row: RowMapping) -> TraceStep:
        """The step's checkpoint."""
        began, ended = row["started_at"], row["completed_at"]
        outcome = outcome_of(row["output"])
        failure = outcome["failure"] if outcome is not None else None
        return cls(
            name=row["function_name"],
            started_at=began,
            finished_at=ended,
            duration_s=round((ended - began).total_seconds(), 3) if began and ended else None,
            parts=[
                TracePart(name=name, duration_s=took_s)
                for name, took_s in (outcome["took_s"] if outcome is not None else {}).items()
            ],
            failure=failure["detail"] if failure is not None else None,
            result=None if row["output"] in (None, "null") else row["output"],
            error=row["error"],
        )


class TraceWorkflow(BaseModel):
    """A durable workflow and the steps it has done."""

    uuid: UUID
    name: str
    status: str
    worker: str | None
    attempts: int
    created_at: Timestamp
    updated_at: Timestamp
    steps: list[TraceStep]

    @classmethod
    def of(cls, workflow: Workflow) -> TraceWorkflow:
        """The workflow as its engine stores it."""
        row = workflow.row
        return cls(
            uuid=UUID(row["workflow_uuid"]),
            name=row["name"],
            status=row["status"],
            worker=row["executor_id"],
            attempts=row["recovery_attempts"] or 0,
            created_at=row["created_at"],
            updated_at=row["updated_at"],
            steps=[TraceStep.of(step) for step in workflow.steps],
        )


class TraceOperation(BaseModel):
    """An operation with the operator's view of its error, and its workflow."""

    uuid: UUID
    kind: str
    status: OperationStatus
    actor: str
    request_id: str
    step: str | None
    percent: int
    error: str | None
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    deadline_at: Timestamp
    alarmed_at: Timestamp | None
    workflow: TraceWorkflow | None

    @classmethod
    def of(cls, row: Operation, workflow: Workflow | None) -> TraceOperation:
        """The operation and what carried it out."""
        return cls(
            uuid=row.operation_id,
            kind=row.kind,
            status=OperationStatus(row.status),
            actor=row.actor,
            request_id=row.request_id,
            step=row.step,
            percent=row.percent,
            error=row.error_detail,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            deadline_at=row.deadline_at,
            alarmed_at=row.alarmed_at,
            workflow=TraceWorkflow.of(workflow) if workflow is not None else None,
        )


class TraceAudit(BaseModel):
    """The last audit that ended, and what it found about this thing: nothing, where it began before the thing was."""

    uuid: UUID
    at: Timestamp
    is_earlier: bool = Field(description="Whether it began before there was this thing.")
    findings: list[FindingView]


class TraceView(BaseModel):
    """All that is known of one thing. `uuid` is the whole that the asked one is a part of."""

    uuid: UUID
    title: str
    rows: list[TraceRow]
    events: list[TraceEvent]
    operations: list[TraceOperation]
    waits: list[TraceWorkflow]
    last_audit: TraceAudit | None

    @classmethod
    def of(cls, found: Trace) -> TraceView:
        """The trace in wire form."""
        audit = found.audit
        return cls(
            uuid=found.subject,
            title=found.title,
            rows=[
                TraceRow(table=row.__tablename__, columns=to_jsonable_python(columns(row)))
                for row in found.rows
            ],
            events=[
                TraceEvent(
                    at=row.created_at,
                    kind=row.kind,
                    actor=row.actor,
                    operation=row.operation_id,
                    data=row.data,
                )
                for row in found.events
            ],
            operations=[TraceOperation.of(row, workflow) for row, workflow in found.operations],
            waits=[TraceWorkflow.of(workflow) for workflow in found.waits],
            last_audit=TraceAudit(
                uuid=audit.audit_id,
                at=audit.finished_at or audit.created_at,
                is_earlier=found.created_at is not None and audit.created_at < found.created_at,
                findings=[FindingView.of(row) for row in found.findings],
            )
            if audit is not None
            else None,
        )
