"""Verbs of public addresses: taken, billed, released, listed. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, and_, bindparam, cast, func, null, or_, select, update
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.orm import Session

from awan.accounts import Caller, quotas
from awan.catalogue import Component, PricedItem
from awan.catalogue.models import Location
from awan.catalogue.service import first_price
from awan.errors import Conflict, Invalid, NoCapacity, NotFound
from awan.events import record
from awan.kit.clock import now
from awan.kit.ids import new_id
from awan.kit.pagination import PageRequest
from awan.ledger import close_spans, lock_prices, open_spans
from awan.networks.models import Address, AddressState, Nic, Pool, PrivateNetwork
from awan.networks.names import mark_stale
from awan.operations.service import refuse_if_busy
from awan.resources import ResourceKind, create, lock_owned, retire
from awan.resources.models import Resource
from awan.settings import get_settings

NO_ADDRESS = "The location has no free public address at the moment."
NOT_SOLD = "Public addresses are not sold in this location."
# What a creation takes; built once, because building it takes longer than sending it.
_TAKEABLE = (
    select(Address)
    .join(Pool)
    .where(
        Pool.location_id == bindparam("location"),
        Pool.family == 4,
        Pool.is_enabled,
        or_(
            Address.state == AddressState.AVAILABLE,
            and_(
                Address.state == AddressState.QUARANTINE,
                or_(
                    Address.quarantined_until <= func.now(),
                    Address.previous_account_id == bindparam("account"),
                ),
            ),
        ),
    )
    .order_by(Address.state, Address.inet)
    .limit(1)
    .with_for_update(skip_locked=True, of=Address)
)


def allocate(
    session: Session, caller: Caller, location_id: int, *, operation_id: UUID | None = None
) -> Address:
    """Takes an address for the account, from its quota: free to use, priced, and billed unless for an operation.

    Raises: QuotaExceeded, Invalid where addresses have no price, NoCapacity.
    """
    quotas.take(session, caller.account_id, public_ips=1)
    price = first_price(session, location_id, Component.PUBLIC_IP, caller.currency)
    if price is None:
        raise Invalid.field("location_id", NOT_SOLD)
    address = take_address(session, caller, location_id, operation_id=operation_id)
    assert address.resource_id is not None
    lock_prices(session, {address.resource_id: [PricedItem(price, 1)]})
    if operation_id is None:
        bill_address(session, address, actor=caller.actor, operation_id=None)
    session.flush()
    return address


def take_address(
    session: Session, caller: Caller, location_id: int, *, operation_id: UUID | None
) -> Address:
    """Takes an address for the account. What the caller does: the quota before, prices and bill afterwards.

    An address that the account released itself may come back to it; others wait until its quarantine is over.
    Its row is written with the next flush, so that whatever else becomes of it is part of the same statement.
    Raises: NoCapacity.
    """
    wanted = {"location": location_id, "account": caller.account_id}
    address = session.scalars(_TAKEABLE, wanted).first()
    if address is None:
        raise NoCapacity(
            NO_ADDRESS,
            detail=f"location {location_id}: no takeable address in any enabled IPv4 pool",
        )
    resource_id = new_id()
    resource = create(
        session,
        kind=ResourceKind.PUBLIC_IP,
        resource_id=resource_id,
        account_id=caller.account_id,
        name=str(address.inet),
        location_id=location_id,
        operation_id=operation_id,
    )
    record(
        session,
        kind="public_ip.allocated",
        actor=caller.actor,
        account_id=caller.account_id,
        resource_id=resource_id,
        operation_id=operation_id,
        data={"ip_address": str(address.inet)},
    )
    address.state = AddressState.FREE
    address.account_id = caller.account_id
    address.resource_id = resource_id
    address.operation_id = operation_id
    address.previous_account_id = None
    address.quarantined_until = None
    address.allocated_at = resource.created_at
    return address


def bill_address(
    session: Session, address: Address, *, actor: str, operation_id: UUID | None
) -> None:
    """From now on the address is billed. Billed already: no effect."""
    assert address.account_id is not None
    assert address.resource_id is not None
    open_spans(
        session,
        account_id=address.account_id,
        resource_ids=[address.resource_id],
        at=now(),
        operation_id=operation_id,
        actor=actor,
    )


def find_owned_address(
    session: Session, account_id: UUID, resource_id: UUID, *, location_id: int | None = None
) -> Address | None:
    """The account's address with this public uuid; None when absent, foreign or elsewhere. Nothing is locked."""
    query = (
        select(Address)
        .join(Pool)
        .where(Address.resource_id == resource_id, Address.account_id == account_id)
    )
    if location_id is not None:
        query = query.where(Pool.location_id == location_id)
    return session.scalars(query).first()


