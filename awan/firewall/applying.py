"""The operation that brings a firewall or a firewall group to the fabric. The caller holds the transaction."""

from __future__ import annotations

from sqlalchemy.orm import Session

from awan.firewall.models import Firewall, FirewallGroup
from awan.firewall.workflows import APPLY, APPLY_GROUP
from awan.operations import Operation, begin
from awan.operations.models import OperationStatus
from awan.operations.service import Requester
from awan.resources import Resource, ResourceKind


def begin_apply(
    session: Session, requester: Requester, resource: Resource, row: Firewall | FirewallGroup
) -> Operation:
    """Begins one for the locked row. `resource` is the firewall's instance, or the group's own."""
    if isinstance(row, FirewallGroup):
        plan, subject_id = APPLY_GROUP, row.group_id
    else:
        plan, subject_id = APPLY, row.firewall_id
    operation = begin(
        session,
        caller=requester,
        plan=plan,
        resource=resource,
        resource_kind=ResourceKind(resource.kind),
        subject_id=subject_id,
        holds_resource=False,
    )
    row.apply_operation_id = operation.operation_id
    session.flush()
    return operation


def ensure_queued(
    session: Session, requester: Requester, resource: Resource, row: Firewall | FirewallGroup
) -> Operation:
    """The one that will read the locked row as it is now: one that is queued already, or a new one."""
    operation = _unfinished(session, row)
    if operation is None or operation.status != OperationStatus.QUEUED:
        # One that runs may have read the row before this change.
        operation = begin_apply(session, requester, resource, row)
    return operation


def begin_pending(
    session: Session, requester: Requester, resource: Resource, row: Firewall | FirewallGroup
) -> Operation | None:
    """Begins one for a locked row that is not applied yet, unless one is about to or under way."""
    if row.applied_revision >= row.wanted_revision or _unfinished(session, row) is not None:
        return None
    return begin_apply(session, requester, resource, row)


def _unfinished(session: Session, row: Firewall | FirewallGroup) -> Operation | None:
    """The operation that was asked for last, if it has not ended.

    Its row is locked: one that is queued can begin, and then read the firewall, only after this transaction.
    """
    if row.apply_operation_id is None:
        return None
    operation = session.get(
        Operation, row.apply_operation_id, with_for_update=True, populate_existing=True
    )
    is_unfinished = operation is not None and operation.status in (
        OperationStatus.QUEUED,
        OperationStatus.RUNNING,
    )
    return operation if is_unfinished else None
