"""Verbs of firewall groups: rules that many firewalls of a location share. The caller holds the transaction.

A firewall has a group because it was attached, or because its instance has the group's labels. Locks: the account's
membership (an advisory lock, since labels decide it too), then resources, firewalls and groups, then the operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select, union
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.catalogue import check_location
from awan.engines.fabric.firewall import GROUPS_MAX
from awan.errors import Conflict, Invalid, QuotaExceeded
from awan.events import record
from awan.firewall.applying import begin_apply, begin_pending, ensure_queued
from awan.firewall.membership import living_groups, lock_membership
from awan.firewall.models import Firewall, FirewallAttachment, FirewallGroup, FirewallTrial
from awan.firewall.service import change, firewall_id_of, lock_firewall
from awan.firewall.spec import groups_of, labelled_firewalls
from awan.kit.clock import now
from awan.kit.ids import new_id
from awan.kit.pagination import PageRequest
from awan.operations import Operation
from awan.operations.service import Requester
from awan.resources import Resource, ResourceKind, create, get_owned, lock, lock_owned, retire

GROUPS_PER_ACCOUNT_MAX = 50
UNKNOWN = "The selected groups is invalid."
TWICE = "A firewall group is named twice."
TAKEN = "The name has already been taken."


@dataclass(frozen=True)
class GroupView:
    """A group with its name and the number of instances that are behind it."""

    group: FirewallGroup
    name: str
    instances_count: int


@dataclass(frozen=True)
class Member:
    """An instance that is behind a group, by label or because the group was attached."""

    instance_id: UUID
    hostname: str
    is_by_label: bool


def list_groups(session: Session, caller: Caller, page: PageRequest) -> tuple[list[GroupView], int]:
    """A page of the account's groups, oldest first, and the number of all."""
    query = (
        select(FirewallGroup, Resource)
        .join(Resource, Resource.resource_id == FirewallGroup.group_id)
        .where(FirewallGroup.account_id == caller.account_id, FirewallGroup.deleted_at.is_(None))
    )
    total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
    rows = session.execute(
        query.order_by(FirewallGroup.created_at, FirewallGroup.group_id)
        .limit(page.limit)
        .offset(page.offset)
    ).all()
    counts = _count_members(session, [group.group_id for group, _ in rows])
    return [
        GroupView(group, resource.name, counts.get(group.group_id, 0)) for group, resource in rows
    ], total


def _count_members(session: Session, group_ids: Sequence[UUID]) -> dict[UUID, int]:
    """Group id -> instances behind it, by hand or by label, of those that have any."""
    by_hand = (
        select(FirewallAttachment.firewall_id, FirewallAttachment.group_id)
        .join(Firewall, Firewall.firewall_id == FirewallAttachment.firewall_id)
        .where(FirewallAttachment.group_id.in_(group_ids), Firewall.deleted_at.is_(None))
    )
    by_label = labelled_firewalls(FirewallGroup.group_id.in_(group_ids))
    both = union(by_hand, by_label).subquery()
    query = select(both.c.group_id, func.count()).group_by(both.c.group_id)
    return dict(session.execute(query).all())


def find_group(session: Session, caller: Caller, group_id: UUID) -> GroupView:
    """The caller's group. Raises: NotFound."""
    resource = get_owned(session, caller, ResourceKind.FIREWALL_GROUP, group_id)
    group = session.get_one(FirewallGroup, group_id, populate_existing=True)
    return GroupView(group, resource.name, len(members(session, group)))


def members(session: Session, group: FirewallGroup) -> list[Member]:
    """The instances that are behind the group, by name."""
    attached = (
        select(Firewall.instance_id)
        .join(FirewallAttachment, FirewallAttachment.firewall_id == Firewall.firewall_id)
        .where(FirewallAttachment.group_id == group.group_id, Firewall.deleted_at.is_(None))
    )
    labelled = labelled_firewalls(FirewallGroup.group_id == group.group_id).subquery()
    by_hand = set(session.scalars(attached))
    by_label = set(
        session.scalars(
            select(Firewall.instance_id).join(
                labelled, labelled.c.firewall_id == Firewall.firewall_id
            )
        )
    )
    rows = session.execute(
        select(Resource.resource_id, Resource.name)
        .where(Resource.resource_id.in_(by_hand | by_label))
        .order_by(Resource.name)
    )
    return [Member(uuid, name, uuid not in by_hand) for uuid, name in rows]


def placed_groups(
    session: Session, firewall_id: UUID
) -> tuple[list[tuple[FirewallGroup, str]], set[UUID]]:
    """The firewall's groups with their names, in their order; and which of them were attached by hand."""
    groups = groups_of(session, [firewall_id])[firewall_id]
    names = dict(
        session.execute(
            select(Resource.resource_id, Resource.name).where(
                Resource.resource_id.in_([group.group_id for group in groups])
            )
        ).all()
    )
    by_hand = set(
        session.scalars(
            select(FirewallAttachment.group_id).where(FirewallAttachment.firewall_id == firewall_id)
        )
    )
    return [(group, names[group.group_id]) for group in groups], by_hand


