"""Beginning, cancelling and describing operations. Inside the caller's transaction, but `is_cancel_requested`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import Select, func, select, update
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from awan.errors import Conflict, NotFound, Unavailable
from awan.events import record
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.ids import new_id
from awan.kit.pagination import PageRequest
from awan.operations import durable
from awan.operations.models import FINAL, Operation, OperationStatus
from awan.operations.plans import Plan, Target, is_registered
from awan.resources.models import Resource

BUSY_RETRY_AFTER_S = 5


class Requester(Protocol):
    """Who asks: the caller of the API, or the control plane itself."""

    @property
    def account_id(self) -> UUID | None:
        """The account that acts; None for the control plane itself."""

    @property
    def is_operator(self) -> bool:
        """Whether it acts for the operator rather than for a customer."""

    @property
    def actor(self) -> str:
        """Who acts, as the event log has it."""

    @property
    def request_id(self) -> str:
        """The request this belongs to."""


@dataclass(frozen=True)
class ControlPlane:
    """The control plane itself, under one of its names: it acts for whoever owns the thing."""

    actor: str
    account_id: UUID | None = None
    is_operator: bool = True
    request_id: str = field(default_factory=lambda: new_id().hex)


def begin(
    session: Session,
    *,
    caller: Requester,
    plan: Plan,
    resource: Resource | None,
    resource_kind: str,
    subject_id: UUID,
    operation_id: UUID | None = None,
    partition_key: UUID | None = None,
    queue_behind: bool = False,
    holds_resource: bool = True,
    also: Sequence[Resource] = (),
) -> Operation:
    """Starts a plan when the caller's transaction commits; on rollback nothing of it exists.

    The caller has locked the row of `resource` (FOR UPDATE), and those of `also`, things that the operation holds
    besides and on which nothing may run either: all in the order of their ids. `operation_id` may be given so that
    other ids can be derived from it beforehand. Operations of one `partition_key` (default: the subject) run one after
    the other in the order of their transactions' start.
    A resource that was made for this very operation has it as its active one already.
    Without `holds_resource` it is about a part of the resource: it begins whatever runs on the whole, and does not
    keep anything from being begun there.
    Raises: Conflict (with Retry-After) when another operation runs on the resource, unless `queue_behind`.
    """
    if not is_registered(plan):
        raise ValueError(f"{plan.workflow} is not registered")
    is_new = resource is not None and resource.active_operation_id == operation_id is not None
    if resource is not None and holds_resource and not queue_behind and not is_new:
        refuse_if_busy(session, resource)
    for other in also:
        refuse_if_busy(session, other)
    account_id = None if caller.is_operator else caller.account_id
    operation = Operation(
        operation_id=operation_id or new_id(),
        kind=plan.kind,
        resource_id=resource.resource_id if resource is not None else None,
        resource_kind=resource_kind,
        account_id=resource.account_id if resource is not None else account_id,
        actor=caller.actor,
        request_id=caller.request_id,
        status=OperationStatus.QUEUED.value,
        percent=0,
        holds_resource=holds_resource,
        deadline_at=now() + timedelta(seconds=plan.deadline_s),
        created_at=now(),
    )
    session.add(operation)
    if resource is not None and holds_resource:
        resource.active_operation_id = operation.operation_id
    for other in also:
        other.active_operation_id = operation.operation_id
    session.flush()
    record(
        session,
        kind="operation.queued",
        actor=caller.actor,
        account_id=operation.account_id,
        resource_id=operation.resource_id,
        operation_id=operation.operation_id,
        data={"kind": plan.kind},
    )
    durable.enqueue_operation(
        session, plan.workflow, operation.operation_id, subject_id, partition_key or subject_id
    )
    return operation


def refuse_if_busy(session: Session, resource: Resource) -> None:
    """Raises: Conflict naming the operation that runs on the resource."""
    if resource.active_operation_id is None:
        return
    running = session.get(Operation, resource.active_operation_id)
    if running is None or OperationStatus(running.status) in FINAL:
        return
    raise Conflict(
        f"Another operation is in progress: {running.kind} ({running.operation_id}).",
        retry_after_s=BUSY_RETRY_AFTER_S,
    )


def is_cancel_requested(target: Target) -> bool:
    """Whether the operation shall stop or has ended already: a step that waits asks it once or twice a second.

    In a transaction of its own. While the database is away nobody knows: no.
    """
    try:
        with transaction() as session:
            row = session.execute(
                select(Operation.cancel_requested_at, Operation.status).where(
                    Operation.operation_id == target.operation_id
                )
            ).one()
    except (Unavailable, PoolTimeout):
        return False
    return row.cancel_requested_at is not None or OperationStatus(row.status) in FINAL


def request_cancel(session: Session, operation_id: UUID) -> None:
    """Asks an operation to stop at its next step boundary, or in a wait that asks, and to undo itself.

    Ended or absent: no effect.
    """
    session.execute(
        update(Operation)
        .where(
            Operation.operation_id == operation_id,
            Operation.status.in_([OperationStatus.QUEUED, OperationStatus.RUNNING]),
        )
        .values(cancel_requested_at=func.coalesce(Operation.cancel_requested_at, func.now()))
    )


def enqueue_wait(session: Session, workflow_name: str, workflow_id: str, *args: object) -> None:
    """Starts a waiting workflow (see `waiting_workflow`) when the transaction commits.

    `workflow_id` is derived from what it waits for; a workflow of this id that exists already stays as it is.
    Arguments are ids and small values, never secrets.
    """
    durable.enqueue_waiting(session, workflow_name, workflow_id, *args)


def enqueue_prompt(
    session: Session, workflow_name: str, workflow_id: str, partition_key: UUID, *args: object
) -> None:
    """As `enqueue_wait`, for what somebody waits for: it begins at once, as an operation does, and must be short.

    Those of one `partition_key` run one after the other.
    """
    durable.enqueue_prompt(session, workflow_name, workflow_id, partition_key, *args)


def summary(operation: Operation) -> dict[str, Any]:
    """The operation as it stands beside the data of a changing answer."""
    return {
        "uuid": str(operation.operation_id),
        "kind": operation.kind,
        "status": operation.status,
    }


@dataclass(frozen=True)
class OperationFilter:
    """Which operations a list holds; None means any."""

    status: OperationStatus | None = None
    resource_id: UUID | None = None
    kind: str | None = None


def list_operations(
    session: Session, caller: Requester, wanted: OperationFilter, page: PageRequest
) -> tuple[list[Operation], int]:
    """A page of the caller's operations, newest first, and how many there are in all."""
    query = _visible(caller)
    if wanted.status is not None:
        query = query.where(Operation.status == wanted.status)
    if wanted.resource_id is not None:
        query = query.where(Operation.resource_id == wanted.resource_id)
    if wanted.kind is not None:
        query = query.where(Operation.kind == wanted.kind)
    total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
    newest_first = query.order_by(Operation.created_at.desc(), Operation.operation_id.desc())
    rows = session.scalars(newest_first.limit(page.limit).offset(page.offset)).all()
    return list(rows), total


def get_operation(session: Session, caller: Requester, operation_id: UUID) -> Operation:
    """One of the caller's operations. Raises: NotFound, in the same words when it is another account's."""
    row = session.scalar(_visible(caller).where(Operation.operation_id == operation_id))
    if row is None:
        raise NotFound("Operation not found.")
    return row


def _visible(caller: Requester) -> Select[Operation]:
    query = select(Operation)
    return query if caller.is_operator else query.where(Operation.account_id == caller.account_id)
