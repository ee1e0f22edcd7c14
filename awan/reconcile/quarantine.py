"""What lies on engines without a row that explains it: marked, reported once, and never touched."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from uuid import UUID

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from awan.events import record
from awan.fleet.models import Node, NodeState
from awan.instances.recover import ACTOR
from awan.reconcile.models import Quarantined, StrayKind

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Scope:
    """Something that was read whole: the domains or files of a node, or the ports of a location (without node)."""

    kind: StrayKind
    node_id: UUID | None


@dataclass(frozen=True)
class Stray:
    """One thing that no row explains. `sentence` says it to an operator."""

    kind: StrayKind
    node_id: UUID | None
    subject: str
    sentence: str


def update_quarantine(
    session: Session, location_id: int, found: Sequence[Stray], read: Collection[Scope]
) -> None:
    """Marks what was found for the first time, and ends the mark of what is gone from what was read.

    What lay on a node that was removed is nobody's business any more: its mark ends too.
    """
    present = session.scalars(
        select(Quarantined).where(
            Quarantined.location_id == location_id, Quarantined.ended_at.is_(None)
        )
    ).all()
    removed = set(
        session.scalars(
            select(Node.node_id).where(
                Node.location_id == location_id, Node.state == NodeState.REMOVED
            )
        )
    )
    strays = {(it.kind, it.node_id, it.subject): it for it in found}
    still_there = []
    for row in present:
        key = (StrayKind(row.kind), row.node_id, row.subject)
        if strays.pop(key, None) is not None:
            still_there.append(row.quarantined_id)
        elif row.node_id in removed or Scope(StrayKind(row.kind), row.node_id) in read:
            row.ended_at = session.scalar(select(func.now()))
            _record(session, "quarantine.left", row.kind, row.node_id, row.subject, row.sentence)
    if still_there:
        session.execute(
            update(Quarantined)
            .where(Quarantined.quarantined_id.in_(still_there))
            .values(seen_at=func.now())
            .execution_options(synchronize_session=False)
        )
    for stray in strays.values():
        _enter(session, location_id, stray)


def _enter(session: Session, location_id: int, stray: Stray) -> None:
    row = insert(Quarantined).values(
        location_id=location_id,
        node_id=stray.node_id,
        kind=stray.kind,
        subject=stray.subject,
        sentence=stray.sentence,
    )
    # Another worker may have been faster.
    added = session.scalar(row.on_conflict_do_nothing().returning(Quarantined.quarantined_id))
    if added is None:
        return
    kind, node_id = stray.kind, stray.node_id
    _record(session, "quarantine.entered", kind, node_id, stray.subject, stray.sentence)
    log.error("quarantined", alarm=True, kind=kind, subject=stray.subject, why=stray.sentence)


def _record(
    session: Session, event: str, kind: str, node_id: UUID | None, subject: str, sentence: str
) -> None:
    record(
        session,
        kind=event,
        actor=ACTOR,
        account_id=None,
        data={
            "kind": kind,
            "node": str(node_id) if node_id is not None else None,
            "subject": subject,
            "sentence": sentence,
        },
    )


def list_quarantined(session: Session) -> Sequence[Quarantined]:
    """What is there now, oldest first."""
    return session.scalars(
        select(Quarantined)
        .where(Quarantined.ended_at.is_(None))
        .order_by(Quarantined.found_at, Quarantined.quarantined_id)
    ).all()
