"""The firewall that the fabric should have, read whole from the rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Select,
    Uuid,
    and_,
    any_,
    bindparam,
    literal_column,
    null,
    select,
    union_all,
)
from sqlalchemy.orm import Session

from awan.engines.fabric.firewall import (
    GROUPS_MAX,
    AddressSetSpec,
    Direction,
    FirewallGroupSpec,
    FirewallSpec,
    RuleAction,
    RuleProtocol,
    RuleSpec,
)
from awan.firewall.models import Firewall, FirewallAttachment, FirewallGroup, IpsetEntry, Rule
from awan.kit.ids import derived_id
from awan.resources import Resource


def read_spec(session: Session, firewall_id: UUID) -> FirewallSpec | None:
    """The firewall as it is wanted now; None when it is gone.

    The revision is read with the rest, under the row's lock: a change is either in both or in neither.
    """
    row = session.get(Firewall, firewall_id, with_for_update={"read": True}, populate_existing=True)
    return None if row is None or row.deleted_at is not None else read_specs(session, [row])[0]


def read_specs(session: Session, rows: Sequence[Firewall]) -> list[FirewallSpec]:
    """Those of many, in a handful of queries. Firewalls that share a group share its specification."""
    ids = [row.firewall_id for row in rows]
    rules: dict[UUID, list[Rule]] = {}
    for rule in session.scalars(_RULES, {"firewalls": ids}):
        rules.setdefault(rule.firewall_id, []).append(rule)
    used = {rule.ipset_id for of in rules.values() for rule in of if rule.ipset_id is not None}
    networks = _networks(session, used)
    groups = groups_of(session, ids)
    shared = {it.group_id: it for of in groups.values() for it in of}
    specs = {group_id: group_spec(group) for group_id, group in shared.items()}
    return [
        _spec(
            row,
            rules.get(row.firewall_id, []),
            networks,
            tuple(specs[group.group_id] for group in groups[row.firewall_id]),
        )
        for row in rows
    ]


def read_group_spec(session: Session, group_id: UUID) -> FirewallGroupSpec | None:
    """The group as it is wanted now; None when it is gone."""
    row = session.get(FirewallGroup, group_id, populate_existing=True)
    return None if row is None or row.deleted_at is not None else group_spec(row)


def group_spec(row: FirewallGroup) -> FirewallGroupSpec:
    """The group as the fabric is told. Rules and revision are one row, so that they go together."""
    return FirewallGroupSpec(
        group_id=row.group_id,
        account_id=row.account_id,
        revision=row.wanted_revision,
        rules=tuple(
            _group_rule(row.group_id, number, stored)
            for number, stored in enumerate(row.rules, start=1)
            if stored["is_enabled"]
        ),
    )


def _group_rule(group_id: UUID, number: int, stored: dict[str, Any]) -> RuleSpec:
    ports = stored["ports"]
    return RuleSpec(
        rule_id=derived_id(group_id, f"rule {number}"),
        direction=Direction(stored["direction"]),
        protocol=RuleProtocol(stored["protocol"]),
        action=RuleAction(stored["action"]),
        ports=(ports[0], ports[1]) if ports is not None else None,
        icmp_type=stored["icmp_type"],
        peers=tuple(ip_network(text) for text in stored["sources"]),
    )


def groups_of(session: Session, firewall_ids: Collection[UUID]) -> dict[UUID, list[FirewallGroup]]:
    """Firewall -> its groups in their order: those attached to it, then those by label, the oldest first."""
    placed: dict[UUID, list[UUID]] = {firewall_id: [] for firewall_id in firewall_ids}
    found = session.execute(_GROUPS, {"firewalls": list(placed)}) if placed else ()
    for firewall_id, group_id, *_ in found:
        if group_id not in placed[firewall_id] and len(placed[firewall_id]) < GROUPS_MAX:
            placed[firewall_id].append(group_id)
    # Their rules are read once, however many firewalls share them.
    ids = {group_id for group_ids in placed.values() for group_id in group_ids}
    rows = select(FirewallGroup).where(FirewallGroup.group_id.in_(ids))
    fresh = rows.execution_options(populate_existing=True)
    groups = {row.group_id: row for row in session.scalars(fresh)} if ids else {}
    return {
        firewall_id: [groups[group_id] for group_id in group_ids]
        for firewall_id, group_ids in placed.items()
    }


def labelled_firewalls(*conditions: ColumnElement[bool]) -> Select[UUID, UUID]:
    """Firewalls with the groups that their instances are behind by label."""
    return (
        select(Firewall.firewall_id, FirewallGroup.group_id)
        .join(Resource, Resource.resource_id == Firewall.instance_id)
        .join(
            FirewallGroup,
            and_(
                FirewallGroup.account_id == Firewall.account_id,
                FirewallGroup.location_id == Firewall.location_id,
                FirewallGroup.member_labels != {},
                Resource.labels.contains(FirewallGroup.member_labels),
            ),
        )
        .where(Firewall.deleted_at.is_(None), FirewallGroup.deleted_at.is_(None), *conditions)
    )


# Read for each instance that begins or changes; built once, because building them takes longer than sending them. An
# array, because the list of an IN is written into the text anew each time.
_WANTED = any_(bindparam("firewalls", type_=ARRAY(Uuid)))
_RULES = (
    select(Rule)
    .where(Rule.firewall_id == _WANTED, Rule.is_enabled)
    .order_by(Rule.firewall_id, Rule.position)
    .execution_options(populate_existing=True)
)
_BY_HAND, _BY_LABEL = 0, 1
_GROUPS = union_all(
    select(
        FirewallAttachment.firewall_id,
        FirewallAttachment.group_id,
        literal_column(str(_BY_HAND)).label("way"),
        FirewallAttachment.position.label("position"),
        null().label("created_at"),
    )
    .join(FirewallGroup, FirewallGroup.group_id == FirewallAttachment.group_id)
    .where(FirewallAttachment.firewall_id == _WANTED, FirewallGroup.deleted_at.is_(None)),
    labelled_firewalls()
    .where(Firewall.firewall_id == _WANTED)
    .add_columns(literal_column(str(_BY_LABEL)), literal_column("0"), FirewallGroup.created_at),
).order_by("firewall_id", "way", "position", "created_at", "group_id")


def _networks(
    session: Session, ipset_ids: Collection[int]
) -> dict[int, list[IPv4Network | IPv6Network]]:
    found: dict[int, list[IPv4Network | IPv6Network]] = {ipset_id: [] for ipset_id in ipset_ids}
    query = select(IpsetEntry.ipset_id, IpsetEntry.cidr).where(IpsetEntry.ipset_id.in_(ipset_ids))
    for ipset_id, cidr in session.execute(query) if ipset_ids else ():
        found[ipset_id].append(cidr)
    return found


def _spec(
    row: Firewall,
    rules: Sequence[Rule],
    networks: dict[int, list[IPv4Network | IPv6Network]],
    groups: tuple[FirewallGroupSpec, ...],
) -> FirewallSpec:
    """Only the sets that an enabled rule refers to are of use to the fabric."""
    used = sorted({rule.ipset_id for rule in rules if rule.ipset_id is not None})
    return FirewallSpec(
        firewall_id=row.firewall_id,
        account_id=row.account_id,
        revision=row.wanted_revision,
        policy=RuleAction(row.policy),
        outbound_policy=RuleAction(row.outbound_policy),
        apply_to_private=row.apply_to_private,
        rules=tuple(
            RuleSpec(
                rule_id=rule.rule_id,
                direction=Direction(rule.direction),
                protocol=RuleProtocol(rule.protocol),
                action=RuleAction(rule.action),
                ports=None
                if rule.port_first is None or rule.port_last is None
                else (rule.port_first, rule.port_last),
                icmp_type=rule.icmp_type,
                set_id=rule.ipset_id,
                peers=() if rule.peer is None else (rule.peer,),
            )
            for rule in rules
        ),
        sets=tuple(AddressSetSpec(ipset_id, tuple(networks[ipset_id])) for ipset_id in used),
        groups=groups,
    )