def release_address(session: Session, caller: Caller, resource_id: UUID) -> None:
    """Gives a free address back to the pool, by way of quarantine.

    Raises: NotFound, Conflict while it is attached or something is done to it.
    """
    # Locks are taken in the same order everywhere: resource, instance, quota, node, address.
    resource = lock_owned(session, caller, ResourceKind.PUBLIC_IP, resource_id)
    address = find_owned_address(session, resource.account_id, resource_id)
    if address is None:
        raise NotFound("Public network not found.")
    # Before the quota is waited for: whoever ends the instance that has the address holds it, and waits for us.
    _refuse_if_in_use(address)
    quotas.give_back(session, resource.account_id, public_ips=1)
    if not lock_owned_address(session, address):
        raise NotFound("Public network not found.")
    _refuse_if_in_use(address)
    refuse_if_busy(session, resource)
    return_to_pool(session, address, actor=caller.actor, operation_id=None)


def _refuse_if_in_use(address: Address) -> None:
    if address.state != AddressState.FREE:
        what = "the gateway of a private network"
        if address.state == AddressState.ATTACHED:
            what = "attached to an instance"
        raise Conflict(f"The address is {what}; detach it first.")


def lock_owned_address(session: Session, address: Address) -> bool:
    """Locks the row and reads it anew; whether it still belongs to whom it belonged to before."""
    owner = address.account_id, address.resource_id
    session.refresh(address, with_for_update=True)
    return (address.account_id, address.resource_id) == owner


def return_to_pool(
    session: Session, address: Address, *, actor: str, operation_id: UUID | None
) -> None:
    """Takes a locked address from its owner, whose quota was given back before."""
    account_id, resource_id = address.account_id, address.resource_id
    assert account_id is not None
    assert resource_id is not None
    close_spans(session, resource_id, at=now(), operation_id=operation_id)
    retire(session, resource_id)
    address.state = AddressState.QUARANTINE
    address.previous_account_id = account_id
    address.quarantined_until = now() + timedelta(seconds=get_settings().address_quarantine_s)
    address.account_id = address.resource_id = address.nic_id = address.operation_id = None
    address.rdns = address.new_rdns = None
    mark_stale(session, session.get_one(Pool, address.pool_id).location_id, [address.inet])
    record(
        session,
        kind="public_ip.released",
        actor=actor,
        account_id=account_id,
        resource_id=resource_id,
        operation_id=operation_id,
        data={"ip_address": str(address.inet)},
    )
    session.flush()


def give_back_allocated(
    session: Session, address: Address, *, actor: str, operation_id: UUID
) -> None:
    """An address that a failed operation had allocated, and still holds, goes back."""
    assert address.account_id is not None
    # Locks are taken in the same order everywhere: resource, instance, quota, node, address.
    quotas.give_back(session, address.account_id, public_ips=1)
    session.refresh(address, with_for_update=True)
    return_to_pool(session, address, actor=actor, operation_id=operation_id)


def refuse_if_address_busy(session: Session, address: Address) -> None:
    """Raises: Conflict while an operation runs on a (locked) address, which may be about to attach it."""
    assert address.resource_id is not None
    resource = session.get_one(Resource, address.resource_id, populate_existing=True)
    refuse_if_busy(session, resource)


