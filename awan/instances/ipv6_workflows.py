"""Durable work on the IPv6 prefixes that are routed to instances, running or stopped.

instance.add_ipv6_prefix      port -> route
instance.remove_ipv6_prefix   route gone -> port

Each step pushes what the rows say now, of the port and of the location's router. A prefix that is going is marked in
its row: from then on neither has it.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from awan.instances.steps import make_ports, settle_late_step
from awan.instances.workflows import mark_change_failed, mark_changed
from awan.kit.database import transaction
from awan.networks.models import PrefixPool
from awan.networks.prefixes import find_prefix, push_router, release_prefix
from awan.operations import Failure, Plan, Step, Target, register


def _set_leaving(target: Target, *, is_leaving: bool) -> None:
    with transaction() as session:
        prefix = find_prefix(session, target.subject_id, locked=True)
        if prefix is not None:
            prefix.is_leaving = is_leaving


def _push(target: Target, *, waits: bool = False) -> None:
    with transaction() as session:
        prefix = find_prefix(session, target.subject_id)
        if prefix is None:
            return
        pool_id = session.get_one(PrefixPool, prefix.prefix_pool_id).pool_id
    push_router(pool_id, waits=waits)


def undo_allow(target: Target) -> None:
    """The port may not use the prefix."""
    _set_leaving(target, is_leaving=True)
    make_ports(target)


def route(target: Target) -> None:
    """The prefix is routed to the instance, and a node carries the router."""
    _push(target, waits=True)


def undo_route(target: Target) -> None:
    """Nothing is routed to the instance."""
    _set_leaving(target, is_leaving=True)
    _push(target)


def unroute(target: Target) -> None:
    """Nothing is routed to the instance any more."""
    _push(target)


def undo_unroute(target: Target) -> None:
    """The prefix is routed to the instance."""
    _set_leaving(target, is_leaving=False)
    _push(target)


def undo_forbid(target: Target) -> None:
    """The port may use the prefix."""
    _set_leaving(target, is_leaving=False)
    make_ports(target)


def mark_added(session: Session, target: Target) -> None:
    """The prefix can be used."""
    mark_changed(session, target)


def mark_not_added(session: Session, target: Target, failure: Failure) -> None:
    """The prefix goes back; one that the fabric may still have stays, to be removed later."""
    if not failure.left_over:
        release_prefix(session, target.subject_id, operation_id=target.operation_id)
    mark_change_failed(session, target, failure)


def mark_removed(session: Session, target: Target) -> None:
    """The prefix rests, and its names are gone."""
    release_prefix(session, target.subject_id, operation_id=target.operation_id)
    mark_changed(session, target)


def mark_not_removed(session: Session, target: Target, failure: Failure) -> None:
    """The prefix stays."""
    prefix = find_prefix(session, target.subject_id, locked=True)
    if prefix is not None:
        prefix.is_leaving = False
    mark_change_failed(session, target, failure)


ADD_PREFIX = register(
    Plan(
        workflow="instance.add_ipv6_prefix.v1",
        kind="instance.add_ipv6_prefix",
        steps=(
            Step("port", make_ports, undo_allow, percent=10),
            Step("route", route, undo_route, percent=50),
        ),
        succeed=mark_added,
        fail=mark_not_added,
        overtaken=settle_late_step,
        deadline_s=300,
    )
)
REMOVE_PREFIX = register(
    Plan(
        workflow="instance.remove_ipv6_prefix.v1",
        kind="instance.remove_ipv6_prefix",
        steps=(
            Step("route", unroute, undo_unroute, percent=10),
            Step("port", make_ports, undo_forbid, percent=60),
        ),
        succeed=mark_removed,
        fail=mark_not_removed,
        overtaken=settle_late_step,
        deadline_s=300,
    )
)
