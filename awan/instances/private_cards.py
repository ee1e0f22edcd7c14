"""Attaching instances to private networks, and detaching them. The caller holds the transaction."""

from __future__ import annotations

from ipaddress import IPv4Address
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.errors import Conflict, Invalid, NotFound
from awan.instances.models import DesiredState
from awan.instances.private_workflows import ATTACH, DETACH
from awan.instances.service import begin_change, lock_instance, refuse_unless_changeable
from awan.kit.ids import new_id
from awan.networks.models import Nic, PrivateNetwork
from awan.networks.private_networks import INVALID, create_private_nic, find_network
from awan.operations import Operation


def attach(
    session: Session,
    caller: Caller,
    instance_id: UUID,
    reference: str,
    private_ip: IPv4Address | None,
) -> Operation:
    """Plugs a card of the private network in, running or stopped.

    Raises: NotFound, Invalid (vswitch, private_ip), Conflict (busy, node unreachable, neither running nor stopped,
    attached already, network not active), QuotaExceeded, NoCapacity.
    """
    resource, instance = lock_instance(session, caller, instance_id)
    network = find_network(
        session, instance.account_id, reference, location_id=instance.location_id
    )
    if network is None:
        raise Invalid.field("vswitch", INVALID)
    refuse_unless_changeable(session, resource, instance, "attached or detached")
    operation_id = new_id()
    nic = create_private_nic(
        session,
        instance_id=instance_id,
        network=network,
        operation_id=operation_id,
        private_ip=private_ip,
    )
    data: dict[str, object] = {
        "vswitch": str(network.resource_id),
        "ip_address": str(nic.private_ip),
    }
    return begin_change(
        session,
        caller,
        ATTACH,
        resource,
        instance,
        DesiredState(instance.desired_state),
        operation_id=operation_id,
        data=data,
    )


def detach(session: Session, caller: Caller, instance_id: UUID, reference: str | None) -> Operation:
    """Takes the card of a private network away, or all private cards when none is named.

    Raises: NotFound, Conflict (busy, node unreachable, neither running nor stopped, not attached).
    """
    resource, instance = lock_instance(session, caller, instance_id)
    network = None
    if reference is not None:
        network = find_network(
            session, instance.account_id, reference, location_id=instance.location_id
        )
        if network is None:
            raise NotFound("Private network not found.")
    refuse_unless_changeable(session, resource, instance, "attached or detached")
    query = (
        select(Nic, PrivateNetwork.resource_id)
        .join(PrivateNetwork, PrivateNetwork.network_id == Nic.network_id)
        .where(Nic.instance_id == instance_id, Nic.deleted_at.is_(None))
        .order_by(Nic.network_id)
    )
    if network is not None:
        query = query.where(Nic.network_id == network.network_id)
    found = session.execute(query).all()
    if not found:
        which = "a" if network is None else "this"
        raise Conflict(f"The instance is not attached to {which} private network.")
    for nic, _ in found:
        nic.is_leaving = True
    data: dict[str, object] = {"vswitches": [str(resource_id) for _, resource_id in found]}
    return begin_change(
        session,
        caller,
        DETACH,
        resource,
        instance,
        DesiredState(instance.desired_state),
        data=data,
    )
