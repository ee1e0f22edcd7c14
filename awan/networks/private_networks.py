"""Verbs of private networks and of the cards in them. The caller holds the transaction.

A network's row is locked last of all, as an address is: who attaches a card, and who deletes the network or changes
its gateway, wait for each other there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from uuid import UUID

from sqlalchemy import func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from awan.accounts import Caller, quotas
from awan.catalogue.models import Location
from awan.catalogue.service import check_location
from awan.engines.fabric import PortSpec, PrivateNetworkSpec
from awan.errors import Conflict, Invalid, NoCapacity, NotFound, QuotaExceeded
from awan.events import record
from awan.kit.ids import derived_id, derived_mac, new_id
from awan.networks.addresses import find_owned_address, lock_owned_address, refuse_if_address_busy
from awan.networks.models import (
    Address,
    AddressState,
    Nic,
    NicRole,
    Pool,
    PrivateNetwork,
    PrivateNetworkState,
)
from awan.networks.private_names import find_domains, give_service_ip, mark_names_stale
from awan.networks.private_rules import (
    check_address,
    choose_address,
    choose_prefix,
    parse_private_prefix,
    private_switch,
)
from awan.networks.private_workflows import CREATE, DELETE, SET_GATEWAY, find_private_spec
from awan.operations import Operation, begin
from awan.resources import Resource, ResourceKind, create, get_owned, lock_owned

CARDS_MAX = 8
"""Private networks of one instance."""
INVALID = "The selected vswitch is invalid."
NOT_USABLE = {
    PrivateNetworkState.CREATING: "The vswitch is still being created. Please try again in a moment.",
    PrivateNetworkState.UPDATING: "The vswitch is being changed. Please try again in a moment.",
    PrivateNetworkState.DELETING: "The vswitch is being deleted.",
    PrivateNetworkState.ERROR: "The vswitch has an error, which its status_reason tells.",
}
"""Why an own network that was named cannot be used now; for a field, where a foreign one is `INVALID`."""
NOT_ACTIVE = "The private network is not active: it is {state}."
RETRY_AFTER_S = 5


@dataclass(frozen=True)
class PrivateNetworkView:
    """A network with the rows that its answer needs."""

    network: PrivateNetwork
    resource: Resource
    location: Location
    gateway: Address | None
    instances_count: int
    domain: str | None


@dataclass(frozen=True)
class Member:
    """A card in a private network, and whose it is."""

    nic: Nic
    network: PrivateNetwork
    network_name: str
    hostname: str


def create_private_network(
    session: Session, caller: Caller, *, location_id: int, name: str, cidr: str | None
) -> tuple[UUID, Operation]:
    """Begins to make a network; its prefix is the system's choice unless given, and overlaps none of the account's.

    Raises: Invalid (location, name, cidr), QuotaExceeded, NoCapacity.
    """
    location = check_location(session, location_id)
    wanted = _parse_prefix(cidr) if cidr is not None else None
    assert caller.account_id is not None
    # Its lock makes networks of one account wait for each other: two at once do not get one prefix.
    quotas.take(session, caller.account_id, private_networks=1)
    taken = session.scalars(
        select(PrivateNetwork.cidr).where(
            PrivateNetwork.account_id == caller.account_id, PrivateNetwork.deleted_at.is_(None)
        )
    ).all()
    prefix = wanted or choose_prefix(taken)
    if prefix is None:
        raise NoCapacity("The account has no private prefix left; choose one.")
    if wanted is not None and any(wanted.overlaps(other) for other in taken):
        raise Invalid.field("cidr", "The prefix overlaps another private network of the account.")
    resource_id, operation_id = new_id(), new_id()
    resource = create(
        session,
        kind=ResourceKind.PRIVATE_NETWORK,
        resource_id=resource_id,
        account_id=caller.account_id,
        name=name,
        location_id=location.location_id,
        operation_id=operation_id,
    )
    session.flush()
    network = PrivateNetwork(
        resource_id=resource_id,
        account_id=caller.account_id,
        location_id=location.location_id,
        cidr=prefix,
        state=PrivateNetworkState.CREATING,
    )
    session.add(network)
    session.flush()
    give_service_ip(session, network)
    operation = begin(
        session,
        caller=caller,
        plan=CREATE,
        resource=resource,
        resource_kind=ResourceKind.PRIVATE_NETWORK,
        subject_id=resource_id,
        operation_id=operation_id,
    )
    _record(session, caller, resource, CREATE.kind, operation, {"cidr": str(prefix)})
    return resource_id, operation


def _parse_prefix(cidr: str) -> IPv4Network:
    try:
        return parse_private_prefix(cidr)
    except ValueError as err:
        raise Invalid.field("cidr", str(err)) from err


def _record(
    session: Session,
    caller: Caller,
    resource: Resource,
    kind: str,
    operation: Operation | None,
    data: Mapping[str, object] | None = None,
) -> None:
    record(
        session,
        kind=kind,
        actor=caller.actor,
        account_id=resource.account_id,
        resource_id=resource.resource_id,
        operation_id=operation.operation_id if operation is not None else None,
        data=dict(data) if data is not None else None,
    )


def lock_network(
    session: Session, caller: Caller, resource_id: UUID
) -> tuple[Resource, PrivateNetwork]:
    """A network with its ownership row, both locked. Raises: NotFound."""
    resource = lock_owned(session, caller, ResourceKind.PRIVATE_NETWORK, resource_id)
    return resource, _lock_row(session, PrivateNetwork.resource_id == resource_id)


def _lock_row(session: Session, condition: object) -> PrivateNetwork:
    query = select(PrivateNetwork).where(condition).with_for_update()  # type: ignore[arg-type]
    return session.scalars(query.execution_options(populate_existing=True)).one()


def rename_private_network(session: Session, caller: Caller, resource_id: UUID, name: str) -> None:
    """Raises: NotFound, Invalid when another network of the location has the name."""
    resource, _ = lock_network(session, caller, resource_id)
    if resource.name == name:
        return
    before, resource.name = resource.name, name
    try:
        session.flush()
    except IntegrityError as err:
        raise Invalid.field("name", "The name has already been taken.") from err
    _record(
        session, caller, resource, "private_network.renamed", None, {"from": before, "to": name}
    )


def delete_private_network(session: Session, caller: Caller, resource_id: UUID) -> Operation:
    """Ends a network without members; the address of its gateway stays the account's.

    Raises: NotFound, Conflict (busy, or it has members).
    """
    resource, network = lock_network(session, caller, resource_id)
    if members := count_members(session, network.network_id):
        raise Conflict(f"The private network has {members} instances; detach them first.")
    operation = begin(
        session,
        caller=caller,
        plan=DELETE,
        resource=resource,
        resource_kind=ResourceKind.PRIVATE_NETWORK,
        subject_id=resource_id,
    )
    network.state = PrivateNetworkState.DELETING
    network.is_changing_gateway = False
    _record(session, caller, resource, DELETE.kind, operation)
    return operation


def set_gateway(
    session: Session, caller: Caller, resource_id: UUID, address_id: UUID | None
) -> Operation:
    """Gives the network a gateway with this free public address, or none.

    Raises: NotFound, Invalid (address), Conflict (busy, not active, address in use, nothing to change).
    """
    resource = lock_owned(session, caller, ResourceKind.PRIVATE_NETWORK, resource_id)
    address = _find_gateway(session, resource, address_id)
    network = _lock_row(session, PrivateNetwork.resource_id == resource_id)
    if network.state not in (PrivateNetworkState.ACTIVE, PrivateNetworkState.UPDATING):
        raise Conflict(NOT_ACTIVE.format(state=network.state), retry_after_s=RETRY_AFTER_S)
    operation = begin(
        session,
        caller=caller,
        plan=SET_GATEWAY,
        resource=resource,
        resource_kind=ResourceKind.PRIVATE_NETWORK,
        subject_id=resource_id,
    )
    if address is None and network.gateway_address_id is None:
        raise Conflict("The private network has no gateway.")
    if address is not None:
        if not lock_owned_address(session, address) or address.state != AddressState.FREE:
            raise Conflict("The public network is in use.")
        refuse_if_address_busy(session, address)
        address.state, address.operation_id = AddressState.GATEWAY, None
    network.next_gateway_address_id = address.address_id if address is not None else None
    network.is_changing_gateway = True
    network.state = PrivateNetworkState.UPDATING
    shown = {"public_gateway": str(address.inet) if address is not None else None}
    _record(session, caller, resource, SET_GATEWAY.kind, operation, shown)
    return operation


def _find_gateway(session: Session, resource: Resource, address_id: UUID | None) -> Address | None:
    if address_id is None:
        return None
    address = find_owned_address(
        session, resource.account_id, address_id, location_id=resource.location_id
    )
    if address is None:
        raise Invalid.field("public_gateway", "The selected public_gateway is invalid.")
    return address


# -- looking ---------------------------------------------------------------------------------------


def list_private_networks(
    session: Session, account_id: UUID | None, *, resource_id: UUID | None = None
) -> list[PrivateNetworkView]:
    """The account's networks, oldest first."""
    query = (
        select(PrivateNetwork, Resource, Location, Address)
        .join(Resource, Resource.resource_id == PrivateNetwork.resource_id)
        .join(Location, Location.location_id == PrivateNetwork.location_id)
        .outerjoin(Address, Address.address_id == PrivateNetwork.gateway_address_id)
        .order_by(PrivateNetwork.network_id)
    )
    if resource_id is not None:
        query = query.where(PrivateNetwork.resource_id == resource_id)
    else:
        query = query.where(
            PrivateNetwork.account_id == account_id, PrivateNetwork.deleted_at.is_(None)
        )
    counts = _counts(session)
    rows = session.execute(query.execution_options(populate_existing=True)).all()
    domains = find_domains(session, [row.PrivateNetwork for row in rows])
    return [
        PrivateNetworkView(
            network,
            resource,
            location,
            gateway,
            counts.get(network.network_id, 0),
            domains.get(network.resource_id),
        )
        for network, resource, location, gateway in rows
    ]


