"""Verbs of routed IPv6 prefixes: the operator's pools, an instance's /64, and what the fabric has of them.

The caller holds the transaction, but for `push_router` and `withdraw_prefix`, which speak to the fabric.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv6Address, IPv6Network
from uuid import UUID

from sqlalchemy import and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.catalogue import engines
from awan.catalogue.service import check_location
from awan.engines.fabric import PrefixRoute, PrefixRouterSpec, PublicNetworkSpec
from awan.errors import Conflict, EngineUnavailable, Invalid, NoCapacity, NotFound
from awan.events import record
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.ids import new_id
from awan.kit.inet import parse_ipv6
from awan.networks.models import (
    Address,
    Nic,
    Pool,
    PrefixName,
    PrefixPool,
    PrefixState,
    RoutedPrefix,
)
from awan.networks.names import mark_stale
from awan.networks.pools import POOLS_LOCK_ID, network_spec, parsed, refuse_overlap
from awan.networks.prefix_rules import (
    parse_prefix_pool,
    parse_router_address,
    prefixes_of,
    router_name,
)
from awan.networks.private_workflows import CARRIED_TIMEOUT_S, PUSHES_MAX, find_chassis
from awan.settings import get_settings

NO_PREFIXES = "IPv6 prefixes are not offered in the instance's network."
NO_PREFIX = "The location has no free IPv6 prefix at the moment."


# -- pools -----------------------------------------------------------------------------------------


def create_prefix_pool(
    session: Session, caller: Caller, *, location_id: int, cidr: str, router_address: str
) -> PrefixPool:
    """A range that the provider's router sends to `router_address`, with a row for every /64 of it.

    Raises: Invalid (location, prefix, address), Conflict when it overlaps a pool, or when the on-link pool has another
    router already.
    """
    location = check_location(session, location_id)
    network = parsed("cidr", lambda: parse_prefix_pool(cidr))
    session.execute(select(func.pg_advisory_xact_lock(POOLS_LOCK_ID)))
    refuse_overlap(session, network)
    on_link = _on_link_pool(session, location.location_id, router_address)
    assert isinstance(on_link.cidr, IPv6Network)
    cidr_of_link = on_link.cidr
    address = parsed(
        "router_address",
        lambda: parse_router_address(cidr_of_link, on_link.gateway, router_address),
    )
    others = set(
        session.scalars(
            select(PrefixPool.router_address).where(PrefixPool.pool_id == on_link.pool_id)
        )
    )
    if others - {address}:
        raise Conflict(f"The router of the pool {on_link.cidr} has the address {min(others)}.")
    pool = PrefixPool(
        location_id=location.location_id,
        pool_id=on_link.pool_id,
        cidr=network,
        router_address=address,
    )
    session.add(pool)
    session.flush()
    session.add_all(
        RoutedPrefix(prefix_id=new_id(), prefix_pool_id=pool.prefix_pool_id, cidr=prefix)
        for prefix in prefixes_of(network)
    )
    _record_pool(session, caller, "prefix_pool.created", pool)
    session.flush()
    return pool


def _on_link_pool(session: Session, location_id: int, router_address: str) -> Pool:
    address = parsed("router_address", lambda: parse_ipv6(router_address))
    pools = session.scalars(
        select(Pool).where(Pool.location_id == location_id, Pool.family == 6, Pool.is_enabled)
    )
    found = next((pool for pool in pools if address in pool.cidr), None)
    if found is None:
        raise Invalid.field(
            "router_address", "The router_address must be in an IPv6 pool of the location."
        )
    return found


def _record_pool(session: Session, caller: Caller, kind: str, pool: PrefixPool) -> None:
    record(
        session,
        kind=kind,
        actor=caller.actor,
        account_id=None,
        data={"cidr": str(pool.cidr), "pool": pool.prefix_pool_id},
    )


def list_prefix_pools(session: Session) -> list[tuple[PrefixPool, dict[str, int]]]:
    """Pools by id, each with its number of prefixes by state."""
    counts: dict[int, dict[str, int]] = {}
    for pool_id, state, number in session.execute(
        select(RoutedPrefix.prefix_pool_id, RoutedPrefix.state, func.count()).group_by(
            RoutedPrefix.prefix_pool_id, RoutedPrefix.state
        )
    ):
        counts.setdefault(pool_id, {})[state] = number
    pools = session.scalars(select(PrefixPool).order_by(PrefixPool.prefix_pool_id)).all()
    return [(pool, counts.get(pool.prefix_pool_id, {})) for pool in pools]


def delete_prefix_pool(session: Session, caller: Caller, prefix_pool_id: int) -> None:
    """Removes a pool of which no instance has a prefix. Raises: NotFound, Conflict."""
    pool = session.get(PrefixPool, prefix_pool_id, with_for_update=True)
    if pool is None:
        raise NotFound("Pool not found.")
    rows = RoutedPrefix.prefix_pool_id == prefix_pool_id
    # Locked, so that none is assigned between this look and the removal.
    states = session.scalars(select(RoutedPrefix.state).where(rows).with_for_update()).all()
    if used := sum(1 for state in states if state == PrefixState.ASSIGNED):
        raise Conflict(f"{used} prefixes of the pool belong to instances.")
    session.execute(delete(RoutedPrefix).where(rows))
    session.delete(pool)
    _record_pool(session, caller, "prefix_pool.deleted", pool)
    session.flush()


def end_prefix_quarantines(session: Session) -> int:
    """Prefixes whose quarantine is over go back to the pool; how many did."""
    result = session.execute(
        update(RoutedPrefix)
        .where(
            RoutedPrefix.state == PrefixState.QUARANTINE,
            RoutedPrefix.quarantined_until <= func.now(),
        )
        .values(state=PrefixState.AVAILABLE, previous_account_id=None, quarantined_until=None)
    )
    return int(result.rowcount)  # type: ignore[attr-defined]


# -- an instance's prefix --------------------------------------------------------------------------


def find_prefix(
    session: Session, instance_id: UUID, *, locked: bool = False
) -> RoutedPrefix | None:
    """The prefix that an instance has, also while it is being given or taken away."""
    query = select(RoutedPrefix).where(RoutedPrefix.instance_id == instance_id)
    if locked:
        query = query.with_for_update()
    return session.scalars(query.execution_options(populate_existing=True)).first()


def assign_prefix(
    session: Session, *, account_id: UUID, instance_id: UUID, operation_id: UUID
) -> RoutedPrefix:
    """Takes a /64 for the instance; one that the account released itself may come back to it.

    The caller has locked the instance. Raises: Conflict (has one, no public IPv6 address, none offered), NoCapacity.
    """
    if find_prefix(session, instance_id) is not None:
        raise Conflict("The instance has an IPv6 prefix already.")
    own = session.scalars(
        select(Address)
        .join(Nic, Nic.nic_id == Address.nic_id)
        .where(Nic.instance_id == instance_id, Nic.deleted_at.is_(None), Address.family == 6)
    ).first()
    if own is None:
        raise Conflict("The instance has no public IPv6 address that a prefix could be sent to.")
    pools = session.scalars(
        select(PrefixPool.prefix_pool_id).where(PrefixPool.pool_id == own.pool_id)
    ).all()
    if not pools:
        raise Conflict(NO_PREFIXES)
    rested = and_(
        RoutedPrefix.state == PrefixState.QUARANTINE,
        or_(
            RoutedPrefix.quarantined_until <= func.now(),
            RoutedPrefix.previous_account_id == account_id,
        ),
    )
    prefix = session.scalars(
        select(RoutedPrefix)
        .where(
            RoutedPrefix.prefix_pool_id.in_(pools),
            or_(RoutedPrefix.state == PrefixState.AVAILABLE, rested),
        )
        .order_by(RoutedPrefix.state, RoutedPrefix.cidr)
        .limit(1)
        .with_for_update(skip_locked=True)
    ).first()
    if prefix is None:
        raise NoCapacity(NO_PREFIX, detail=f"prefix pools {list(pools)} have no takeable prefix")
    assert isinstance(own.inet, IPv6Address)
    prefix.state = PrefixState.ASSIGNED
    prefix.account_id, prefix.instance_id, prefix.next_hop = account_id, instance_id, own.inet
    prefix.operation_id, prefix.assigned_at, prefix.is_leaving = operation_id, now(), False
    prefix.previous_account_id = prefix.quarantined_until = None
    session.flush()
    return prefix


def release_prefix(session: Session, instance_id: UUID, *, operation_id: UUID) -> None:
    """The instance has no prefix any more, and its names are gone; it rests before another account gets it."""
    prefix = find_prefix(session, instance_id, locked=True)
    if prefix is None:
        return
    location_id = session.get_one(PrefixPool, prefix.prefix_pool_id).location_id
    names = session.scalars(
        select(PrefixName.inet).where(PrefixName.prefix_id == prefix.prefix_id)
    ).all()
    session.execute(delete(PrefixName).where(PrefixName.prefix_id == prefix.prefix_id))
    mark_stale(session, location_id, names)
    prefix.state, prefix.previous_account_id = PrefixState.QUARANTINE, prefix.account_id
    prefix.quarantined_until = now() + timedelta(seconds=get_settings().address_quarantine_s)
    prefix.account_id = prefix.instance_id = prefix.next_hop = prefix.assigned_at = None
    prefix.operation_id, prefix.is_leaving = operation_id, False
    session.flush()


# -- the fabric ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RouterWish:
    """What the fabric must have of the router of an on-link pool. Without `router`: none."""

    location_id: int
    name: str
    public: PublicNetworkSpec | None
    router: PrefixRouterSpec | None


def push_router(pool_id: int, *, waits: bool = False) -> bool:
    """The router of an on-link pool is as the rows have it; whether anything of it had to be changed.

    With `waits` it is carried by a node. Looks at the rows again afterwards: whoever pushes last has pushed the newest.
    Raises: EngineUnavailable, also when the rows change all the time or no node carries it.
    """
    has_changed = False
    for _ in range(PUSHES_MAX):
        with transaction() as session:
            wish = read_router(session, pool_id)
            fabric = engines(session, wish.location_id).fabric
        if wish.router is None or wish.public is None:
            has_changed |= fabric.ensure_prefix_router_absent(wish.name)
        else:
            fabric.ensure_public_network(wish.public)
            has_changed |= fabric.ensure_prefix_router(wish.router)
        with transaction() as session:
            if read_router(session, pool_id) == wish:
                break
    else:
        raise EngineUnavailable("fabric", "push routed prefixes", "the rows change all the time")
    if (
        waits
        and wish.router is not None
        and not fabric.wait_prefix_router_carried(wish.name, timeout_s=CARRIED_TIMEOUT_S)
    ):
        raise EngineUnavailable("fabric", "wait_prefix_router_carried", "no node carries it")
    return has_changed


def read_router(session: Session, pool_id: int) -> RouterWish:
    """The router of an on-link pool as the rows have it: there is one while an instance has a prefix."""
    on_link = session.get_one(Pool, pool_id)
    assert isinstance(on_link.cidr, IPv6Network)
    name = router_name(pool_id)
    rows = session.execute(
        select(RoutedPrefix.cidr, RoutedPrefix.next_hop, PrefixPool.router_address)
        .join(PrefixPool, PrefixPool.prefix_pool_id == RoutedPrefix.prefix_pool_id)
        .where(
            PrefixPool.pool_id == pool_id,
            RoutedPrefix.state == PrefixState.ASSIGNED,
            RoutedPrefix.is_leaving.is_(False),
        )
        .order_by(RoutedPrefix.cidr)
    ).all()
    public = _public_network(session, on_link)
    if not rows or public is None:
        return RouterWish(on_link.location_id, name, None, None)
    router = PrefixRouterSpec(
        name=name,
        public_switch=public.switch,
        address=rows[0].router_address,
        on_link=on_link.cidr,
        routes=tuple(PrefixRoute(row.cidr, row.next_hop) for row in rows),
        chassis=find_chassis(session, on_link.location_id, name),
    )
    return RouterWish(on_link.location_id, name, public, router)


def _public_network(session: Session, on_link: Pool) -> PublicNetworkSpec | None:
    """The switch of the oldest IPv4 pool on the provider network of an IPv6 pool."""
    four = session.scalars(
        select(Pool.pool_id)
        .where(
            Pool.location_id == on_link.location_id,
            Pool.family == 4,
            Pool.physical_network == on_link.physical_network,
            Pool.vlan.is_not_distinct_from(on_link.vlan),
        )
        .order_by(Pool.pool_id)
        .limit(1)
    ).first()
    return network_spec(session, four) if four is not None else None


def router_pools(session: Session, location_id: int) -> list[int]:
    """The on-link pools of the location that have, or had, prefixes routed to their instances."""
    query = select(PrefixPool.pool_id).where(PrefixPool.location_id == location_id).distinct()
    return sorted(session.scalars(query))


def withdraw_prefix(instance_id: UUID) -> None:
    """The prefix of an instance that goes is not routed any more; it has none: no effect. Raises: EngineError."""
    with transaction() as session:
        prefix = find_prefix(session, instance_id, locked=True)
        if prefix is None:
            return
        prefix.is_leaving = True
        pool_id = session.get_one(PrefixPool, prefix.prefix_pool_id).pool_id
    push_router(pool_id)
