"""Acting on what a look at an engine has shown: one short transaction per instance, holding its lock.

A look may be old by the time it is acted on. It is acted on only when the instance is idle and nothing has changed
it since its rows were read, before the engine was asked. So two workers that saw the same do one repair, a worker
that was frozen does none, and no operation can begin or run beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import structlog
from sqlalchemy import Select, bindparam, or_, select
from sqlalchemy.orm import Session

from awan.instances.models import DesiredState, Instance
from awan.instances.recover import (
    Reason,
    begin_recovery,
    begin_repair,
    begin_resumption,
    note_crash,
    note_found,
    note_paused,
    note_powered_off,
    note_powered_on,
)
from awan.instances.rules import SETTLED_STATES
from awan.kit.database import execute_directly, transaction
from awan.reconcile.power import Verdict
from awan.resources import Resource, lock

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Known:
    """An instance as its rows were before a look: idle, made, not on its way out. `changed_at` tells later changes."""

    instance_id: UUID
    desired: str
    observed: str
    changed_at: datetime


def known_on(session: Session, node_id: UUID) -> list[Known]:
    """All instances of a node that can be looked at now."""
    return _read(session, _KNOWN_ON, {"node": node_id})


def find_known(session: Session, node_id: UUID, instance_id: UUID) -> Known | None:
    """One instance of the node, or None: there is none, or something is working on it."""
    found = _read(session, _FIND_KNOWN, {"node": node_id, "instance": instance_id})
    return found[0] if found else None


def known_of(session: Session, instance_ids: set[UUID]) -> dict[UUID, Known]:
    """Those of these instances that can be looked at now."""
    found = _read(session, _idle().where(Instance.instance_id.in_(instance_ids)), {})
    return {it.instance_id: it for it in found}


def _idle() -> Select[UUID, str, str, datetime]:
    return (
        select(
            Instance.instance_id,
            Instance.desired_state,
            Instance.observed_state,
            Instance.updated_at,
        )
        .join(Resource, Resource.resource_id == Instance.instance_id)
        .where(
            Resource.deleted_at.is_(None),
            Resource.active_operation_id.is_(None),
            # Not IN, whose list is written into the text anew each time.
            or_(*(Instance.observed_state == state.value for state in SETTLED_STATES)),
            Instance.desired_state != DesiredState.DELETED,
        )
    )


# Asked for each node several times a minute; built once, because building them takes longer than sending them.
_KNOWN_ON = _idle().where(Instance.node_id == bindparam("node"))
_FIND_KNOWN = _KNOWN_ON.where(Instance.instance_id == bindparam("instance"))


def _read(
    session: Session, query: Select[UUID, str, str, datetime], wanted: dict[str, UUID]
) -> list[Known]:
    return [
        Known(instance_id, desired, observed, changed_at)
        for instance_id, desired, observed, changed_at in execute_directly(session, query, wanted)
    ]


def act(known: Known, verdict: Verdict, reason: Reason, words: str) -> bool:
    """Does what the verdict asks for, unless the instance has changed since; whether it did anything.

    `reason` goes to the owner's event log; `words`, the engine's or ours for what was found, to the operator's alone.
    """
    with transaction() as session:
        resource = lock(session, known.instance_id)
        if resource is None or resource.deleted_at or resource.active_operation_id is not None:
            return False
        instance = session.get_one(
            Instance, known.instance_id, with_for_update=True, populate_existing=True
        )
        if instance.updated_at != known.changed_at:
            return False
        has_acted = _carry_out(session, resource, instance, verdict, reason)
        if has_acted:
            note_found(session, instance, reason, words)
    if has_acted:
        log.warning("reconciled", instance=str(known.instance_id), did=verdict, found=words)
    return has_acted


def _carry_out(
    session: Session, resource: Resource, instance: Instance, verdict: Verdict, reason: Reason
) -> bool:
    if verdict is Verdict.NOTE_RUNNING:
        note_powered_on(session, instance)
    elif verdict is Verdict.NOTE_STOPPED:
        note_powered_off(session, instance, reason)
    elif verdict is Verdict.NOTE_PAUSED:
        note_paused(session, instance, reason)
    elif verdict is Verdict.RESUME:
        return begin_resumption(session, resource, instance, reason) is not None
    elif verdict is Verdict.CRASHED:
        note_crash(session, resource, instance)
    elif verdict is Verdict.RECOVER:
        return begin_recovery(session, resource, instance, reason) is not None
    elif verdict is Verdict.REPAIR:
        return begin_repair(session, resource, instance, reason) is not None
    return verdict is not Verdict.SUSPECTED
