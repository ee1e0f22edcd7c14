"""Firewall groups of the fabric against the rows: what they do, and which ports are in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from awan.engines.fabric.acls import group_lines, place_name
from awan.engines.fabric.firewall import FirewallGroupFacts, FirewallGroupSpec
from awan.reconcile.findings import Finding, FindingKind
from awan.reconcile.rules import ExpectedFirewall, ExpectedLocation


@dataclass
class _Place:
    """A group at one of its places; `firewall` is one that has it there, by which it can be put right."""

    spec: FirewallGroupSpec
    place: int
    firewall: ExpectedFirewall
    port_ids: set[UUID] = field(default_factory=set)


def compare_groups(
    where: ExpectedLocation, found: Sequence[FirewallGroupFacts]
) -> Iterator[Finding]:
    """Each group does what its rules say wherever a firewall has it, to the cards behind such firewalls alone."""
    wanted = _places(where)
    guarded = {port_id for firewall in where.firewalls for port_id in firewall.port_ids}
    present = {facts.name: facts for facts in found}
    for name, it in wanted.items():
        facts = present.get(name)
        if facts is None:
            yield Finding(
                FindingKind.FIREWALL_MISSING,
                where.code,
                str(it.firewall.spec.firewall_id),
                name,
                "none",
                f"The fabric lacks the firewall group {name} of {it.firewall.owner}.",
            )
        elif (lines := group_lines(it.spec, it.place)) != facts.lines:
            yield Finding(
                FindingKind.FIREWALL_WRONG,
                where.code,
                str(it.firewall.spec.firewall_id),
                "; ".join(sorted(set(lines) - set(facts.lines))) or "no more",
                "; ".join(sorted(set(facts.lines) - set(lines))) or "less",
                f"The firewall group {name} has other rules in the fabric.",
            )
    for name, facts in present.items():
        if facts.group_id in where.unsettled.group_ids:
            continue
        if facts.group_id not in where.group_ids:
            yield Finding(
                FindingKind.FIREWALL_STRAY,
                where.code,
                name,
                "no such firewall group",
                f"{len(facts.lines)} rows, {len(facts.port_ids)} ports",
                f"The fabric has the firewall group {name}, which no group explains.",
            )
            continue
        inside = wanted[name].port_ids if name in wanted else set()
        for port_id in sorted((inside ^ set(facts.port_ids)) & guarded):
            is_in = port_id in facts.port_ids
            yield Finding(
                FindingKind.PORT_WRONG,
                where.code,
                str(port_id),
                f"{'not ' if is_in else ''}in {name}",
                f"{'' if is_in else 'not '}in {name}",
                f"The port {port_id} is {'' if is_in else 'not '}in the firewall group {name}.",
            )


def _places(where: ExpectedLocation) -> dict[str, _Place]:
    """Port group -> what it should be, of the groups that nothing is done to."""
    found: dict[str, _Place] = {}
    for firewall in where.firewalls:
        for place, spec in enumerate(firewall.spec.groups):
            if spec.group_id not in where.unsettled.group_ids:
                name = place_name(spec.group_id, place)
                it = found.setdefault(name, _Place(spec, place, firewall))
                it.port_ids |= firewall.port_ids
    return found
