"""Names inside private networks: what the nameserver should have, and what it may not have yet.

Whoever changes which cards a network has, or what their instances are called, marks the network in the same
transaction. A task of the workers compares the whole domain of a marked network with what the nameserver has of it,
pushes what differs, and looks at the rows again afterwards: so that whoever pushes last has pushed the newest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from uuid import UUID

import structlog
from sqlalchemy import delete, func, not_, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from awan.catalogue import engines
from awan.catalogue.service import all_zones, private_names_options
from awan.engines.fabric import MemberNames, ServicesSpec
from awan.engines.nameserver import RecordKey
from awan.engines.registry import PrivateNamesOptions
from awan.errors import EngineError, Unavailable
from awan.kit.database import transaction
from awan.networks.models import Nic, PrivateNetwork, StalePrivateNetwork
from awan.networks.private_name_rules import (
    choose_service_ip,
    domain_of,
    names_of_members,
    network_of_name,
)
from awan.networks.private_rules import resolver_of
from awan.resources import Resource

# Networks whose domains are compared at once.
BATCH = 100
ROUNDS_MAX = 50
RETRY_MAX_S, DOUBLINGS_MAX = 60, 6

log = structlog.get_logger(__name__)


# --- what a network has ---


@dataclass(frozen=True)
class NamesPlan:
    """What a private network has so that its members find each other by name."""

    members: MemberNames
    outer: IPv4Address
    services: ServicesSpec


def find_names(session: Session, network: PrivateNetwork) -> NamesPlan | None:
    """Of a network; None where its location has no names inside networks, or it no address for them."""
    options = private_names_options(session, network.location_id)
    if options is None or network.service_ip is None:
        return None
    services = IPv4Network(options.services_cidr)
    if network.service_ip not in services:
        return None
    return NamesPlan(
        members=MemberNames(
            domain=domain_of(network.resource_id, options.zone),
            resolver=IPv4Address(options.resolver),
            router=resolver_of(network.cidr),
        ),
        outer=network.service_ip,
        services=ServicesSpec(services, options.physical_network, options.vlan),
    )


def find_domains(session: Session, networks: Iterable[PrivateNetwork]) -> dict[UUID, str]:
    """Resource id -> the domain of a network, of those that have one."""
    zones = {location_id: it.private for location_id, it in all_zones(session).items()}
    return {
        network.resource_id: domain_of(network.resource_id, zone)
        for network in networks
        if network.service_ip is not None and (zone := zones.get(network.location_id)) is not None
    }


def give_service_ip(session: Session, network: PrivateNetwork) -> bool:
    """The network, locked or new, has an address in the location's services network, if that is there and not full.

    Callers of one location wait for each other. One that lies in another prefix by now is given up for a new one.
    Whether it has another one than before.
    """
    options = private_names_options(session, network.location_id, is_locked=True)
    if options is None:
        return False
    services, resolver = IPv4Network(options.services_cidr), IPv4Address(options.resolver)
    present = network.service_ip
    if present is not None and present in services and present not in _not_for_networks(options):
        return False
    taken = session.scalars(
        select(PrivateNetwork.service_ip).where(
            PrivateNetwork.location_id == network.location_id,
            PrivateNetwork.service_ip.is_not(None),
        )
    ).all()
    chosen = choose_service_ip(services, resolver, [it for it in taken if it is not None])
    if chosen is None:
        log.warning("no address is left for names in a private network", cidr=str(services))
    network.service_ip = chosen
    session.flush()
    return chosen != present


def _not_for_networks(options: PrivateNamesOptions) -> tuple[IPv4Address, ...]:
    services = IPv4Network(options.services_cidr)
    return IPv4Address(options.resolver), services[0], services[-1]


def give_missing_service_ips(location_id: int) -> None:
    """Networks that are older than the location's services network have an address there as well."""
    with transaction() as session:
        options = private_names_options(session, location_id)
        if options is None:
            return
        missing = session.scalars(
            select(PrivateNetwork.network_id)
            .where(
                PrivateNetwork.location_id == location_id,
                PrivateNetwork.deleted_at.is_(None),
                or_(
                    PrivateNetwork.service_ip.is_(None),
                    not_(PrivateNetwork.service_ip.bool_op("<<")(options.services_cidr)),
                    PrivateNetwork.service_ip.in_(_not_for_networks(options)),
                ),
            )
            .order_by(PrivateNetwork.network_id)
        ).all()
    for network_id in missing:
        with transaction() as session:
            # One that is deleted meanwhile must not take an address with it.
            network = session.get_one(PrivateNetwork, network_id, with_for_update=True)
            if network.deleted_at is None and give_service_ip(session, network):
                mark_names_stale(session, [network_id])


# --- what is to be pushed ---


def mark_names_stale(session: Session, network_ids: Collection[int]) -> None:
    """The nameserver has to be told of the members of these networks again."""
    if not network_ids:
        return
    # In the order of ids, so that two transactions never wait for each other.
    fresh = insert(StalePrivateNetwork).values([{"network_id": it} for it in sorted(network_ids)])
    session.execute(
        fresh.on_conflict_do_update(
            index_elements=[StalePrivateNetwork.network_id],
            set_={"marked_at": func.clock_timestamp(), "attempts": 0, "retry_at": func.now()},
        )
    )


def mark_networks_of(session: Session, instance_id: UUID) -> None:
    """As `mark_names_stale`, of all networks that an instance has a card in."""
    session.flush()
    networks = select(Nic.network_id).where(
        Nic.instance_id == instance_id, Nic.network_id.is_not(None), Nic.deleted_at.is_(None)
    )
    mark_names_stale(session, {it for it in session.scalars(networks) if it is not None})