def _counts(session: Session) -> dict[int, int]:
    rows = session.execute(
        select(Nic.network_id, func.count())
        .where(Nic.network_id.is_not(None), Nic.deleted_at.is_(None))
        .group_by(Nic.network_id)
    )
    return {network_id: number for network_id, number in rows if network_id is not None}


def get_private_network(session: Session, resource_id: UUID) -> PrivateNetworkView:
    """A network that the caller was given before, also when it is deleted since."""
    return list_private_networks(session, None, resource_id=resource_id)[0]


def resolve(session: Session, caller: Caller, reference: str) -> UUID:
    """The uuid of the caller's network that is named by uuid or by number. Raises: NotFound."""
    resource_id = _resource_id(session, reference)
    if resource_id is None:
        raise NotFound("Private network not found.")
    return get_owned(session, caller, ResourceKind.PRIVATE_NETWORK, resource_id).resource_id


def _resource_id(session: Session, reference: str) -> UUID | None:
    if reference.isascii() and reference.isdecimal():
        if len(reference) > 9:
            return None
        return session.scalar(
            select(PrivateNetwork.resource_id).where(PrivateNetwork.network_id == int(reference))
        )
    try:
        return UUID(reference)
    except ValueError:
        return None


def find_network(
    session: Session, account_id: UUID, reference: str, *, location_id: int
) -> PrivateNetwork | None:
    """The account's live network of the location, by uuid or number; None for what the account does not have there."""
    resource_id = _resource_id(session, reference)
    if resource_id is None:
        return None
    return session.scalars(
        select(PrivateNetwork).where(
            PrivateNetwork.resource_id == resource_id,
            PrivateNetwork.account_id == account_id,
            PrivateNetwork.location_id == location_id,
            PrivateNetwork.deleted_at.is_(None),
        )
    ).first()


