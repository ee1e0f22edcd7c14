"""The public address of an instance: added, changed, removed, moved to another. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.errors import Conflict, Invalid, NotFound
from awan.instances.models import Instance, PublicNetworkChange
from awan.instances.public_network_workflows import CHANGE
from awan.instances.service import refuse_if_unreachable, require_alive
from awan.kit.ids import new_id
from awan.networks import Address, allocate, find_owned_address
from awan.networks.models import AddressState, Nic, Pool
from awan.operations import Operation, begin
from awan.operations.service import refuse_if_busy
from awan.resources import Resource, ResourceKind, get_owned, lock_owned

HAS_ONE = "The instance has a public network already."
HAS_NONE = "The instance has no public network."
UNKNOWN_ADDRESS = "The selected public network is invalid."
UNKNOWN_INSTANCE = "The selected instance is invalid."


@dataclass(frozen=True)
class Held:
    """Resources and instances that are locked for a change, by id."""

    resources: Mapping[UUID, Resource]
    instances: Mapping[UUID, Instance]


def add(session: Session, caller: Caller, instance_id: UUID) -> Operation:
    """Gives an instance a new public address. Raises: NotFound, Conflict (has one, busy), QuotaExceeded, NoCapacity."""
    held = _lock(session, caller, [instance_id], [])
    instance = held.instances[instance_id]
    if _address_of(session, instance) is not None:
        raise Conflict(HAS_ONE)
    operation_id = new_id()
    # An operator acts for the owner: the address is theirs, in quota, price and bill.
    owner = replace(caller, account_id=instance.account_id, currency=instance.currency)
    address = allocate(session, owner, instance.location_id, operation_id=operation_id)
    assert address.resource_id is not None
    resource = session.get_one(Resource, address.resource_id)
    return _begin(session, caller, held, instance, {instance_id: address}, operation_id, resource)


def change(
    session: Session, caller: Caller, instance_id: UUID, resource_id: UUID | None
) -> Operation:
    """Gives an instance another of the account's free addresses, or (None) takes its address away.

    The address that it had stays the account's. Raises: NotFound, Invalid (address), Conflict (busy, nothing to do).
    """
    account_id = get_owned(session, caller, ResourceKind.INSTANCE, instance_id).account_id
    location_id = session.get_one(Instance, instance_id).location_id
    if resource_id is None:
        held = _lock(session, caller, [instance_id], [])
        instance = held.instances[instance_id]
        if _address_of(session, instance) is None:
            raise Conflict(HAS_NONE)
        return _begin(session, caller, held, instance, {instance_id: None})
    found = find_owned_address(session, account_id, resource_id, location_id=location_id)
    if found is None:
        raise Invalid.field("public_network", UNKNOWN_ADDRESS)
    held = _lock(session, caller, [instance_id], [resource_id])
    instance = held.instances[instance_id]
    address = _lock_address(session, found)
    present = _address_of(session, instance)
    if present is not None and present.address_id == address.address_id:
        raise Conflict("The instance has this public network already.")
    if address.state != AddressState.FREE:
        raise Invalid.field("public_network", "The selected public network is in use.")
    return _begin(session, caller, held, instance, {instance_id: address})


def attach(
    session: Session, caller: Caller, resource_id: UUID, instance_id: UUID | None
) -> Operation:
    """Gives an address to an instance that has none, taking it from whoever has it; None: takes it away only.

    Raises: NotFound, Invalid (instance), Conflict (has an address, address in other use, not attached, busy).
    """
    account_id = get_owned(session, caller, ResourceKind.PUBLIC_IP, resource_id).account_id
    found = find_owned_address(session, account_id, resource_id)
    if found is None:
        raise NotFound("Public network not found.")
    location_id = session.get_one(Pool, found.pool_id).location_id
    if instance_id is not None:
        _check_instance(session, caller, instance_id, account_id, location_id)
    source_id = _instance_of(session, found)
    ids = {it for it in (source_id, instance_id) if it is not None}
    held = _lock(session, caller, sorted(ids), [resource_id])
    address = _lock_address(session, found)
    if _instance_of(session, address) != source_id:
        raise Conflict("The public network was changed just now.", retry_after_s=1)
    if address.state not in (AddressState.FREE, AddressState.ATTACHED):
        raise Conflict("The public network is in other use.")
    if instance_id is None:
        if source_id is None:
            raise Conflict("The public network is not attached to an instance.")
        return _begin(session, caller, held, held.instances[source_id], {source_id: None})
    if instance_id == source_id:
        raise Conflict("The public network is attached to this instance already.")
    instance = held.instances[instance_id]
    if _address_of(session, instance) is not None:
        raise Conflict(HAS_ONE)
    wanted: dict[UUID, Address | None] = {instance_id: address}
    if source_id is not None:
        wanted[source_id] = None
    return _begin(session, caller, held, instance, wanted)


def _check_instance(
    session: Session, caller: Caller, instance_id: UUID, account_id: UUID, location_id: int
) -> None:
    """Raises: Invalid, in the same words for an instance that is absent, another's, or in another location."""
    try:
        resource = get_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    except NotFound as err:
        raise Invalid.field("instance_id", UNKNOWN_INSTANCE) from err
    if (resource.account_id, resource.location_id) != (account_id, location_id):
        raise Invalid.field("instance_id", UNKNOWN_INSTANCE)


