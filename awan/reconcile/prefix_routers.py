"""Routed IPv6 prefixes: what the fabric of a location should have of them, and putting it back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from ipaddress import IPv6Network
from uuid import UUID

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.catalogue.models import Location
from awan.engines.fabric import PrefixRouterFacts
from awan.errors import EngineError
from awan.events import record
from awan.instances.recover import ACTOR
from awan.kit.database import transaction
from awan.networks.models import PrefixPool, PrefixState, RoutedPrefix
from awan.networks.prefix_rules import router_name
from awan.networks.prefixes import push_router, router_pools
from awan.operations import Operation
from awan.reconcile.findings import Finding, FindingKind
from awan.reconcile.rules import ExpectedRoutes

log = structlog.get_logger(__name__)


def expected_routes(
    session: Session, location_id: int, touched: Collection[UUID]
) -> ExpectedRoutes:
    """What the routers of the location should route. `touched`: what changed while the engines were read."""
    rows = session.execute(
        select(RoutedPrefix, PrefixPool.pool_id, Operation.resource_id)
        .join(PrefixPool, PrefixPool.prefix_pool_id == RoutedPrefix.prefix_pool_id)
        .outerjoin(Operation, Operation.operation_id == RoutedPrefix.operation_id)
        .where(PrefixPool.location_id == location_id, RoutedPrefix.operation_id.is_not(None))
    ).all()
    routes: dict[str, dict[str, str]] = {}
    unsettled = set()
    for prefix, pool_id, worked_on in rows:
        if {prefix.instance_id, worked_on} & set(touched):
            unsettled.add(str(prefix.cidr))
        elif prefix.state == PrefixState.ASSIGNED and not prefix.is_leaving:
            routes.setdefault(router_name(pool_id), {})[str(prefix.cidr)] = str(prefix.next_hop)
    return ExpectedRoutes(routes, frozenset(unsettled))


def prefix_ranges(session: Session, location_id: int) -> tuple[IPv6Network, ...]:
    """The ranges from which prefixes are routed to instances of the location."""
    query = select(PrefixPool.cidr).where(PrefixPool.location_id == location_id)
    return tuple(session.scalars(query))


def compare_routers(
    code: str, expected: ExpectedRoutes, found: Sequence[PrefixRouterFacts]
) -> Iterator[Finding]:
    """The fabric's routers of prefixes against the rows: each prefix goes to its instance, no other anywhere."""
    present = {facts.name: facts for facts in found}
    for name, wished in expected.routes.items():
        facts = present.get(name)
        seen = dict(facts.routes) if facts is not None and facts.address is not None else {}
        for prefix, next_hop in wished.items():
            if seen.get(prefix) != next_hop:
                yield Finding(
                    FindingKind.PREFIX_ROUTE,
                    code,
                    prefix,
                    next_hop,
                    seen.get(prefix, "none"),
                    f"The prefix {prefix} is routed to {seen.get(prefix, 'nobody')} instead of {next_hop}.",
                )
        if facts is not None and facts.active_chassis is None:
            yield Finding(
                FindingKind.PREFIX_ROUTE,
                code,
                name,
                "a node that carries the router",
                "none",
                f"No node carries the router {name}: its prefixes are not reached.",
            )
    for name, facts in sorted(present.items()):
        known = expected.routes.get(name, {})
        for prefix, next_hop in facts.routes:
            if prefix not in known and prefix not in expected.unsettled:
                yield Finding(
                    FindingKind.PREFIX_STRAY,
                    code,
                    prefix,
                    "no such route",
                    next_hop,
                    f"The prefix {prefix} is routed to {next_hop}, which no instance explains.",
                )


def put_back_prefix_routers(location_id: int) -> None:
    """The routers of the location's prefixes are as the rows say, on nodes that answer.

    Stops at the first call that the fabric does not answer.
    """
    with transaction() as session:
        pool_ids = router_pools(session, location_id)
    for pool_id in pool_ids:
        try:
            has_changed = push_router(pool_id)
        except EngineError as err:
            log.warning("router of prefixes was not looked at", pool=pool_id, error=str(err))
            return
        if has_changed:
            log.warning("router of prefixes was put right", pool=pool_id)
            with transaction() as session:
                record(
                    session,
                    kind="prefix_router.repaired",
                    actor=ACTOR,
                    account_id=None,
                    data={
                        "location": session.get_one(Location, location_id).code,
                        "router": router_name(pool_id),
                    },
                )