def list_addresses(
    session: Session, account_id: UUID, page: PageRequest
) -> tuple[list[RowMapping], int]:
    """A page of the account's public IPv4 addresses with what they serve, oldest first, and the number of all."""
    total = session.scalar(select(func.count()).select_from(_owned(account_id).subquery())) or 0
    rows = session.execute(
        _owned(account_id)
        .order_by(Address.allocated_at, Address.address_id)
        .limit(page.limit)
        .offset(page.offset)
    ).mappings()
    return list(rows.all()), total


def get_owned_row(session: Session, account_id: UUID, resource_id: UUID) -> RowMapping:
    """One of the account's addresses in the form of `list_addresses`. Raises: NotFound."""
    row = (
        session.execute(_owned(account_id).where(Address.resource_id == resource_id))
        .mappings()
        .first()
    )
    if row is None:
        raise NotFound("Public network not found.")
    return row


def get_released_row(session: Session, account_id: UUID, resource_id: UUID) -> RowMapping:
    """An address that the account has given back, as it was, in the form of `list_addresses`. Raises: NotFound."""
    row = (
        session.execute(
            select(
                Address,
                Pool,
                Location,
                Resource.resource_id.label("uuid"),
                Resource.created_at,
                null().label("instance_id"),
                null().label("hostname"),
                null().label("network_id"),
                null().label("network_name"),
            )
            .join(Pool, Pool.pool_id == Address.pool_id)
            .join(Location, Location.location_id == Pool.location_id)
            .join(Resource, Resource.location_id == Pool.location_id)
            .where(
                Resource.resource_id == resource_id,
                Resource.account_id == account_id,
                Resource.kind == ResourceKind.PUBLIC_IP,
                Address.inet == cast(Resource.name, INET),
            )
        )
        .mappings()
        .first()
    )
    if row is None:
        raise NotFound("Public network not found.")
    return row


def _owned(account_id: UUID) -> Any:
    host = select(Resource).where(Resource.resource_id == Nic.instance_id).correlate(Nic)
    vswitch = (
        select(Resource)
        .where(Resource.resource_id == PrivateNetwork.resource_id)
        .correlate(PrivateNetwork)
    )
    return (
        select(
            Address,
            Pool,
            Location,
            Address.resource_id.label("uuid"),
            Address.allocated_at.label("created_at"),
            Nic.instance_id,
            host.with_only_columns(Resource.name).scalar_subquery().label("hostname"),
            PrivateNetwork.resource_id.label("network_id"),
            vswitch.with_only_columns(Resource.name).scalar_subquery().label("network_name"),
        )
        .join(Pool, Pool.pool_id == Address.pool_id)
        .join(Location, Location.location_id == Pool.location_id)
        .outerjoin(Nic, Nic.nic_id == Address.nic_id)
        .outerjoin(
            PrivateNetwork,
            or_(
                PrivateNetwork.gateway_address_id == Address.address_id,
                PrivateNetwork.next_gateway_address_id == Address.address_id,
            ),
        )
        .where(Address.account_id == account_id, Address.family == 4)
    )


def free_addresses(session: Session, account_id: UUID, location_id: int) -> Sequence[Address]:
    """The account's unattached addresses in a location, by address."""
    return session.scalars(
        select(Address)
        .join(Pool)
        .where(
            Address.account_id == account_id,
            Address.family == 4,
            Address.state == AddressState.FREE,
            Pool.location_id == location_id,
        )
        .order_by(Address.inet)
    ).all()


def end_quarantines(session: Session) -> int:
    """Addresses whose quarantine is over go back to the pool; how many did."""
    result = session.execute(
        update(Address)
        .where(Address.state == AddressState.QUARANTINE, Address.quarantined_until <= func.now())
        .values(state=AddressState.AVAILABLE, previous_account_id=None, quarantined_until=None)
    )
    return int(result.rowcount)  # type: ignore[attr-defined]
