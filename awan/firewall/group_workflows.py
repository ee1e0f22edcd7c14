"""Bringing a firewall group to the fabric, for all firewalls that have it at once.

firewall_group.apply    push (its rules, as they are wanted now) -> confirm (the nodes of its members' ports have them)

A firewall that comes to have a group, or has it no more, is pushed itself, with its groups: see `workflows`.
"""

from __future__ import annotations

import structlog
from sqlalchemy.orm import Session

from awan.catalogue import engines
from awan.engines.fabric import APPLY_TIMEOUT_S
from awan.events import record
from awan.firewall.models import FirewallGroup
from awan.firewall.spec import read_group_spec
from awan.kit.database import transaction
from awan.operations import Failure, Plan, Step, Target, register

log = structlog.get_logger(__name__)


def push(target: Target) -> None:
    """The fabric has the group's rules as they are wanted now; nothing of it when it is gone by now."""
    with transaction() as session:
        spec = read_group_spec(session, target.subject_id)
        location_id = session.get_one(FirewallGroup, target.subject_id).location_id
        fabric = engines(session, location_id).fabric
    if spec is not None:
        fabric.ensure_firewall_group(spec)
        with transaction() as session:
            row = _lock(session, target)
            if row.deleted_at is None:
                row.pushed_revision = max(row.pushed_revision, spec.revision)
                return
    # It went while this was under way: whoever removed it may have been faster.
    fabric.ensure_firewall_group_absent(target.subject_id)


def confirm(target: Target) -> None:
    """The nodes of its members' ports have confirmed it. One that does not answer leaves it pending.

    The watch over the location asks again until it does.
    """
    with transaction() as session:
        group = session.get_one(FirewallGroup, target.subject_id)
        if group.deleted_at is not None:
            return
        pushed = group.pushed_revision
        fabric = engines(session, group.location_id).fabric
    if not fabric.wait_firewall_group_applied(target.subject_id, timeout_s=APPLY_TIMEOUT_S):
        log.warning("firewall group is pending", group=str(target.subject_id), revision=pushed)
        return
    with transaction() as session:
        row = _lock(session, target)
        row.applied_revision = max(row.applied_revision, min(pushed, row.pushed_revision))


def remove_if_gone(target: Target) -> None:
    """The fabric has nothing of a group that is gone, whatever a late step has pushed."""
    with transaction() as session:
        group = session.get_one(FirewallGroup, target.subject_id)
        if group.deleted_at is None:
            return
        fabric = engines(session, group.location_id).fabric
    fabric.ensure_firewall_group_absent(target.subject_id)


def _lock(session: Session, target: Target) -> FirewallGroup:
    return session.get_one(
        FirewallGroup, target.subject_id, with_for_update=True, populate_existing=True
    )


def tell(session: Session, target: Target) -> None:
    """The owner is told how far the change has come."""
    group = session.get_one(FirewallGroup, target.subject_id)
    if group.deleted_at is not None:
        return
    is_applied = group.applied_revision >= group.wanted_revision
    record(
        session,
        kind="firewall_group.applied" if is_applied else "firewall_group.pending",
        actor=f"operation:{target.operation_id}",
        account_id=group.account_id,
        resource_id=group.group_id,
        operation_id=target.operation_id,
        data={"revision": group.applied_revision},
    )


def tell_failure(session: Session, target: Target, failure: Failure) -> None:
    """What is wanted stays wanted, and pending; the watch over the location tries again."""
    tell(session, target)


APPLY_GROUP = register(
    Plan(
        workflow="firewall_group.apply.v1",
        kind="firewall_group.apply",
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
