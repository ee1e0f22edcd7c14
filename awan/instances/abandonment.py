"""What becomes of instances whose node is given up for good."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan import fleet
from awan.accounts import Caller
from awan.events import record
from awan.fleet import Node
from awan.instances.models import Instance
from awan.instances.service import begin_deletion
from awan.resources import lock


def abandon_node(session: Session, caller: Caller, node_id: UUID, confirmation: str) -> Node:
    """The node is lost, and every instance on it is deleted, protected or not, without asking the node.

    Charging for them ends now. Their addresses stay their owners', unattached. Raises: as `fleet.abandon`.
    """
    query = select(Instance.instance_id).where(
        Instance.node_id == node_id, Instance.deleted_at.is_(None)
    )
    held = []
    # Resources and instances are locked before the node, as everywhere. A node that is silent gets nothing meanwhile.
    for instance_id in session.scalars(query.order_by(Instance.instance_id)).all():
        resource = lock(session, instance_id)
        assert resource is not None
        held.append((resource, session.get_one(Instance, instance_id, with_for_update=True)))
    node = fleet.abandon(session, caller, node_id, confirmation)
    for resource, instance in held:
        if resource.deleted_at is not None:
            continue
        begin_deletion(session, caller, resource, instance, remove_ip=False)
        record(
            session,
            kind="instance.lost",
            actor=caller.actor,
            account_id=resource.account_id,
            resource_id=resource.resource_id,
        )
    return node
