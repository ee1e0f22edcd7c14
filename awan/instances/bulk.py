"""One power action on many instances, each with its own result.

All begin in the caller's transaction, each in a savepoint of its own: what one of them refuses leaves the others
alone. Instances are locked in the order of their uuids, so that two bulk actions never wait for each other in a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.errors import Invalid, Refused
from awan.instances import guest, service
from awan.instances.rules import parse_label_filter
from awan.instances.schemas import BULK_MAX, BulkAction, BulkError, BulkResult
from awan.kit.http import OperationView
from awan.operations import Operation, summary
from awan.resources import Resource, ResourceKind

Action = Literal["start", "stop", "restart", "reset"]

UNKNOWN = "The selected uuids is invalid."
REFUSED_BEFORE = "Nothing was begun on this instance at the first call."


def act(session: Session, caller: Caller, request: BulkAction) -> list[BulkResult]:
    """Begins the action on each of the instances that it can be begun on; a result for each, in order of uuids.

    Raises: Invalid for unknown uuids and for a label of more than `BULK_MAX` instances.
    """
    begin = _begin(request.action, force=bool(request.force))
    results = []
    for instance_id in _choose(session, caller, request):
        try:
            with session.begin_nested():
                operation = begin(session, caller, instance_id)
            results.append(_begun(instance_id, operation))
        except Refused as refused:
            results.append(_refused(instance_id, refused.type, refused.message))
    return results


def _begin(action: Action, *, force: bool) -> Callable[[Session, Caller, UUID], Operation]:
    if action == "start":
        return service.start
    if action == "reset":
        return guest.reset
    verb = service.stop if action == "stop" else service.restart
    return lambda session, caller, instance_id: verb(session, caller, instance_id, force=force)


def _choose(session: Session, caller: Caller, request: BulkAction) -> list[UUID]:
    live = select(Resource.resource_id).where(
        Resource.kind == ResourceKind.INSTANCE, Resource.deleted_at.is_(None)
    )
    owned = live.where(Resource.account_id == caller.account_id)
    if request.uuids is not None:
        wanted = sorted(set(request.uuids))
        # An operator may name anyone's instances. A label is each account's own.
        nameable = live if caller.is_operator else owned
        known = set(session.scalars(nameable.where(Resource.resource_id.in_(wanted))))
        if len(known) != len(wanted):
            raise Invalid.field("uuids", UNKNOWN)
        return wanted
    assert request.label is not None
    labelled = owned.where(*service.with_labels(parse_label_filter(request.label)))
    found = list(session.scalars(labelled.order_by(Resource.resource_id).limit(BULK_MAX + 1)))
    if len(found) > BULK_MAX:
        raise Invalid.field("label", f"The label is on more than {BULK_MAX} instances.")
    return found


def remember(results: Sequence[BulkResult]) -> str:
    """What a repeat of the call has to know: which instances, and the operations that were begun. Ids only."""
    return " ".join(
        f"{result.uuid}={result.operation.uuid if result.operation is not None else ''}"
        for result in results
    )


def recall(session: Session, remembered: str) -> list[BulkResult]:
    """The results of an earlier call, its operations as they are now."""
    pairs = [pair.partition("=") for pair in remembered.split()]
    operation_ids = [UUID(operation_id) for _, _, operation_id in pairs if operation_id]
    query = select(Operation).where(Operation.operation_id.in_(operation_ids))
    operations = {operation.operation_id: operation for operation in session.scalars(query)}
    return [
        _begun(UUID(instance_id), operations[UUID(operation_id)])
        if operation_id
        else _refused(UUID(instance_id), "INVALID_OPERATION", REFUSED_BEFORE)
        for instance_id, _, operation_id in pairs
    ]


def _begun(instance_id: UUID, operation: Operation) -> BulkResult:
    shown = OperationView(**summary(operation))
    return BulkResult(uuid=instance_id, operation=shown, error=None)


def _refused(instance_id: UUID, kind: str, message: str) -> BulkResult:
    error = BulkError(type=kind, message=message)
    return BulkResult(uuid=instance_id, operation=None, error=error)
