"""Comparing what engines have with what they should have. Pure: facts and expectations in, findings out.

Something is *settled* when nothing has worked on it while the engines were read. What is not settled may be there,
be absent or look different without being a finding; it only must not be taken for a stray.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from pathlib import PurePosixPath
from uuid import UUID

from awan.engines.fabric import PortFacts, PortSpec
from awan.engines.fabric.acls import firewall_lines, group_name
from awan.engines.fabric.firewall import FirewallFacts, FirewallSpec
from awan.engines.hypervisor import DomainFacts, Power
from awan.engines.nameserver import RecordKey, RecordKind
from awan.engines.volumes import VolumeFacts
from awan.engines.volumes.names import name_image, name_seed, name_volume, read_name
from awan.kit.clock import now
from awan.networks.prefix_rules import address_of_pointer
from awan.networks.rules import default_name, is_default_name
from awan.reconcile.findings import Finding, FindingKind
from awan.reconcile.private_names import ExpectedPrivateNames

GIB = 1 << 30
# A domain whose QEMU died and that nobody started since is off, whatever the node calls it.
POWERS_OFF = frozenset({Power.STOPPED, Power.CRASHED})


@dataclass(frozen=True)
class ExpectedVolume:
    """A disk's file. Its guest sees `size_gib`."""

    volume_id: UUID
    size_gib: int


@dataclass(frozen=True)
class ExpectedInstance:
    """A settled instance that holds its place. `power` None: either is right.

    `seed_generations`: the seeds that may lie on the node; one alone is exact, of several at least one is there.
    `has_console`: somebody looks at its screen, or did so a moment ago.
    """

    instance_id: UUID
    name: str
    node_id: UUID
    power: Power | None
    volumes: tuple[ExpectedVolume, ...]
    port_ids: frozenset[UUID]
    seed_generations: tuple[int, ...]
    has_console: bool = False

    @property
    def label(self) -> str:
        """How sentences call it."""
        return f"instance {self.name} ({self.instance_id})"


@dataclass(frozen=True)
class ExpectedPort:
    """The port of a live card of a settled instance. `chassis` is set where the port must be bound and up.

    `dhcp_families` (4, 6) are those whose addresses must be given out by DHCP.
    """

    spec: PortSpec
    owner: str
    chassis: str | None
    dhcp_families: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExpectedName:
    """A record that the nameserver should have, and whose address it is about."""

    value: str
    address: IPv4Address | IPv6Address


@dataclass(frozen=True)
class ExpectedFirewall:
    """The firewall of a settled instance, with the cards that are in it."""

    spec: FirewallSpec
    instance_id: UUID
    owner: str
    port_ids: frozenset[UUID]


@dataclass(frozen=True)
class ExpectedRoutes:
    """Router -> prefix -> next hop, of settled instances. `unsettled`: prefixes that something is done to."""

    routes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    unsettled: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Unsettled:
    """Ids of what is being worked on, of every kind that an engine may show."""

    instance_ids: Collection[UUID] = frozenset()
    volume_ids: Collection[UUID] = frozenset()
    port_ids: Collection[UUID] = frozenset()
    image_sha256s: Collection[str] = frozenset()
    switches: Collection[str] = frozenset()
    addresses: Collection[IPv4Address | IPv6Address] = frozenset()
    firewall_ids: Collection[UUID] = frozenset()
    group_ids: Collection[UUID] = frozenset()


@dataclass(frozen=True)
class ExpectedNode:
    """A node that serves. `image_sha256s` lie on it."""

    node_id: UUID
    name: str
    image_sha256s: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ExpectedLocation:
    """All that the engines of one location should have, `looked_at` then."""

    code: str
    nodes: Mapping[UUID, ExpectedNode] = field(default_factory=dict)
    instances: Sequence[ExpectedInstance] = ()
    ports: Sequence[ExpectedPort] = ()
    names: Mapping[RecordKey, ExpectedName] = field(default_factory=dict)
    names_zone: str | None = None
    firewalls: Sequence[ExpectedFirewall] = ()
    group_ids: Collection[UUID] = frozenset()
    networks: Mapping[str, str | None] = field(default_factory=dict)
    private_names: ExpectedPrivateNames = field(default_factory=ExpectedPrivateNames)
    prefix_routes: ExpectedRoutes = field(default_factory=ExpectedRoutes)
    prefix_ranges: Sequence[IPv6Network] = ()
    unsettled: Unsettled = field(default_factory=Unsettled)
    looked_at: datetime = field(default_factory=now)


