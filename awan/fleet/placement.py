"""Placement: which node carries an instance, and what that takes of the node. The caller holds the transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Integer, and_, bindparam, case, delete, func, select, update
from sqlalchemy.orm import Session

from awan.catalogue.models import Tier
from awan.errors import NoCapacity
from awan.fleet.models import Node, NodeHealth, NodeState, NodeTier, Placement
from awan.fleet.rules import choose_threads
from awan.kit.database import execute_directly

# Nodes that are tried; more do not find room that these do not, unless very many creations come at once.
CANDIDATES_MAX = 20


@dataclass(frozen=True)
class Demand:
    """What an instance needs of a node. Memory in MiB, disk in GiB."""

    vcpus: int
    dedicated: bool
    memory_mib: int
    disk_gib: int


# Every creation asks these; built once, because building them takes longer than sending them.
_IN_SERVICE = (Node.state == NodeState.ACTIVE, Node.health == NodeHealth.REACHABLE)
_THREADS_LEFT = Node.cpu_threads - Node.dedicated_threads_used - bindparam("more_threads")
_FITS: dict[str, ColumnElement[bool]] = {
    "cpu": and_(
        _THREADS_LEFT >= 0,
        (Node.vcpus_used + bindparam("more_vcpus")) * 100
        <= _THREADS_LEFT * bindparam("cpu_percent"),
    ),
    "memory": (Node.memory_mib_used + bindparam("more_memory_mib")) * 100
    <= Node.memory_mib * bindparam("memory_percent"),
    "disk": (Node.disk_gib_used + bindparam("more_disk_gib")) * 100
    <= Node.disk_gib * bindparam("disk_percent"),
}
"""Conditions under which a node has room, by the name of the limit. Dedicated threads are never over-committed."""
_USED = {
    "vcpus_used": Node.vcpus_used + bindparam("more_vcpus"),
    "dedicated_threads_used": Node.dedicated_threads_used + bindparam("more_threads"),
    "memory_mib_used": Node.memory_mib_used + bindparam("more_memory_mib"),
    "disk_gib_used": Node.disk_gib_used + bindparam("more_disk_gib"),
}
_OWN = (
    select(func.count())
    .where(Placement.node_id == Node.node_id, Placement.account_id == bindparam("account"))
    .correlate(Node)
    .scalar_subquery()
)
_FULLNESS = func.greatest(
    Node.memory_mib_used * 1.0 / func.nullif(Node.memory_mib, 0),
    Node.disk_gib_used * 1.0 / func.nullif(Node.disk_gib, 0),
    (
        Node.vcpus_used * 100.0 / bindparam("cpu_percent", type_=Integer)
        + Node.dedicated_threads_used
    )
    / func.nullif(Node.cpu_threads, 0),
)
_DEDICATED = select(Placement.instance_id, Placement.threads).where(
    Placement.node_id == bindparam("node"), Placement.is_dedicated
)
_CANDIDATES = (
    select(Node.node_id)
    .join(NodeTier, NodeTier.node_id == Node.node_id)
    .where(
        Node.location_id == bindparam("location"),
        NodeTier.tier_id == bindparam("tier"),
        *_IN_SERVICE,
        *_FITS.values(),
    )
    .order_by(_OWN, _FULLNESS, Node.name)
    .limit(CANDIDATES_MAX)
)
_TAKE = (
    update(Node)
    .where(Node.node_id == bindparam("node"), *_IN_SERVICE, *_FITS.values())
    .values(_USED)
    .returning(Node)
    .execution_options(populate_existing=True)
)
_GIVE_BACK = update(Node).where(Node.node_id == bindparam("node")).values(_USED)
_WHY_NOT = (
    select(
        func.count(),
        func.count(case((and_(*_IN_SERVICE), 1))),
        *(
            func.count(case((and_(*_IN_SERVICE, ~condition), 1))).label(limit)
            for limit, condition in _FITS.items()
        ),
    )
    .select_from(Node)
    .join(NodeTier, NodeTier.node_id == Node.node_id)
    .where(
        Node.location_id == bindparam("location"),
        NodeTier.tier_id == bindparam("tier"),
        Node.state != NodeState.REMOVED,
    )
)


def place(
    session: Session,
    *,
    instance_id: UUID,
    account_id: UUID,
    location_id: int,
    tier: Tier,
    demand: Demand,
) -> Node:
    """Reserves room for an instance and returns its node.

    Candidates are tried from the one with the fewest instances of the account, then the emptiest; each try is one
    conditional UPDATE, so parallel placements can never take the same room twice. Dedicated threads are chosen behind
    that UPDATE, which locks the node's row.
    Raises: NoCapacity with a coarse sentence for the customer and the exact limits for the operator.
    """
    bounds = {
        **_change(demand, 1),
        "location": location_id,
        "tier": tier.tier_id,
        "cpu_percent": tier.cpu_overcommit_percent,
        "memory_percent": tier.memory_overcommit_percent,
        "disk_percent": tier.storage_overcommit_percent,
    }
    for node_id in session.scalars(_CANDIDATES, {**bounds, "account": account_id}).all():
        taken = session.scalars(_TAKE, {**bounds, "node": node_id}).first()
        if taken is not None:
            session.add(
                Placement(
                    instance_id=instance_id,
                    account_id=account_id,
                    node_id=node_id,
                    tier_id=tier.tier_id,
                    vcpus=demand.vcpus,
                    is_dedicated=demand.dedicated,
                    threads=_own_threads(session, taken, demand),
                    memory_mib=demand.memory_mib,
                    disk_gib=demand.disk_gib,
                )
            )
            return taken
    raise _explain(session, bounds, demand)


def release(session: Session, instance_id: UUID) -> None:
    """Gives the instance's room back. Released already: no effect."""
    placement = session.scalars(
        delete(Placement).where(Placement.instance_id == instance_id).returning(Placement)
    ).first()
    if placement is None:
        return
    demand = Demand(
        placement.vcpus, placement.is_dedicated, placement.memory_mib, placement.disk_gib
    )
    given = {**_change(demand, -1), "node": placement.node_id}
    execute_directly(session, _GIVE_BACK, given)


