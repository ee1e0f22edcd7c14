"""`/admin/nodes` and `/admin/capacity`: the operator's fleet."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from awan.accounts import Caller, idempotent, operator, replay
from awan.accounts.idempotency import IdempotentCall
from awan.fleet import service
from awan.fleet.capacity import capacity
from awan.fleet.models import Node
from awan.fleet.schemas import NodeCreate, NodeRemoval, NodeView, TierCapacity
from awan.fleet.workflows import ADD, PROBE, REMOVE
from awan.kit.database import transaction
from awan.kit.http import (
    Answer,
    EmptyForm,
    Envelope,
    OperationView,
    Request,
    answer,
    form_body,
)
from awan.operations import Operation, Plan, begin, summary, wait_for_success
from awan.operations.models import OperationStatus
from awan.settings import get_settings

admin_router = APIRouter()


@admin_router.post("/nodes", status_code=201, response_model=Envelope[NodeView])
def add_node(
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: NodeCreate = Depends(form_body(NodeCreate)),
) -> Answer:
    """Add a hypervisor: it is probed (libvirt, chassis, pool) before anything is placed on it."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            node_id = UUID(call.earlier.resource_id)
            operation = session.get_one(Operation, call.earlier.operation_id)
        else:
            node_id = service.insert_node(session, caller, **body.model_dump()).node_id
            operation = _begin(session, caller, call, ADD, node_id)
    return _at_its_end(operation, node_id, "Node added", 201)


@admin_router.get("/nodes", response_model=Envelope[list[NodeView]])
def list_nodes(caller: Caller = Depends(operator("read"))) -> Answer:
    """List nodes."""
    with transaction() as session:
        views = [view_node(session, node) for node in service.list_nodes(session)]
    return answer("Nodes", views)


@admin_router.get("/nodes/{node_uuid:uuid}", response_model=Envelope[NodeView])
def get_node(node_uuid: UUID, caller: Caller = Depends(operator("read"))) -> Answer:
    """Show a node."""
    with transaction() as session:
        view = view_node(session, service.get_node(session, node_uuid))
    return answer("Node details", view)


@admin_router.post("/nodes/{node_uuid:uuid}/probe", response_model=Envelope[NodeView])
def probe_node(
    node_uuid: UUID,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Ask a node again what it is. A host that is not the one that was added is refused."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            operation = session.get_one(Operation, call.earlier.operation_id)
        else:
            service.get_node(session, node_uuid)
            operation = _begin(session, caller, call, PROBE, node_uuid)
    return _at_its_end(operation, node_uuid, "Node probed")


@admin_router.post("/nodes/{node_uuid:uuid}/cordon", response_model=Envelope[NodeView])
def cordon_node(
    node_uuid: UUID,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Place nothing new on a node."""
    return _set_cordon(request, caller, node_uuid, True)


@admin_router.post("/nodes/{node_uuid:uuid}/uncordon", response_model=Envelope[NodeView])
def uncordon_node(
    node_uuid: UUID,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Place instances on a node again."""
    return _set_cordon(request, caller, node_uuid, False)


def _set_cordon(request: Request, caller: Caller, node_id: UUID, cordoned: bool) -> Answer:
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, view_node(session, session.get_one(Node, node_id)))
        view = view_node(session, service.set_cordon(session, caller, node_id, cordoned))
        return call.keep(answer("Node cordoned" if cordoned else "Node uncordoned", view), node_id)


@admin_router.delete("/nodes/{node_uuid:uuid}", response_model=Envelope[NodeView])
def remove_node(
    node_uuid: UUID,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: NodeRemoval = Depends(form_body(NodeRemoval, or_query=True)),
) -> Answer:
    """Remove a node on which nothing is placed; the copies of template images on it go too.

    When they cannot be removed, the node stays, cordoned. One that will never answer again is removed with `lost`.
    """
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            operation = session.get(Operation, call.earlier.operation_id)
        elif body.lost:
            service.forget_lost_node(session, caller, node_uuid)
            operation = None
            call.keep(answer("Node removed", None), node_uuid)
        else:
            service.start_removal(session, caller, node_uuid)
            operation = _begin(session, caller, call, REMOVE, node_uuid)
    return _at_its_end(operation, node_uuid, "Node removed")


@admin_router.get("/capacity", response_model=Envelope[list[TierCapacity]])
def get_capacity(caller: Caller = Depends(operator("read"))) -> Answer:
    """What each location can still take in each tier."""
    with transaction() as session:
        rows = capacity(session)
    return answer("Capacity", rows)


def _begin(
    session: Session, caller: Caller, call: IdempotentCall, plan: Plan, node_id: UUID
) -> Operation:
    """Starts a plan on the node, and remembers that this call did."""
    operation = begin(
        session,
        caller=caller,
        plan=plan,
        resource=None,
        resource_kind="node",
        subject_id=node_id,
    )
    shown = OperationView(**summary(operation))
    call.keep(answer(plan.kind, None, operation=shown), node_id)
    return operation


def _at_its_end(
    operation: Operation | None, node_id: UUID, message: str, status: int = 200
) -> Answer:
    """The node as its operation left it, whatever became of it; 202 when the operation takes longer.

    Raises: Conflict with what the operation said when it failed.
    """
    shown = None
    if operation is not None:
        ended = wait_for_success(operation.operation_id, get_settings().operation_wait_s)
        shown = OperationView(**summary(ended))
        status = status if ended.status == OperationStatus.SUCCEEDED else 202
    with transaction() as session:
        view = view_node(session, session.get_one(Node, node_id))
    return answer(message, view, status=status, operation=shown)


def view_node(session: Session, node: Node) -> NodeView:
    """A node as operators see it."""
    return NodeView.of(node, service.node_tiers(session, node.node_id))
