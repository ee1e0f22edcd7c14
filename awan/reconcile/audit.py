"""The audit: engines against rows, and rows against rows. It changes nothing; no findings means all is well.

first look   -> which transactions have ended, which first boots are waited for, which image files are kept
engines read -> domains, files and ports of every location, nodes side by side
second look  -> all rows in one read-only snapshot; what changed since the first look is left out
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import UUID

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from awan.catalogue import engines
from awan.catalogue.models import Location
from awan.engines.fabric import ChassisFacts, PortFacts
from awan.engines.hypervisor import DomainFacts
from awan.engines.registry import LocationEngines
from awan.engines.volumes import VolumeFacts
from awan.errors import EngineError, Unavailable
from awan.fleet.models import Node
from awan.fleet.service import endpoint
from awan.kit.database import transaction
from awan.reconcile.expected import SERVING, Expectations, look_first
from awan.reconcile.findings import Finding, FindingKind
from awan.reconcile.row_checks import check_rows
from awan.reconcile.rules import ExpectedLocation, compare_domains, compare_files, compare_ports

# Nodes that are read at the same time; each call is bounded by its engine.
READERS_MAX = 16

T = TypeVar("T")


@dataclass
class _Seen:
    """What the engines of a location answered; a part that did not answer is missing, and a finding."""

    domains: dict[UUID, list[DomainFacts]] = field(default_factory=dict)
    files: dict[UUID, list[VolumeFacts]] = field(default_factory=dict)
    ports: list[PortFacts] | None = None
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class _Site:
    """A location with its nodes and its opened engines."""

    location: Location
    nodes: Sequence[Node]
    engines: LocationEngines


def run_audit(location_ids: Sequence[int] | None = None) -> list[Finding]:
    """Everything that is not as it should be, in all locations or in the engines of some.

    Rows are always compared all. Blocks as long as the slowest node takes; bounded by the engines' own deadlines.
    Raises: Unavailable when the database is away.
    """
    findings: list[Finding] = []
    with transaction() as session:
        first = look_first(session)
        sites = _sites(session, location_ids, findings)
    with ThreadPoolExecutor(READERS_MAX, thread_name_prefix="audit") as readers:
        pending = [(site, _begin_reading(readers, site)) for site in sites]
        seen = [(site, collect()) for site, collect in pending]
    with _one_snapshot() as session:
        expectations = Expectations(session, first)
        for site, answered in seen:
            expected = expectations.of_location(session.merge(site.location, load=False))
            findings += answered.findings
            findings += _compare(expected, answered)
        findings += check_rows(session)
        findings += expectations.lost_first_boots()
        findings += expectations.stray_image_files()
    return sorted(findings, key=lambda it: (it.kind, it.location or "", it.subject, it.found))


@contextmanager
def _one_snapshot() -> Iterator[Session]:
    with transaction() as session:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        session.execute(text("SET TRANSACTION READ ONLY"))
        yield session


def _sites(
    session: Session, location_ids: Sequence[int] | None, findings: list[Finding]
) -> list[_Site]:
    """The locations with their engines opened. One whose engines cannot be opened is a finding if it has nodes."""
    query = select(Location).order_by(Location.location_id)
    if location_ids is not None:
        query = query.where(Location.location_id.in_(location_ids))
    sites = []
    for location in session.scalars(query):
        nodes = session.scalars(
            select(Node)
            .where(Node.location_id == location.location_id, Node.state.in_(SERVING))
            .order_by(Node.name)
        ).all()
        try:
            sites.append(_Site(location, nodes, engines(session, location.location_id)))
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


def _begin_reading(readers: ThreadPoolExecutor, site: _Site) -> Callable[[], _Seen]:
    """Asks the location's engines for all they have; the result waits for the answers."""
    opened, code = site.engines, site.location.code
    nodes = [(node, endpoint(node)) for node in site.nodes]
    domains = [readers.submit(opened.hypervisor.list_domains, reached) for _, reached in nodes]
    files = [readers.submit(opened.volumes.list_volumes, reached) for _, reached in nodes]
    ports = readers.submit(opened.fabric.list_ports)
    chassis = readers.submit(opened.fabric.list_chassis)

    def collect() -> _Seen:
        seen = _Seen()
        for (node, _), domain_list, file_list in zip(nodes, domains, files, strict=True):
            silence = _silence(
                FindingKind.NODE_SILENT, code, str(node.node_id), f"Node {node.name}"
            )
            if (found_domains := _result(domain_list, seen, silence)) is not None:
                seen.domains[node.node_id] = found_domains
            if (found_files := _result(file_list, seen, silence)) is not None:
                seen.files[node.node_id] = found_files
        silence = _silence(FindingKind.FABRIC_SILENT, code, code, "The fabric")
        seen.ports = _result(ports, seen, silence)
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


def _result(future: Future[T], seen: _Seen, silence: Callable[[EngineError], Finding]) -> T | None:
    try:
        return future.result()
    except EngineError as err:
        seen.findings.append(silence(err))
        return None


def _silent_chassis(site: _Site, found: Sequence[ChassisFacts]) -> Iterator[Finding]:
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


def _compare(expected: ExpectedLocation, seen: _Seen) -> Iterator[Finding]:
    for node in expected.nodes.values():
        if node.node_id in seen.domains:
            yield from compare_domains(expected, node, seen.domains[node.node_id])
        if node.node_id in seen.files:
            yield from compare_files(expected, node, seen.files[node.node_id])
    if seen.ports is not None:
        yield from compare_ports(expected, seen.ports)