@dataclass(frozen=True)
class NodeThreads:
    """Whose the threads of a node are, by number: all it has, those of one instance, and all dedicated ones."""

    present: tuple[int, ...]
    own: tuple[int, ...]
    dedicated: frozenset[int]

    @property
    def shared(self) -> tuple[int, ...]:
        """Those left to instances without threads of their own."""
        return tuple(number for number in self.present if number not in self.dedicated)

    @property
    def shared_without_own(self) -> tuple[int, ...]:
        """Those left to them once this instance is gone."""
        dedicated = self.dedicated.difference(self.own)
        return tuple(number for number in self.present if number not in dedicated)


def node_threads(session: Session, node: Node, instance_id: UUID) -> NodeThreads:
    """Whose the node's threads are now."""
    rows = session.execute(_DEDICATED, {"node": node.node_id}).all()
    return NodeThreads(
        present=tuple(node.facts["cpu_threads"]),
        own=tuple(number for owner, own in rows if owner == instance_id for number in own),
        dedicated=frozenset(number for _, own in rows for number in own),
    )


def _own_threads(session: Session, node: Node, demand: Demand) -> list[int]:
    """Threads of the (locked) node for a new dedicated instance; none for one that shares."""
    if not demand.dedicated:
        return []
    taken = select(func.unnest(Placement.threads)).where(Placement.node_id == node.node_id)
    return choose_threads(node.facts["cpu_threads"], set(session.scalars(taken)), demand.vcpus)


def _change(demand: Demand, sign: int) -> dict[str, Any]:
    return {
        "more_vcpus": 0 if demand.dedicated else sign * demand.vcpus,
        "more_threads": sign * demand.vcpus if demand.dedicated else 0,
        "more_memory_mib": sign * demand.memory_mib,
        "more_disk_gib": sign * demand.disk_gib,
    }


def _explain(session: Session, bounds: dict[str, Any], demand: Demand) -> NoCapacity:
    """Why nothing fits: how many active nodes fail at which limit, in the operator's words."""
    counts = session.execute(_WHY_NOT, bounds).one()
    total, available, *short = counts
    limits = {
        limit: number
        for limit, number in zip(("cpu", "memory", "disk"), short, strict=True)
        if number
    }
    if not available:
        coarse = "this tier has no server in service at the location"
    else:
        coarse = (
            f"not enough free {max(limits, key=lambda limit: limits[limit])}"
            if limits
            else "servers are busy"
        )
    detail = (
        f"location {bounds['location']}, tier {bounds['tier']}: {total} nodes, {available} active; too little "
        + (", ".join(f"{limit} on {number}" for limit, number in limits.items()) or "of nothing")
        + f"; wanted {demand.vcpus} {'dedicated' if demand.dedicated else 'shared'} vCPU,"
        f" {demand.memory_mib} MiB, {demand.disk_gib} GiB"
    )
    return NoCapacity(
        f"The location has no capacity for this size at the moment: {coarse}.", detail=detail
    )