def wanted_names(
    session: Session, networks: Collection[PrivateNetwork]
) -> dict[UUID, dict[RecordKey, str]]:
    """Resource id -> what the nameserver should have of a network: nothing of one that is deleted, or has no names."""
    domains = find_domains(session, networks)
    rows = session.execute(
        select(Nic.network_id, Resource.name, Nic.private_ip)
        .join(Resource, Resource.resource_id == Nic.instance_id)
        .where(
            Nic.network_id.in_([network.network_id for network in networks]),
            Nic.deleted_at.is_(None),
        )
        .order_by(Nic.created_at, Nic.nic_id)
    ).all()
    members: dict[int, list[tuple[str, IPv4Address]]] = {}
    for network_id, hostname, address in rows:
        assert network_id is not None
        assert address is not None
        members.setdefault(network_id, []).append((hostname, address))
    return {
        network.resource_id: names_of_members(
            members.get(network.network_id, ()), domains[network.resource_id]
        )
        if network.resource_id in domains and network.deleted_at is None
        else {}
        for network in networks
    }


def names_by_address(session: Session, network: PrivateNetwork) -> dict[str, str]:
    """Address -> name of the members of a network that have one."""
    wanted = wanted_names(session, [network])[network.resource_id]
    return {address: key.name for key, address in wanted.items()}


def stale_private_networks(session: Session) -> set[UUID]:
    """The networks whose names are about to be pushed."""
    query = select(PrivateNetwork.resource_id).join(
        StalePrivateNetwork, StalePrivateNetwork.network_id == PrivateNetwork.network_id
    )
    return set(session.scalars(query))


def push_stale_private_names() -> None:
    """Tells the nameservers what they may not have yet. One that is away is tried again, later and later."""
    with transaction() as session:
        locations = session.scalars(
            select(PrivateNetwork.location_id)
            .join(StalePrivateNetwork, StalePrivateNetwork.network_id == PrivateNetwork.network_id)
            .where(StalePrivateNetwork.retry_at <= func.now())
            .distinct()
        ).all()
    for location_id in locations:
        for _ in range(ROUNDS_MAX):
            if not _push_some(location_id):
                break


def _push_some(location_id: int) -> bool:
    """One batch of a location. Whether there may be more to do now."""
    with transaction() as session:
        marks = session.execute(
            select(StalePrivateNetwork.network_id, StalePrivateNetwork.marked_at)
            .join(PrivateNetwork, PrivateNetwork.network_id == StalePrivateNetwork.network_id)
            .where(
                PrivateNetwork.location_id == location_id,
                StalePrivateNetwork.retry_at <= func.now(),
            )
            .order_by(StalePrivateNetwork.network_id)
            .limit(BATCH)
        ).all()
        zones = all_zones(session).get(location_id)
        zone = zones.private if zones is not None else None
        known = {mark.network_id: mark.marked_at for mark in marks}
        wanted = wanted_names(session, _read(session, known))
    try:
        if marks and zone is not None:
            _push(location_id, zone, wanted)
    except (EngineError, Unavailable) as err:
        log.warning("private names were not pushed", location=location_id, error=str(err))
        _postpone(known)
        return False
    with transaction() as session:
        _forget(session, known, wanted)
    return len(marks) == BATCH


def _read(session: Session, network_ids: Collection[int]) -> list[PrivateNetwork]:
    query = select(PrivateNetwork).where(PrivateNetwork.network_id.in_(network_ids))
    query = query.order_by(PrivateNetwork.network_id)
    return list(session.scalars(query.execution_options(populate_existing=True)))


def _push(location_id: int, zone: str, wanted: Mapping[UUID, Mapping[RecordKey, str]]) -> None:
    """The domains of these networks have these names and no others."""
    with transaction() as session:
        nameserver = engines(session, location_id).nameserver
    if nameserver is None or nameserver.zones.private != zone:
        # Configured otherwise since: the watch over the location marks what that leaves to be told.
        return
    found = nameserver.list_records(zone)
    domains: dict[UUID | None, list[RecordKey]] = {}
    for key in found:
        domains.setdefault(network_of_name(key.name, zone), []).append(key)
    changes: dict[RecordKey, str | None] = {}
    for network, names in wanted.items():
        present = {key: found[key] for key in domains.get(network, ())}
        changes |= dict.fromkeys(present.keys() - names.keys())
        changes |= {key: value for key, value in names.items() if present.get(key) != (value,)}
    if changes:
        nameserver.ensure_records(changes)


def _forget(
    session: Session,
    marks: Mapping[int, object],
    pushed: Mapping[UUID, Mapping[RecordKey, str]],
) -> None:
    """What was pushed is not marked any more, unless it was marked anew, or another worker has pushed newer names."""
    networks = _read(session, marks)
    wanted = wanted_names(session, networks)
    for network in networks:
        if wanted[network.resource_id] != pushed.get(network.resource_id):
            mark_names_stale(session, [network.network_id])
        session.execute(
            delete(StalePrivateNetwork).where(
                StalePrivateNetwork.network_id == network.network_id,
                StalePrivateNetwork.marked_at == marks[network.network_id],
            )
        )


def _postpone(network_ids: Collection[int]) -> None:
    with transaction() as session:
        delay_s = func.least(
            RETRY_MAX_S, func.power(2, func.least(DOUBLINGS_MAX, StalePrivateNetwork.attempts))
        )
        session.execute(
            update(StalePrivateNetwork)
            .where(StalePrivateNetwork.network_id.in_(network_ids))
            .values(
                attempts=StalePrivateNetwork.attempts + 1,
                retry_at=func.now() + delay_s * text("interval '1 second'"),
            )
            .execution_options(synchronize_session=False)
        )