def active_networks(
    session: Session, account_id: UUID, location_id: int
) -> list[PrivateNetworkView]:
    """The account's networks of a location that instances can be attached to. Raises: Invalid (location)."""
    check_location(session, location_id)
    return [
        view
        for view in list_private_networks(session, account_id)
        if view.location.location_id == location_id
        and view.network.state == PrivateNetworkState.ACTIVE
    ]


def count_members(session: Session, network_id: int) -> int:
    """How many cards are in a network."""
    return (
        session.scalar(
            select(func.count()).where(Nic.network_id == network_id, Nic.deleted_at.is_(None))
        )
        or 0
    )


def members_of(
    session: Session,
    *,
    network_id: int | None = None,
    instance_ids: Sequence[UUID] | None = None,
) -> list[Member]:
    """The cards in a network by address, or those of instances in the order in which they came."""
    vswitch = aliased(Resource)
    query = (
        select(Nic, PrivateNetwork, vswitch.name, Resource.name)
        .join(PrivateNetwork, PrivateNetwork.network_id == Nic.network_id)
        .join(vswitch, vswitch.resource_id == PrivateNetwork.resource_id)
        .join(Resource, Resource.resource_id == Nic.instance_id)
        .where(Nic.deleted_at.is_(None))
    )
    if network_id is not None:
        query = query.where(Nic.network_id == network_id).order_by(Nic.private_ip)
    if instance_ids is not None:
        query = query.where(Nic.instance_id.in_(instance_ids))
        query = query.order_by(Nic.created_at, Nic.network_id)
    return [Member(*row) for row in session.execute(query)]


