"""Trials: what is changed at a firewall goes back by itself unless its owner confirms it in time.

Who shuts himself out need only wait. What goes back: policies, where the firewall stands, rules, groups, and the
entries of all sets that there were. Rules of a group are not the firewall's own: they stay. Sets that are made
meanwhile stay, without a rule; none can be deleted, since what goes back may need it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from ipaddress import ip_network
from typing import Any
from uuid import UUID

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.errors import Conflict
from awan.firewall.membership import living_groups, lock_membership
from awan.firewall.models import (
    Firewall,
    FirewallAttachment,
    FirewallTrial,
    Ipset,
    IpsetEntry,
    Rule,
)
from awan.firewall.service import change, entries_of, lock_firewall, lock_owned_firewall, note
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.operations import ControlPlane, Operation
from awan.operations.service import Requester
from awan.resources import Resource, ResourceKind, get_owned, lock

ACTOR = "system:firewall_trial"
NO_TRIAL = "No trial is running."
RULE_COLUMNS = (
    "rule_id",
    "position",
    "direction",
    "protocol",
    "port_first",
    "port_last",
    "icmp_type",
    "ipset_id",
    "peer",
    "action",
    "description",
    "is_enabled",
    "created_at",
)

TYPES: dict[str, Callable[[str], Any]] = {
    "rule_id": UUID,
    "entry_id": UUID,
    "peer": ip_network,
    "cidr": ip_network,
    "created_at": datetime.fromisoformat,
}


def begin_trial(session: Session, caller: Caller, instance_id: UUID, seconds: int) -> FirewallTrial:
    """From now on changes count for so many seconds. Raises: NotFound, Conflict (one is running)."""
    _, firewall = lock_owned_firewall(session, caller, instance_id)
    if session.get(FirewallTrial, firewall.firewall_id) is not None:
        raise Conflict("A trial is running already: confirm it, or take it back.")
    trial = FirewallTrial(
        firewall_id=firewall.firewall_id,
        before=_read(session, firewall),
        ends_at=now() + timedelta(seconds=seconds),
    )
    session.add(trial)
    session.flush()
    note(session, caller, firewall, "trial_begun", {"seconds": seconds}, None)
    return trial


def confirm_trial(session: Session, caller: Caller, instance_id: UUID) -> None:
    """What was changed stays. Raises: NotFound, Conflict when none is running, or its time is over."""
    _, firewall = lock_owned_firewall(session, caller, instance_id)
    trial = session.get(FirewallTrial, firewall.firewall_id, populate_existing=True)
    if trial is None or trial.ends_at <= now():
        raise Conflict(NO_TRIAL)
    session.delete(trial)
    session.flush()
    note(session, caller, firewall, "trial_confirmed", {}, None)


def revert_trial(session: Session, caller: Caller, instance_id: UUID) -> Operation:
    """What was changed goes back now. Raises: NotFound, Conflict when no trial is running."""
    owned = get_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    lock_membership(session, owned.account_id)
    resource, firewall = lock_owned_firewall(session, caller, instance_id)
    trial = session.get(FirewallTrial, firewall.firewall_id, populate_existing=True)
    if trial is None:
        raise Conflict(NO_TRIAL)
    return _revert(session, caller, resource, firewall, trial)


def find_trial(session: Session, firewall_id: UUID) -> FirewallTrial | None:
    """The trial that is running, or None."""
    return session.get(FirewallTrial, firewall_id, populate_existing=True)


def end_trials() -> int:
    """Takes back the trials whose time is over; their number. For a schedule."""
    with transaction() as session:
        over = session.execute(
            select(Firewall.instance_id, Firewall.account_id)
            .join(FirewallTrial, FirewallTrial.firewall_id == Firewall.firewall_id)
            .where(FirewallTrial.ends_at <= now())
        ).all()
    for instance_id, account_id in over:
        with transaction() as session:
            lock_membership(session, account_id)
            resource, firewall = lock(session, instance_id), lock_firewall(session, instance_id)
            trial = session.get(FirewallTrial, firewall.firewall_id, populate_existing=True)
            if resource is not None and trial is not None and trial.ends_at <= now():
                _revert(session, ControlPlane(ACTOR), resource, firewall, trial)
    return len(over)


def _read(session: Session, firewall: Firewall) -> dict[str, Any]:
    """The firewall as it is, to be put back."""
    rules = session.scalars(select(Rule).where(Rule.firewall_id == firewall.firewall_id)).all()
    ids = session.scalars(
        select(Ipset.ipset_id).where(Ipset.firewall_id == firewall.firewall_id)
    ).all()
    return {
        "policy": firewall.policy,
        "outbound_policy": firewall.outbound_policy,
        "apply_to_private": firewall.apply_to_private,
        "groups": [
            str(group_id)
            for group_id in session.scalars(
                select(FirewallAttachment.group_id)
                .where(FirewallAttachment.firewall_id == firewall.firewall_id)
                .order_by(FirewallAttachment.position)
            )
        ],
        "rules": [{name: _plain(getattr(rule, name)) for name in RULE_COLUMNS} for rule in rules],
        "entries": {
            str(ipset_id): [
                {
                    "entry_id": str(entry.entry_id),
                    "cidr": str(entry.cidr),
                    "description": entry.description,
                    "created_at": entry.created_at.isoformat(),
                }
                for entry in entries
            ]
            for ipset_id, entries in entries_of(session, ids).items()
        },
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int) else str(value)


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if value is None or name not in TYPES else TYPES[name](value)
        for name, value in row.items()
    }


def _revert(
    session: Session,
    requester: Requester,
    resource: Resource,
    firewall: Firewall,
    trial: FirewallTrial,
) -> Operation:
    before = trial.before
    firewall.policy, firewall.outbound_policy = before["policy"], before["outbound_policy"]
    firewall.apply_to_private = before["apply_to_private"]
    for kind in (Rule, FirewallAttachment):
        session.execute(delete(kind).where(kind.firewall_id == firewall.firewall_id))
    # The caller has locked the membership: a group that is gone meanwhile is left out, and none goes now.
    group_ids = [UUID(text) for text in before["groups"]]
    living = living_groups(session, group_ids)
    session.add_all(
        FirewallAttachment(firewall_id=firewall.firewall_id, group_id=group_id, position=position)
        for position, group_id in enumerate(group_ids, start=1)
        if group_id in living
    )
    ids = [int(text) for text in before["entries"]]
    session.execute(delete(IpsetEntry).where(IpsetEntry.ipset_id.in_(ids)))
    session.flush()
    session.expire_all()
    session.add_all(
        Rule(firewall_id=firewall.firewall_id, **_typed(row)) for row in before["rules"]
    )
    session.add_all(
        IpsetEntry(ipset_id=int(text), **_typed(row))
        for text, rows in before["entries"].items()
        for row in rows
    )
    session.delete(trial)
    session.flush()
    return change(session, requester, resource, firewall, "trial_reverted", {})
