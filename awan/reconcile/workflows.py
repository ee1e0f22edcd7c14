"""An audit as durable work: the API never talks to an engine, a worker does.

audit.run    compare -> findings stored
"""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from awan.kit.clock import now
from awan.kit.database import transaction
from awan.operations import Failure, Plan, Step, Target, register
from awan.reconcile.audit import run_audit
from awan.reconcile.models import AuditFinding, AuditRun

AUDIT_TIMEOUT_S = 600.0
# Older runs are forgotten, so that an audit every few minutes does not fill the database.
RUNS_KEPT = 500


def compare(target: Target) -> None:
    """The findings of this moment are stored; those of an interrupted attempt are replaced."""
    findings = run_audit()
    with transaction() as session:
        session.execute(delete(AuditFinding).where(AuditFinding.audit_id == target.subject_id))
        if findings:
            session.execute(
                insert(AuditFinding),
                [{"audit_id": target.subject_id, **asdict(finding)} for finding in findings],
            )


def mark_finished(session: Session, target: Target) -> None:
    """The audit has ended: how many findings it has."""
    run = session.get_one(AuditRun, target.subject_id, with_for_update=True)
    run.finished_at = now()
    run.finding_count = session.scalar(
        select(func.count()).where(AuditFinding.audit_id == target.subject_id)
    )
    kept = select(AuditRun.audit_id).order_by(AuditRun.created_at.desc()).limit(RUNS_KEPT)
    session.execute(
        delete(AuditRun)
        .where(AuditRun.audit_id.not_in(kept), AuditRun.finished_at.is_not(None))
        .execution_options(synchronize_session=False)
    )


def mark_failed(session: Session, target: Target, failure: Failure) -> None:
    """The audit could not be run; the reason stays with its operation."""
    session.get_one(AuditRun, target.subject_id, with_for_update=True).finished_at = now()


AUDIT = register(
    Plan(
        workflow="audit.run.v1",
        kind="audit.run",
        steps=(Step("compare", compare, percent=10, timeout_s=AUDIT_TIMEOUT_S),),
        succeed=mark_finished,
        fail=mark_failed,
        deadline_s=AUDIT_TIMEOUT_S,
    )
)
