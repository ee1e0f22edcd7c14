"""Names of addresses: what the nameserver should have, what it may not have yet, and the names that owners give.

Every address has a default name in the location's zone, which leads to it, and a PTR record that leads to the name its
owner gave it, or to the default one. Whoever changes what that should be marks the address in the same transaction; a
task of the workers pushes what is marked. So a nameserver that is away holds nothing up, and is told later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from uuid import UUID

import structlog
from sqlalchemy import delete, func, select, text, tuple_, update
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.catalogue import engines
from awan.catalogue.service import all_zones
from awan.engines.nameserver import RecordKey, Zones
from awan.errors import Conflict, EngineError, Invalid, NotFound, RateLimited, Unavailable
from awan.kit.database import transaction
from awan.kit.resolving import LookupFailed, look_up_ipv4, look_up_ipv6
from awan.networks.models import Address, Pool, PrefixName, PrefixPool, RoutedPrefix, StaleName
from awan.networks.rules import default_name, parse_rdns, pointer_key, records_of
from awan.operations import Operation, Plan, begin
from awan.operations.service import refuse_if_busy
from awan.resources import Resource, ResourceKind, get_owned, lock_owned
from awan.settings import get_settings

AnyAddress = IPv4Address | IPv6Address

LOOKUP_TIMEOUT_S = 5.0
NO_NAMES = "The names of addresses cannot be set in this location."
# What is pushed at once; a location with more has several rounds in a run.
BATCH = 500
ROUNDS_MAX = 50
RETRY_MAX_S, DOUBLINGS_MAX = 60, 6

_MARK_STALE = text(
    """
    INSERT INTO stale_name (location_id, inet)
    SELECT :location, CAST(marked.address AS inet)
    FROM unnest(CAST(:addresses AS text[])) WITH ORDINALITY AS marked (address, position)
    WHERE EXISTS (
        SELECT FROM location_engine WHERE location_id = :location AND kind = 'nameserver'
    )
    ORDER BY marked.position
    ON CONFLICT (location_id, inet)
    DO UPDATE SET marked_at = clock_timestamp(), attempts = 0, retry_at = now()
    """
)

log = structlog.get_logger(__name__)


# --- what is to be pushed ---


def mark_stale(session: Session, location_id: int, addresses: Iterable[AnyAddress]) -> None:
    """The nameserver has to be told of these addresses again; where the location has none, no effect.

    Rows are written in the order of addresses, so that two transactions never wait for each other.
    """
    ordered = sorted(set(addresses), key=lambda it: (it.version, int(it)))
    if ordered:
        texts = [str(address) for address in ordered]
        session.execute(_MARK_STALE, {"location": location_id, "addresses": texts})


def mark_pool_stale(session: Session, pool: Pool) -> None:
    """As `mark_stale`, of all addresses of a pool."""
    session.flush()
    addresses = session.scalars(select(Address.inet).where(Address.pool_id == pool.pool_id)).all()
    for start in range(0, len(addresses), BATCH):
        mark_stale(session, pool.location_id, addresses[start : start + BATCH])


def wanted_records(
    session: Session, location_id: int, zones: Zones, addresses: Sequence[AnyAddress]
) -> dict[RecordKey, str | None]:
    """What the nameserver should have of these addresses; None where one is no address of the location any more.

    A pool whose prefix is in none of the reverse zones has no PTR records. An address of a routed prefix has no other
    name than the one that its owner gave it.
    """
    names = {
        row.inet: row.rdns
        for row in session.execute(
            select(Address.inet, Address.rdns)
            .join(Pool)
            .where(Pool.location_id == location_id, Address.inet.in_(addresses))
        )
    }
    given = prefix_names(session, location_id, addresses)
    wanted: dict[RecordKey, str | None] = {}
    for address in addresses:
        for key, value in records_of(address, zones.forward, names.get(address)).items():
            if zones.zone_of(key.name) is not None:
                wanted[key] = value if address in names else None
        if address in given and zones.zone_of(pointer_key(address).name) is not None:
            wanted[pointer_key(address)] = given[address]
    return wanted


def prefix_names(
    session: Session, location_id: int, addresses: Sequence[AnyAddress] | None = None
) -> dict[AnyAddress, str]:
    """The names that owners gave to addresses of routed prefixes of the location, or to those of `addresses`."""
    query = (
        select(PrefixName.inet, PrefixName.rdns)
        .join(RoutedPrefix, RoutedPrefix.prefix_id == PrefixName.prefix_id)
        .join(PrefixPool, PrefixPool.prefix_pool_id == RoutedPrefix.prefix_pool_id)
        .where(PrefixPool.location_id == location_id)
    )
    if addresses is not None:
        query = query.where(PrefixName.inet.in_(addresses))
    return {row.inet: row.rdns for row in session.execute(query)}


def push_stale_names() -> None:
    """Tells the nameservers what they may not have yet. One that is away is tried again, later and later."""
    with transaction() as session:
        due = select(StaleName.location_id).where(StaleName.retry_at <= func.now()).distinct()
        locations = session.scalars(due).all()
    for location_id in locations:
        for _ in range(ROUNDS_MAX):
            if not _push_some(location_id):
                break


def _push_some(location_id: int) -> bool:
    """One batch of a location. Whether there may be more to do now."""
    with transaction() as session:
        marks = session.execute(
            select(StaleName.inet, StaleName.marked_at)
            .where(StaleName.location_id == location_id, StaleName.retry_at <= func.now())
            .order_by(StaleName.inet)
            .limit(BATCH)
        ).all()
        zones = all_zones(session).get(location_id)
        addresses = [mark.inet for mark in marks]
        wanted = wanted_records(session, location_id, zones, addresses) if zones else {}
    try:
        if wanted:
            _push(location_id, wanted)
    except (EngineError, Unavailable) as err:
        log.warning("names were not pushed", location=location_id, error=str(err))
        _postpone(location_id, addresses)
        return False
    with transaction() as session:
        session.execute(
            delete(StaleName).where(
                StaleName.location_id == location_id,
                tuple_(StaleName.inet, StaleName.marked_at).in_([tuple(mark) for mark in marks]),
            )
        )
    return len(marks) == BATCH


def _push(location_id: int, wanted: Mapping[RecordKey, str | None]) -> None:
    with transaction() as session:
        nameserver = engines(session, location_id).nameserver
    if nameserver is not None:
        nameserver.ensure_records(wanted)


def _postpone(location_id: int, addresses: Sequence[AnyAddress]) -> None:
    with transaction() as session:
        delay_s = func.least(
            RETRY_MAX_S, func.power(2, func.least(DOUBLINGS_MAX, StaleName.attempts))
        )
        session.execute(
            update(StaleName)
            .where(StaleName.location_id == location_id, StaleName.inet.in_(addresses))
            .values(
                attempts=StaleName.attempts + 1,
                retry_at=func.now() + delay_s * text("interval '1 second'"),
            )
            .execution_options(synchronize_session=False)
        )


# --- names that owners give ---


@dataclass(frozen=True)
class Wish:
    """A name that an address may get. `is_own`: it is the default name, which leads to the address already."""

    name: str
    address: AnyAddress
    is_own: bool


def check_wish(session: Session, caller: Caller, resource_id: UUID, rdns: str | None) -> Wish:
    """The name that the caller's address is to get; None stands for its default name.

    Raises: NotFound, RateLimited, Invalid, Conflict where there is no nameserver.
    """
    address, pool = find_named(session, resource_id, account_id=caller.account_id)
    zones = all_zones(session)
    own = zones.get(pool.location_id)
    if own is None or own.zone_of(pointer_key(address.inet).name) is None:
        raise Conflict(NO_NAMES)
    assert isinstance(address.inet, IPv4Address)
    default = default_name(address.inet, own.forward)
    name = default if rdns is None else parse_given(rdns, zones, default)
    return Wish(name, address.inet, name == default)


def parse_given(rdns: str, zones: Mapping[int, Zones], default: str | None) -> str:
    """The name that an owner gives, which is in none of our own zones unless it is the default one. Raises: Invalid."""
    try:
        name = parse_rdns(rdns)
    except ValueError as err:
        raise Invalid.field("rdns", str(err)) from err
    ours = [zone for it in zones.values() for zone in (it.forward, it.private) if zone is not None]
    if name != default and any(name == zone or name.endswith(f".{zone}") for zone in ours):
        raise Invalid.field("rdns", "The rdns is in a zone in which names are given by us alone.")
    return name


def confirm(wish: Wish) -> None:
    """The name leads to the address at this moment, where that is asked for. Blocks; call it outside transactions.

    Raises: Invalid.
    """
    settings = get_settings()
    if wish.is_own or not settings.rdns_forward_confirm:
        return
    is_ipv4 = wish.address.version == 4
    look_up = look_up_ipv4 if is_ipv4 else look_up_ipv6
    try:
        found = look_up(wish.name, settings.rdns_resolvers, timeout_s=LOOKUP_TIMEOUT_S)
    except LookupFailed as err:
        log.info("forward lookup failed", error=str(err))
        raise Invalid.field(
            "rdns", f"The name {wish.name} could not be looked up. Try again in a moment."
        ) from err
    if wish.address not in found:
        raise Invalid.field(
            "rdns",
            f"The name {wish.name} has no {'A' if is_ipv4 else 'AAAA'} record with the address"
            f" {wish.address}.",
        )


def set_rdns(
    session: Session, caller: Caller, plan: Plan, resource_id: UUID, rdns: str | None
) -> Operation:
    """Begins to give the caller's address a name, which `confirm` has accepted.

    Raises: as `check_wish`; Conflict while another operation runs on the address.
    """
    resource = lock_owned(session, caller, ResourceKind.PUBLIC_IP, resource_id)
    refuse_if_often(session, plan, resource)
    wish = check_wish(session, caller, resource_id, rdns)
    refuse_if_busy(session, resource)
    operation = begin(
        session,
        caller=caller,
        plan=plan,
        resource=resource,
        resource_kind=ResourceKind.PUBLIC_IP,
        subject_id=resource_id,
    )
    address, _ = find_named(session, resource_id, account_id=caller.account_id, locked=True)
    address.new_rdns = wish.name
    session.flush()
    return operation


def check_often(session: Session, caller: Caller, plan: Plan, resource_id: UUID) -> None:
    """As `refuse_if_often`, of the caller's address. Raises: NotFound, RateLimited."""
    refuse_if_often(session, plan, get_owned(session, caller, ResourceKind.PUBLIC_IP, resource_id))


