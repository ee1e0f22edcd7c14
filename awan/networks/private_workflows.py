"""Durable work on private networks.

private_network.create   network
private_network.gateway  gateway                 (an undo puts the one before back)
private_network.delete   gateway and network gone            (no undo: it only goes forward)

Each step pushes what the rows say now, and looks again afterwards: whoever pushes last has pushed the newest. So the
reconciler may push at any time as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.accounts import quotas
from awan.catalogue import engines
from awan.engines.fabric import (
    GatewaySpec,
    PrivateNetworkSpec,
    PublicNetworkSpec,
    ResolverSpec,
)
from awan.engines.fabric.private import choose_gateway_chassis
from awan.errors import EngineRejected, EngineUnavailable
from awan.fleet.models import Node, NodeHealth, NodeState
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.networks.models import Address, AddressState, Pool, PrivateNetwork, PrivateNetworkState
from awan.networks.pools import network_spec
from awan.networks.private_names import find_names, mark_names_stale
from awan.networks.private_rules import private_spec, private_switch
from awan.operations import Failure, Plan, Step, Target, register
from awan.resources import retire

PUSHES_MAX = 10
CARRIED_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Wish:
    """What the fabric of a location must have of a private network. Without `network`: nothing."""

    location_id: int
    switch: str
    network: PrivateNetworkSpec | None
    public: PublicNetworkSpec | None
    gateway: GatewaySpec | None
    resolver: ResolverSpec | None


def push_network(resource_id: UUID) -> bool:
    """Makes the fabric as the rows have the network; whether anything of it had to be changed.

    Raises: EngineUnavailable, also when the rows change all the time; EngineRejected when no node could carry the
    gateway.
    """
    has_changed = False
    for _ in range(PUSHES_MAX):
        with transaction() as session:
            wish = _read_wish(session, resource_id)
            fabric = engines(session, wish.location_id).fabric
        if wish.network is None:
            fabric.ensure_private_network_absent(wish.switch)
        else:
            has_changed |= fabric.ensure_private_network(wish.network)
            if wish.gateway is None or wish.public is None:
                has_changed |= fabric.ensure_gateway_absent(wish.switch)
            else:
                fabric.ensure_public_network(wish.public)
                has_changed |= fabric.ensure_gateway(wish.gateway)
            if wish.resolver is None:
                has_changed |= fabric.ensure_resolver_absent(wish.switch)
            else:
                has_changed |= fabric.ensure_resolver(wish.resolver)
        with transaction() as session:
            if _read_wish(session, resource_id) == wish:
                return has_changed
    raise EngineUnavailable("fabric", "push a private network", "its rows change all the time")


def find_private_spec(session: Session, network: PrivateNetwork) -> PrivateNetworkSpec:
    """The network as the fabric must have it; its nameservers are those of the location's oldest pool."""
    pool = session.scalars(
        select(Pool)
        .where(Pool.location_id == network.location_id, Pool.family == 4, Pool.is_enabled)
        .order_by(Pool.pool_id)
        .limit(1)
    ).first()
    servers = pool.dns_servers if pool is not None else ()
    four = tuple(server for server in servers if isinstance(server, IPv4Address))
    plan = find_names(session, network)
    names = plan.members if plan is not None else None
    return private_spec(network.resource_id, network.cidr, four, names)