def compare_domains(
    where: ExpectedLocation, node: ExpectedNode, found: Sequence[DomainFacts]
) -> Iterator[Finding]:
    """Domains of a node against its instances: one for one by uuid, with our metadata, in the power that was seen."""
    expected = {it.instance_id: it for it in where.instances if it.node_id == node.node_id}
    homes = {it.instance_id: where.nodes[it.node_id].name for it in where.instances}
    for facts in found:
        instance = expected.pop(facts.domain_uuid, None)
        if facts.domain_uuid in where.unsettled.instance_ids:
            continue
        if instance is None or facts.instance_id != facts.domain_uuid:
            yield _stray_domain(where, node, facts, homes.get(facts.domain_uuid))
        else:
            yield from _compare_domain(where, node, instance, facts)
    for instance in expected.values():
        yield Finding(
            FindingKind.DOMAIN_MISSING,
            where.code,
            str(instance.instance_id),
            f"a domain on {node.name}",
            "none",
            f"{_capital(instance.label)} should be on node {node.name}, which has no such domain.",
        )


def _stray_domain(
    where: ExpectedLocation, node: ExpectedNode, facts: DomainFacts, home: str | None
) -> Finding:
    if home is not None and home != node.name:
        reason = f"its instance belongs on {home}"
    elif facts.instance_id is None:
        reason = "it does not carry our metadata"
    elif facts.instance_id != facts.domain_uuid:
        reason = f"its metadata names another instance ({facts.instance_id})"
    else:
        reason = "no instance explains it"
    return Finding(
        FindingKind.DOMAIN_STRAY,
        where.code,
        str(facts.domain_uuid),
        "no such domain",
        f"{facts.name}, {facts.power}",
        f"Node {node.name} has the domain {facts.name} ({facts.domain_uuid}), {facts.power}: {reason}.",
    )


def _compare_domain(
    where: ExpectedLocation, node: ExpectedNode, instance: ExpectedInstance, facts: DomainFacts
) -> Iterator[Finding]:
    subject = str(instance.instance_id)
    if not facts.is_persistent:
        yield Finding(
            FindingKind.DOMAIN_UNDEFINED,
            where.code,
            subject,
            "a definition",
            "none",
            f"The domain of {instance.label} on {node.name} runs without a definition: it is gone once"
            " it stops.",
        )
    if instance.power is not None and not _is_power(instance.power, facts.power):
        yield Finding(
            FindingKind.DOMAIN_POWER,
            where.code,
            subject,
            instance.power,
            facts.power,
            f"{_capital(instance.label)} is known as {instance.power}, but its domain on {node.name}"
            f" is {facts.power}.",
        )
    disks = {PurePosixPath(path).name for path in facts.disk_paths}
    volumes = {name_volume(it.volume_id) for it in instance.volumes}
    wishes = [
        volumes | {name_seed(instance.instance_id, number)} for number in instance.seed_generations
    ]
    if disks not in wishes:
        yield Finding(
            FindingKind.DOMAIN_DISKS,
            where.code,
            subject,
            _listed(wishes[-1]),
            _listed(disks),
            f"The domain of {instance.label} on {node.name} has the disks {_listed(disks)}"
            f" instead of {_listed(wishes[-1])}.",
        )
    if (
        facts.unlocked_until is not None
        and facts.unlocked_until > where.looked_at
        and not instance.has_console
    ):
        yield Finding(
            FindingKind.CONSOLE_UNLOCKED,
            where.code,
            subject,
            "a locked screen",
            f"open until {facts.unlocked_until:%Y-%m-%d %H:%M:%S}",
            f"The screen of {instance.label} on {node.name} opens until {facts.unlocked_until:%Y-%m-%d %H:%M:%S} UTC,"
            " though nobody has a console of it.",
        )
    if set(facts.port_ids) != instance.port_ids:
        cards, wished = _listed(map(str, facts.port_ids)), _listed(map(str, instance.port_ids))
        yield Finding(
            FindingKind.DOMAIN_CARDS,
            where.code,
            subject,
            wished,
            cards,
            f"The domain of {instance.label} on {node.name} has cards on the ports {cards}"
            f" instead of {wished}.",
        )


def _is_power(wished: Power, found: Power) -> bool:
    return found in POWERS_OFF if wished in POWERS_OFF else found is wished


