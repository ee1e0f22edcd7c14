"""Operators' notes about instances, also about deleted ones. Customers never see them, nor that they exist."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.errors import NotFound
from awan.events import record
from awan.instances.models import Instance, InstanceNote


def list_notes(session: Session, instance_id: UUID) -> Sequence[InstanceNote]:
    """The notes, newest first. Raises: NotFound when there never was such an instance."""
    _require(session, instance_id)
    query = select(InstanceNote).where(InstanceNote.instance_id == instance_id)
    return session.scalars(query.order_by(InstanceNote.note_id.desc())).all()


def add_note(session: Session, caller: Caller, instance_id: UUID, text: str) -> InstanceNote:
    """Writes a note. Raises: NotFound."""
    _require(session, instance_id)
    note = InstanceNote(instance_id=instance_id, text=text, actor=caller.actor)
    session.add(note)
    session.flush()
    _record(session, caller, note, "instance.noted")
    return note


def remove_note(session: Session, caller: Caller, instance_id: UUID, note_id: int) -> InstanceNote:
    """Deletes a note. Raises: NotFound."""
    note = session.get(InstanceNote, note_id)
    if note is None or note.instance_id != instance_id:
        raise NotFound("Note not found.")
    session.delete(note)
    _record(session, caller, note, "instance.note_removed")
    return note


def _require(session: Session, instance_id: UUID) -> None:
    if session.get(Instance, instance_id) is None:
        raise NotFound("Instance not found.")


def _record(session: Session, caller: Caller, note: InstanceNote, kind: str) -> None:
    """An event of the operator's own: without the text, which goes when the note goes."""
    record(
        session,
        kind=kind,
        actor=caller.actor,
        account_id=None,
        resource_id=note.instance_id,
        data={"note": note.note_id},
    )
