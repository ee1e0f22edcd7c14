"""Verbs of addresses, pools and network cards. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import RowMapping, and_, cast, delete, func, null, or_, select, update
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from awan.accounts import Caller, quotas
from awan.catalogue import Component, PricedItem
from awan.catalogue.models import Location
from awan.catalogue.service import all_current_prices, check_location
from awan.engines.fabric import PortSpec, PublicNetworkSpec
from awan.errors import Conflict, Invalid, NoCapacity, NotFound
from awan.events import record
from awan.kit.clock import now
from awan.kit.ids import derived_id, derived_mac, new_id
from awan.kit.pagination import PageRequest
from awan.ledger import close_spans, lock_prices, open_spans
from awan.networks.models import Address, AddressState, Nic, NicRole, Pool, PrivateNetwork
from awan.networks.names import mark_pool_stale, mark_stale
from awan.networks.rules import ipv6_of, parse_gateway, parse_prefix, switch_name, usable_addresses
from awan.operations.service import refuse_if_busy
from awan.resources import ResourceKind, create, lock_owned, retire
from awan.resources.models import Resource
from awan.settings import get_settings

T = TypeVar("T")

# Two pools that are made at once must see each other, or both could hold one address.
POOLS_LOCK_ID = 0x6177616E706F6F6C
NO_ADDRESS = "The location has no free public address at the moment."


def create_pool(
    session: Session,
    caller: Caller,
    *,
    location_id: int,
    cidr: str,
    gateway: str,
    physical_network: str,
    vlan: int | None,
    dns_servers: Sequence[str],
    reserved: Sequence[str],
) -> Pool:
    """A public prefix; for IPv4 a row for every address that may be sold.

    Raises: Invalid (prefix, gateway, servers, reserved addresses), Conflict when it overlaps a pool of any location.
    """
    location = check_location(session, location_id)
    network = _parsed("cidr", lambda: parse_prefix(cidr))
    router = _parsed("gateway", lambda: parse_gateway(network, gateway))
    servers = _parsed("dns_servers", lambda: [ip_address(server) for server in dns_servers])
    excluded = _parsed("reserved", lambda: [IPv4Address(address) for address in reserved])
    session.execute(select(func.pg_advisory_xact_lock(POOLS_LOCK_ID)))
    for pool in session.scalars(select(Pool)):
        if pool.family == network.version and pool.cidr.overlaps(network):
            raise Conflict(f"The prefix overlaps the pool {pool.cidr}.")
    pool = Pool(
        location_id=location.location_id,
        family=network.version,
        cidr=network,
        gateway=router,
        physical_network=physical_network,
        vlan=vlan,
        dns_servers=servers,
    )
    session.add(pool)
    try:
        session.flush()
    except IntegrityError as err:
        raise Conflict("The location has this pool already.") from err
    if isinstance(network, IPv4Network):
        assert isinstance(router, IPv4Address)
        session.add_all(
            Address(address_id=new_id(), pool_id=pool.pool_id, family=4, inet=address)
            for address in usable_addresses(network, router, excluded)
        )
        mark_pool_stale(session, pool)
    record(
        session,
        kind="pool.created",
        actor=caller.actor,
        account_id=None,
        data={"cidr": cidr, "pool": pool.pool_id},
    )
    session.flush()
    return pool


def _parsed(field: str, parse: Callable[[], T]) -> T:
    """What `parse` gives; what it says against its text becomes a refusal of the field."""
    try:
        return parse()
    except ValueError as err:
        raise Invalid.field(field, str(err)) from err


def list_pools(session: Session) -> list[tuple[Pool, dict[str, int]]]:
    """Pools by id, each with its number of addresses by state."""
    counts: dict[int, dict[str, int]] = {}
    for pool_id, state, number in session.execute(
        select(Address.pool_id, Address.state, func.count()).group_by(
            Address.pool_id, Address.state
        )
    ):
        counts.setdefault(pool_id, {})[state] = number
    pools = session.scalars(select(Pool).order_by(Pool.pool_id)).all()
    return [(pool, counts.get(pool.pool_id, {})) for pool in pools]


def network_spec(session: Session, pool_id: int) -> PublicNetworkSpec:
    """The logical switch of an IPv4 pool, with the location's IPv6 pool on the same provider network beside it."""
    pool = session.get(Pool, pool_id)
    if pool is None or not isinstance(pool.cidr, IPv4Network):
        raise NotFound("Pool not found.")
    assert isinstance(pool.gateway, IPv4Address)
    six = _ipv6_pool(session, pool)
    assert six is None or (
        isinstance(six.cidr, IPv6Network) and isinstance(six.gateway, IPv6Address)
    )
    return PublicNetworkSpec(
        switch=switch_name(pool.pool_id),
        physical_network=pool.physical_network,
        vlan=pool.vlan,
        ipv4_cidr=pool.cidr,
        ipv4_gateway=pool.gateway,
        ipv6_cidr=six.cidr if six is not None else None,  # type: ignore[arg-type]
        ipv6_gateway=six.gateway if six is not None else None,  # type: ignore[arg-type]
        dns_servers=(*pool.dns_servers, *(six.dns_servers if six is not None else ())),
    )