def compare_files(
    where: ExpectedLocation, node: ExpectedNode, found: Sequence[VolumeFacts]
) -> Iterator[Finding]:
    """Files in a node's pool against disks, seeds and images: all that should be there, and nothing else."""
    here = [it for it in where.instances if it.node_id == node.node_id]
    sizes = {
        name_volume(volume.volume_id): volume.size_gib * GIB for it in here for volume in it.volumes
    }
    owners = {name_volume(volume.volume_id): it.label for it in here for volume in it.volumes}
    images = {name_image(sha256) for sha256 in node.image_sha256s}
    seeds = {
        it.instance_id: [name_seed(it.instance_id, number) for number in it.seed_generations]
        for it in here
    }
    allowed = {*sizes, *images, *(name for names in seeds.values() for name in names)}
    present = {facts.name: facts for facts in found}
    for name, facts in present.items():
        if name not in allowed and not _is_unsettled(where.unsettled, facts):
            yield _stray_file(where, node, facts)
        elif name in sizes and facts.capacity_bytes != sizes[name]:
            yield Finding(
                FindingKind.FILE_SIZE,
                where.code,
                name,
                f"{sizes[name]} bytes",
                f"{facts.capacity_bytes} bytes",
                f"The disk {name} of {owners[name]} on {node.name} has {facts.capacity_bytes} bytes"
                f" for the guest instead of {sizes[name]}.",
            )
    wanted = [(name, f"the disk of {owners[name]}") for name in sizes]
    settled = node.image_sha256s - set(where.unsettled.image_sha256s)
    wanted += [(name_image(sha256), "a template image") for sha256 in sorted(settled)]
    for it in here:
        if not any(name in present for name in seeds[it.instance_id]):
            wanted.append((seeds[it.instance_id][-1], f"the seed of {it.label}"))
    for name, what in wanted:
        if name not in present:
            yield Finding(
                FindingKind.FILE_MISSING,
                where.code,
                name,
                f"a file on {node.name}",
                "none",
                f"The pool of node {node.name} lacks {name}, {what}.",
            )


def _stray_file(where: ExpectedLocation, node: ExpectedNode, facts: VolumeFacts) -> Finding:
    reason = (
        "its name is none of ours"
        if facts.kind == "foreign"
        else f"no row explains this {facts.kind}"
    )
    return Finding(
        FindingKind.FILE_STRAY,
        where.code,
        facts.name,
        "no such file",
        f"{facts.kind}, {facts.allocation_bytes} bytes",
        f"The pool of node {node.name} has the file {facts.name} ({facts.allocation_bytes} bytes): {reason}.",
    )


def _is_unsettled(unsettled: Unsettled, facts: VolumeFacts) -> bool:
    return (
        facts.volume_id in unsettled.volume_ids
        or facts.sha256 in unsettled.image_sha256s
        or read_name(facts.name).instance_id in unsettled.instance_ids
    )


def compare_ports(where: ExpectedLocation, found: Sequence[PortFacts]) -> Iterator[Finding]:
    """Ports of the fabric against live cards: addresses and security as the rows say, never a port without security."""
    expected = {str(port.spec.port_id): port for port in where.ports}
    for facts in found:
        port = expected.pop(facts.name, None)
        if not any(facts.port_security):
            yield Finding(
                FindingKind.PORT_UNPROTECTED,
                where.code,
                facts.name,
                port.spec.security_line if port is not None else "no such port",
                "no port security",
                f"The port {facts.name} on {facts.switch} has no port security: whoever is behind it"
                " may use every address.",
            )
        if facts.port_id in where.unsettled.port_ids or (
            facts.instance_id in where.unsettled.instance_ids
        ):
            continue
        if port is None:
            yield Finding(
                FindingKind.PORT_STRAY,
                where.code,
                facts.name,
                "no such port",
                f"{facts.switch}: {_listed(facts.addresses)}",
                f"The fabric has the port {facts.name} on {facts.switch}, which no card explains.",
            )
        else:
            yield from _compare_port(where, port, facts)
    for name, port in expected.items():
        yield Finding(
            FindingKind.PORT_MISSING,
            where.code,
            name,
            f"{port.spec.switch}: {port.spec.address_line}",
            "none",
            f"The fabric lacks the port {name} of {port.owner}.",
        )


