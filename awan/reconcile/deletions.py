"""Deletions that failed: what is wanted goes on being wanted, and is tried again by itself, each after a while.

Mostly the node was away for longer than a deletion of its instance waits, or the fabric for longer than one of a
private network. Charging has ended, and the guest may still run.
"""

from __future__ import annotations

from uuid import UUID

import structlog
from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from awan.errors import Conflict
from awan.fleet import Node, NodeHealth, NodeState
from awan.instances.models import DesiredState, Instance
from awan.instances.recover import ACTOR, is_due
from awan.instances.service import begin_deletion
from awan.instances.workflows import DELETE
from awan.kit.database import transaction
from awan.networks.models import PrivateNetwork, PrivateNetworkState
from awan.networks.private_workflows import DELETE as DELETE_NETWORK
from awan.operations import ControlPlane, begin
from awan.resources import Resource, ResourceKind, lock

KINDS = (DELETE.kind, DELETE_NETWORK.kind)

log = structlog.get_logger(__name__)


def resume_deletions(location_id: int) -> None:
    """Begins the deletions of the location anew that have failed and can succeed now.

    A node that is lost is not asked any more. One that is unreachable is waited for.
    """
    with transaction() as session:
        failed = [
            *session.scalars(_instances(location_id)).all(),
            *session.scalars(_private_networks(location_id)).all(),
        ]
    for resource_id in failed:
        try:
            _resume(resource_id)
        except Conflict as err:
            log.warning("deletion is resumed later", subject=str(resource_id), why=str(err))


def _instances(location_id: int) -> Select[UUID]:
    return (
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
    )


def _private_networks(location_id: int) -> Select[UUID]:
    return (
        select(PrivateNetwork.resource_id)
        .join(Resource, Resource.resource_id == PrivateNetwork.resource_id)
        .where(
            PrivateNetwork.location_id == location_id,
            PrivateNetwork.state == PrivateNetworkState.DELETING,
            PrivateNetwork.deleted_at.is_(None),
            Resource.active_operation_id.is_(None),
        )
        .order_by(PrivateNetwork.resource_id)
    )


def _resume(resource_id: UUID) -> None:
    with transaction() as session:
        resource = lock(session, resource_id)
        if resource is None or resource.deleted_at or resource.active_operation_id is not None:
            return
        if not is_due(session, resource_id, KINDS):
            return
        _begin(session, resource)
    log.warning("deletion is resumed", subject=str(resource_id))


def _begin(session: Session, resource: Resource) -> None:
    caller, uuid = ControlPlane(ACTOR), resource.resource_id
    if resource.kind == ResourceKind.INSTANCE:
        instance = session.get_one(Instance, uuid, with_for_update=True)
        begin_deletion(session, caller, resource, instance, remove_ip=instance.releases_ips)
    else:
        begin(
            session,
            caller=caller,
            plan=DELETE_NETWORK,
            resource=resource,
            resource_kind=ResourceKind.PRIVATE_NETWORK,
            subject_id=uuid,
        )
