"""Everything that the database knows of one thing: its rows, its history, its operations and their steps.

Read-only, and without asking an engine: what the engines have is told by the last audit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, inspect, or_, select, text
from sqlalchemy.orm import Session

from awan.catalogue.models import TemplateImage
from awan.credentials.models import SshKey
from awan.errors import NotFound
from awan.events.models import Event
from awan.firewall.models import Firewall, Rule
from awan.firewall.service import firewall_id_of
from awan.fleet.models import Node, Placement
from awan.instances.models import Instance
from awan.kit.database import Base
from awan.kit.ids import derived_id
from awan.ledger.models import LockedPrice, UsageSpan
from awan.networks.models import Address, Nic
from awan.operations import Operation
from awan.reconcile.models import AuditFinding, AuditRun
from awan.reconcile.service import find_last_audit, findings_of
from awan.resources import Resource
from awan.volumes import Volume

# Newest first, and bounded: a trace is one page, not an export.
EVENTS_MAX = 100
OPERATIONS_MAX = 50
ROWS_MAX = 200

_WORKFLOWS = text(
    """
    SELECT workflow_uuid, name, status, executor_id, recovery_attempts, queue_name,
        to_timestamp(created_at / 1000.0) AS created_at,
        to_timestamp(updated_at / 1000.0) AS updated_at
    FROM dbos.workflow_status WHERE workflow_uuid = ANY (:ids) ORDER BY created_at
    """
)
_STEPS = text(
    """
    SELECT workflow_uuid, function_id, function_name, output, error,
        to_timestamp(started_at_epoch_ms / 1000.0) AS started_at,
        to_timestamp(completed_at_epoch_ms / 1000.0) AS completed_at
    FROM dbos.operation_outputs WHERE workflow_uuid = ANY (:ids)
    ORDER BY workflow_uuid, function_id
    """
)
# The partition of a workflow is the thing it works on, also where the thing is no customer's resource.
_OF_SUBJECT = text(
    "SELECT CAST(workflow_uuid AS uuid) FROM dbos.workflow_status"
    " WHERE queue_partition_key = :subject ORDER BY created_at DESC LIMIT :most"
)


@dataclass(frozen=True)
class Workflow:
    """A workflow as its engine stores it, with the steps it has done."""

    row: RowMapping
    steps: Sequence[RowMapping]


@dataclass(frozen=True)
class Trace:
    """What is known of `subject`: `title` says what it is. Events and operations are oldest first.

    `created_at`: since when it is there, None where no row says so.
    """

    subject: UUID
    title: str
    created_at: datetime | None
    rows: Sequence[Base]
    events: Sequence[Event]
    operations: Sequence[tuple[Operation, Workflow | None]]
    waits: Sequence[Workflow]
    audit: AuditRun | None
    findings: Sequence[AuditFinding]


def trace(session: Session, uuid: UUID) -> Trace:
    """What is known of the thing with this uuid, of any kind; a part of an instance leads to the whole instance.

    Raises: NotFound when nothing has it.
    """
    subject = _owner_of(session, uuid)
    title, rows = _rows(session, subject)
    instances = [row for row in rows if isinstance(row, Instance)]
    operations = _operations(session, subject)
    wait_ids = [derived_id(row.create_operation_id, "first_boot") for row in instances]
    workflows = _workflows(session, [*(row.operation_id for row in operations), *wait_ids])
    audit = find_last_audit(session)
    events = session.scalars(
        select(Event)
        .where(
            or_(
                Event.resource_id == subject,
                Event.operation_id.in_([row.operation_id for row in operations]),
            )
        )
        .order_by(Event.event_id.desc())
        .limit(EVENTS_MAX)
    ).all()
    return Trace(
        subject=subject,
        title=title,
        created_at=next(
            (row.created_at for row in [*rows, *operations] if hasattr(row, "created_at")), None
        ),
        rows=rows,
        events=events[::-1],
        operations=[(row, workflows.get(row.operation_id)) for row in operations],
        waits=[workflows[wait] for wait in wait_ids if wait in workflows],
        audit=audit,
        findings=_findings(session, audit, subject, rows),
    )


def _owner_of(session: Session, uuid: UUID) -> UUID:
    """The thing that `uuid` is a part of, or itself."""
    if session.get(Resource, uuid) is not None:
        return uuid
    operation = session.get(Operation, uuid)
    if operation is not None and operation.resource_id is not None:
        return operation.resource_id
    part = session.get(Nic, uuid) or session.get(Volume, uuid)
    if part is not None and part.instance_id is not None:
        return part.instance_id
    address = session.get(Address, uuid)
    if address is not None and address.resource_id is not None:
        return address.resource_id
    return uuid


def _rows(session: Session, subject: UUID) -> tuple[str, list[Base]]:
    """What the thing is, and its rows: its own first, then what hangs on it."""
    resource = session.get(Resource, subject)
    if resource is not None:
        rows = [resource, *_rows_of_resource(session, subject)]
        return f"{resource.kind} {resource.name}", rows
    for kind, model in (
        ("operation", Operation),
        ("node", Node),
        ("template image", TemplateImage),
        ("address", Address),
        ("card", Nic),
        ("disk", Volume),
        ("audit", AuditRun),
    ):
        row = session.get(model, subject)
        if row is not None:
            # An operation is shown with its steps, not as a row.
            return kind, [row] if kind != "operation" else []
    raise NotFound("Nothing has this uuid.")


def _rows_of_resource(session: Session, subject: UUID) -> list[Base]:
    cards = select(Nic.nic_id).where(Nic.instance_id == subject)
    queries = (
        select(Instance).where(Instance.instance_id == subject),
        select(SshKey).where(SshKey.resource_id == subject),
        select(Placement).where(Placement.instance_id == subject),
        select(Volume).where(Volume.instance_id == subject).order_by(Volume.created_at),
        select(Nic).where(Nic.instance_id == subject).order_by(Nic.created_at),
        select(Firewall).where(Firewall.instance_id == subject),
        select(Rule).where(Rule.firewall_id == firewall_id_of(subject)).order_by(Rule.position),
        select(Address)
        .where(or_(Address.resource_id == subject, Address.nic_id.in_(cards)))
        .order_by(Address.family, Address.inet),
        select(LockedPrice)
        .where(LockedPrice.resource_id == subject)
        .order_by(LockedPrice.component),
        select(UsageSpan)
        .where(UsageSpan.resource_id == subject)
        .order_by(UsageSpan.span_id.desc()),
    )
    return [row for query in queries for row in session.scalars(query.limit(ROWS_MAX))]


def _operations(session: Session, subject: UUID) -> list[Operation]:
    ids = session.scalars(_OF_SUBJECT, {"subject": str(subject), "most": OPERATIONS_MAX}).all()
    rows = session.scalars(
        select(Operation)
        .where(
            or_(
                Operation.resource_id == subject,
                Operation.operation_id == subject,
                Operation.operation_id.in_(ids),
            )
        )
        .order_by(Operation.created_at.desc())
        .limit(OPERATIONS_MAX)
    ).all()
    return list(rows[::-1])


def _workflows(session: Session, ids: Iterable[UUID]) -> dict[UUID, Workflow]:
    named = {"ids": [str(wanted) for wanted in ids]}
    steps: dict[str, list[RowMapping]] = {}
    for step in session.execute(_STEPS, named).mappings():
        steps.setdefault(step["workflow_uuid"], []).append(step)
    return {
        UUID(row["workflow_uuid"]): Workflow(row, steps.get(row["workflow_uuid"], []))
        for row in session.execute(_WORKFLOWS, named).mappings()
    }


def _findings(
    session: Session, audit: AuditRun | None, subject: UUID, rows: Sequence[Base]
) -> list[AuditFinding]:
    """What the last audit found about the thing or a part of it; files are named after their uuids."""
    if audit is None:
        return []
    ids = {str(subject)}
    for row in rows:
        identity = inspect(row, raiseerr=True).identity or ()
        ids |= {str(key) for key in identity if isinstance(key, UUID)}
    return [
        finding
        for finding in findings_of(session, audit.audit_id)
        if any(uuid in finding.subject for uuid in ids)
    ]


def columns(row: Base) -> dict[str, Any]:
    """A row's columns by name, without those that are empty."""
    values = {name: getattr(row, name) for name in inspect(type(row)).column_attrs.keys()}  # noqa: SIM118
    return {name: value for name, value in values.items() if value is not None}
