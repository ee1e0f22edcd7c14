"""Verbs of firewalls. The caller holds the transaction.

Locks: the instance's resource, then its firewall, then the operation that brings it to the fabric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from ipaddress import IPv4Network, IPv6Network
from uuid import UUID

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.engines.fabric.firewall import Direction, RuleAction, RuleProtocol
from awan.errors import Conflict, Invalid, NotFound, QuotaExceeded
from awan.events import record
from awan.firewall.applying import begin_apply, begin_pending, ensure_queued
from awan.firewall.models import (
    Firewall,
    FirewallAttachment,
    FirewallTrial,
    Ipset,
    IpsetEntry,
    Rule,
)
from awan.firewall.rules import ENTRIES_MAX, IPSETS_MAX, RULES_MAX, RuleValues, check_protocol
from awan.kit.clock import now
from awan.kit.ids import derived_id, new_id
from awan.kit.pagination import PageRequest
from awan.operations import Operation
from awan.operations.service import Requester
from awan.resources import Resource, ResourceKind, get_owned, lock, lock_owned

SAME_RULE = "The firewall has the very same rule already."
UNKNOWN_IPSET = "The selected source_ipset is invalid."


def firewall_id_of(instance_id: UUID) -> UUID:
    """The uuid of an instance's firewall."""
    return derived_id(instance_id, "firewall")


def create_firewall(
    session: Session, *, instance_id: UUID, account_id: UUID, location_id: int
) -> Firewall:
    """The firewall of a new instance: open, without rules."""
    firewall = Firewall(
        firewall_id=firewall_id_of(instance_id),
        instance_id=instance_id,
        account_id=account_id,
        location_id=location_id,
    )
    session.add(firewall)
    session.flush()
    return firewall


def retire_firewall(session: Session, instance_id: UUID, requester: Requester) -> None:
    """The firewall ends with its instance, whose ports are gone and whose resource is locked. Ended already: no effect.

    Where it was ever changed, a push of it may be under way: one more operation sees to it that nothing stays.
    """
    firewall = lock_firewall(session, instance_id)
    if firewall.deleted_at is not None:
        return
    firewall.deleted_at = now()
    ids = select(Ipset.ipset_id).where(Ipset.firewall_id == firewall.firewall_id)
    for kind in (FirewallTrial, FirewallAttachment):
        session.execute(delete(kind).where(kind.firewall_id == firewall.firewall_id))
    session.execute(delete(Rule).where(Rule.firewall_id == firewall.firewall_id))
    session.execute(delete(IpsetEntry).where(IpsetEntry.ipset_id.in_(ids)))
    session.execute(delete(Ipset).where(Ipset.firewall_id == firewall.firewall_id))
    session.flush()
    if firewall.apply_operation_id is not None:
        resource = session.get_one(Resource, instance_id)
        begin_apply(session, requester, resource, firewall)


def find_firewall(session: Session, caller: Caller, instance_id: UUID) -> Firewall:
    """The firewall of the caller's instance. Raises: NotFound."""
    get_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    return session.get_one(Firewall, firewall_id_of(instance_id), populate_existing=True)


def request_apply(session: Session, requester: Requester, instance_id: UUID) -> Operation | None:
    """Brings a firewall to the fabric that is not there yet, unless something is about to; for the control plane."""
    resource = lock(session, instance_id)
    firewall = lock_firewall(session, instance_id)
    if resource is None or firewall.deleted_at is not None:
        return None
    return begin_pending(session, requester, resource, firewall)


def set_policy(
    session: Session,
    caller: Caller,
    instance_id: UUID,
    policy: RuleAction,
    *,
    outbound_policy: RuleAction | None,
    apply_to_private: bool | None,
) -> tuple[Firewall, Operation]:
    """What happens to packets that no rule is about, and where the firewall stands. None: as before.

    Raises: NotFound.
    """
    resource, firewall = lock_owned_firewall(session, caller, instance_id)
    firewall.policy = policy
    if outbound_policy is not None:
        firewall.outbound_policy = outbound_policy
    if apply_to_private is not None:
        firewall.apply_to_private = apply_to_private
    said = {
        "policy": firewall.policy,
        "outbound_policy": firewall.outbound_policy,
        "apply_to_private": firewall.apply_to_private,
    }
    return firewall, change(session, caller, resource, firewall, "policy_changed", said)