def gateway_candidates(
    session: Session, account_id: UUID, location_id: int, network: PrivateNetwork
) -> list[tuple[Address, bool]]:
    """The account's addresses that may be the network's gateway, each with whether it is."""
    rows = session.scalars(
        select(Address)
        .join(Pool)
        .where(
            Address.account_id == account_id,
            Address.family == 4,
            Pool.location_id == location_id,
            or_(
                Address.state == AddressState.FREE,
                Address.address_id == network.gateway_address_id,
            ),
        )
        .order_by(Address.inet)
    )
    return [(row, row.address_id == network.gateway_address_id) for row in rows]


# -- cards -----------------------------------------------------------------------------------------


def create_private_nic(
    session: Session,
    *,
    instance_id: UUID,
    network: PrivateNetwork,
    operation_id: UUID,
    private_ip: IPv4Address | None = None,
) -> Nic:
    """A card in the network, with this address or with its lowest free one.

    Raises: Invalid (private_ip), Conflict (network not active, instance in it already), QuotaExceeded, NoCapacity.
    """
    network = _lock_row(session, PrivateNetwork.network_id == network.network_id)
    if network.state != PrivateNetworkState.ACTIVE:
        raise Conflict(NOT_ACTIVE.format(state=network.state), retry_after_s=RETRY_AFTER_S)
    cards = session.execute(
        select(Nic.network_id).where(
            Nic.instance_id == instance_id,
            Nic.network_id.is_not(None),
            Nic.deleted_at.is_(None),
        )
    ).scalars()
    known = list(cards)
    if network.network_id in known:
        raise Conflict("The instance is attached to this private network already.")
    if len(known) >= CARDS_MAX:
        raise QuotaExceeded(f"An instance is in at most {CARDS_MAX} private networks.")
    address = _choose_address(session, network, private_ip)
    nic_id = derived_id(operation_id, f"nic:private:{network.network_id}")
    nic = Nic(
        nic_id=nic_id,
        instance_id=instance_id,
        account_id=network.account_id,
        location_id=network.location_id,
        role=NicRole.PRIVATE,
        mac=derived_mac(nic_id),
        network_id=network.network_id,
        private_ip=address,
        operation_id=operation_id,
    )
    session.add(nic)
    session.flush()
    mark_names_stale(session, [network.network_id])
    return nic


def _choose_address(
    session: Session, network: PrivateNetwork, wanted: IPv4Address | None
) -> IPv4Address:
    taken = session.scalars(
        select(Nic.private_ip).where(Nic.network_id == network.network_id, Nic.deleted_at.is_(None))
    ).all()
    used = [address for address in taken if address is not None]
    if wanted is not None:
        if problem := check_address(network.cidr, used, wanted):
            raise Invalid.field("private_ip", problem)
        return wanted
    address = choose_address(network.cidr, used)
    if address is None:
        raise NoCapacity("The private network has no free address.")
    return address


def private_port_spec(
    nic: Nic,
    network: PrivateNetwork,
    *,
    hostname: str,
    operation_id: UUID,
    firewall_id: UUID | None,
    is_routed: bool,
) -> PortSpec:
    """The port of a private card. `is_routed`: its guest has no public address, so the gateway is its way out."""
    return PortSpec(
        port_id=nic.nic_id,
        switch=private_switch(network.resource_id),
        mac=nic.mac,
        ipv4=nic.private_ip,
        ipv6=None,
        hostname=hostname,
        instance_id=nic.instance_id,
        account_id=nic.account_id,
        operation_id=operation_id,
        is_routed=is_routed,
        firewall_id=firewall_id,
        is_private=True,
    )


def private_port_specs(
    session: Session, nics: Sequence[Nic], *, hostname: str, operation_id: UUID, firewall_id: UUID
) -> list[tuple[PrivateNetworkSpec, PortSpec]]:
    """The ports of an instance's private cards; `nics` are all its cards."""
    is_routed = all(nic.role != NicRole.PUBLIC for nic in nics)
    specs = []
    for nic in nics:
        if nic.role == NicRole.PRIVATE:
            network = session.get_one(PrivateNetwork, nic.network_id)
            port = private_port_spec(
                nic,
                network,
                hostname=hostname,
                operation_id=operation_id,
                firewall_id=firewall_id,
                is_routed=is_routed,
            )
            specs.append((find_private_spec(session, network), port))
    return specs