def _lock(
    session: Session, caller: Caller, instance_ids: Sequence[UUID], address_ids: Sequence[UUID]
) -> Held:
    """Locks instances and addresses as resources, by id, then the instances. Raises: NotFound, Conflict."""
    kinds = dict.fromkeys(instance_ids, ResourceKind.INSTANCE)
    kinds |= dict.fromkeys(address_ids, ResourceKind.PUBLIC_IP)
    resources = {
        uuid: lock_owned(session, caller, kind, uuid) for uuid, kind in sorted(kinds.items())
    }
    instances = {
        uuid: session.get_one(Instance, uuid, with_for_update=True, populate_existing=True)
        for uuid in sorted(instance_ids)
    }
    for resource in resources.values():
        refuse_if_busy(session, resource)
    for instance in instances.values():
        refuse_if_unreachable(session, instance)
        require_alive(instance)
    return Held(resources, instances)


def _lock_address(session: Session, address: Address) -> Address:
    session.refresh(address, with_for_update=True)
    return address


def _instance_of(session: Session, address: Address) -> UUID | None:
    return session.get_one(Nic, address.nic_id).instance_id if address.nic_id is not None else None


def _address_of(session: Session, instance: Instance) -> Address | None:
    """The instance's public IPv4 address, or None."""
    return session.scalars(
        select(Address)
        .join(Nic, Nic.nic_id == Address.nic_id)
        .where(
            Nic.instance_id == instance.instance_id,
            Nic.deleted_at.is_(None),
            Address.family == 4,
        )
    ).first()


def _begin(
    session: Session,
    caller: Caller,
    held: Held,
    main: Instance,
    wanted: Mapping[UUID, Address | None],
    operation_id: UUID | None = None,
    allocated: Resource | None = None,
) -> Operation:
    """One operation for all of it; it is the one of the instance `main`, and holds the others."""
    also = [it for uuid, it in held.resources.items() if uuid != main.instance_id]
    if allocated is not None:
        also.append(allocated)
    operation = begin(
        session,
        caller=caller,
        plan=CHANGE,
        resource=held.resources[main.instance_id],
        resource_kind=ResourceKind.INSTANCE,
        subject_id=main.instance_id,
        operation_id=operation_id,
        also=also,
    )
    for instance_id, address in wanted.items():
        present = _address_of(session, held.instances[instance_id])
        session.add(
            PublicNetworkChange(
                operation_id=operation.operation_id,
                instance_id=instance_id,
                old_address_id=present.address_id if present is not None else None,
                new_address_id=address.address_id if address is not None else None,
            )
        )
    session.flush()
    return operation