def count_rules(session: Session, firewall_id: UUID, *, only_enabled: bool = False) -> int:
    """How many rules a firewall has."""
    query = select(func.count()).select_from(Rule).where(Rule.firewall_id == firewall_id)
    return session.scalar(query.where(Rule.is_enabled) if only_enabled else query) or 0


def list_rules(
    session: Session, firewall_id: UUID, page: PageRequest
) -> tuple[list[tuple[Rule, Ipset | None]], int]:
    """A page of rules by position, each with the set that it refers to, and the number of all."""
    query = (
        select(Rule, Ipset)
        .outerjoin(Ipset, Ipset.ipset_id == Rule.ipset_id)
        .where(Rule.firewall_id == firewall_id)
        .order_by(Rule.position)
    )
    rows = session.execute(query.limit(page.limit).offset(page.offset)).all()
    return [(rule, ipset) for rule, ipset in rows], count_rules(session, firewall_id)


def get_rule(session: Session, firewall: Firewall, rule_id: UUID) -> tuple[Rule, Ipset | None]:
    """A rule of the firewall with its set. Raises: NotFound."""
    row = session.get(Rule, rule_id, populate_existing=True)
    if row is None or row.firewall_id != firewall.firewall_id:
        raise NotFound("Firewall rule not found.")
    return row, session.get(Ipset, row.ipset_id) if row.ipset_id is not None else None


def add_rule(
    session: Session,
    caller: Caller,
    instance_id: UUID,
    values: RuleValues,
    description: str,
    *,
    position: int | None = None,
) -> tuple[Rule, Operation]:
    """A rule behind all others, or at a position. Raises: NotFound, Invalid, QuotaExceeded."""
    resource, firewall = lock_owned_firewall(session, caller, instance_id)
    _check_values(session, firewall, values)
    _refuse_same(session, firewall, values)
    count = count_rules(session, firewall.firewall_id)
    if count >= RULES_MAX:
        raise QuotaExceeded(f"A firewall has at most {RULES_MAX} rules.")
    rule = _new_rule(firewall, values, description, count + 1)
    session.add(rule)
    session.flush()
    if position is not None:
        _move(session, rule, position, count + 1)
    said = {"rule": str(rule.rule_id)}
    return rule, change(session, caller, resource, firewall, "rule_created", said)


def update_rule(
    session: Session,
    caller: Caller,
    instance_id: UUID,
    rule_id: UUID,
    *,
    protocol: RuleProtocol,
    ports: tuple[int, int] | None,
    icmp_type: int | None,
    action: RuleAction,
    description: str,
) -> tuple[Rule, Operation]:
    """What a rule is about and does; its source and direction stay. Raises: NotFound, Invalid."""
    resource, firewall = lock_owned_firewall(session, caller, instance_id)
    rule, _ = get_rule(session, firewall, rule_id)
    values = RuleValues(
        Direction(rule.direction), protocol, ports, icmp_type, rule.ipset_id, rule.peer, action
    )
    _check_values(session, firewall, values)
    _refuse_same(session, firewall, values, but=rule_id)
    rule.protocol, rule.action, rule.description = protocol, action, description
    rule.port_first, rule.port_last = ports or (None, None)
    rule.icmp_type = icmp_type
    said = {"rule": str(rule_id)}
    return rule, change(session, caller, resource, firewall, "rule_changed", said)


def enable_rule(
    session: Session, caller: Caller, instance_id: UUID, rule_id: UUID, *, is_enabled: bool
) -> tuple[Rule, Operation | None]:
    """Has a rule count or not; as it is already: no effect. Raises: NotFound."""
    resource, firewall = lock_owned_firewall(session, caller, instance_id)
    rule, _ = get_rule(session, firewall, rule_id)
    if rule.is_enabled == is_enabled:
        return rule, None
    rule.is_enabled = is_enabled
    kind = "rule_enabled" if is_enabled else "rule_disabled"
    return rule, change(session, caller, resource, firewall, kind, {"rule": str(rule_id)})


