"""Reading what the engines of locations have, nodes side by side. Nothing here compares or changes anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import UUID

from sqlalchemy import or_, select, text
from sqlalchemy.orm import Session

from awan.catalogue import engines
from awan.catalogue.models import Location
from awan.engines.fabric import (
    ChassisFacts,
    PortFacts,
    PrefixRouterFacts,
    PrivateNetworkFacts,
)
from awan.engines.fabric.firewall import FirewallFacts, FirewallGroupFacts
from awan.engines.hypervisor import DomainFacts
from awan.engines.nameserver import RecordKey
from awan.engines.registry import LocationEngines
from awan.engines.volumes import VolumeFacts
from awan.errors import EngineError, Unavailable
from awan.fleet.models import Node, NodeHealth, NodeState
from awan.fleet.service import endpoint
from awan.kit.database import transaction
from awan.reconcile.expected import SERVING
from awan.reconcile.findings import Finding, FindingKind

# Nodes that are read at the same time; each call is bounded by its engine.
READERS_MAX = 16

T = TypeVar("T")


@dataclass
class Seen:
    """What the engines of a location answered; a part that did not answer is missing, and a finding."""

    domains: dict[UUID, list[DomainFacts]] = field(default_factory=dict)
    files: dict[UUID, list[VolumeFacts]] = field(default_factory=dict)
    ports: list[PortFacts] | None = None
    networks: list[PrivateNetworkFacts] | None = None
    prefix_routers: list[PrefixRouterFacts] | None = None
    names: dict[RecordKey, tuple[str, ...]] | None = None
    firewalls: Sequence[FirewallFacts] | None = None
    firewall_groups: Sequence[FirewallGroupFacts] | None = None
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Site:
    """A location with its nodes and its opened engines."""

    location: Location
    nodes: Sequence[Node]
    engines: LocationEngines


@contextmanager
def one_snapshot() -> Iterator[Session]:
    """A read-only session in which all queries see the same rows."""
    with transaction() as session:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        session.execute(text("SET TRANSACTION READ ONLY"))
        yield session


def open_sites(
    session: Session, location_ids: Sequence[int] | None, findings: list[Finding]
) -> list[Site]:
    """The locations with their engines opened. One whose engines cannot be opened is a finding if it has nodes."""
    query = select(Location).order_by(Location.location_id)
    if location_ids is not None:
        query = query.where(Location.location_id.in_(location_ids))
    sites = []
    for location in session.scalars(query):
        nodes = session.scalars(
            select(Node)
            .where(
                Node.location_id == location.location_id,
                Node.state.in_(SERVING),
                # A lost node that does not answer is as it should be.
                or_(Node.state != NodeState.LOST, Node.health == NodeHealth.REACHABLE),
            )
            .order_by(Node.name)
        ).all()
        try:
            sites.append(Site(location, nodes, engines(session, location.location_id)))
        except (EngineError, Unavailable) as err:
            if nodes:
                findings.append(
                    Finding(
                        FindingKind.LOCATION_UNREADABLE,
                        location.code,
                        location.code,
                        "engines that can be opened",
                        str(err),
                        f"The engines of location {location.name} cannot be opened: {err}",
                    )
                )
    return sites


def read(
    sites: Sequence[Site], *, with_files: bool = True, with_chassis: bool = True
) -> list[tuple[Site, Seen]]:
    """Asks the engines of all sites for what they have. Blocks as long as the slowest takes.

    Files, names and chassis are the slow parts: a node reads its whole pool, a nameserver sends whole zones, and a
    chassis that is away is waited for. `with_files` stands for names too.
    """
    with ThreadPoolExecutor(READERS_MAX, thread_name_prefix="reader") as readers:
        pending = [
            (site, _begin_reading(readers, site, with_files=with_files, with_chassis=with_chassis))
            for site in sites
        ]
        return [(site, collect()) for site, collect in pending]


def _begin_reading(
    readers: ThreadPoolExecutor, site: Site, *, with_files: bool, with_chassis: bool
) -> Callable[[], Seen]:
    """Asks the location's engines for all they have; the result waits for the answers."""
    opened, code = site.engines, site.location.code
    nodes = [(node, endpoint(node)) for node in site.nodes]
    domains = [readers.submit(opened.hypervisor.list_domains, reached) for _, reached in nodes]
    files = [
        readers.submit(opened.volumes.list_volumes, reached) if with_files else None
        for _, reached in nodes
    ]
    ports = readers.submit(opened.fabric.list_ports)
    firewalls = readers.submit(opened.fabric.list_firewalls)
    groups = readers.submit(opened.fabric.list_firewall_groups)
    networks = readers.submit(opened.fabric.list_private_networks)
    routers = readers.submit(opened.fabric.list_prefix_routers)
    chassis = readers.submit(opened.fabric.list_chassis) if with_chassis else None
    names = (
        readers.submit(opened.nameserver.list_records)
        if with_files and opened.nameserver is not None
        else None
    )

    def collect() -> Seen:
        seen = Seen()
        for (node, _), domain_list, file_list in zip(nodes, domains, files, strict=True):
            silence = _silence(
                FindingKind.NODE_SILENT, code, str(node.node_id), f"Node {node.name}"
            )
            if (found_domains := _result(domain_list, seen, silence)) is not None:
                seen.domains[node.node_id] = found_domains
            if file_list is None:
                continue
            if (found_files := _result(file_list, seen, silence)) is not None:
                seen.files[node.node_id] = found_files
        silence = _silence(FindingKind.FABRIC_SILENT, code, code, "The fabric")
        seen.ports = _result(ports, seen, silence)
        if seen.ports is not None:
            seen.networks = _result(networks, seen, silence)
            seen.prefix_routers = _result(routers, seen, silence)
        if names is not None:
            no_names = _silence(FindingKind.NAMESERVER_SILENT, code, code, "The nameserver")
            seen.names = _result(names, seen, no_names)
        seen.firewalls = _result(firewalls, seen, silence)
        if seen.firewalls is not None:
            seen.firewall_groups = _result(groups, seen, silence)
        if chassis is None:
            return seen
        found_chassis = _result(chassis, seen, silence)
        if found_chassis is not None:
            seen.findings += _silent_chassis(site, found_chassis)
        return seen

    return collect


def _silence(
    kind: FindingKind, code: str, subject: str, who: str
) -> Callable[[EngineError], Finding]:
    def describe(err: EngineError) -> Finding:
        return Finding(
            kind,
            code,
            subject,
            "an answer",
            err.words,
            f"{who} did not answer {err.call}: {err.words}",
        )

    return describe


def _result(future: Future[T], seen: Seen, silence: Callable[[EngineError], Finding]) -> T | None:
    try:
        return future.result()
    except EngineError as err:
        seen.findings.append(silence(err))
        return None


def _silent_chassis(site: Site, found: Sequence[ChassisFacts]) -> Iterator[Finding]:
    alive = {chassis.system_id: chassis.is_alive for chassis in found}
    for node in site.nodes:
        name = node.ovn_system_id or "unknown"
        if not alive.get(name, False):
            state = "absent" if name not in alive else "behind"
            yield Finding(
                FindingKind.CHASSIS_SILENT,
                site.location.code,
                str(node.node_id),
                f"chassis {name} alive",
                state,
                f"The chassis {name} of node {node.name} is {state}: changes of the network do not"
                " reach it.",
            )