def create_group(
    session: Session,
    caller: Caller,
    *,
    location_id: int,
    name: str,
    description: str,
    rules: Sequence[dict[str, Any]],
    labels: Mapping[str, str],
) -> FirewallGroup:
    """A group with these rules. Who has the labels is behind it at once.

    Raises: Invalid (location_id, name), QuotaExceeded (groups of the account, or of a member).
    """
    assert caller.account_id is not None
    check_location(session, location_id)
    lock_membership(session, caller.account_id)
    count = select(func.count()).where(
        FirewallGroup.account_id == caller.account_id, FirewallGroup.deleted_at.is_(None)
    )
    if (session.scalar(count) or 0) >= GROUPS_PER_ACCOUNT_MAX:
        raise QuotaExceeded(f"An account has at most {GROUPS_PER_ACCOUNT_MAX} firewall groups.")
    resource = create(
        session,
        kind=ResourceKind.FIREWALL_GROUP,
        resource_id=new_id(),
        account_id=caller.account_id,
        name=name,
        location_id=location_id,
        operation_id=None,
    )
    group = FirewallGroup(
        group_id=resource.resource_id,
        account_id=caller.account_id,
        location_id=location_id,
        description=description,
        rules=list(rules),
        member_labels={},
        # The fabric knows it from the first firewall that has it: there is nothing to bring yet.
        wanted_revision=1,
        pushed_revision=1,
        applied_revision=1,
        created_at=now(),
    )
    session.add(group)
    session.flush()
    _note(session, caller, group, "created", {"name": name, "rules": len(rules)}, None)
    if labels:
        _follow(session, caller, group, labels)
    return group


def update_group(
    session: Session,
    caller: Caller,
    group_id: UUID,
    *,
    name: str | None,
    description: str | None,
    labels: Mapping[str, str] | None,
) -> FirewallGroup:
    """Another name, description, or labels; None: as before. Raises: NotFound, Invalid (name), QuotaExceeded."""
    resource, group = _lock_owned(session, caller, group_id)
    if name is not None and name != resource.name:
        try:
            with session.begin_nested():
                resource.name = name
        except IntegrityError as err:
            raise Invalid.field("name", TAKEN) from err
    if description is not None:
        group.description = description
    session.flush()
    shown = group.member_labels if labels is None else labels
    said = {"name": resource.name, "labels": dict(shown)}
    _note(session, caller, group, "changed", said, None)
    if labels is not None and labels != group.member_labels:
        _follow(session, caller, group, labels)
    return group


def replace_group_rules(
    session: Session, caller: Caller, group_id: UUID, rules: Sequence[dict[str, Any]]
) -> tuple[FirewallGroup, Operation]:
    """These rules instead of all that there were, for all members at once. Raises: NotFound."""
    resource, group = _lock_owned(session, caller, group_id)
    group.rules = list(rules)
    group.wanted_revision += 1
    session.flush()
    operation = ensure_queued(session, caller, resource, group)
    _note(session, caller, group, "rules_replaced", {"rules": len(rules)}, operation)
    return group, operation


def delete_group(session: Session, caller: Caller, group_id: UUID) -> Operation:
    """The group is gone. Raises: NotFound, Conflict while instances are behind it."""
    resource, group = _lock_owned(session, caller, group_id)
    if count := len(members(session, group)):
        raise Conflict(
            f"{count} {'instance is' if count == 1 else 'instances are'} behind the firewall group:"
            " detach it, and take its labels away, first."
        )
    group.deleted_at = now()
    group.rules, group.member_labels = [], {}
    of_group = FirewallAttachment.group_id == group_id
    session.execute(delete(FirewallAttachment).where(of_group))
    session.flush()
    operation = begin_apply(session, caller, resource, group)
    _note(session, caller, group, "deleted", {}, operation)
    retire(session, group_id)
    return operation


def set_groups(
    session: Session, caller: Caller, instance_id: UUID, group_ids: Sequence[UUID]
) -> tuple[Firewall, Operation | None]:
    """The instance's firewall has these groups, in this order, besides those by label; as it is: no effect.

    Raises: NotFound, Invalid (groups) for one that is not the account's, of another location, or named twice,
    QuotaExceeded.
    """
    owned = get_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    lock_membership(session, owned.account_id)
    resource = lock_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    firewall = lock_firewall(session, instance_id)
    known = set(
        session.scalars(
            select(FirewallGroup.group_id).where(
                FirewallGroup.group_id.in_(group_ids),
                FirewallGroup.account_id == firewall.account_id,
                FirewallGroup.location_id == firewall.location_id,
                FirewallGroup.deleted_at.is_(None),
            )
        )
    )
    if not known.issuperset(group_ids):
        raise Invalid.field("groups", UNKNOWN)
    if len(known) < len(group_ids):
        raise Invalid.field("groups", TWICE)
    present = session.scalars(
        select(FirewallAttachment.group_id)
        .where(FirewallAttachment.firewall_id == firewall.firewall_id)
        .order_by(FirewallAttachment.position)
    ).all()
    if list(present) == list(group_ids):
        return firewall, None
    of_firewall = FirewallAttachment.firewall_id == firewall.firewall_id
    session.execute(delete(FirewallAttachment).where(of_firewall))
    session.add_all(
        FirewallAttachment(firewall_id=firewall.firewall_id, group_id=group_id, position=position)
        for position, group_id in enumerate(group_ids, start=1)
    )
    session.flush()
    _check_count(session, [firewall.firewall_id])
    said = {"groups": [str(group_id) for group_id in group_ids]}
    return firewall, change(session, caller, resource, firewall, "groups_changed", said)


