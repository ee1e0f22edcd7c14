"""`/admin/instances`: everyone's instances, what operators keep about them, and their end with a node given up."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends

from awan.accounts import Caller, idempotent, operator, replay
from awan.fleet import Node
from awan.fleet.routes import view_node
from awan.fleet.schemas import NodeAbandonment, NodeView
from awan.instances import notes
from awan.instances.abandonment import abandon_node as abandon
from awan.instances.models import InstanceNote
from awan.instances.present import show_placed
from awan.instances.schemas import EveryonesQuery, NoteCreate, NoteView, PlacedPage
from awan.instances.service import list_everyones
from awan.kit.database import transaction
from awan.kit.http import (
    Answer,
    EmptyForm,
    Envelope,
    PathId,
    Remains,
    Request,
    answer,
    form_body,
    query_of,
)
from awan.kit.pagination import PageRequest, paged

admin_router = APIRouter()


@admin_router.get("/instances", response_model=Envelope[PlacedPage])
def list_everyones_instances(
    caller: Caller = Depends(operator("read")),
    query: EveryonesQuery = Depends(query_of(EveryonesQuery)),
) -> Answer:
    """The instances of all accounts, with their owners and nodes, newest first."""
    page = PageRequest(query.page, query.limit)
    with transaction() as session:
        views, total = list_everyones(session, page, query.filters(), query.sort)
        rows = show_placed(session, views)
    return answer("Instances", paged(rows, page, total))


@admin_router.get("/instances/{instance_uuid:uuid}/notes", response_model=Envelope[list[NoteView]])
def list_instance_notes(instance_uuid: UUID, caller: Caller = Depends(operator("read"))) -> Answer:
    """The notes about an instance, newest first; also of a deleted one. Customers never see them."""
    with transaction() as session:
        views = [_view(note) for note in notes.list_notes(session, instance_uuid)]
    return answer("Notes", views)


@admin_router.post(
    "/instances/{instance_uuid:uuid}/notes",
    status_code=201,
    response_model=Envelope[NoteView | Remains],
)
def add_instance_note(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: NoteCreate = Depends(form_body(NoteCreate)),
) -> Answer:
    """Write a note about an instance."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            known = session.get(InstanceNote, int(call.earlier.resource_id or 0))
            return replay(call.earlier, call.earlier.remains if known is None else _view(known))
        note = notes.add_note(session, caller, instance_uuid, body.text)
        return call.keep(answer("Note added", _view(note), status=201), note.note_id)


@admin_router.delete(
    "/instances/{instance_uuid:uuid}/notes/{note_id}", response_model=Envelope[NoteView | Remains]
)
def remove_instance_note(
    instance_uuid: UUID,
    note_id: PathId,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Delete a note."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, call.earlier.remains)
        note = notes.remove_note(session, caller, instance_uuid, note_id)
        return call.keep(answer("Note removed", _view(note)), note_id)


@admin_router.post("/nodes/{node_uuid:uuid}/abandon", response_model=Envelope[NodeView])
def abandon_node(
    node_uuid: UUID,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: NodeAbandonment = Depends(form_body(NodeAbandonment)),
) -> Answer:
    """Give up a node that is unreachable and will not come back. Make sure that it is switched off.

    Its instances are deleted, also protected ones, and their charging ends now; their addresses stay their owners'. The
    node is never taken into service again under its host_uuid and OVN system-id. Should it answer all the same, the
    domains on it are stopped, and shown in the quarantine.
    """
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, view_node(session, session.get_one(Node, node_uuid)))
        node = abandon(session, caller, node_uuid, body.confirm)
        return call.keep(answer("Node abandoned", view_node(session, node)), node_uuid)


def _view(note: InstanceNote) -> NoteView:
    return NoteView(id=note.note_id, text=note.text, actor=note.actor, created_at=note.created_at)