def move_rule(
    session: Session, caller: Caller, instance_id: UUID, rule_id: UUID, position: int
) -> tuple[Rule, Operation | None]:
    """Gives a rule another place; those between move by one. There already: no effect. Raises: NotFound, Invalid."""
    resource, firewall = lock_owned_firewall(session, caller, instance_id)
    rule, _ = get_rule(session, firewall, rule_id)
    if rule.position == position:
        return rule, None
    _move(session, rule, position, count_rules(session, firewall.firewall_id))
    said = {"rule": str(rule_id), "position": position}
    return rule, change(session, caller, resource, firewall, "rule_moved", said)


def delete_rule(session: Session, caller: Caller, instance_id: UUID, rule_id: UUID) -> Operation:
    """Removes a rule; those behind it move up. Raises: NotFound."""
    resource, firewall = lock_owned_firewall(session, caller, instance_id)
    rule, _ = get_rule(session, firewall, rule_id)
    _shift(session, firewall.firewall_id, rule.position + 1, None, -1)
    session.delete(rule)
    session.flush()
    said = {"rule": str(rule_id)}
    return change(session, caller, resource, firewall, "rule_deleted", said)


def replace_rules(
    session: Session,
    caller: Caller,
    instance_id: UUID,
    rules: Sequence[tuple[RuleValues, str, bool]],
) -> Operation:
    """These rules (with description and whether enabled), in this order, instead of all that there were.

    Raises: NotFound, Invalid naming the rule, QuotaExceeded.
    """
    resource, firewall = lock_owned_firewall(session, caller, instance_id)
    if len(rules) > RULES_MAX:
        raise QuotaExceeded(f"A firewall has at most {RULES_MAX} rules.")
    ids = set(_ipset_ids(session, firewall))
    errors: dict[str, list[str]] = {}
    seen: set[RuleValues] = set()
    for number, (values, _, _) in enumerate(rules):
        for field, sentences in _errors_of(values, ids).items():
            errors[f"rules.{number}.{field}"] = sentences
        if values in seen:
            errors[f"rules.{number}.action"] = [SAME_RULE]
        seen.add(values)
    if errors:
        raise Invalid(errors)
    session.execute(delete(Rule).where(Rule.firewall_id == firewall.firewall_id))
    for position, (values, description, is_enabled) in enumerate(rules, start=1):
        rule = _new_rule(firewall, values, description, position)
        rule.is_enabled = is_enabled
        session.add(rule)
    session.flush()
    said = {"rules": len(rules)}
    return change(session, caller, resource, firewall, "rules_replaced", said)


def list_ipsets(
    session: Session, firewall_id: UUID, page: PageRequest
) -> tuple[Sequence[Ipset], int]:
    """A page of the firewall's sets, oldest first, and the number of all."""
    query = select(Ipset).where(Ipset.firewall_id == firewall_id)
    total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
    rows = session.scalars(
        query.order_by(Ipset.ipset_id).limit(page.limit).offset(page.offset)
    ).all()
    return rows, total


def entries_of(session: Session, ipset_ids: Sequence[int]) -> dict[int, list[IpsetEntry]]:
    """Set -> its entries, oldest first."""
    found: dict[int, list[IpsetEntry]] = {ipset_id: [] for ipset_id in ipset_ids}
    for row in session.scalars(
        select(IpsetEntry)
        .where(IpsetEntry.ipset_id.in_(ipset_ids))
        .order_by(IpsetEntry.created_at, IpsetEntry.entry_id)
    ):
        found[row.ipset_id].append(row)
    return found


def rules_by_ipset(session: Session, ipset_ids: Sequence[int]) -> dict[int, int]:
    """Set -> how many rules refer to it."""
    rows = session.execute(
        select(Rule.ipset_id, func.count())
        .where(Rule.ipset_id.in_(ipset_ids))
        .group_by(Rule.ipset_id)
    )
    return {ipset_id: count for ipset_id, count in rows if ipset_id is not None}


def get_ipset(session: Session, firewall: Firewall, ipset_id: int) -> Ipset:
    """A set of the firewall. Raises: NotFound."""
    row = session.get(Ipset, ipset_id, populate_existing=True)
    if row is None or row.firewall_id != firewall.firewall_id:
        raise NotFound("IPSet not found.")
    return row


