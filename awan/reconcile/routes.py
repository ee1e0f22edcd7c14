"""`/admin/audit`, `/admin/quarantine`, `/admin/trace`: is all as it should be, and what happened to one thing."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends

from awan.accounts import Caller, idempotent, operator
from awan.kit.database import transaction
from awan.kit.http import Answer, EmptyForm, Envelope, OperationView, Request, answer, form_body
from awan.operations import summary, wait_for_end
from awan.operations.models import FINAL, OperationStatus
from awan.reconcile import service
from awan.reconcile.quarantine import list_quarantined
from awan.reconcile.schemas import AuditView, QuarantinedView, TraceView
from awan.reconcile.trace import trace
from awan.settings import get_settings

admin_router = APIRouter()


@admin_router.post("/audit", response_model=Envelope[AuditView])
def begin_audit(
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Compare what the engines have with what the database says, and the database with itself. Changes nothing.

    202 when it takes longer than a moment: ask `GET /admin/audit/{uuid}` until it has ended.
    """
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            audit_id, operation_id = UUID(call.earlier.resource_id), call.earlier.operation_id
            assert operation_id is not None
        else:
            run, operation = service.begin_audit(session, caller)
            audit_id, operation_id = run.audit_id, run.operation_id
            shown = OperationView(**summary(operation))
            call.keep(answer("Audit started", None, operation=shown), audit_id)
    ended = wait_for_end(operation_id, get_settings().operation_wait_s)
    with transaction() as session:
        view = AuditView.of(*service.get_audit(session, audit_id))
    has_ended = OperationStatus(ended.status) in FINAL
    return answer(
        "Audit finished" if has_ended else "Audit started",
        view,
        status=200 if has_ended else 202,
        operation=OperationView(**summary(ended)),
    )


@admin_router.get("/audit/{uuid:uuid}", response_model=Envelope[AuditView])
def get_audit(uuid: UUID, caller: Caller = Depends(operator("read"))) -> Answer:
    """An audit and its findings; none means that all is well."""
    with transaction() as session:
        view = AuditView.of(*service.get_audit(session, uuid))
    return answer("Audit", view)


@admin_router.get("/quarantine", response_model=Envelope[list[QuarantinedView]])
def get_quarantine(caller: Caller = Depends(operator("read"))) -> Answer:
    """Domains, ports and files that no row explains. They are reported here, and never touched."""
    with transaction() as session:
        views = [QuarantinedView.of(row) for row in list_quarantined(session)]
    return answer("Quarantine", views)


@admin_router.get("/trace/{uuid:uuid}", response_model=Envelope[TraceView])
def get_trace(uuid: UUID, caller: Caller = Depends(operator("read"))) -> Answer:
    """Rows, events, operations and their steps of any one thing: instance, address, operation, node, disk, card."""
    with transaction() as session:
        view = TraceView.of(trace(session, uuid))
    return answer("Trace", view)
