"""Private networks and their ports: what the fabric of a location should have of them, and putting it back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from uuid import UUID

import structlog
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from awan.engines.fabric import PrivateNetworkFacts
from awan.errors import EngineError, EngineRejected
from awan.events import record
from awan.firewall import Firewall
from awan.fleet.models import Node
from awan.instances.models import Instance, ObservedState
from awan.instances.recover import ACTOR
from awan.kit.database import transaction
from awan.networks.models import Address, Nic, NicRole, PrivateNetwork, PrivateNetworkState
from awan.networks.private_names import give_missing_service_ips
from awan.networks.private_networks import private_port_spec
from awan.networks.private_rules import private_switch
from awan.networks.private_workflows import mark_healed, push_network
from awan.reconcile.findings import Finding, FindingKind
from awan.reconcile.rules import ExpectedPort
from awan.resources import Resource, lock

UNSETTLED = (PrivateNetworkState.ERROR, PrivateNetworkState.DELETING)
log = structlog.get_logger(__name__)


def expected_private_ports(
    session: Session,
    location_id: int,
    settled: Mapping[UUID, Instance],
    nodes: Mapping[UUID, Node],
) -> list[ExpectedPort]:
    """The ports of the private cards of settled instances, with the firewalls that stand before them."""
    cards = session.scalars(
        select(Nic).where(Nic.location_id == location_id, Nic.deleted_at.is_(None))
    ).all()
    have_public = {nic.instance_id for nic in cards if nic.role == NicRole.PUBLIC}
    networks = {
        network.network_id: network
        for network in session.scalars(
            select(PrivateNetwork).where(PrivateNetwork.location_id == location_id)
        )
    }
    guarded = {
        row.instance_id: row.firewall_id
        for row in session.scalars(
            select(Firewall).where(
                Firewall.location_id == location_id,
                Firewall.apply_to_private,
                Firewall.deleted_at.is_(None),
            )
        )
    }
    ports = []
    for nic in cards:
        instance = settled.get(nic.instance_id)
        if instance is None or nic.network_id is None or nic.is_leaving:
            continue
        is_up = instance.observed_state == ObservedState.RUNNING
        node = nodes.get(instance.node_id) if instance.node_id is not None else None
        ports.append(
            ExpectedPort(
                spec=private_port_spec(
                    nic,
                    networks[nic.network_id],
                    hostname=instance.hostname,
                    operation_id=instance.create_operation_id,
                    firewall_id=guarded.get(nic.instance_id),
                    is_routed=nic.instance_id not in have_public,
                ),
                owner=f"instance {instance.hostname} ({instance.instance_id})",
                chassis=node.ovn_system_id if node is not None and is_up else None,
                dhcp_families=(4,),
            )
        )
    return ports


def expected_networks(
    session: Session, location_id: int, touched: Collection[UUID]
) -> tuple[dict[str, str | None], frozenset[str]]:
    """Switch -> public address of its gateway, of settled networks; and the switches of those that are not."""
    rows = session.execute(
        select(PrivateNetwork, Address.inet)
        .outerjoin(Address, Address.address_id == PrivateNetwork.gateway_address_id)
        .where(
            PrivateNetwork.location_id == location_id,
            or_(
                PrivateNetwork.deleted_at.is_(None),
                PrivateNetwork.resource_id.in_(list(touched)),
            ),
        )
    ).all()
    settled: dict[str, str | None] = {}
    unsettled = set()
    for network, inet in rows:
        switch = private_switch(network.resource_id)
        if network.resource_id in touched or network.state in UNSETTLED:
            unsettled.add(switch)
        else:
            settled[switch] = str(inet) if inet is not None else None
    return settled, frozenset(unsettled)


def compare_networks(
    code: str,
    expected: Mapping[str, str | None],
    unsettled: Collection[str],
    found: Sequence[PrivateNetworkFacts],
) -> Iterator[Finding]:
    """Private networks of the fabric against the rows: all that should be there with their gateways, and no others."""
    present = {facts.switch: facts for facts in found}
    for switch, public_ip in expected.items():
        facts = present.get(switch)
        if facts is None:
            yield Finding(
                FindingKind.NETWORK_MISSING,
                code,
                switch,
                "a private network",
                "none",
                f"The fabric lacks the private network {switch}.",
            )
        elif facts.public_ip != public_ip:
            wished, seen = public_ip or "none", facts.public_ip or "none"
            yield Finding(
                FindingKind.NETWORK_GATEWAY,
                code,
                switch,
                wished,
                seen,
                f"The private network {switch} has the gateway {seen} instead of {wished}.",
            )
        elif public_ip is not None and facts.active_chassis is None:
            yield Finding(
                FindingKind.NETWORK_GATEWAY,
                code,
                switch,
                "a node that carries the gateway",
                "none",
                f"No node carries the gateway {public_ip} of the private network {switch}.",
            )
    for switch in sorted(present.keys() - expected.keys() - set(unsettled)):
        yield Finding(
            FindingKind.NETWORK_STRAY,
            code,
            switch,
            "no such network",
            f"gateway {present[switch].public_ip or 'none'}",
            f"The fabric has the private network {switch}, which no row explains.",
        )


def put_back_private_networks(location_id: int) -> None:
    """All made networks of the location that nothing works on are as their rows say; what was left over is free.

    Gateways, and ways to resolvers, are put on the nodes that answer. Stops at the first call that the fabric does not
    answer.
    """
    give_missing_service_ips(location_id)
    with transaction() as session:
        ids = session.scalars(
            select(PrivateNetwork.resource_id)
            .join(Resource, Resource.resource_id == PrivateNetwork.resource_id)
            .where(
                PrivateNetwork.location_id == location_id,
                PrivateNetwork.deleted_at.is_(None),
                PrivateNetwork.made_at.is_not(None),
                PrivateNetwork.state != PrivateNetworkState.DELETING,
                Resource.active_operation_id.is_(None),
            )
            .order_by(PrivateNetwork.network_id)
        ).all()
    for resource_id in ids:
        try:
            has_changed = push_network(resource_id)
        except EngineRejected as err:
            log.warning("private network was refused", network=str(resource_id), error=str(err))
            continue
        except EngineError as err:
            log.warning(
                "private network was not looked at", network=str(resource_id), error=str(err)
            )
            return
        _note(resource_id, has_changed)


def _note(resource_id: UUID, has_changed: bool) -> None:
    with transaction() as session:
        resource = lock(session, resource_id)
        network = session.scalars(
            select(PrivateNetwork)
            .where(PrivateNetwork.resource_id == resource_id)
            .with_for_update()
        ).one()
        if resource is None or resource.active_operation_id is not None or resource.deleted_at:
            return
        is_healed = network.state == PrivateNetworkState.ERROR
        if is_healed:
            mark_healed(session, network)
        if has_changed or is_healed:
            log.warning("private network was put back", network=str(resource_id))
            record(
                session,
                kind="private_network.repaired",
                actor=ACTOR,
                account_id=network.account_id,
                resource_id=resource_id,
            )