def create_ipset(
    session: Session, caller: Caller, instance_id: UUID, name: str, description: str
) -> Ipset:
    """An empty set. The fabric need not know of it before a rule refers to it.

    Raises: NotFound, Invalid when the name is taken, QuotaExceeded.
    """
    _, firewall = lock_owned_firewall(session, caller, instance_id)
    names = session.scalars(
        select(Ipset.name).where(Ipset.firewall_id == firewall.firewall_id)
    ).all()
    if name in names:
        raise Invalid.field("name", "The name has already been taken.")
    if len(names) >= IPSETS_MAX:
        raise QuotaExceeded(f"A firewall has at most {IPSETS_MAX} IPSets.")
    row = Ipset(firewall_id=firewall.firewall_id, name=name, description=description)
    session.add(row)
    session.flush()
    note(session, caller, firewall, "ipset_created", {"ipset": row.ipset_id}, None)
    return row


def delete_ipset(session: Session, caller: Caller, instance_id: UUID, ipset_id: int) -> None:
    """Removes a set with its entries. Raises: NotFound, Conflict while a rule or a trial may need it."""
    _, firewall = lock_owned_firewall(session, caller, instance_id)
    row = get_ipset(session, firewall, ipset_id)
    if session.get(FirewallTrial, firewall.firewall_id) is not None:
        raise Conflict(
            "A trial is running, and may need the IPSet again: confirm it or take it back first."
        )
    if count := rules_by_ipset(session, [ipset_id]).get(ipset_id, 0):
        raise Conflict(f"The IPSet is used by {count} {'rule' if count == 1 else 'rules'}.")
    session.execute(delete(IpsetEntry).where(IpsetEntry.ipset_id == ipset_id))
    session.delete(row)
    session.flush()
    note(session, caller, firewall, "ipset_deleted", {"ipset": ipset_id}, None)


def add_entry(
    session: Session,
    caller: Caller,
    instance_id: UUID,
    ipset_id: int,
    cidr: IPv4Network | IPv6Network,
    description: str,
) -> tuple[IpsetEntry, Operation]:
    """A prefix more in a set. Raises: NotFound, Invalid when it is in it already, QuotaExceeded."""
    resource, firewall = lock_owned_firewall(session, caller, instance_id)
    get_ipset(session, firewall, ipset_id)
    present = [row.cidr for row in entries_of(session, [ipset_id])[ipset_id]]
    if cidr in present:
        raise Invalid.field("cidr", f"The IPSet has {cidr} already.")
    if len(present) >= ENTRIES_MAX:
        raise QuotaExceeded(f"An IPSet has at most {ENTRIES_MAX} entries.")
    row = IpsetEntry(entry_id=new_id(), ipset_id=ipset_id, cidr=cidr, description=description)
    session.add(row)
    session.flush()
    said = {"ipset": ipset_id, "cidr": str(cidr)}
    return row, change(session, caller, resource, firewall, "ipset_entry_created", said)


def get_entry(session: Session, firewall: Firewall, ipset_id: int, entry_id: UUID) -> IpsetEntry:
    """An entry of a set of the firewall. Raises: NotFound."""
    get_ipset(session, firewall, ipset_id)
    row = session.get(IpsetEntry, entry_id, populate_existing=True)
    if row is None or row.ipset_id != ipset_id:
        raise NotFound("IP/CIDR not found.")
    return row


def delete_entry(
    session: Session, caller: Caller, instance_id: UUID, ipset_id: int, entry_id: UUID
) -> Operation:
    """A prefix less in a set; the last one may go, and an empty set matches nothing. Raises: NotFound."""
    resource, firewall = lock_owned_firewall(session, caller, instance_id)
    row = get_entry(session, firewall, ipset_id, entry_id)
    session.delete(row)
    session.flush()
    said = {"ipset": ipset_id, "cidr": str(row.cidr)}
    return change(session, caller, resource, firewall, "ipset_entry_deleted", said)


def lock_owned_firewall(
    session: Session, caller: Caller, instance_id: UUID
) -> tuple[Resource, Firewall]:
    """The firewall of the caller's instance and the instance's resource, both locked. Raises: NotFound."""
    resource = lock_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    return resource, lock_firewall(session, instance_id)


