"""`/admin/nodes` and `/admin/capacity`: the operator's fleet."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from awan.accounts import Caller, idempotent, operator
from awan.errors import Conflict
from awan.fleet import service
from awan.fleet.capacity import capacity
from awan.fleet.models import Node
from awan.fleet.schemas import NodeCreate, NodeView, TierCapacity
from awan.fleet.workflows import ADD, PROBE
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
from awan.operations import Operation, begin, summary, wait_for_end
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
            operation = begin(
                session,
                caller=caller,
                plan=ADD,
                resource=None,
                resource_kind="node",
                subject_id=node_id,
            )
            shown = OperationView(**summary(operation))
            call.keep(answer("Node added", None, status=201, operation=shown), node_id)
    return _after_probe(operation, node_id, "Node added", 201)


@admin_router.get("/nodes", response_model=Envelope[list[NodeView]])
def list_nodes(caller: Caller = Depends(operator("read"))) -> Answer:
    """List nodes."""
    with transaction() as session:
        views = [_view(session, node) for node in service.list_nodes(session)]
    return answer("Nodes", views)


@admin_router.get("/nodes/{node_uuid}", response_model=Envelope[NodeView])
def get_node(node_uuid: UUID, caller: Caller = Depends(operator("read"))) -> Answer:
    """Show a node."""
    with transaction() as session:
        view = _view(session, service.get_node(session, node_uuid))
    return answer("Node details", view)


@admin_router.post("/nodes/{node_uuid}/probe", response_model=Envelope[NodeView])
def probe_node(
    node_uuid: UUID,
    caller: Caller = Depends(operator("write")),
    body: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Ask a node again what it is. A host that is not the one that was added is refused."""
    with transaction() as session:
        service.get_node(session, node_uuid)
        operation = begin(
            session,
            caller=caller,
            plan=PROBE,
            resource=None,
            resource_kind="node",
            subject_id=node_uuid,
        )
    return _after_probe(operation, node_uuid, "Node probed", 200)


@admin_router.post("/nodes/{node_uuid}/cordon", response_model=Envelope[NodeView])
def cordon_node(
    node_uuid: UUID,
    caller: Caller = Depends(operator("write")),
    body: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Place nothing new on a node."""
    with transaction() as session:
        view = _view(session, service.set_cordon(session, caller, node_uuid, True))
    return answer("Node cordoned", view)


@admin_router.post("/nodes/{node_uuid}/uncordon", response_model=Envelope[NodeView])
def uncordon_node(
    node_uuid: UUID,
    caller: Caller = Depends(operator("write")),
    body: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Place instances on a node again."""
    with transaction() as session:
        view = _view(session, service.set_cordon(session, caller, node_uuid, False))
    return answer("Node uncordoned", view)


@admin_router.delete("/nodes/{node_uuid}", response_model=Envelope[NodeView])
def remove_node(node_uuid: UUID, caller: Caller = Depends(operator("write"))) -> Answer:
    """Forget a node on which nothing is placed."""
    with transaction() as session:
        view = _view(session, service.remove_node(session, caller, node_uuid))
    return answer("Node removed", view)


@admin_router.get("/capacity", response_model=Envelope[list[TierCapacity]])
def get_capacity(caller: Caller = Depends(operator("read"))) -> Answer:
    """What each location can still take in each tier."""
    with transaction() as session:
        rows = capacity(session)
    return answer("Capacity", rows)


def _after_probe(operation: Operation, node_id: UUID, message: str, status: int) -> Answer:
    """The node once its probe has ended; 202 when it takes longer. Raises: Conflict with what the probe said."""
    ended = wait_for_end(operation.operation_id, get_settings().operation_wait_s)
    if ended.status == OperationStatus.FAILED:
        raise Conflict(f"{ended.error_message} {ended.error_detail or ''}".strip())
    with transaction() as session:
        view = _view(session, service.get_node(session, node_id))
    done = ended.status == OperationStatus.SUCCEEDED
    return answer(
        message, view, status=status if done else 202, operation=OperationView(**summary(ended))
    )


def _view(session: Session, node: Node) -> NodeView:
    return NodeView.of(node, service.node_tiers(session, node.node_id))
