"""Verbs of audits. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import NAMESPACE_URL, UUID, uuid5

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.errors import NotFound
from awan.kit.ids import new_id
from awan.operations import Operation, begin
from awan.reconcile.models import AuditFinding, AuditRun
from awan.reconcile.workflows import AUDIT

# Audits run one after the other: two at once would ask every node everything twice.
PARTITION = uuid5(NAMESPACE_URL, "awan:audit")


def begin_audit(session: Session, caller: Caller) -> tuple[AuditRun, Operation]:
    """Enqueues an audit of everything."""
    run = AuditRun(audit_id=new_id(), operation_id=new_id())
    operation = begin(
        session,
        caller=caller,
        plan=AUDIT,
        resource=None,
        resource_kind="audit",
        subject_id=run.audit_id,
        operation_id=run.operation_id,
        partition_key=PARTITION,
    )
    session.add(run)
    session.flush()
    return run, operation


def get_audit(
    session: Session, audit_id: UUID
) -> tuple[AuditRun, Operation, Sequence[AuditFinding]]:
    """An audit, its operation and what it found. Raises: NotFound."""
    run = session.get(AuditRun, audit_id)
    if run is None:
        raise NotFound("Audit not found.")
    return run, session.get_one(Operation, run.operation_id), findings_of(session, audit_id)


def find_last_audit(session: Session) -> AuditRun | None:
    """The newest audit that ended well, or None."""
    return session.scalars(
        select(AuditRun)
        .where(AuditRun.finding_count.is_not(None))
        .order_by(AuditRun.created_at.desc())
        .limit(1)
    ).first()


def findings_of(session: Session, audit_id: UUID) -> Sequence[AuditFinding]:
    """What an audit found, by kind."""
    return session.scalars(
        select(AuditFinding)
        .where(AuditFinding.audit_id == audit_id)
        .order_by(AuditFinding.finding_id)
    ).all()