def lock_firewall(session: Session, instance_id: UUID) -> Firewall:
    """An instance's firewall, locked and read fresh; the resource is locked already."""
    firewall_id = firewall_id_of(instance_id)
    return session.get_one(Firewall, firewall_id, with_for_update=True, populate_existing=True)


def change(
    session: Session,
    requester: Requester,
    resource: Resource,
    firewall: Firewall,
    kind: str,
    data: Mapping[str, object],
) -> Operation:
    """A revision more of a locked firewall, the event, and the operation that brings it to the fabric."""
    firewall.wanted_revision += 1
    session.flush()
    operation = ensure_queued(session, requester, resource, firewall)
    note(session, requester, firewall, kind, data, operation)
    return operation


def note(
    session: Session,
    requester: Requester,
    firewall: Firewall,
    kind: str,
    data: Mapping[str, object],
    operation: Operation | None,
) -> None:
    """The event of a change."""
    record(
        session,
        kind=f"firewall.{kind}",
        actor=requester.actor,
        account_id=firewall.account_id,
        resource_id=firewall.instance_id,
        operation_id=operation.operation_id if operation is not None else None,
        data=dict(data),
    )


def _ipset_ids(session: Session, firewall: Firewall) -> Sequence[int]:
    query = select(Ipset.ipset_id).where(Ipset.firewall_id == firewall.firewall_id)
    return session.scalars(query).all()


def _errors_of(values: RuleValues, ipset_ids: set[int]) -> dict[str, list[str]]:
    errors = check_protocol(values.protocol, values.ports, values.icmp_type)
    if values.ipset_id is not None and values.ipset_id not in ipset_ids:
        errors["source_ipset"] = [UNKNOWN_IPSET]
    return errors


def _check_values(session: Session, firewall: Firewall, values: RuleValues) -> None:
    errors = _errors_of(values, set(_ipset_ids(session, firewall)))
    if errors:
        raise Invalid(errors)


def _refuse_same(
    session: Session, firewall: Firewall, values: RuleValues, *, but: UUID | None = None
) -> None:
    """Raises: Invalid when another rule says the very same."""
    columns = (
        Rule.direction,
        Rule.protocol,
        Rule.port_first,
        Rule.port_last,
        Rule.icmp_type,
        Rule.ipset_id,
        Rule.peer,
        Rule.action,
    )
    first, last = values.ports or (None, None)
    wanted = astuple(values)
    said = (*wanted[:2], first, last, *wanted[3:])
    query = select(Rule.rule_id).where(
        Rule.firewall_id == firewall.firewall_id,
        *(column.is_not_distinct_from(value) for column, value in zip(columns, said, strict=True)),
    )
    if but is not None:
        query = query.where(Rule.rule_id != but)
    if session.scalar(query.limit(1)) is not None:
        raise Invalid.field("action", SAME_RULE)


def _new_rule(firewall: Firewall, values: RuleValues, description: str, position: int) -> Rule:
    first, last = values.ports or (None, None)
    return Rule(
        rule_id=new_id(),
        firewall_id=firewall.firewall_id,
        position=position,
        direction=values.direction,
        protocol=values.protocol,
        port_first=first,
        port_last=last,
        icmp_type=values.icmp_type,
        ipset_id=values.ipset_id,
        peer=values.peer,
        action=values.action,
        description=description,
        is_enabled=True,
        created_at=now(),
    )


def _move(session: Session, rule: Rule, position: int, count: int) -> None:
    """Raises: Invalid when there is no such place among `count` rules."""
    if not 1 <= position <= count:
        raise Invalid.field("position", f"The position must be between 1 and {count}.")
    if position < rule.position:
        _shift(session, rule.firewall_id, position, rule.position - 1, +1)
    else:
        _shift(session, rule.firewall_id, rule.position + 1, position, -1)
    rule.position = position
    session.flush()


def _shift(session: Session, firewall_id: UUID, first: int, last: int | None, by: int) -> None:
    """Moves the rules from position `first` to `last` (None: to the end)."""
    query = update(Rule).where(Rule.firewall_id == firewall_id, Rule.position >= first)
    if last is not None:
        query = query.where(Rule.position <= last)
    session.execute(
        query.values(position=Rule.position + by).execution_options(synchronize_session="fetch")
    )