def _compare_port(
    where: ExpectedLocation, port: ExpectedPort, facts: PortFacts
) -> Iterator[Finding]:
    spec = port.spec
    pairs = [
        ("switch", spec.switch, facts.switch),
        ("instance", str(spec.instance_id), str(facts.instance_id)),
        ("addresses", spec.address_line, _listed(facts.addresses)),
        # A port without any security has its own finding.
        ("port security", spec.security_line, _listed(facts.port_security) or spec.security_line),
        ("membership", "a tenant's", "a tenant's" if facts.is_confined else "none"),
        (
            "firewall",
            str(spec.firewall_id or "none"),
            _listed(map(str, facts.firewall_ids)) or "none",
        ),
    ]
    if missing := set(port.dhcp_families) - set(facts.dhcp_families):
        wished_families, seen_families = (
            _families(port.dhcp_families),
            _families(facts.dhcp_families),
        )
        pairs.append(("DHCP families", wished_families, f"{seen_families} (no IPv{min(missing)})"))
    for what, wished, seen in pairs:
        if wished != seen:
            yield Finding(
                FindingKind.PORT_WRONG,
                where.code,
                facts.name,
                wished,
                seen,
                f"The port {facts.name} of {port.owner} has the {what} {seen} instead of {wished}.",
            )
    if port.chassis is not None and (not facts.is_up or facts.chassis != port.chassis):
        state = f"{'up' if facts.is_up else 'down'} on {facts.chassis or 'no chassis'}"
        yield Finding(
            FindingKind.PORT_UNBOUND,
            where.code,
            facts.name,
            f"up on {port.chassis}",
            state,
            f"The port {facts.name} of {port.owner} is {state}, not up on {port.chassis}.",
        )


def compare_names(
    where: ExpectedLocation, found: Mapping[RecordKey, tuple[str, ...]]
) -> Iterator[Finding]:
    """The nameserver's zones against the rows. A record that does not have our form is the operator's own."""
    unsettled = where.unsettled.addresses
    for key, expected in where.names.items():
        values = found.get(key, ())
        if values != (expected.value,) and expected.address not in unsettled:
            seen = _listed(values) or "none"
            yield Finding(
                FindingKind.NAME_WRONG,
                where.code,
                key.name,
                f"{key.kind} {expected.value}",
                seen,
                f"The nameserver has for {key.name} {key.kind}: {seen}, instead of {expected.value}.",
            )
    assert where.names_zone is not None
    open_keys = {default_name(address, where.names_zone) for address in unsettled}
    open_keys |= {address.reverse_pointer for address in unsettled}
    for key, values in sorted(found.items()):
        if key in where.names or key.name in open_keys:
            continue
        ours = values if key.kind is RecordKind.PTR else (key.name,)
        # In a range of prefixes every PTR record is an owner's, or nobody's.
        address = address_of_pointer(key.name) if key.kind is RecordKind.PTR else None
        is_in_range = any(address in network for network in where.prefix_ranges if address)
        if is_in_range or any(is_default_name(name, where.names_zone) for name in ours):
            yield Finding(
                FindingKind.NAME_STRAY,
                where.code,
                key.name,
                "no such record",
                f"{key.kind} {_listed(values)}",
                f"The nameserver has {key.name} {key.kind} {_listed(values)}, which no address explains.",
            )


def compare_firewalls(where: ExpectedLocation, found: Sequence[FirewallFacts]) -> Iterator[Finding]:
    """Firewalls of the fabric against those of instances: each does what its rules say, to its cards alone."""
    expected = {group_name(it.spec.firewall_id): it for it in where.firewalls}
    for facts in found:
        wished = expected.pop(facts.name, None)
        if facts.firewall_id in where.unsettled.firewall_ids:
            continue
        if wished is None:
            yield Finding(
                FindingKind.FIREWALL_STRAY,
                where.code,
                facts.name,
                "no such firewall",
                f"{len(facts.lines)} rows, {len(facts.port_ids)} ports",
                f"The fabric has the firewall {facts.name}, which no instance explains.",
            )
            continue
        lines, ports = set(firewall_lines(wished.spec)), wished.port_ids
        missing, foreign = sorted(lines - set(facts.lines)), sorted(set(facts.lines) - lines)
        if missing or foreign:
            yield _wrong_firewall(
                where,
                wished,
                "; ".join(missing) or "no more",
                "; ".join(foreign) or "less",
                "rules",
            )
        if strangers := set(facts.port_ids) - ports:
            yield _wrong_firewall(
                where, wished, _listed(map(str, ports)), _listed(map(str, strangers)), "ports"
            )
    for name, wished in expected.items():
        yield Finding(
            FindingKind.FIREWALL_MISSING,
            where.code,
            str(wished.spec.firewall_id),
            name,
            "none",
            f"The fabric lacks the firewall of {wished.owner}.",
        )


def _wrong_firewall(
    where: ExpectedLocation, wished: ExpectedFirewall, expected: str, found: str, what: str
) -> Finding:
    return Finding(
        FindingKind.FIREWALL_WRONG,
        where.code,
        str(wished.spec.firewall_id),
        expected,
        found,
        f"The firewall of {wished.owner} has other {what} in the fabric: it lacks {expected}, and has {found}."
        if what == "rules"
        else f"The firewall of {wished.owner} has the ports {found} of others in the fabric.",
    )


def _families(families: Iterable[int]) -> str:
    return _listed(f"IPv{family}" for family in families) or "none"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
