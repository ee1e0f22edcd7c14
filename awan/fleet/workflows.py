"""Nodes coming and going: the host is asked what it is before anything is placed on it.

node.add      probe -> pool -> stored
node.probe    the same for a node that is in service (new memory, a new disk)
node.fence    domains of an abandoned node that came back stopped
node.remove   copies of images gone          (no undo: a removal that failed can be asked for again)
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from awan.catalogue import engines
from awan.engines.fabric import ChassisFacts
from awan.engines.hypervisor import Power
from awan.errors import Conflict
from awan.events import record
from awan.fleet.models import Node, NodeState
from awan.fleet.service import endpoint, forget_copies, forget_node, store_probe
from awan.kit.database import transaction
from awan.operations import Failure, Plan, Step, Target, register

ACTOR = "system:fleet"


def probe(target: Target) -> None:
    """The node's storage pool is active, and what host, chassis and pool are is stored.

    Raises: Conflict when no chassis of the location's fabric matches, or the host is another one.
    """
    with transaction() as session:
        node = session.get_one(Node, target.subject_id)
        reached, opened = endpoint(node), engines(session, node.location_id)
    opened.volumes.ensure_pool(reached)
    facts = opened.hypervisor.probe(reached)
    chassis = opened.fabric.list_chassis()
    with transaction() as session:
        node = session.get_one(Node, target.subject_id, with_for_update=True)
        found = _match(node, facts.hostname, chassis)
        if node.mgmt_ip is None:
            node.mgmt_ip = found.encap_ip
        store_probe(session, node, facts, found.system_id)


def _match(node: Node, hostname: str, chassis: list[ChassisFacts]) -> ChassisFacts:
    """The node's chassis: by the system-id the operator named or that is known, else by host name."""
    for found in chassis:
        if node.ovn_system_id is not None:
            if found.system_id == node.ovn_system_id:
                return found
        elif found.hostname == hostname:
            return found
    wanted = node.ovn_system_id or hostname
    known = ", ".join(sorted(found.system_id for found in chassis)) or "none"
    raise Conflict(
        f"The fabric has no chassis {wanted} (it has: {known}). Is ovn-controller running on the node?"
    )


def mark_added(session: Session, target: Target) -> None:
    """The node is in service."""
    node = session.get_one(Node, target.subject_id)
    record(
        session,
        kind="node.added",
        actor=ACTOR,
        account_id=None,
        operation_id=target.operation_id,
        data={"node": str(node.node_id), "name": node.name},
    )


def mark_not_added(session: Session, target: Target, failure: Failure) -> None:
    """A node that could not be probed is not kept."""
    node = session.get_one(Node, target.subject_id, with_for_update=True)
    if node.state == NodeState.ADDING:
        node.state = NodeState.REMOVED


def keep(session: Session, target: Target, failure: Failure | None = None) -> None:
    """Nothing to write beside what the probe stored."""


def remove_images(target: Target) -> None:
    """No template image lies in the node's pool, not even one whose upload was cut off."""
    with transaction() as session:
        node = session.get_one(Node, target.subject_id)
        reached, opened = endpoint(node), engines(session, node.location_id)
    for file in opened.volumes.list_volumes(reached):
        if file.sha256 is not None:
            opened.volumes.delete_image(reached, file.sha256)
            with transaction() as session:
                forget_copies(session, target.subject_id, file.sha256)


def mark_removed(session: Session, target: Target) -> None:
    """The node is gone; its row stays for what was placed on it once."""
    node = session.get_one(Node, target.subject_id, with_for_update=True)
    forget_node(session, node, actor=ACTOR, operation_id=target.operation_id)


def mark_not_removed(session: Session, target: Target, failure: Failure) -> None:
    """A node that could not be cleared stays known, and nothing is placed on it."""
    node = session.get_one(Node, target.subject_id, with_for_update=True)
    if node.state == NodeState.REMOVING:
        node.state = NodeState.CORDONED


def stop_domains(target: Target) -> None:
    """No domain of ours runs on a node that was abandoned. Definitions and disks stay as they are."""
    with transaction() as session:
        node = session.get_one(Node, target.subject_id)
        if node.state != NodeState.LOST:
            return
        reached, opened = endpoint(node), engines(session, node.location_id)
    for found in opened.hypervisor.list_domains(reached):
        if found.instance_id is not None and found.power in (Power.RUNNING, Power.PAUSED):
            opened.hypervisor.ensure_stopped(reached, found.domain_uuid, grace_s=0, force=True)


def mark_fenced(session: Session, target: Target) -> None:
    """The operator learns that the node has come back."""
    node = session.get_one(Node, target.subject_id)
    record(
        session,
        kind="node.fenced",
        actor=ACTOR,
        account_id=None,
        operation_id=target.operation_id,
        data={"node": str(node.node_id), "name": node.name},
    )


ADD = register(
    Plan(
        workflow="node.add.v1",
        kind="node.add",
        steps=(Step("probe", probe, percent=10, timeout_s=20),),
        succeed=mark_added,
        fail=mark_not_added,
        deadline_s=120,
    )
)
PROBE = register(
    Plan(
        workflow="node.probe.v1",
        kind="node.probe",
        steps=(Step("probe", probe, percent=10, timeout_s=20),),
        succeed=keep,
        fail=keep,
        deadline_s=120,
    )
)
FENCE = register(
    Plan(
        workflow="node.fence.v1",
        kind="node.fence",
        steps=(Step("stop", stop_domains, percent=10, timeout_s=60, cancellable=False),),
        succeed=mark_fenced,
        fail=keep,
        deadline_s=600,
    )
)
REMOVE = register(
    Plan(
        workflow="node.remove.v1",
        kind="node.remove",
        steps=(Step("images", remove_images, percent=10, timeout_s=20, cancellable=False),),
        succeed=mark_removed,
        fail=mark_not_removed,
        deadline_s=300,
    )
)
