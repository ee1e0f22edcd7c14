"""One look at a location: its networks, the ports of its instances, and what lies on its engines without a row.

networks -> put back by the same verb that made them
ports, firewalls, cards, seeds -> repaired by an operation on the instance
firewalls that a node had not confirmed -> asked for again
deletions that have failed -> begun anew
names -> marked, and pushed by the task that pushes all names
strays -> quarantined: reported, watched, never touched
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import structlog
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from awan.engines.fabric import PublicNetworkSpec
from awan.engines.volumes.names import read_name
from awan.errors import EngineError
from awan.events import record
from awan.firewall import Firewall
from awan.firewall.groups import request_apply_group
from awan.firewall.models import FirewallGroup
from awan.firewall.service import request_apply
from awan.fleet import Node, NodeHealth
from awan.instances.models import Instance
from awan.instances.recover import ACTOR, Reason
from awan.instances.rules import SETTLED_STATES
from awan.kit.database import transaction
from awan.networks import Address, Nic
from awan.networks.cards import public_nic_id
from awan.networks.names import mark_stale
from awan.networks.pools import network_spec
from awan.operations import ControlPlane
from awan.reconcile.deletions import resume_deletions
from awan.reconcile.expected import Expectations, look_first
from awan.reconcile.findings import Finding, FindingKind
from awan.reconcile.firewall_groups import compare_groups
from awan.reconcile.models import StrayKind
from awan.reconcile.power import Verdict
from awan.reconcile.prefix_routers import compare_routers, put_back_prefix_routers
from awan.reconcile.private_names import (
    compare_private_names,
    compare_resolvers,
    put_back_private_names,
)
from awan.reconcile.private_networks import compare_networks, put_back_private_networks
from awan.reconcile.quarantine import Scope, Stray, update_quarantine
from awan.reconcile.reading import Seen, Site, one_snapshot, open_sites, read
from awan.reconcile.repairs import act, known_of
from awan.reconcile.rules import (
    ExpectedLocation,
    compare_domains,
    compare_files,
    compare_firewalls,
    compare_names,
    compare_ports,
)

STRAYS = {
    FindingKind.DOMAIN_STRAY: StrayKind.DOMAIN,
    FindingKind.PORT_STRAY: StrayKind.PORT,
    FindingKind.FIREWALL_STRAY: StrayKind.FIREWALL,
    FindingKind.FILE_STRAY: StrayKind.FILE,
    FindingKind.NAME_STRAY: StrayKind.NAME,
    FindingKind.NETWORK_STRAY: StrayKind.NETWORK,
}
NETWORK_FAULTS = (
    FindingKind.PORT_MISSING,
    FindingKind.PORT_WRONG,
    FindingKind.PORT_UNPROTECTED,
    FindingKind.FIREWALL_MISSING,
    FindingKind.FIREWALL_WRONG,
    FindingKind.DOMAIN_CARDS,
    FindingKind.PORT_STRAY,
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Found:
    """A finding with the node it was made on; None for what belongs to the whole location."""

    node_id: UUID | None
    finding: Finding


def check_location(location_id: int, *, with_files: bool = True) -> None:
    """Compares the location's engines with its rows, and acts on what differs.

    Nodes that are unreachable are left out, and so is whatever does not answer: the next look sees it.
    Raises: Unavailable when the database is away.
    """
    silent: list[Finding] = []
    with transaction() as session:
        first = look_first(session)
        sites = [_without_unreachable(site) for site in open_sites(session, [location_id], silent)]
    if not sites:
        return
    _put_back_networks(sites[0])
    _apply_pending(location_id)
    resume_deletions(location_id)
    put_back_private_networks(location_id)
    put_back_prefix_routers(location_id)
    (site, seen) = read(sites, with_files=with_files, with_chassis=False)[0]
    with one_snapshot() as session:
        expected = Expectations(session, first).of_location(
            session.merge(site.location, load=False)
        )
        found = list(_compare(expected, seen))
        owners = {str(port.spec.port_id): port.spec.instance_id for port in expected.ports}
        owners |= {str(it.spec.firewall_id): it.instance_id for it in expected.firewalls}
        owners |= _owners_of_left_over(session, seen, found)
        faulty = {
            instance_id: it.finding
            for it in found
            if (instance_id := _instance_of(it.finding, owners)) is not None
        }
        known = known_of(session, set(faulty))
    for silence in (*silent, *seen.findings):
        log.warning(
            "location was not read whole", location=site.location.code, why=silence.sentence
        )
    for instance_id, it in known.items():
        finding = faulty[instance_id]
        reason = Reason.NETWORK if finding.kind in NETWORK_FAULTS else Reason.SEED
        act(it, Verdict.REPAIR, reason, f"{finding.kind}: {finding.found}")
    wrong = {it.finding.subject for it in found if it.finding.kind is FindingKind.NAME_WRONG}
    with transaction() as session:
        mark_stale(
            session,
            location_id,
            [it.address for key, it in expected.names.items() if key.name in wrong],
        )
        put_back = put_back_private_names(
            session, expected.private_names.zone, [it.finding for it in found]
        )
        strays = [
            Stray(STRAYS[it.finding.kind], it.node_id, it.finding.subject, it.finding.sentence)
            for it in found
            if it.finding.kind in STRAYS and it.finding.subject not in put_back
        ]
        update_quarantine(session, location_id, strays, _scopes(seen))


def _without_unreachable(site: Site) -> Site:
    nodes = [node for node in site.nodes if node.health == NodeHealth.REACHABLE]
    return Site(site.location, nodes, site.engines)


def _put_back_networks(site: Site) -> None:
    """The logical switches that cards are on, with DHCP options and the rules for tenants, are as they should be."""
    with transaction() as session:
        networks = _networks_in_use(session, site.location.location_id)
    for network in networks:
        try:
            has_changed = site.engines.fabric.ensure_public_network(network)
        except EngineError as err:
            log.warning("network was not looked at", switch=network.switch, error=str(err))
            return
        if has_changed:
            log.warning("network was put back", switch=network.switch)
            with transaction() as session:
                _record_network(session, site, network.switch)


def _apply_pending(location_id: int) -> None:
    """Firewalls and groups that a node has not confirmed, or that could not be pushed, are brought there again."""
    with transaction() as session:
        pending = session.scalars(
            select(Firewall.instance_id)
            .join(Instance, Instance.instance_id == Firewall.instance_id)
            .join(Node, Node.node_id == Instance.node_id)
            .where(
                Firewall.location_id == location_id,
                Firewall.applied_revision < Firewall.wanted_revision,
                # A node that is away confirms nothing; what it has to confirm can be pushed meanwhile.
                or_(
                    Firewall.pushed_revision < Firewall.wanted_revision,
                    Node.health == NodeHealth.REACHABLE,
                ),
                Firewall.deleted_at.is_(None),
                Instance.observed_state.in_(SETTLED_STATES),
            )
        ).all()
        groups = session.scalars(
            select(FirewallGroup.group_id).where(
                FirewallGroup.location_id == location_id,
                FirewallGroup.applied_revision < FirewallGroup.wanted_revision,
                FirewallGroup.deleted_at.is_(None),
            )
        ).all()
    for instance_id in pending:
        with transaction() as session:
            request_apply(session, ControlPlane(ACTOR), instance_id)
    for group_id in groups:
        with transaction() as session:
            request_apply_group(session, ControlPlane(ACTOR), group_id)


def _networks_in_use(session: Session, location_id: int) -> list[PublicNetworkSpec]:
    """Those of instances that are made. One that is being made for the first time is not missing."""
    pool_ids = session.scalars(
        select(Address.pool_id)
        .join(Nic, Nic.nic_id == Address.nic_id)
        .join(Instance, Instance.instance_id == Nic.instance_id)
        .where(
            Nic.location_id == location_id,
            Nic.deleted_at.is_(None),
            Address.family == 4,
            Instance.observed_state.in_(SETTLED_STATES),
        )
        .distinct()
        .order_by(Address.pool_id)
    )
    return [network_spec(session, pool_id) for pool_id in pool_ids.all()]


def _record_network(session: Session, site: Site, switch: str) -> None:
    record(
        session,
        kind="network.repaired",
        actor=ACTOR,
        account_id=None,
        data={"location": site.location.code, "switch": switch},
    )


def _compare(expected: ExpectedLocation, seen: Seen) -> Iterator[Found]:
    for node in expected.nodes.values():
        if node.node_id in seen.domains:
            domains = compare_domains(expected, node, seen.domains[node.node_id])
            yield from (Found(node.node_id, it) for it in domains)
        if node.node_id in seen.files:
            files = compare_files(expected, node, seen.files[node.node_id])
            yield from (Found(node.node_id, it) for it in files)
    if seen.ports is not None:
        yield from (Found(None, it) for it in compare_ports(expected, seen.ports))
    if seen.networks is not None:
        networks, unsettled = expected.networks, expected.unsettled.switches
        compared = compare_networks(expected.code, networks, unsettled, seen.networks)
        yield from (Found(None, it) for it in compared)
        ways = compare_resolvers(expected.code, expected.private_names, networks, seen.networks)
        yield from (Found(None, it) for it in ways)
    if seen.prefix_routers is not None:
        routed = compare_routers(expected.code, expected.prefix_routes, seen.prefix_routers)
        yield from (Found(None, it) for it in routed)
    if seen.names is not None and expected.names_zone is not None:
        yield from (Found(None, it) for it in compare_names(expected, seen.names))
        private = compare_private_names(expected.code, expected.private_names, seen.names)
        yield from (Found(None, it) for it in private)
    if seen.firewalls is not None:
        yield from (Found(None, it) for it in compare_firewalls(expected, seen.firewalls))
    if seen.firewall_groups is not None:
        yield from (Found(None, it) for it in compare_groups(expected, seen.firewall_groups))


def _owners_of_left_over(session: Session, seen: Seen, found: Sequence[Found]) -> dict[str, UUID]:
    """Ports that a failed change of an address has left to an instance without one, and the instances."""
    names = {it.finding.subject for it in found if it.finding.kind is FindingKind.PORT_STRAY}
    said = {it.name: it.instance_id for it in seen.ports or () if it.name in names}
    rows = session.execute(
        select(Instance.instance_id, Instance.create_operation_id).where(
            Instance.instance_id.in_([it for it in said.values() if it is not None])
        )
    )
    public = {str(public_nic_id(created_by)): instance_id for instance_id, created_by in rows}
    return {name: public[name] for name in names if name in public}


def _instance_of(finding: Finding, owners: Mapping[str, UUID]) -> UUID | None:
    """The instance that a repair would put right (`owners`: of ports and firewalls); None for what no repair can.

    Not a disk that is missing: what was on it cannot be made again. Of domains it is the cards alone: whether they are
    there and run is the business of their node's watch.
    """
    if finding.kind is FindingKind.DOMAIN_CARDS:
        return UUID(finding.subject)
    if finding.kind in NETWORK_FAULTS:
        return owners.get(finding.subject)
    if finding.kind is FindingKind.FILE_MISSING:
        return read_name(finding.subject).instance_id
    return None


def _scopes(seen: Seen) -> set[Scope]:
    """What was read whole: of this alone it can be said that something is not there any more."""
    scopes = {Scope(StrayKind.DOMAIN, node_id) for node_id in seen.domains}
    scopes |= {Scope(StrayKind.FILE, node_id) for node_id in seen.files}
    if seen.ports is not None:
        scopes.add(Scope(StrayKind.PORT, None))
    if seen.networks is not None:
        scopes.add(Scope(StrayKind.NETWORK, None))
    if seen.names is not None:
        scopes.add(Scope(StrayKind.NAME, None))
    if seen.firewall_groups is not None:
        scopes.add(Scope(StrayKind.FIREWALL, None))
    return scopes