def refuse_if_often(session: Session, plan: Plan, resource: Resource) -> None:
    """Raises: RateLimited when the address's name was changed too often in the last hour."""
    allowed = get_settings().rdns_changes_per_hour
    ages_s = session.scalars(
        select(func.extract("epoch", func.now() - Operation.created_at))
        .where(
            Operation.resource_id == resource.resource_id,
            Operation.kind == plan.kind,
            Operation.created_at > func.now() - text("interval '1 hour'"),
        )
        .order_by(Operation.created_at.desc())
        .limit(allowed)
    ).all()
    if len(ages_s) == allowed:
        raise RateLimited(
            f"The name of an address can be changed {allowed} times an hour.",
            retry_after_s=max(1, 3600 - int(ages_s[-1])),
        )


def find_named(
    session: Session, resource_id: UUID, *, account_id: UUID | None = None, locked: bool = False
) -> tuple[Address, Pool]:
    """An address by its public uuid, of this account where given. Raises: NotFound."""
    query = select(Address, Pool).join(Pool).where(Address.resource_id == resource_id)
    if account_id is not None:
        query = query.where(Address.account_id == account_id)
    if locked:
        query = query.with_for_update(of=Address).execution_options(populate_existing=True)
    row = session.execute(query).first()
    if row is None:
        raise NotFound("Public network not found.")
    return row.Address, row.Pool


def name_of(address: Address, zones: Zones | None) -> str | None:
    """The name that an address has; None where there is no nameserver."""
    return None if zones is None else address.rdns or default_name(address.inet, zones.forward)


def shown_name(session: Session, resource_id: UUID) -> str | None:
    """The name that an address has or is getting; of one that was given back, the one it has by default."""
    zones = all_zones(session)
    try:
        address, pool = find_named(session, resource_id)
    except NotFound:
        kept = session.get_one(Resource, resource_id)
        assert kept.location_id is not None
        own = zones.get(kept.location_id)
        return None if own is None else default_name(IPv4Address(kept.name), own.forward)
    return address.new_rdns or name_of(address, zones.get(pool.location_id))


def stale_addresses(session: Session) -> dict[int, set[AnyAddress]]:
    """Location id -> addresses whose names are about to be pushed."""
    found: dict[int, set[AnyAddress]] = {}
    for location_id, address in session.execute(select(StaleName.location_id, StaleName.inet)):
        found.setdefault(location_id, set()).add(address)
    return found
