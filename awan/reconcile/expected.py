"""What the engines of a location should have, read from the rows in one snapshot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from uuid import UUID

from sqlalchemy import func, or_, select, text
from sqlalchemy.orm import Session

from awan.catalogue.images import stored_contents
from awan.catalogue.models import ImageState, Location, TemplateImage
from awan.catalogue.service import all_zones, stored_path
from awan.console.models import Console, ConsoleState
from awan.console.workflows import CONNECT_TIMEOUT_S, PASSWORD_VALID_S
from awan.engines.fabric import PortSpec
from awan.engines.hypervisor import Power
from awan.engines.nameserver import RecordKey
from awan.firewall import Firewall, firewall_id_of
from awan.firewall.models import FirewallGroup
from awan.firewall.spec import read_specs
from awan.fleet.models import Node, NodeImage, NodeState
from awan.instances.first_boot import FIRST_BOOT
from awan.instances.models import DesiredState, Instance, ObservedState
from awan.instances.situation import SCRUBBED_GENERATION, SECRET_GENERATION
from awan.kit.ids import derived_id
from awan.networks.cards import routed_prefixes
from awan.networks.models import Address, Nic, Pool
from awan.networks.names import prefix_names, stale_addresses
from awan.networks.pools import network_spec
from awan.networks.private_names import stale_private_networks
from awan.networks.rules import ipv6_of, pointer_key, records_of, switch_name
from awan.reconcile.findings import Finding, FindingKind
from awan.reconcile.prefix_routers import expected_routes, prefix_ranges
from awan.reconcile.private_names import expected_private_names
from awan.reconcile.private_networks import expected_networks, expected_private_ports
from awan.reconcile.rules import (
    ExpectedFirewall,
    ExpectedInstance,
    ExpectedLocation,
    ExpectedName,
    ExpectedNode,
    ExpectedPort,
    ExpectedVolume,
    Unsettled,
)
from awan.resources import Resource, ResourceKind
from awan.volumes.models import Volume, VolumeState

POWERS = {
    ObservedState.RUNNING: Power.RUNNING,
    ObservedState.PAUSED: Power.PAUSED,
    ObservedState.STOPPED: Power.STOPPED,
}
# A lost node has nothing that should be there; it is looked at for what comes back with it.
SERVING = (NodeState.ACTIVE, NodeState.CORDONED, NodeState.LOST)

_WAITING = text(
    "SELECT workflow_uuid FROM dbos.workflow_status"
    " WHERE name = :name AND status IN ('ENQUEUED', 'PENDING', 'DELAYED')"
)
# Every change of a thing writes an event in its own transaction. What began or ended since the first look is told
# apart by transactions and not by clocks.
_TOUCHED = text(
    """
    SELECT resource_id FROM operation
    WHERE status IN ('queued', 'running') AND resource_id IS NOT NULL
    UNION
    SELECT resource_id FROM event
    WHERE xid >= pg_snapshot_xmin(CAST(:snapshot AS pg_snapshot))
        AND NOT pg_visible_in_snapshot(xid, CAST(:snapshot AS pg_snapshot))
        AND resource_id IS NOT NULL
    """
)


# Contents of images whose removal runs, or has ended since the first look.
_REMOVING = text(
    """
    SELECT sha256 FROM template_image JOIN operation ON operation_id = removal_operation_id
    WHERE sha256 IS NOT NULL AND (status IN ('queued', 'running') OR operation_id IN (
        SELECT operation_id FROM event
        WHERE xid >= pg_snapshot_xmin(CAST(:snapshot AS pg_snapshot))
            AND NOT pg_visible_in_snapshot(xid, CAST(:snapshot AS pg_snapshot))
            AND operation_id IS NOT NULL))
    """
)


@dataclass(frozen=True)
class FirstLook:
    """Taken before the engines are read: from here on, whatever changes is unsettled.

    `stored_contents`: the SHA-256 of each image file that the control plane keeps. `stale_names`: by location, the
    addresses whose names the nameserver is about to be told. `stale_networks`: the private networks, likewise.
    """

    snapshot: str
    waiting: frozenset[str]
    stored_contents: frozenset[str]
    stale_names: Mapping[int, set[IPv4Address | IPv6Address]]
    stale_networks: frozenset[UUID]


def look_first(session: Session) -> FirstLook:
    """The transactions, the waits for first boots and the image files as of now."""
    return FirstLook(
        snapshot=str(session.scalar(text("SELECT CAST(pg_current_snapshot() AS text)"))),
        waiting=_waiting(session),
        stored_contents=stored_contents(),
        stale_names=stale_addresses(session),
        stale_networks=frozenset(stale_private_networks(session)),
    )


def _waiting(session: Session) -> frozenset[str]:
    return frozenset(session.scalars(_WAITING, {"name": FIRST_BOOT}))


class Expectations:
    """Reads what should be, as the session's snapshot has it. What changed since `first` is unsettled."""

    def __init__(self, session: Session, first: FirstLook) -> None:
        self._session = session
        self._touched = frozenset(session.scalars(_TOUCHED, {"snapshot": first.snapshot}))
        self._removing = frozenset(session.scalars(_REMOVING, {"snapshot": first.snapshot}))
        self._stored = first.stored_contents
        self._stale_names = (first.stale_names, stale_addresses(session))
        self._stale_networks = first.stale_networks | stale_private_networks(session)
        self._waiting_now = _waiting(session)
        self._waited = first.waiting | self._waiting_now

    def of_location(self, location: Location) -> ExpectedLocation:
        """All that the engines of the location should have."""
        session = self._session
        nodes = {
            node.node_id: node
            for node in session.scalars(
                select(Node).where(
                    Node.location_id == location.location_id, Node.state.in_(SERVING)
                )
            )
        }
        rows = session.scalars(
            select(Instance).where(
                Instance.location_id == location.location_id,
                or_(Instance.holds_quota, Instance.instance_id.in_(self._touched)),
            )
        ).all()
        settled = {row.instance_id: row for row in rows if self._is_settled(row)}
        unsettled = [row for row in rows if row.instance_id not in settled]
        half_made = {row for row in settled.values() if row.observed_state not in POWERS}
        ports = [
            *self._ports(location.location_id, settled, nodes),
            *expected_private_ports(session, location.location_id, settled, nodes),
        ]
        networks, open_switches = expected_networks(session, location.location_id, self._touched)
        port_ids: dict[UUID, set[UUID]] = {}
        guarded: dict[UUID, set[UUID]] = {}
        for port in ports:
            port_ids.setdefault(port.spec.instance_id, set()).add(port.spec.port_id)
            if port.spec.firewall_id is not None:
                guarded.setdefault(port.spec.instance_id, set()).add(port.spec.port_id)
        volumes = self._volumes(location.location_id, settled)
        zones = all_zones(session).get(location.location_id)
        watched = self._watched_screens()
        groups = frozenset(
            session.scalars(
                select(FirewallGroup.group_id).where(
                    FirewallGroup.location_id == location.location_id,
                    FirewallGroup.deleted_at.is_(None),
                )
            )
        )
        return ExpectedLocation(
            code=location.code,
            nodes=self._nodes(nodes),
            instances=[
                ExpectedInstance(
                    instance_id=row.instance_id,
                    name=row.hostname,
                    node_id=row.node_id,
                    power=POWERS.get(ObservedState(row.observed_state)),
                    volumes=tuple(volumes.get(row.instance_id, ())),
                    port_ids=frozenset(port_ids.get(row.instance_id, ())),
                    seed_generations=self._seed_generations(row),
                    has_console=row.instance_id in watched,
                )
                for row in settled.values()
                if row.node_id in nodes
            ],
            ports=ports,
            names=self._names(location.location_id),
            names_zone=zones.forward if zones is not None else None,
            firewalls=self._firewalls(settled, guarded),
            group_ids=groups,
            networks=networks,
            private_names=expected_private_names(
                session, location.location_id, self._touched, self._stale_networks
            ),
            prefix_routes=expected_routes(session, location.location_id, self._touched),
            prefix_ranges=prefix_ranges(session, location.location_id),
            unsettled=replace(
                self._unsettled(location.location_id, unsettled, half_made),
                switches=open_switches,
                group_ids=self._touched,
            ),
        )

    def lost_first_boots(self) -> list[Finding]:
        """Instances whose guest nobody waits for: they would never become ready, and never be billed."""
        rows = self._session.execute(
            select(Instance, Location.code)
            .join(Location, Location.location_id == Instance.location_id)
            .where(
                Instance.holds_quota,
                Instance.ready_at.is_(None),
                Instance.desired_state != DesiredState.DELETED,
                Instance.observed_state.in_(list(POWERS)),
            )
        )
        return [
            Finding(
                FindingKind.INSTANCE_UNWATCHED,
                code,
                str(row.instance_id),
                "a workflow that waits for the guest",
                "none",
                f"Instance {row.hostname} ({row.instance_id}) is not ready, and no workflow waits for"
                " its guest: it would never be billed.",
            )
            for row, code in rows
            if _first_boot_id(row) not in self._waiting_now
        ]

    def stray_image_files(self) -> list[Finding]:
        """Image files of the control plane that no image explains. While one is being checked, none can be told."""
        rows = self._session.execute(select(TemplateImage.sha256, TemplateImage.state)).all()
        if any(row.state == ImageState.CHECKING for row in rows):
            return []
        known = {row.sha256 for row in rows if row.state != ImageState.REMOVED}
        return [
            Finding(
                FindingKind.IMAGE_STRAY,
                None,
                sha256,
                "no such file",
                stored_path(sha256).name,
                f"The control plane keeps the file {stored_path(sha256)}, which no image explains.",
            )
            for sha256 in sorted(self._stored - known - self._removing)
        ]

    def _watched_screens(self) -> set[UUID]:
        """Instances whose screen is, or was a moment ago, unlocked for somebody."""
        recently = func.now() - timedelta(seconds=CONNECT_TIMEOUT_S + PASSWORD_VALID_S)
        query = select(Console.instance_id).where(
            or_(Console.state != ConsoleState.CLOSED, Console.closed_at > recently)
        )
        return set(self._session.scalars(query))

    def _is_settled(self, row: Instance) -> bool:
        return (
            row.holds_quota
            and row.desired_state != DesiredState.DELETED
            and row.instance_id not in self._touched
        )

    def _seed_generations(self, row: Instance) -> tuple[int, ...]:
        """While the first boot is waited for, the seed may be replaced at any moment."""
        if _first_boot_id(row) in self._waited:
            return (SECRET_GENERATION, SCRUBBED_GENERATION)
        return (row.seed_generation,)

    def _nodes(self, nodes: Mapping[UUID, Node]) -> dict[UUID, ExpectedNode]:
        images: dict[UUID, set[str]] = {}
        for node_id, sha256 in self._session.execute(
            select(NodeImage.node_id, TemplateImage.sha256)
            .join(TemplateImage, TemplateImage.image_id == NodeImage.image_id)
            .where(NodeImage.node_id.in_(nodes), TemplateImage.sha256.is_not(None))
        ):
            images.setdefault(node_id, set()).add(str(sha256))
        return {
            node_id: ExpectedNode(node_id, node.name, frozenset(images.get(node_id, ())))
            for node_id, node in nodes.items()
        }

    def _volumes(
        self, location_id: int, settled: Mapping[UUID, Instance]
    ) -> dict[UUID, list[ExpectedVolume]]:
        found: dict[UUID, list[ExpectedVolume]] = {}
        for row in self._session.scalars(
            select(Volume).where(
                Volume.location_id == location_id, Volume.state != VolumeState.DELETED
            )
        ):
            owner = settled.get(row.instance_id) if row.instance_id is not None else None
            if owner is not None and row.node_id == owner.node_id:
                found.setdefault(owner.instance_id, []).append(
                    ExpectedVolume(row.volume_id, row.size_gib)
                )
        return found

    def _ports(
        self, location_id: int, settled: Mapping[UUID, Instance], nodes: Mapping[UUID, Node]
    ) -> list[ExpectedPort]:
        has_dhcpv6: dict[int, bool] = {}
        addresses: dict[UUID, dict[int, Address]] = {}
        cards: dict[UUID, Nic] = {}
        for nic, address in self._session.execute(
            select(Nic, Address)
            .join(Address, Address.nic_id == Nic.nic_id)
            .where(Nic.location_id == location_id, Nic.deleted_at.is_(None))
            .order_by(Address.allocated_at)
        ):
            cards[nic.nic_id] = nic
            # Of two addresses of a family, which is a finding of its own, the older one counts.
            addresses.setdefault(nic.nic_id, {}).setdefault(address.family, address)
        prefixes = routed_prefixes(self._session, list(settled))
        ports = []
        for nic_id, nic in cards.items():
            instance, four = settled.get(nic.instance_id), addresses[nic_id].get(4)
            if instance is None or four is None:
                continue
            six = addresses[nic_id].get(6)
            if four.pool_id not in has_dhcpv6:
                network = network_spec(self._session, four.pool_id)
                has_dhcpv6[four.pool_id] = network.ipv6_cidr is not None
            is_up = instance.observed_state in (ObservedState.RUNNING, ObservedState.PAUSED)
            node = nodes.get(instance.node_id) if instance.node_id is not None else None
            ports.append(
                ExpectedPort(
                    spec=PortSpec(
                        port_id=nic_id,
                        switch=switch_name(four.pool_id),
                        mac=nic.mac,
                        ipv4=four.inet if isinstance(four.inet, IPv4Address) else None,
                        ipv6=six.inet
                        if six is not None and isinstance(six.inet, IPv6Address)
                        else None,
                        ipv6_prefix=prefixes.get(
                            (instance.instance_id, six.inet if six is not None else None)
                        ),
                        hostname=instance.hostname,
                        instance_id=instance.instance_id,
                        account_id=nic.account_id,
                        operation_id=instance.create_operation_id,
                        firewall_id=firewall_id_of(instance.instance_id),
                    ),
                    owner=_owner(instance),
                    chassis=node.ovn_system_id if node is not None and is_up else None,
                    dhcp_families=(
                        (4, 6) if six is not None and has_dhcpv6[four.pool_id] else (4,)
                    ),
                )
            )
        return ports

    def _names(self, location_id: int) -> dict[RecordKey, ExpectedName]:
        """The records of every address of the location, in the zones that it has."""
        zones = all_zones(self._session).get(location_id)
        if zones is None:
            return {}
        rows = self._session.execute(
            select(Address.inet, Address.rdns).join(Pool).where(Pool.location_id == location_id)
        )
        wanted = {
            key: ExpectedName(value, row.inet)
            for row in rows
            for key, value in records_of(row.inet, zones.forward, row.rdns).items()
        }
        for address, name in prefix_names(self._session, location_id).items():
            wanted[pointer_key(address)] = ExpectedName(name, address)
        return {key: it for key, it in wanted.items() if zones.zone_of(key.name) is not None}

    def _unsettled_addresses(
        self, location_id: int, nic_ids: Iterable[UUID]
    ) -> set[IPv4Address | IPv6Address]:
        """Addresses that something is done to: their names are being pushed, they are changed, or their cards are."""
        session = self._session
        found: set[IPv4Address | IPv6Address] = set()
        for stale in self._stale_names:
            found |= stale.get(location_id, set())
        changed = select(Resource.name).where(
            Resource.kind == ResourceKind.PUBLIC_IP, Resource.resource_id.in_(self._touched)
        )
        found |= {ip_address(name) for name in session.scalars(changed)}
        prefixes = session.scalars(
            select(Pool.cidr).where(Pool.location_id == location_id, Pool.family == 6)
        ).all()
        cards = list(nic_ids)
        found |= {
            ipv6_of(cidr, nic_id)
            for cidr in prefixes
            for nic_id in cards
            if isinstance(cidr, IPv6Network)
        }
        return found

    def _firewalls(
        self, settled: Mapping[UUID, Instance], port_ids: Mapping[UUID, set[UUID]]
    ) -> list[ExpectedFirewall]:
        rows = self._session.scalars(
            select(Firewall).where(Firewall.instance_id.in_(settled), Firewall.deleted_at.is_(None))
        ).all()
        return [
            ExpectedFirewall(
                spec=spec,
                instance_id=row.instance_id,
                owner=_owner(settled[row.instance_id]),
                port_ids=frozenset(port_ids.get(row.instance_id, ())),
            )
            for row, spec in zip(rows, read_specs(self._session, rows), strict=True)
            # One that was never made whole may have none.
            if settled[row.instance_id].observed_state in POWERS
        ]

    def _unsettled(
        self, location_id: int, rows: list[Instance], half_made: Collection[Instance]
    ) -> Unsettled:
        """Whatever these instances have, had or are getting on the engines; of those half made, the firewall may be."""
        ids = {row.instance_id for row in rows}
        session = self._session
        port_ids = frozenset(session.scalars(select(Nic.nic_id).where(Nic.instance_id.in_(ids))))
        images = select(TemplateImage.sha256).where(
            TemplateImage.image_id.in_({row.image_id for row in rows}),
            TemplateImage.sha256.is_not(None),
        )
        return Unsettled(
            instance_ids=frozenset(ids),
            volume_ids=frozenset(
                session.scalars(select(Volume.volume_id).where(Volume.instance_id.in_(ids)))
            ),
            port_ids=port_ids,
            addresses=self._unsettled_addresses(location_id, port_ids),
            firewall_ids=frozenset(firewall_id_of(row.instance_id) for row in (*rows, *half_made)),
            image_sha256s=self._removing
            | frozenset(sha256 for sha256 in session.scalars(images) if sha256),
        )


def _owner(row: Instance) -> str:
    return f"instance {row.hostname} ({row.instance_id})"


def _first_boot_id(row: Instance) -> str:
    return str(derived_id(row.create_operation_id, "first_boot"))
