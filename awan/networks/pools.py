"""Verbs of address pools: the public prefixes of a location. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeVar

from sqlalchemy import and_, bindparam, delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from awan.accounts import Caller
from awan.catalogue.service import check_location
from awan.engines.fabric import PublicNetworkSpec
from awan.errors import Conflict, Invalid, NotFound
from awan.events import record
from awan.kit.ids import new_id
from awan.kit.inet import parse_address
from awan.networks.models import Address, Pool, PrefixPool
from awan.networks.names import mark_pool_stale
from awan.networks.rules import (
    parse_gateway,
    parse_prefix,
    switch_name,
    usable_addresses,
)

T = TypeVar("T")
# Two pools that are made at once must see each other, or both could hold one address.
POOLS_LOCK_ID = 0x6177616E706F6F6C
_SIX = aliased(Pool)
# Steps of instances ask this all the time; built once, because building it takes longer than sending it.
_WITH_IPV6 = (
    select(Pool, _SIX)
    .outerjoin(
        _SIX,
        and_(
            _SIX.location_id == Pool.location_id,
            _SIX.family == 6,
            _SIX.is_enabled,
            _SIX.physical_network == Pool.physical_network,
            _SIX.vlan.is_not_distinct_from(Pool.vlan),
        ),
    )
    .where(Pool.pool_id == bindparam("pool"))
    .order_by(_SIX.pool_id)
    .limit(1)
)


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
    network = parsed("cidr", lambda: parse_prefix(cidr))
    router = parsed("gateway", lambda: parse_gateway(network, gateway))
    servers = parsed("dns_servers", lambda: [parse_address(server) for server in dns_servers])
    excluded = parsed("reserved", lambda: [IPv4Address(address) for address in reserved])
    session.execute(select(func.pg_advisory_xact_lock(POOLS_LOCK_ID)))
    refuse_overlap(session, network)
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


def refuse_overlap(session: Session, network: IPv4Network | IPv6Network) -> None:
    """Raises: Conflict when the prefix overlaps a pool of addresses or of routed prefixes, in any location."""
    pools = [*session.scalars(select(Pool.cidr)), *session.scalars(select(PrefixPool.cidr))]
    for cidr in pools:
        if cidr.version == network.version and cidr.overlaps(network):
            raise Conflict(f"The prefix overlaps the pool {cidr}.")


def parsed(field: str, parse: Callable[[], T]) -> T:
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
    pool, six = pool_with_ipv6(session, pool_id)
    if not isinstance(pool.cidr, IPv4Network):
        raise NotFound("Pool not found.")
    assert isinstance(pool.gateway, IPv4Address)
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


def pool_with_ipv6(session: Session, pool_id: int) -> tuple[Pool, Pool | None]:
    """A pool, and the location's IPv6 pool on the same provider network. Raises: NotFound."""
    row = session.execute(_WITH_IPV6, {"pool": pool_id}).one_or_none()
    if row is None:
        raise NotFound("Pool not found.")
    return row[0], row[1]


def delete_pool(session: Session, caller: Caller, pool_id: int) -> None:
    """Removes a pool nobody has an address of. Raises: NotFound, Conflict."""
    pool = session.get(Pool, pool_id, with_for_update=True)
    if pool is None:
        raise NotFound("Pool not found.")
    # Locked, so that none is taken between this look and the removal.
    owners = session.scalars(
        select(Address.account_id).where(Address.pool_id == pool_id).with_for_update()
    ).all()
    if owned := sum(1 for owner in owners if owner is not None):
        raise Conflict(f"{owned} addresses of the pool belong to customers.")
    if session.scalar(select(func.count()).where(PrefixPool.pool_id == pool_id)):
        raise Conflict("A pool of routed prefixes stands on this pool.")
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
