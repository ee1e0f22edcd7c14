"""Deletions of instances that failed: what is wanted goes on being wanted, and is tried again by itself.

Mostly the node was away for longer than a deletion waits. Charging has ended, and the guest may still run.
"""

from __future__ import annotations

from uuid import UUID

import structlog
from sqlalchemy import or_, select

from awan.errors import Conflict
from awan.fleet import Node, NodeHealth, NodeState
from awan.instances.models import DesiredState, Instance
from awan.instances.recover import ACTOR, is_due
from awan.instances.service import begin_deletion
from awan.instances.workflows import DELETE
from awan.kit.database import transaction
from awan.operations import ControlPlane
from awan.resources import Resource, lock

log = structlog.get_logger(__name__)


def resume_deletions(location_id: int) -> None:
    """Begins the deletions of the location anew that have failed and can succeed now, each after a while.

    A node that is lost is not asked any more. One that is unreachable is waited for.
    """
    with transaction() as session:
        failed = session.scalars(
            select(Instance.instance_id)
            .join(Resource, Resource.resource_id == Instance.instance_id)
            .join(Node, Node.node_id == Instance.node_id)
            .where(
                Instance.location_id == location_id,
                Instance.desired_state == DesiredState.DELETED,
                Instance.deleted_at.is_(None),
                Resource.active_operation_id.is_(None),
                or_(Node.health == NodeHealth.REACHABLE, Node.state == NodeState.LOST),
            )
            .order_by(Instance.instance_id)
        ).all()
    for instance_id in failed:
        try:
            _resume(instance_id)
        except Conflict as err:
            log.warning("deletion is resumed later", instance=str(instance_id), why=str(err))


def _resume(instance_id: UUID) -> None:
    with transaction() as session:
        resource = lock(session, instance_id)
        if resource is None or resource.deleted_at or resource.active_operation_id is not None:
            return
        instance = session.get_one(Instance, instance_id, with_for_update=True)
        if not is_due(session, instance_id, [DELETE.kind]):
            return
        caller = ControlPlane(ACTOR)
        begin_deletion(session, caller, resource, instance, remove_ip=instance.releases_ips)
    log.warning("deletion is resumed", instance=str(instance_id))
