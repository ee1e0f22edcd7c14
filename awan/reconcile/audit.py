"""The audit: engines against rows, and rows against rows. It changes nothing; no findings means all is well.

first look   -> which transactions have ended, which first boots are waited for, which image files are kept
engines read -> domains, files, ports and names of every location, nodes side by side
second look  -> all rows in one read-only snapshot; what changed since the first look is left out
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from awan.kit.database import transaction
from awan.reconcile.expected import Expectations, look_first
from awan.reconcile.findings import Finding
from awan.reconcile.firewall_groups import compare_groups
from awan.reconcile.prefix_routers import compare_routers
from awan.reconcile.private_names import compare_private_names, compare_resolvers
from awan.reconcile.private_networks import compare_networks
from awan.reconcile.reading import Seen, one_snapshot, open_sites, read
from awan.reconcile.row_checks import check_rows
from awan.reconcile.rules import (
    ExpectedLocation,
    compare_domains,
    compare_files,
    compare_firewalls,
    compare_names,
    compare_ports,
)


def run_audit(location_ids: Sequence[int] | None = None) -> list[Finding]:
    """Everything that is not as it should be, in all locations or in the engines of some.

    Rows are always compared all. Blocks as long as the slowest node takes; bounded by the engines' own deadlines.
    Raises: Unavailable when the database is away.
    """
    findings: list[Finding] = []
    with transaction() as session:
        first = look_first(session)
        sites = open_sites(session, location_ids, findings)
    seen = read(sites)
    with one_snapshot() as session:
        expectations = Expectations(session, first)
        for site, answered in seen:
            expected = expectations.of_location(session.merge(site.location, load=False))
            findings += answered.findings
            findings += _compare(expected, answered)
        findings += check_rows(session)
        findings += expectations.lost_first_boots()
        findings += expectations.stray_image_files()
    return sorted(findings, key=lambda it: (it.kind, it.location or "", it.subject, it.found))


def _compare(expected: ExpectedLocation, seen: Seen) -> Iterator[Finding]:
    for node in expected.nodes.values():
        if node.node_id in seen.domains:
            yield from compare_domains(expected, node, seen.domains[node.node_id])
        if node.node_id in seen.files:
            yield from compare_files(expected, node, seen.files[node.node_id])
    if seen.ports is not None:
        yield from compare_ports(expected, seen.ports)
    if seen.networks is not None:
        networks, unsettled = expected.networks, expected.unsettled.switches
        yield from compare_networks(expected.code, networks, unsettled, seen.networks)
        yield from compare_resolvers(expected.code, expected.private_names, networks, seen.networks)
    if seen.prefix_routers is not None:
        yield from compare_routers(expected.code, expected.prefix_routes, seen.prefix_routers)
    if seen.names is not None and expected.names_zone is not None:
        yield from compare_names(expected, seen.names)
        yield from compare_private_names(expected.code, expected.private_names, seen.names)
    if seen.firewalls is not None:
        yield from compare_firewalls(expected, seen.firewalls)
    if seen.firewall_groups is not None:
        yield from compare_groups(expected, seen.firewall_groups)
