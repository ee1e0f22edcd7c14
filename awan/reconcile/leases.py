"""Who watches what: each node and each location is watched by exactly one live worker.

A lease is renewed several times before it ends. Leases share the things out evenly; a worker that has too many lets
some go. All times are the database's.
"""

from __future__ import annotations

from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from awan.fleet.models import Node
from awan.operations.workers import count_alive
from awan.reconcile.expected import SERVING
from awan.reconcile.models import WatchLease

NODE, LOCATION = "node:", "location:"

_ADD_MISSING = text(
    """
    INSERT INTO watch_lease (subject, leased_until)
    SELECT subject, now() - interval '1 s' FROM unnest(CAST(:subjects AS text[])) AS subject
    ON CONFLICT DO NOTHING
    """
)


def take_leases(session: Session, executor_id: str, lease_s: float) -> set[str]:
    """What this worker watches for the next `lease_s` seconds."""
    subjects = _subjects(session)
    session.execute(_ADD_MISSING, {"subjects": sorted(subjects)})
    session.execute(delete(WatchLease).where(WatchLease.subject.not_in(subjects)))
    share = -(-len(subjects) // max(1, count_alive(session, lease_s)))
    held = _renew(session, executor_id, lease_s)
    if len(held) > share:
        surplus = sorted(held)[share:]
        session.execute(
            update(WatchLease)
            .where(WatchLease.subject.in_(surplus), WatchLease.executor_id == executor_id)
            .values(executor_id=None, leased_until=func.now())
        )
        held -= set(surplus)
    elif len(held) < share:
        held |= _take(session, executor_id, lease_s, share - len(held))
    return held


def release_leases(session: Session, executor_id: str) -> None:
    """Another worker may take over at once what this one has watched."""
    session.execute(
        update(WatchLease)
        .where(WatchLease.executor_id == executor_id)
        .values(executor_id=None, leased_until=func.now())
    )


def _subjects(session: Session) -> set[str]:
    rows = session.execute(
        select(Node.node_id, Node.location_id).where(Node.state.in_(SERVING))
    ).all()
    nodes = {f"{NODE}{node_id}" for node_id, _ in rows}
    return nodes | {f"{LOCATION}{location_id}" for _, location_id in rows}


def _renew(session: Session, executor_id: str, lease_s: float) -> set[str]:
    """Also what has run out: as long as nobody else has taken it, it is still ours."""
    return set(
        session.scalars(
            update(WatchLease)
            .where(WatchLease.executor_id == executor_id)
            .values(leased_until=_until(lease_s))
            .returning(WatchLease.subject)
        )
    )


def _take(session: Session, executor_id: str, lease_s: float, count: int) -> set[str]:
    free = session.scalars(
        select(WatchLease.subject)
        .where(WatchLease.leased_until < func.now())
        .order_by(WatchLease.subject)
        .limit(count)
        .with_for_update(skip_locked=True)
    ).all()
    return set(
        session.scalars(
            update(WatchLease)
            .where(WatchLease.subject.in_(free))
            .values(executor_id=executor_id, leased_until=_until(lease_s))
            .returning(WatchLease.subject)
        )
    )


def _until(lease_s: float) -> object:
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, lease_s)