def _ipv6_pool(session: Session, pool: Pool) -> Pool | None:
    return session.scalars(
        select(Pool)
        .where(
            Pool.location_id == pool.location_id,
            Pool.family == 6,
            Pool.is_enabled,
            Pool.physical_network == pool.physical_network,
            Pool.vlan.is_not_distinct_from(pool.vlan),
        )
        .order_by(Pool.pool_id)
        .limit(1)
    ).first()


def allocate(
    session: Session, caller: Caller, location_id: int, *, operation_id: UUID | None = None
) -> Address:
    """Takes an address for the account: free to use, priced, and (unless part of an instance's creation) billed.

    An address that the account released itself may come back to it; others wait until its quarantine is over.
    Raises: QuotaExceeded, NoCapacity.
    """
    quotas.take(session, caller.account_id, public_ips=1)
    address = session.scalars(
        select(Address)
        .join(Pool)
        .where(
            Pool.location_id == location_id,
            Pool.family == 4,
            Pool.is_enabled,
            _takeable(caller.account_id),
        )
        .order_by(Address.state, Address.inet)
        .limit(1)
        .with_for_update(skip_locked=True, of=Address)
    ).first()
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
    session.flush()
    address.state = AddressState.FREE
    address.account_id = caller.account_id
    address.resource_id = resource_id
    address.operation_id = operation_id
    address.previous_account_id = None
    address.quarantined_until = None
    address.allocated_at = resource.created_at
    lock_prices(
        session, resource_id, [PricedItem(_ip_price(session, caller.currency, location_id), 1)]
    )
    if operation_id is None:
        bill_address(session, address, actor=caller.actor, operation_id=None)
    record(
        session,
        kind="public_ip.allocated",
        actor=caller.actor,
        account_id=caller.account_id,
        resource_id=resource_id,
        operation_id=operation_id,
        data={"ip_address": str(address.inet)},
    )
    session.flush()
    return address


def _takeable(account_id: UUID) -> Any:
    rested = and_(
        Address.state == AddressState.QUARANTINE,
        or_(Address.quarantined_until <= func.now(), Address.previous_account_id == account_id),
    )
    return or_(Address.state == AddressState.AVAILABLE, rested)


def _ip_price(session: Session, currency: str, location_id: int) -> Any:
    """An address costs what it costs in the location's first tier that prices it. Raises: Invalid when none does."""
    from awan.catalogue.models import TierLocation

    offered = set(
        session.scalars(select(TierLocation.tier_id).where(TierLocation.location_id == location_id))
    )
    for tier_id, prices in sorted(all_current_prices(session, currency).items()):
        if tier_id in offered and Component.PUBLIC_IP in prices:
            return prices[Component.PUBLIC_IP]
    raise Invalid.field("location_id", "Public addresses are not sold in this location.")