def _read_wish(session: Session, resource_id: UUID) -> Wish:
    network = session.scalars(
        select(PrivateNetwork)
        .where(PrivateNetwork.resource_id == resource_id)
        .execution_options(populate_existing=True)
    ).one()
    switch, location_id = private_switch(resource_id), network.location_id
    is_wanted = network.made_at is not None or network.state == PrivateNetworkState.CREATING
    if not is_wanted or network.state in (
        PrivateNetworkState.DELETING,
        PrivateNetworkState.DELETED,
    ):
        return Wish(location_id, switch, None, None, None, None)
    spec = find_private_spec(session, network)
    resolver = _find_resolver(session, network)
    address_id = (
        network.next_gateway_address_id
        if network.is_changing_gateway
        else network.gateway_address_id
    )
    if address_id is None:
        return Wish(location_id, switch, spec, None, None, resolver)
    address = session.get_one(Address, address_id)
    pool = session.get_one(Pool, address.pool_id)
    assert isinstance(address.inet, IPv4Address)
    assert isinstance(pool.cidr, IPv4Network)
    assert isinstance(pool.gateway, IPv4Address)
    public = network_spec(session, address.pool_id)
    gateway = GatewaySpec(
        network=spec,
        public_switch=public.switch,
        public_ip=address.inet,
        public_cidr=pool.cidr,
        next_hop=pool.gateway,
        chassis=find_chassis(session, location_id, switch),
    )
    return Wish(location_id, switch, spec, public, gateway, resolver)


def _find_resolver(session: Session, network: PrivateNetwork) -> ResolverSpec | None:
    """The network's way to the resolver; None where it has no names, or no node yet that could carry it."""
    plan = find_names(session, network)
    if plan is None:
        return None
    switch = private_switch(network.resource_id)
    chassis = _find_chassis(session, network.location_id, switch)
    if not chassis:
        return None
    return ResolverSpec(
        switch=switch,
        cidr=network.cidr,
        inner=plan.members.router,
        outer=plan.outer,
        resolver=plan.members.resolver,
        services=plan.services,
        chassis=chassis,
    )


def find_chassis(session: Session, location_id: int, switch: str) -> tuple[str, ...]:
    """The nodes that may carry a gateway, or another router, of this name: those that answer, or all when none does.

    Raises: EngineRejected.
    """
    chosen = _find_chassis(session, location_id, switch)
    if not chosen:
        raise EngineRejected("fabric", "choose the gateway's nodes", "the location has none")
    return chosen


def _find_chassis(session: Session, location_id: int, switch: str) -> tuple[str, ...]:
    nodes = session.scalars(
        select(Node).where(
            Node.location_id == location_id,
            Node.state.in_([NodeState.ACTIVE, NodeState.CORDONED]),
            Node.ovn_system_id.is_not(None),
        )
    ).all()
    answering = [node for node in nodes if node.health == NodeHealth.REACHABLE]
    return choose_gateway_chassis(switch, [str(node.ovn_system_id) for node in answering or nodes])


# -- steps -----------------------------------------------------------------------------------------


def make_network(target: Target) -> None:
    """The network exists."""
    push_network(target.subject_id)


def undo_make_network(target: Target) -> None:
    """The network does not exist."""
    with transaction() as session:
        network = _find(session, target.subject_id)
        fabric = engines(session, network.location_id).fabric
    fabric.ensure_private_network_absent(private_switch(target.subject_id))


def make_gateway(target: Target) -> None:
    """The network has the gateway that it shall have, and a node carries it."""
    push_network(target.subject_id)
    with transaction() as session:
        wish = _read_wish(session, target.subject_id)
        fabric = engines(session, wish.location_id).fabric
    if wish.gateway is not None and not fabric.wait_gateway_carried(
        wish.switch, timeout_s=CARRIED_TIMEOUT_S
    ):
        raise EngineUnavailable("fabric", "wait_gateway_carried", "no node carries the gateway")


def undo_make_gateway(target: Target) -> None:
    """The network has the gateway it had before."""
    with transaction() as session:
        _find(session, target.subject_id, is_locked=True).is_changing_gateway = False
    push_network(target.subject_id)


def remove_network(target: Target) -> None:
    """The network is gone, with its gateway."""
    push_network(target.subject_id)


def put_right(target: Target) -> None:
    """Whatever a late step has done to the network, it is as the rows have it."""
    push_network(target.subject_id)


# -- ends ------------------------------------------------------------------------------------------


def mark_made(session: Session, target: Target) -> None:
    """The network can be used."""
    network = _find(session, target.subject_id, is_locked=True)
    network.state, network.made_at, network.status_reason = PrivateNetworkState.ACTIVE, now(), None


