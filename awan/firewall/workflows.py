"""Bringing a firewall to the fabric, beside whatever else is done to its instance.

firewall.apply    push (the whole of it, as it is wanted now) -> confirm (the nodes of its ports have it)

Its partition is the firewall, so a change of it never waits behind a stop or a start. A change that finds one of
these still queued begins none of its own: that one will read it too.
"""

from __future__ import annotations

from uuid import UUID

import structlog
from sqlalchemy import func, update
from sqlalchemy.orm import Session

from awan.catalogue import engines
from awan.engines.fabric import APPLY_TIMEOUT_S
from awan.events import record
from awan.firewall.models import Firewall
from awan.firewall.spec import read_spec
from awan.kit.database import transaction
from awan.operations import Failure, Plan, Step, Target, register

log = structlog.get_logger(__name__)


def push(target: Target) -> None:
    """The fabric has the firewall as it is wanted now; none when it is gone by now."""
    with transaction() as session:
        spec = read_spec(session, target.subject_id)
        fabric = engines(session, _location_of(session, target.subject_id)).fabric
    if spec is not None:
        fabric.ensure_firewall(spec)
        with transaction() as session:
            if note_pushed(session, target.subject_id, spec.revision):
                return
    # It went while this was under way: whoever removed it may have been faster.
    fabric.ensure_firewall_absent(target.subject_id)


def confirm(target: Target) -> None:
    """The nodes of the firewall's ports have confirmed it. One that does not answer leaves it pending.

    The watch over the location asks again until it does.
    """
    with transaction() as session:
        firewall = session.get_one(Firewall, target.subject_id)
        if firewall.deleted_at is not None:
            return
        pushed = firewall.pushed_revision
        fabric = engines(session, firewall.location_id).fabric
    if not fabric.wait_firewall_applied(target.subject_id, timeout_s=APPLY_TIMEOUT_S):
        log.warning("firewall is pending", firewall=str(target.subject_id), revision=pushed)
        return
    with transaction() as session:
        note_applied(session, target.subject_id, pushed)


def remove_if_gone(target: Target) -> None:
    """The fabric has nothing of a firewall that is gone, whatever a late step has pushed."""
    with transaction() as session:
        firewall = session.get_one(Firewall, target.subject_id)
        if firewall.deleted_at is None:
            return
        fabric = engines(session, firewall.location_id).fabric
    fabric.ensure_firewall_absent(target.subject_id)


def note_pushed(session: Session, firewall_id: UUID, revision: int) -> bool:
    """This revision was committed to the fabric; False when the firewall is gone, so that it must not stay there."""
    noted = session.scalar(
        update(Firewall)
        .where(Firewall.firewall_id == firewall_id, Firewall.deleted_at.is_(None))
        .values(pushed_revision=func.greatest(Firewall.pushed_revision, revision))
        .returning(Firewall.firewall_id)
        .execution_options(synchronize_session=False)
    )
    return noted is not None


def note_applied(session: Session, firewall_id: UUID, revision: int) -> None:
    """The nodes have confirmed this revision, which was pushed before they were asked."""
    confirmed = func.least(revision, Firewall.pushed_revision)
    session.execute(
        update(Firewall)
        .where(Firewall.firewall_id == firewall_id, Firewall.applied_revision < confirmed)
        .values(applied_revision=confirmed)
        .execution_options(synchronize_session=False)
    )


def _location_of(session: Session, firewall_id: UUID) -> int:
    return session.get_one(Firewall, firewall_id).location_id


def tell(session: Session, target: Target) -> None:
    """The owner is told how far the change has come."""
    firewall = session.get_one(Firewall, target.subject_id)
    if firewall.deleted_at is not None:
        return
    is_applied = firewall.applied_revision >= firewall.wanted_revision
    record(
        session,
        kind="firewall.applied" if is_applied else "firewall.pending",
        actor=f"operation:{target.operation_id}",
        account_id=firewall.account_id,
        resource_id=firewall.instance_id,
        operation_id=target.operation_id,
        data={"firewall": str(firewall.firewall_id), "revision": firewall.applied_revision},
    )


def tell_failure(session: Session, target: Target, failure: Failure) -> None:
    """What is wanted stays wanted, and pending; the watch over the location tries again."""
    tell(session, target)


APPLY = register(
    Plan(
        workflow="firewall.apply.v1",
        kind="firewall.apply",
        steps=(
            Step("push", push, percent=10, cancellable=False),
            Step("confirm", confirm, percent=60, cancellable=False),
        ),
        succeed=tell,
        fail=tell_failure,
        overtaken=remove_if_gone,
        deadline_s=180,
    )
)
