"""What a location can still take."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.catalogue.models import Tier
from awan.fleet.models import Node, NodeHealth, NodeState, NodeTier
from awan.fleet.schemas import TierCapacity


def capacity(session: Session) -> list[TierCapacity]:
    """Per location and tier: nodes in and out of service, and the room left on those in service.

    Room of a node is counted once for every tier that it serves, so rows of one location do not add up.
    """
    rows = session.execute(
        select(Node, Tier)
        .join(NodeTier, NodeTier.node_id == Node.node_id)
        .join(Tier, Tier.tier_id == NodeTier.tier_id)
        .where(Node.state.in_([NodeState.ACTIVE, NodeState.CORDONED]))
        .order_by(Node.location_id, Tier.tier_id)
    )
    found: dict[tuple[int, int], TierCapacity] = {}
    for node, tier in rows:
        entry = found.setdefault(
            (node.location_id, tier.tier_id),
            TierCapacity(
                location_id=node.location_id,
                tier_id=tier.tier_id,
                tier=tier.name,
                nodes_active=0,
                nodes_out_of_service=0,
                vcpus_free=0,
                memory_mib_free=0,
                disk_gib_free=0,
            ),
        )
        if node.state != NodeState.ACTIVE or node.health != NodeHealth.REACHABLE:
            entry.nodes_out_of_service += 1
            continue
        threads = node.cpu_threads - node.dedicated_threads_used
        entry.nodes_active += 1
        entry.vcpus_free += max(0, threads * tier.cpu_overcommit_percent // 100 - node.vcpus_used)
        entry.memory_mib_free += max(
            0, node.memory_mib * tier.memory_overcommit_percent // 100 - node.memory_mib_used
        )
        entry.disk_gib_free += max(
            0, node.disk_gib * tier.storage_overcommit_percent // 100 - node.disk_gib_used
        )
    return list(found.values())