def bill_address(
    session: Session, address: Address, *, actor: str, operation_id: UUID | None
) -> None:
    """From now on the address is billed. Billed already: no effect."""
    assert address.account_id is not None
    assert address.resource_id is not None
    open_spans(
        session,
        account_id=address.account_id,
        resource_id=address.resource_id,
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
    quotas.give_back(session, caller.account_id, public_ips=1)
    address = find_owned_address(session, caller.account_id, resource_id)
    if address is None or not lock_owned_address(session, address):
        raise NotFound("Public network not found.")
    if address.state != AddressState.FREE:
        what = "the gateway of a private network"
        if address.state == AddressState.ATTACHED:
            what = "attached to an instance"
        raise Conflict(f"The address is {what}; detach it first.")
    refuse_if_busy(session, resource)
    _give_back(session, address, actor=caller.actor, operation_id=None)


def lock_owned_address(session: Session, address: Address) -> bool:
    """Locks the row and reads it anew; whether it still belongs to whom it belonged to before."""
    owner = address.account_id, address.resource_id
    session.refresh(address, with_for_update=True)
    return (address.account_id, address.resource_id) == owner


def _give_back(
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


def create_public_nic(
    session: Session, *, instance_id: UUID, address: Address, operation_id: UUID
) -> Nic:
    """A card on the address's network; it also gets an IPv6 address where the location has a prefix.

    Raises: Invalid when the address is in use.
    """
    if not lock_owned_address(session, address) or address.state != AddressState.FREE:
        raise Invalid.field("public_network", "The selected public network is in use.")
    refuse_if_address_busy(session, address)
    assert address.account_id is not None
    pool = session.get_one(Pool, address.pool_id)
    nic = Nic(
        nic_id=public_nic_id(operation_id),
        instance_id=instance_id,
        account_id=address.account_id,
        location_id=pool.location_id,
        role=NicRole.PUBLIC,
        mac=derived_mac(public_nic_id(operation_id)),
        operation_id=operation_id,
    )
    session.add(nic)
    session.flush()
    address.state = AddressState.ATTACHED
    address.nic_id = nic.nic_id
    _add_ipv6(session, nic, pool)
    session.flush()
    return nic


def _add_ipv6(session: Session, nic: Nic, pool: Pool) -> None:
    """The card's IPv6 address, where the location has a prefix on the network of the IPv4 pool."""
    six = _ipv6_pool(session, pool)
    if six is None:
        return
    assert isinstance(six.cidr, IPv6Network)
    inet = ipv6_of(six.cidr, nic.nic_id)
    mark_stale(session, six.location_id, [inet])
    session.add(
        Address(
            address_id=derived_id(nic.nic_id, "ipv6"),
            pool_id=six.pool_id,
            family=6,
            inet=inet,
            state=AddressState.ATTACHED,
            account_id=nic.account_id,
            nic_id=nic.nic_id,
            operation_id=nic.operation_id,
            allocated_at=now(),
        )
    )


def public_nic_id(create_operation_id: UUID) -> UUID:
    """The one id that the public card of an instance has, whenever it has one: so its MAC and its IPv6 stay too.

    Derived from the operation that created the instance. A guest knows the card again when it comes back.
    """
    return derived_id(create_operation_id, "nic:public")


def public_port_spec(
    session: Session,
    address: Address,
    *,
    instance_id: UUID,
    hostname: str,
    operation_id: UUID,
    firewall_id: UUID,
) -> tuple[PublicNetworkSpec, PortSpec]:
    """The port that the instance's public card has with this address, whether or not it has it now.

    `operation_id`: the one that created the instance.
    """
    assert address.account_id is not None
    assert isinstance(address.inet, IPv4Address)
    nic_id = public_nic_id(operation_id)
    network = network_spec(session, address.pool_id)
    return network, PortSpec(
        port_id=nic_id,
        switch=network.switch,
        mac=derived_mac(nic_id),
        ipv4=address.inet,
        ipv6=ipv6_of(network.ipv6_cidr, nic_id) if network.ipv6_cidr is not None else None,
        hostname=hostname,
        instance_id=instance_id,
        account_id=address.account_id,
        operation_id=operation_id,
        firewall_id=firewall_id,
    )


def give_public_address(
    session: Session,
    *,
    instance_id: UUID,
    address: Address | None,
    create_operation_id: UUID,
    operation_id: UUID,
    actor: str,
) -> None:
    """The instance has this public address from now on, or none. One that it had is free, and billed like any other.

    The caller has locked the instance and both addresses. Its card is made, kept, or ended, with its IPv6 address.
    """
    nic_id = public_nic_id(create_operation_id)
    nic = session.get(Nic, nic_id)
    for old in session.scalars(
        select(Address).where(Address.nic_id == nic_id).with_for_update()
    ).all():
        if old.family == 6:
            mark_stale(session, session.get_one(Pool, old.pool_id).location_id, [old.inet])
            session.delete(old)
        elif address is None or old.address_id != address.address_id:
            old.state, old.nic_id, old.operation_id = AddressState.FREE, None, None
            bill_address(session, old, actor=actor, operation_id=operation_id)
    session.flush()
    if address is None:
        if nic is not None:
            nic.deleted_at = now()
        session.flush()
        return
    assert address.account_id is not None
    pool = session.get_one(Pool, address.pool_id)
    if nic is None:
        nic = Nic(
            nic_id=nic_id,
            instance_id=instance_id,
            account_id=address.account_id,
            location_id=pool.location_id,
            role=NicRole.PUBLIC,
            mac=derived_mac(nic_id),
            operation_id=create_operation_id,
        )
        session.add(nic)
    nic.deleted_at = None
    session.flush()
    address.state, address.nic_id = AddressState.ATTACHED, nic_id
    bill_address(session, address, actor=actor, operation_id=operation_id)
    _add_ipv6(session, nic, pool)
    session.flush()


def give_back_allocated(
    session: Session, address: Address, *, actor: str, operation_id: UUID
) -> None:
    """An address that a failed operation had allocated, and still holds, goes back."""
    assert address.account_id is not None
    # Locks are taken in the same order everywhere: resource, instance, quota, node, address.
    quotas.give_back(session, address.account_id, public_ips=1)
    session.refresh(address, with_for_update=True)
    _give_back(session, address, actor=actor, operation_id=operation_id)


def refuse_if_address_busy(session: Session, address: Address) -> None:
    """Raises: Conflict while an operation runs on a (locked) address, which may be about to attach it."""
    assert address.resource_id is not None
    resource = session.get_one(Resource, address.resource_id, populate_existing=True)
    refuse_if_busy(session, resource)


def release_nics(
    session: Session,
    instance_id: UUID,
    *,
    release_ips: bool,
    made_by: UUID | None,
    actor: str,
    operation_id: UUID,
) -> None:
    """Ends the cards of an instance. Its IPv4 addresses stay the owner's unless they go too.

    The caller has locked the account's quota. An address goes when `release_ips`, or when the operation `made_by`
    allocated it (a creation that failed).
    """
    for nic in session.scalars(
        select(Nic).where(Nic.instance_id == instance_id, Nic.deleted_at.is_(None))
    ):
        addresses = session.scalars(
            select(Address).where(Address.nic_id == nic.nic_id).with_for_update()
        ).all()
        for address in addresses:
            if address.family == 6:
                mark_stale(session, nic.location_id, [address.inet])
                session.delete(address)
                continue
            address.state, address.nic_id = AddressState.FREE, None
            if release_ips or (made_by is not None and address.operation_id == made_by):
                quotas.give_back(session, nic.account_id, public_ips=1)
                _give_back(session, address, actor=actor, operation_id=operation_id)
            else:
                bill_address(session, address, actor=actor, operation_id=operation_id)
        nic.deleted_at = now()
    session.flush()


def nics_of(session: Session, instance_id: UUID) -> Sequence[Nic]:
    """The cards of an instance that it shall have, the public one first, then in the order in which they came."""
    return session.scalars(
        select(Nic)
        .where(Nic.instance_id == instance_id, Nic.deleted_at.is_(None), Nic.is_leaving.is_(False))
        .order_by(Nic.role.desc(), Nic.created_at, Nic.nic_id)
    ).all()


def public_port_specs(
    session: Session,
    nics: Sequence[Nic],
    *,
    hostname: str,
    operation_id: UUID,
    firewall_id: UUID,
) -> list[tuple[PublicNetworkSpec, PortSpec]]:
    """The ports that the fabric must have for the public ones of an instance's cards, each with its network."""
    specs = []
    for nic in nics:
        if nic.role != NicRole.PUBLIC:
            continue
        four, six = _addresses(session, nic.nic_id)
        assert four is not None
        specs.append(
            (
                network_spec(session, four.pool_id),
                PortSpec(
                    port_id=nic.nic_id,
                    switch=switch_name(four.pool_id),
                    mac=nic.mac,
                    ipv4=four.inet if isinstance(four.inet, IPv4Address) else None,
                    ipv6=six.inet
                    if six is not None and isinstance(six.inet, IPv6Address)
                    else None,
                    hostname=hostname,
                    instance_id=nic.instance_id,
                    account_id=nic.account_id,
                    operation_id=operation_id,
                    firewall_id=firewall_id,
                ),
            )
        )
    return specs


def _addresses(session: Session, nic_id: UUID) -> tuple[Address | None, Address | None]:
    found = {
        row.family: row for row in session.scalars(select(Address).where(Address.nic_id == nic_id))
    }
    return found.get(4), found.get(6)


def public_addresses(session: Session, instance_ids: Sequence[UUID]) -> dict[UUID, list[Address]]:
    """Instance id -> its addresses, IPv4 first, in one query; in none when no instance is given."""
    if not instance_ids:
        return {}
    rows = session.execute(
        select(Nic.instance_id, Address)
        .join(Address, Address.nic_id == Nic.nic_id)
        .where(Nic.instance_id.in_(instance_ids), Nic.deleted_at.is_(None))
        .order_by(Nic.instance_id, Address.family, Address.inet)
    )
    found: dict[UUID, list[Address]] = {}
    for instance_id, address in rows:
        found.setdefault(instance_id, []).append(address)
    return found


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


def delete_pool(session: Session, caller: Caller, pool_id: int) -> None:
    """Removes a pool nobody has an address of. Raises: NotFound, Conflict."""
    pool = session.get(Pool, pool_id, with_for_update=True)
    if pool is None:
        raise NotFound("Pool not found.")
    owned = session.scalar(
        select(func.count()).where(Address.pool_id == pool_id, Address.account_id.is_not(None))
    )
    if owned:
        raise Conflict(f"{owned} addresses of the pool belong to customers.")
    mark_pool_stale(session, pool)
    session.execute(delete(Address).where(Address.pool_id == pool_id))
    session.delete(pool)
    record(
        session,
        kind="pool.deleted",
        actor=caller.actor,
        account_id=None,
        data={"cidr": str(pool.cidr)},
    )
