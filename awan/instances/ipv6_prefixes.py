"""The IPv6 prefix of an instance: given and taken away. The caller holds the transaction."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.errors import Conflict
from awan.instances.ipv6_workflows import ADD_PREFIX, REMOVE_PREFIX
from awan.instances.models import DesiredState
from awan.instances.service import begin_change, lock_instance, refuse_unless_changeable
from awan.kit.ids import new_id
from awan.networks.prefixes import assign_prefix, find_prefix
from awan.operations import Operation


def add(session: Session, caller: Caller, instance_id: UUID) -> Operation:
    """Routes a /64 to the instance, running or stopped.

    Raises: NotFound, Conflict (busy, node unreachable, neither running nor stopped, has one, no public IPv6 address,
    none offered), NoCapacity.
    """
    resource, instance = lock_instance(session, caller, instance_id)
    refuse_unless_changeable(session, resource, instance)
    operation_id = new_id()
    prefix = assign_prefix(
        session,
        account_id=instance.account_id,
        instance_id=instance_id,
        operation_id=operation_id,
    )
    return begin_change(
        session,
        caller,
        ADD_PREFIX,
        resource,
        instance,
        DesiredState(instance.desired_state),
        operation_id=operation_id,
        data={"ipv6_prefix": str(prefix.cidr)},
    )


def remove(session: Session, caller: Caller, instance_id: UUID) -> Operation:
    """Takes the instance's prefix away, with the names of its addresses.

    Raises: NotFound, Conflict (busy, node unreachable, neither running nor stopped, has none).
    """
    resource, instance = lock_instance(session, caller, instance_id)
    refuse_unless_changeable(session, resource, instance)
    prefix = find_prefix(session, instance_id, locked=True)
    if prefix is None:
        raise Conflict("The instance has no IPv6 prefix.")
    operation_id = new_id()
    prefix.is_leaving, prefix.operation_id = True, operation_id
    return begin_change(
        session,
        caller,
        REMOVE_PREFIX,
        resource,
        instance,
        DesiredState(instance.desired_state),
        operation_id=operation_id,
        data={"ipv6_prefix": str(prefix.cidr)},
    )