def follow_labels(
    session: Session, requester: Requester, resource: Resource, labels: Mapping[str, str]
) -> None:
    """The locked instance gets these labels, and with them the groups that go by them; the membership is locked.

    Raises: QuotaExceeded.
    """
    firewall_id = firewall_id_of(resource.resource_id)
    before = [group.group_id for group in groups_of(session, [firewall_id])[firewall_id]]
    resource.labels = dict(labels)
    session.flush()
    after = [group.group_id for group in groups_of(session, [firewall_id])[firewall_id]]
    if before == after:
        return
    _check_count(session, [firewall_id])
    firewall = lock_firewall(session, resource.resource_id)
    said = {"groups": [str(group_id) for group_id in after]}
    change(session, requester, resource, firewall, "groups_changed", said)


def request_apply_group(session: Session, requester: Requester, group_id: UUID) -> Operation | None:
    """Brings a group to the fabric that is not there yet, unless something is about to; for the control plane."""
    resource = lock(session, group_id)
    group = _lock(session, group_id)
    if resource is None or group.deleted_at is not None:
        return None
    return begin_pending(session, requester, resource, group)


def _follow(
    session: Session, caller: Caller, group: FirewallGroup, labels: Mapping[str, str]
) -> None:
    """The locked group goes by these labels from now on: firewalls that get or lose it by that are pushed."""
    before = {member.instance_id for member in members(session, group)}
    group.member_labels = dict(labels)
    session.flush()
    after = {member.instance_id for member in members(session, group)}
    moved = sorted(before ^ after)
    _check_count(session, [firewall_id_of(instance_id) for instance_id in moved])
    for instance_id in moved:
        resource = lock(session, instance_id)
        firewall = lock_firewall(session, instance_id)
        if resource is not None and firewall.deleted_at is None:
            said = {"groups": [str(group.group_id)], "by_label": True}
            change(session, caller, resource, firewall, "groups_changed", said)


def _check_count(session: Session, firewall_ids: Sequence[UUID]) -> None:
    """Raises: QuotaExceeded when one of these firewalls has more groups than there are places.

    What a trial that is running would attach again counts, too: it must find a place.
    """
    by_label = labelled_firewalls(Firewall.firewall_id.in_(firewall_ids))
    attached = select(FirewallAttachment.firewall_id, FirewallAttachment.group_id).where(
        FirewallAttachment.firewall_id.in_(firewall_ids)
    )
    trials = select(FirewallTrial.firewall_id, FirewallTrial.before["groups"]).where(
        FirewallTrial.firewall_id.in_(firewall_ids)
    )
    counts: dict[UUID, set[UUID]] = {}
    for query in (by_label, attached) if firewall_ids else ():
        for firewall_id, group_id in session.execute(query):
            counts.setdefault(firewall_id, set()).add(group_id)
    for firewall_id, texts in session.execute(trials) if firewall_ids else ():
        counts.setdefault(firewall_id, set()).update(UUID(text) for text in texts)
    living = living_groups(session, set().union(*counts.values()))
    if any(len(groups & living) > GROUPS_MAX for groups in counts.values()):
        raise QuotaExceeded(f"An instance has at most {GROUPS_MAX} firewall groups.")


def _lock_owned(session: Session, caller: Caller, group_id: UUID) -> tuple[Resource, FirewallGroup]:
    owned = get_owned(session, caller, ResourceKind.FIREWALL_GROUP, group_id)
    lock_membership(session, owned.account_id)
    resource = lock_owned(session, caller, ResourceKind.FIREWALL_GROUP, group_id)
    return resource, _lock(session, group_id)


def _lock(session: Session, group_id: UUID) -> FirewallGroup:
    # Whoever takes a trial back refers to groups while it holds what we may ask for next: that needs no lock of ours.
    return session.get_one(
        FirewallGroup, group_id, with_for_update={"key_share": True}, populate_existing=True
    )


def _note(
    session: Session,
    requester: Requester,
    group: FirewallGroup,
    kind: str,
    data: Mapping[str, object],
    operation: Operation | None,
) -> None:
    record(
        session,
        kind=f"firewall_group.{kind}",
        actor=requester.actor,
        account_id=group.account_id,
        resource_id=group.group_id,
        operation_id=operation.operation_id if operation is not None else None,
        data=dict(data),
    )
