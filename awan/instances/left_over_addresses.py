"""Addresses that a failed change of a public network had allocated, and kept because it could not undo its port."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.networks import Address
from awan.networks.addresses import give_back_allocated
from awan.networks.models import AddressState
from awan.operations import Operation
from awan.operations.models import OperationStatus
from awan.resources import Resource

ACTOR = "system:public_network"
CHANGE_KIND = "instance.change_public_network"


def give_back_left_over(session: Session, instance_id: UUID, operation_id: UUID) -> None:
    """They go back, with their quota: the fabric has no port with them any more. The caller has locked the instance.

    One that its owner has attached to something, or is about to, or to release, is in the owner's hands.
    """
    found = session.execute(
        select(Address, Resource)
        .join(Operation, Operation.operation_id == Address.operation_id)
        .join(Resource, Resource.resource_id == Address.resource_id)
        .where(
            Operation.resource_id == instance_id,
            Operation.kind == CHANGE_KIND,
            Operation.status == OperationStatus.FAILED,
            Address.state == AddressState.FREE,
            Resource.active_operation_id.is_(None),
        )
        # Resources come before instances in the order of locks: here they are not waited for.
        .with_for_update(of=Resource, skip_locked=True)
    ).all()
    for address, _ in found:
        give_back_allocated(session, address, actor=ACTOR, operation_id=operation_id)
