"""The firewall that the fabric should have, read whole from the rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ipaddress import IPv4Network, IPv6Network
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.engines.fabric.firewall import (
    AddressSetSpec,
    Direction,
    FirewallSpec,
    RuleAction,
    RuleProtocol,
    RuleSpec,
)
from awan.firewall.models import Firewall, IpsetEntry, Rule


def read_spec(session: Session, firewall_id: UUID) -> FirewallSpec | None:
    """The firewall as it is wanted now; None when it is gone.

    The revision is read with the rest, under the row's lock: a change is either in both or in neither.
    """
    row = session.get(Firewall, firewall_id, with_for_update={"read": True}, populate_existing=True)
    return None if row is None or row.deleted_at is not None else read_specs(session, [row])[0]


def read_specs(session: Session, rows: Sequence[Firewall]) -> list[FirewallSpec]:
    """Those of many, in three queries."""
    ids = [row.firewall_id for row in rows]
    rules: dict[UUID, list[Rule]] = {}
    for rule in session.scalars(
        select(Rule)
        .where(Rule.firewall_id.in_(ids), Rule.is_enabled)
        .order_by(Rule.firewall_id, Rule.position)
        .execution_options(populate_existing=True)
    ):
        rules.setdefault(rule.firewall_id, []).append(rule)
    used = {rule.ipset_id for of in rules.values() for rule in of if rule.ipset_id is not None}
    networks = _networks(session, used)
    return [_spec(row, rules.get(row.firewall_id, []), networks) for row in rows]


def _networks(
    session: Session, ipset_ids: Collection[int]
) -> dict[int, list[IPv4Network | IPv6Network]]:
    found: dict[int, list[IPv4Network | IPv6Network]] = {ipset_id: [] for ipset_id in ipset_ids}
    query = select(IpsetEntry.ipset_id, IpsetEntry.cidr).where(IpsetEntry.ipset_id.in_(ipset_ids))
    for ipset_id, cidr in session.execute(query) if ipset_ids else ():
        found[ipset_id].append(cidr)
    return found


def _spec(
    row: Firewall, rules: Sequence[Rule], networks: dict[int, list[IPv4Network | IPv6Network]]
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
    )
