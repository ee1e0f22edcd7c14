"""Names inside private networks: what the fabric and the nameserver of a location should have, and putting it back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from uuid import UUID

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from awan.catalogue.service import all_zones, private_names_options
from awan.engines.fabric import PrivateNetworkFacts
from awan.engines.nameserver import RecordKey
from awan.fleet.models import Node, NodeState
from awan.networks.models import Nic, PrivateNetwork
from awan.networks.private_name_rules import network_of_name
from awan.networks.private_names import mark_names_stale, wanted_names
from awan.networks.private_rules import private_switch
from awan.reconcile.findings import Finding, FindingKind


@dataclass(frozen=True)
class ExpectedPrivateNames:
    """Names inside the private networks of a location, which are in `zone`; None where they have none.

    `service_ips`: the address behind which the members of a network ask, by its switch. `unsettled`: the networks that
    something is done to, or to whose members.
    """

    zone: str | None = None
    records: Mapping[RecordKey, str] = field(default_factory=dict)
    service_ips: Mapping[str, str] = field(default_factory=dict)
    unsettled: frozenset[UUID] = frozenset()


def expected_private_names(
    session: Session, location_id: int, touched: Collection[UUID], stale: Collection[UUID]
) -> ExpectedPrivateNames:
    """As the rows have it. `stale`: networks whose names are about to be pushed."""
    zones = all_zones(session).get(location_id)
    options = private_names_options(session, location_id)
    if zones is None or zones.private is None or options is None:
        return ExpectedPrivateNames()
    networks = session.scalars(
        select(PrivateNetwork).where(
            PrivateNetwork.location_id == location_id, PrivateNetwork.deleted_at.is_(None)
        )
    ).all()
    services = IPv4Network(options.services_cidr)
    changed = session.scalars(
        select(PrivateNetwork.resource_id)
        .outerjoin(Nic, Nic.network_id == PrivateNetwork.network_id)
        .where(
            PrivateNetwork.location_id == location_id,
            or_(PrivateNetwork.resource_id.in_(touched), Nic.instance_id.in_(touched)),
        )
    )
    return ExpectedPrivateNames(
        zone=zones.private,
        records={
            key: value
            for names in wanted_names(session, networks).values()
            for key, value in names.items()
        },
        service_ips={
            private_switch(network.resource_id): str(network.service_ip)
            for network in networks
            if network.service_ip is not None and network.service_ip in services
        }
        if _has_nodes(session, location_id)
        else {},
        unsettled=frozenset(stale) | frozenset(changed),
    )


def _has_nodes(session: Session, location_id: int) -> bool:
    query = select(Node.node_id).where(
        Node.location_id == location_id,
        Node.state.in_([NodeState.ACTIVE, NodeState.CORDONED]),
        Node.ovn_system_id.is_not(None),
    )
    return session.scalar(query.limit(1)) is not None


def compare_resolvers(
    code: str,
    expected: ExpectedPrivateNames,
    settled: Collection[str],
    found: Sequence[PrivateNetworkFacts],
) -> Iterator[Finding]:
    """The ways of settled private networks to their resolver, against the rows."""
    for facts in found:
        if facts.switch not in settled:
            continue
        wished = expected.service_ips.get(facts.switch)
        if facts.service_ip != wished:
            yield _wrong_way(code, facts.switch, wished or "none", facts.service_ip or "none")
        elif wished is not None and facts.resolver_chassis is None:
            yield _wrong_way(code, facts.switch, f"{wished} on a node", "no node")


def _wrong_way(code: str, switch: str, expected: str, found: str) -> Finding:
    return Finding(
        FindingKind.NETWORK_RESOLVER,
        code,
        switch,
        expected,
        found,
        f"The private network {switch} asks its resolver by way of {found} instead of {expected}.",
    )


def compare_private_names(
    code: str, expected: ExpectedPrivateNames, found: Mapping[RecordKey, tuple[str, ...]]
) -> Iterator[Finding]:
    """The zone of private names against the rows. What is in no network's domain is the operator's own."""
    zone = expected.zone
    if zone is None:
        return
    for key, value in expected.records.items():
        values = found.get(key, ())
        if values != (value,) and network_of_name(key.name, zone) not in expected.unsettled:
            seen = ", ".join(values) or "none"
            yield Finding(
                FindingKind.NAME_WRONG,
                code,
                key.name,
                f"{key.kind} {value}",
                seen,
                f"The nameserver has for {key.name} {key.kind}: {seen}, instead of {value}.",
            )
    for key, values in sorted(found.items()):
        network = network_of_name(key.name, zone)
        if (
            network is not None
            and key not in expected.records
            and network not in expected.unsettled
        ):
            yield Finding(
                FindingKind.NAME_STRAY,
                code,
                key.name,
                "no such record",
                f"{key.kind} {', '.join(values)}",
                f"The nameserver has {key.name} {key.kind} {', '.join(values)}, which no member explains.",
            )


def put_back_private_names(
    session: Session, zone: str | None, findings: Iterable[Finding]
) -> frozenset[str]:
    """Whatever is wrong in the domain of a network of ours, be it deleted, is pushed again. Those names."""
    wrong: dict[UUID, set[str]] = {}
    for finding in findings:
        if zone is not None and finding.kind in (FindingKind.NAME_WRONG, FindingKind.NAME_STRAY):
            network = network_of_name(finding.subject, zone)
            if network is not None:
                wrong.setdefault(network, set()).add(finding.subject)
    rows = session.execute(
        select(PrivateNetwork.network_id, PrivateNetwork.resource_id).where(
            PrivateNetwork.resource_id.in_(wrong)
        )
    ).all()
    mark_names_stale(session, [row.network_id for row in rows])
    return frozenset(name for row in rows for name in wrong[row.resource_id])
