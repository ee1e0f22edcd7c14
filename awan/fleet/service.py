"""Verbs of the fleet's nodes. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, or_, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.catalogue.models import TemplateImage, Tier
from awan.catalogue.service import EngineRow, engines_of, find_location
from awan.engines.hypervisor import NodeEndpoint, NodeFacts
from awan.engines.registry import LocationEngines
from awan.errors import Conflict, Invalid, NotFound
from awan.events import record
from awan.fleet.models import Node, NodeHealth, NodeImage, NodeState, NodeTier
from awan.kit.clock import now
from awan.kit.ids import new_id

WATCH_ACTOR = "system:watch"
ABANDONED = "The node was abandoned: it can only be removed, as lost, once nothing is placed on it."


# Asked for each node several times a minute, hence columns instead of entities, which take twice the time.
_NODE_WITH_ENGINES = text(
    """
    SELECT node.node_id, name, libvirt_uri, libvirt_host_uuid, state, location_id,
        engine.kind, engine.driver, engine.options, engine.secret_id
    FROM node LEFT JOIN location_engine AS engine USING (location_id)
    WHERE node.node_id = :node
    """
)
_NOTE_USUAL_ANSWER = text(
    f"""
    UPDATE node SET seen_at = clock_timestamp()
    WHERE node_id = :node AND health = '{NodeHealth.REACHABLE}'
    RETURNING node_id
    """  # noqa: S608
)


@dataclass(frozen=True)
class ReachedNode:
    """Where a node is and the engines that speak to it, as the rows have them now."""

    endpoint: NodeEndpoint
    state: NodeState
    location_id: int
    engines: LocationEngines


def endpoint(node: Node) -> NodeEndpoint:
    """How the engines reach the node."""
    return NodeEndpoint(node.node_id, node.name, node.libvirt_uri, node.libvirt_host_uuid)


def get_node(session: Session, node_id: UUID) -> Node:
    """A node that is not removed. Raises: NotFound."""
    node = session.get(Node, node_id)
    if node is None or node.state == NodeState.REMOVED:
        raise NotFound("Node not found.")
    return node


def node_with_engines(session: Session, node_id: UUID) -> ReachedNode:
    """A node and the engines of its location, in one statement.

    Raises: NotFound for an unknown or removed node; Unavailable while an engine is not configured.
    """
    rows = session.execute(_NODE_WITH_ENGINES, {"node": node_id}).all()
    if not rows or rows[0].state == NodeState.REMOVED:
        raise NotFound("Node not found.")
    node = rows[0]
    return ReachedNode(
        NodeEndpoint(node.node_id, node.name, node.libvirt_uri, node.libvirt_host_uuid),
        NodeState(node.state),
        node.location_id,
        engines_of(
            session,
            node.location_id,
            (
                EngineRow(row.kind, row.driver, row.options, row.secret_id)
                for row in rows
                if row.kind is not None
            ),
        ),
    )


def list_nodes(session: Session, location_id: int | None = None) -> Sequence[Node]:
    """Nodes that are not removed, by location and name."""
    query = (
        select(Node).where(Node.state != NodeState.REMOVED).order_by(Node.location_id, Node.name)
    )
    return session.scalars(
        query if location_id is None else query.where(Node.location_id == location_id)
    ).all()


def node_tiers(session: Session, node_id: UUID) -> list[int]:
    """Ids of the tiers that the node serves."""
    return list(
        session.scalars(
            select(NodeTier.tier_id).where(NodeTier.node_id == node_id).order_by(NodeTier.tier_id)
        )
    )


def insert_node(
    session: Session,
    caller: Caller,
    *,
    location_id: int,
    name: str,
    libvirt_uri: str,
    mgmt_ip: str | None,
    ovn_system_id: str | None,
    tier_ids: Sequence[int],
    cpu_threads_cap: int | None,
    memory_mib_cap: int | None,
    disk_gib_cap: int | None,
) -> Node:
    """The row of a node that is about to be probed. Raises: Invalid (location, tier), Conflict (name taken)."""
    if find_location(session, location_id) is None:
        raise Invalid.field("location_id", "The selected location is invalid.")
    known = set(session.scalars(select(Tier.tier_id).where(Tier.tier_id.in_(tier_ids))))
    if unknown := sorted(set(tier_ids) - known):
        raise Invalid.field("tier_ids", f"Unknown tier {unknown[0]}.")
    node = Node(
        node_id=new_id(),
        location_id=location_id,
        name=name,
        libvirt_uri=libvirt_uri,
        mgmt_ip=mgmt_ip,
        ovn_system_id=ovn_system_id,
        state=NodeState.ADDING,
        cpu_threads_cap=cpu_threads_cap,
        memory_mib_cap=memory_mib_cap,
        disk_gib_cap=disk_gib_cap,
    )
    session.add(node)
    try:
        session.flush()
    except IntegrityError as err:
        raise Conflict("A node of this name exists in the location.") from err
    session.add_all(NodeTier(node_id=node.node_id, tier_id=tier_id) for tier_id in set(tier_ids))
    record(
        session,
        kind="node.adding",
        actor=caller.actor,
        account_id=None,
        data={"node": str(node.node_id), "name": name},
    )
    return node


def store_probe(session: Session, node: Node, facts: NodeFacts, system_id: str) -> None:
    """What a probe found becomes the node's capacity, capped by the operator's values.

    Raises: Conflict when another node has this host uuid or chassis, or one that was abandoned had it, or the host
    changed.
    """
    if node.state == NodeState.LOST:
        raise Conflict(ABANDONED)
    if node.libvirt_host_uuid is not None and node.libvirt_host_uuid != facts.host_uuid:
        raise Conflict(f"The host behind {node.name} is not the one that was added.")
    taken = session.scalars(
        select(Node).where(
            Node.node_id != node.node_id,
            or_(Node.state != NodeState.REMOVED, Node.abandoned_at.is_not(None)),
            or_(Node.libvirt_host_uuid == facts.host_uuid, Node.ovn_system_id == system_id),
        )
    ).first()
    if taken is not None and taken.abandoned_at is not None:
        raise Conflict(
            f"This host or chassis was abandoned as {taken.name}. Install it anew, with another host_uuid and OVN"
            " system-id."
        )
    if taken is not None:
        raise Conflict(f"The node {taken.name} is the same host or the same chassis.")
    node.libvirt_host_uuid = facts.host_uuid
    node.ovn_system_id = system_id
    node.cpu_model = facts.cpu_model
    node.has_kvm = facts.kvm
    threads = len(facts.cpu_threads)
    node.cpu_threads = min(threads, node.cpu_threads_cap or threads)
    node.memory_mib = min(facts.memory_mib, node.memory_mib_cap or facts.memory_mib)
    node.disk_gib = min(facts.pool_capacity_gib, node.disk_gib_cap or facts.pool_capacity_gib)
    node.facts = {
        "hostname": facts.hostname,
        "libvirt_version": facts.libvirt_version,
        "qemu_version": facts.qemu_version,
        "cpu_threads": list(facts.cpu_threads),
        "memory_mib": facts.memory_mib,
        "pool_name": facts.pool_name,
        "pool_capacity_gib": facts.pool_capacity_gib,
        "pool_available_gib": facts.pool_available_gib,
    }
    node.probed_at = now()
    if node.state == NodeState.ADDING:
        node.state = NodeState.ACTIVE


def set_cordon(session: Session, caller: Caller, node_id: UUID, cordoned: bool) -> Node:
    """Takes a node out of placement, or back into it. Raises: NotFound, Conflict (being added or removed)."""
    node = _lock_settled(session, node_id)
    node.state = NodeState.CORDONED if cordoned else NodeState.ACTIVE
    session.flush()
    kind = "node.cordoned" if cordoned else "node.uncordoned"
    record(session, kind=kind, actor=caller.actor, account_id=None, data={"node": str(node_id)})
    return node


def start_removal(session: Session, caller: Caller, node_id: UUID) -> None:
    """From now on nothing is placed on an empty node; an operation has to take away what is left on it.

    Raises: NotFound; Conflict while instances are placed on it, or while it is being added or removed.
    """
    node = _lock_settled(session, node_id)
    _refuse_if_used(session, node_id)
    node.state = NodeState.REMOVING
    record(
        session,
        kind="node.removing",
        actor=caller.actor,
        account_id=None,
        data={"node": str(node_id)},
    )


def abandon(session: Session, caller: Caller, node_id: UUID, confirmation: str) -> Node:
    """Gives a node up for good: it is lost, and takes part in nothing any more under its identity.

    `confirmation` is its name. The caller ends what is placed on it.
    Raises: NotFound; Invalid for another name; Conflict while it answers, or is being added, removed, or lost already.
    """
    node = _lock_settled(session, node_id)
    if confirmation != node.name:
        raise Invalid.field("confirm", "This is not the name of the node.")
    if node.health != NodeHealth.UNREACHABLE:
        raise Conflict(
            "The node answers. Only one that is unreachable can be abandoned; make sure that it is switched off."
        )
    node.state, node.abandoned_at = NodeState.LOST, now()
    session.execute(delete(NodeTier).where(NodeTier.node_id == node_id))
    session.flush()
    record(
        session,
        kind="node.abandoned",
        actor=caller.actor,
        account_id=None,
        data={"node": str(node_id), "name": node.name},
    )
    return node


def forget_lost_node(session: Session, caller: Caller, node_id: UUID) -> None:
    """Forgets an empty node that will never answer again, without asking it.

    Raises: NotFound, Conflict while instances are placed on it.
    """
    node = _lock_node(session, node_id)
    _refuse_if_used(session, node_id)
    forget_node(session, node, actor=caller.actor)


def forget_node(
    session: Session, node: Node, *, actor: str, operation_id: UUID | None = None
) -> None:
    """The (locked) node is gone, and with it what it served and held. Forgotten already: no effect."""
    if node.state == NodeState.REMOVED:
        return
    node.state = NodeState.REMOVED
    session.execute(delete(NodeTier).where(NodeTier.node_id == node.node_id))
    session.execute(delete(NodeImage).where(NodeImage.node_id == node.node_id))
    record(
        session,
        kind="node.removed",
        actor=actor,
        account_id=None,
        operation_id=operation_id,
        data={"node": str(node.node_id)},
    )


def forget_copies(session: Session, node_id: UUID, sha256: str) -> None:
    """No image of this content lies on the node any more."""
    same = select(TemplateImage.image_id).where(TemplateImage.sha256 == sha256)
    session.execute(
        delete(NodeImage)
        .where(NodeImage.node_id == node_id, NodeImage.image_id.in_(same))
        .execution_options(synchronize_session=False)
    )


def note_usual_answer(session: Session, node_id: UUID) -> bool:
    """A node that counts as reachable has just answered, which is noted in one statement. False: it does not count so.

    Then `note_answer` is to be asked.
    """
    return session.scalar(_NOTE_USUAL_ANSWER, {"node": node_id}) is not None


def note_answer(session: Session, node_id: UUID) -> bool:
    """The node has just answered. Whether it counted as unreachable until now; then its instances are known again."""
    if note_usual_answer(session, node_id):
        return False
    node = session.get_one(Node, node_id, with_for_update=True, populate_existing=True)
    node.seen_at = _database_time(session)
    if node.health == NodeHealth.REACHABLE:
        return False
    silent_s = round((node.seen_at - node.health_since).total_seconds())
    _set_health(session, node, NodeHealth.REACHABLE, None, {"unreachable_s": silent_s})
    return True


def note_silence(session: Session, node_id: UUID, silent_s: float, reason: str) -> bool:
    """The node counts as unreachable, unless anyone has had an answer within `silent_s`. Whether this call did it.

    `reason` is the engine's words, for the operator.
    """
    node = session.get_one(Node, node_id, with_for_update=True, populate_existing=True)
    since = node.seen_at or node.created_at
    has_answered = (_database_time(session) - since).total_seconds() < silent_s
    if node.health == NodeHealth.UNREACHABLE or has_answered:
        return False
    _set_health(session, node, NodeHealth.UNREACHABLE, reason, {"reason": reason})
    return True


def _set_health(
    session: Session, node: Node, health: NodeHealth, reason: str | None, data: dict[str, Any]
) -> None:
    node.health, node.health_reason = health, reason
    node.health_since = _database_time(session)
    record(
        session,
        kind=f"node.{health}",
        actor=WATCH_ACTOR,
        account_id=None,
        data={"node": str(node.node_id), "name": node.name, **data},
    )


def _database_time(session: Session) -> datetime:
    """One clock for all workers: they compare each other's times."""
    moment = session.scalar(select(func.clock_timestamp()))
    assert isinstance(moment, datetime)
    return moment


def _lock_node(session: Session, node_id: UUID) -> Node:
    node = session.get(Node, node_id, with_for_update=True, populate_existing=True)
    if node is None or node.state == NodeState.REMOVED:
        raise NotFound("Node not found.")
    return node


def _lock_settled(session: Session, node_id: UUID) -> Node:
    node = _lock_node(session, node_id)
    if node.state == NodeState.ADDING:
        raise Conflict("The node is still being added.")
    if node.state == NodeState.REMOVING:
        raise Conflict("The node is being removed.")
    if node.state == NodeState.LOST:
        raise Conflict(ABANDONED)
    return node


def _refuse_if_used(session: Session, node_id: UUID) -> None:
    # Also one whose creation failed: its deletion will still ask the node. Instances belong to a room above, so this
    # asks by name.
    held = session.scalar(
        text("SELECT count(*) FROM instance WHERE node_id = :node AND deleted_at IS NULL"),
        {"node": node_id},
    )
    if held:
        raise Conflict(f"{held} instances are placed on the node; they have to be deleted first.")