def mark_not_made(session: Session, target: Target, failure: Failure) -> None:
    """The network does not exist; its row stays, with the reason, until it is deleted."""
    network = _find(session, target.subject_id, is_locked=True)
    network.state, network.status_reason = PrivateNetworkState.ERROR, failure.message


def mark_gateway_set(session: Session, target: Target) -> None:
    """The gateway is the new one; the address of the one before is free."""
    network = _find(session, target.subject_id, is_locked=True)
    before, network.gateway_address_id = network.gateway_address_id, network.next_gateway_address_id
    network.next_gateway_address_id, network.is_changing_gateway = None, False
    network.state, network.status_reason = PrivateNetworkState.ACTIVE, None
    _free(session, before)


def mark_gateway_not_set(session: Session, target: Target, failure: Failure) -> None:
    """The gateway is the one before. What could not be undone keeps the new address from others, until it is."""
    network = _find(session, target.subject_id, is_locked=True)
    network.is_changing_gateway = False
    network.status_reason = failure.message
    if failure.left_over:
        network.state = PrivateNetworkState.ERROR
        return
    network.state = PrivateNetworkState.ACTIVE
    _free(session, network.next_gateway_address_id)
    network.next_gateway_address_id = None


def mark_healed(session: Session, network: PrivateNetwork) -> None:
    """The fabric has been found, or made, as the rows of the locked network say."""
    network.state, network.status_reason = PrivateNetworkState.ACTIVE, None
    _free(session, network.next_gateway_address_id)
    network.next_gateway_address_id = None


def mark_removed(session: Session, target: Target) -> None:
    """The network is gone: its place in the quota, the address of its gateway and its names are free."""
    network = _find(session, target.subject_id)
    # Locks are taken in the same order everywhere: quota, then address and network.
    if network.deleted_at is None:
        quotas.give_back(session, network.account_id, private_networks=1)
    network = _find(session, target.subject_id, is_locked=True)
    for address_id in (network.gateway_address_id, network.next_gateway_address_id):
        _free(session, address_id)
    network.gateway_address_id = network.next_gateway_address_id = None
    network.state, network.deleted_at = PrivateNetworkState.DELETED, now()
    network.service_ip = None
    mark_names_stale(session, [network.network_id])
    retire(session, network.resource_id)


def mark_not_removed(session: Session, target: Target, failure: Failure) -> None:
    """A deletion that could not be finished stays wanted; it can be asked for again."""
    network = _find(session, target.subject_id, is_locked=True)
    network.state, network.status_reason = PrivateNetworkState.DELETING, failure.message


def _find(session: Session, resource_id: UUID, *, is_locked: bool = False) -> PrivateNetwork:
    query = select(PrivateNetwork).where(PrivateNetwork.resource_id == resource_id)
    if is_locked:
        query = query.with_for_update()
    return session.scalars(query.execution_options(populate_existing=True)).one()


def _free(session: Session, address_id: UUID | None) -> None:
    if address_id is None:
        return
    address = session.get_one(Address, address_id, with_for_update=True)
    if address.state == AddressState.GATEWAY:
        address.state = AddressState.FREE


CREATE = register(
    Plan(
        workflow="private_network.create.v1",
        kind="private_network.create",
        steps=(Step("network", make_network, undo_make_network, percent=20),),
        succeed=mark_made,
        fail=mark_not_made,
        overtaken=put_right,
        deadline_s=300,
    )
)
SET_GATEWAY = register(
    Plan(
        workflow="private_network.gateway.v1",
        kind="private_network.gateway",
        steps=(Step("gateway", make_gateway, undo_make_gateway, percent=20),),
        succeed=mark_gateway_set,
        fail=mark_gateway_not_set,
        overtaken=put_right,
        deadline_s=300,
    )
)
DELETE = register(
    Plan(
        workflow="private_network.delete.v1",
        kind="private_network.delete",
        steps=(Step("network", remove_network, percent=20, timeout_s=300, cancellable=False),),
        succeed=mark_removed,
        fail=mark_not_removed,
        deadline_s=600,
    )
)
