"""Verbs of the public network cards of instances, and the ports they have. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from uuid import UUID

from sqlalchemy import ARRAY, Uuid, and_, any_, bindparam, select
from sqlalchemy.orm import Session

from awan.accounts import quotas
from awan.engines.fabric import PortSpec, PublicNetworkSpec
from awan.errors import Invalid
from awan.kit.clock import now
from awan.kit.ids import derived_id, derived_mac
from awan.networks.addresses import (
    bill_address,
    lock_owned_address,
    refuse_if_address_busy,
    return_to_pool,
)
from awan.networks.models import Address, AddressState, Nic, NicRole, Pool, RoutedPrefix
from awan.networks.names import mark_stale
from awan.networks.pools import network_spec, pool_with_ipv6
from awan.networks.private_names import mark_names_stale
from awan.networks.rules import ipv6_of, switch_name

# Steps of instances ask these all the time; built once, because building them takes longer than sending them.
_NICS = (
    select(Nic)
    .where(
        Nic.instance_id == bindparam("instance"),
        Nic.deleted_at.is_(None),
        Nic.is_leaving.is_(False),
    )
    .order_by(Nic.role.desc(), Nic.created_at, Nic.nic_id)
)
_ADDRESSES = (
    select(Address, RoutedPrefix.cidr)
    .outerjoin(
        RoutedPrefix,
        and_(
            RoutedPrefix.instance_id == bindparam("instance"),
            RoutedPrefix.next_hop == Address.inet,
            RoutedPrefix.is_leaving.is_(False),
        ),
    )
    .where(Address.nic_id == bindparam("nic"))
)
_PUBLIC_ADDRESSES = (
    select(Nic.instance_id, Address)
    .join(Address, Address.nic_id == Nic.nic_id)
    .where(
        Nic.instance_id == any_(bindparam("instances", type_=ARRAY(Uuid))),
        Nic.deleted_at.is_(None),
    )
    .order_by(Nic.instance_id, Address.family, Address.inet)
)
_PREFIXES = select(RoutedPrefix.instance_id, RoutedPrefix.next_hop, RoutedPrefix.cidr).where(
    RoutedPrefix.instance_id.in_(bindparam("instances", expanding=True)),
    RoutedPrefix.is_leaving.is_(False),
)


def create_public_nic(
    session: Session, *, instance_id: UUID, account_id: UUID, location_id: int, operation_id: UUID
) -> Nic:
    """The public card of an instance that this operation creates; `give_first_addresses` is what makes it of use."""
    nic_id = public_nic_id(operation_id)
    nic = Nic(
        nic_id=nic_id,
        instance_id=instance_id,
        account_id=account_id,
        location_id=location_id,
        role=NicRole.PUBLIC,
        mac=derived_mac(nic_id),
        operation_id=operation_id,
    )
    session.add(nic)
    session.flush()
    return nic


def give_first_addresses(
    session: Session, nic: Nic, address: Address, *, is_new: bool = False
) -> list[Address]:
    """A new card has this address, and an IPv6 address where the location has a prefix for the network.

    Gives the addresses of the card, IPv4 first.
    `is_new`: the address was taken in this transaction, so it is locked and nobody else knows it.
    Raises: Invalid when the address is in use.
    """
    if not is_new:
        if not lock_owned_address(session, address) or address.state != AddressState.FREE:
            raise Invalid.field("public_network", "The selected public network is in use.")
        refuse_if_address_busy(session, address)
        # In its owner's hands now, whichever operation had once taken it.
        address.operation_id = None
    # What was changed of the address so far is written in the end, in one statement with what follows.
    with session.no_autoflush:
        _, six = pool_with_ipv6(session, address.pool_id)
        address.state = AddressState.ATTACHED
        address.nic_id = nic.nic_id
        ipv6 = _add_ipv6(session, nic, six)
    session.flush()
    return [address] if ipv6 is None else [address, ipv6]


def _add_ipv6(
    session: Session,
    nic: Nic,
    six: Pool | None,
    names: Mapping[IPv4Address | IPv6Address, str | None] | None = None,
) -> Address | None:
    """The card's IPv6 address, where the location has a pool of them on the network of the IPv4 pool; else None.

    `names`: those that its owner had given to the addresses it had.
    """
    if six is None:
        return None
    assert isinstance(six.cidr, IPv6Network)
    inet = ipv6_of(six.cidr, nic.nic_id)
    mark_stale(session, six.location_id, [inet])
    address = Address(
        address_id=derived_id(nic.nic_id, "ipv6"),
        pool_id=six.pool_id,
        family=6,
        inet=inet,
        state=AddressState.ATTACHED,
        account_id=nic.account_id,
        nic_id=nic.nic_id,
        operation_id=nic.operation_id,
        allocated_at=now(),
        rdns=(names or {}).get(inet),
    )
    session.add(address)
    return address


def public_nic_id(create_operation_id: UUID) -> UUID:
    """The one id that the public card of an instance has, whenever it has one: so its MAC and its IPv6 stay too.

    Derived from the operation that created the instance. A guest knows the card again when it comes back.
    """
    return derived_id(create_operation_id, "nic:public")


def public_port_spec(
    session: Session,
    address: Address,
    *,
    instance_id: UUID,
    hostname: str,
    operation_id: UUID,
    firewall_id: UUID,
) -> tuple[PublicNetworkSpec, PortSpec]:
    """The port that the instance's public card has with this address, whether or not it has it now.

    `operation_id`: the one that created the instance.
    """
    assert address.account_id is not None
    assert isinstance(address.inet, IPv4Address)
    nic_id = public_nic_id(operation_id)
    network = network_spec(session, address.pool_id)
    six = ipv6_of(network.ipv6_cidr, nic_id) if network.ipv6_cidr is not None else None
    return network, PortSpec(
        port_id=nic_id,
        switch=network.switch,
        mac=derived_mac(nic_id),
        ipv4=address.inet,
        ipv6=six,
        ipv6_prefix=routed_prefixes(session, [instance_id]).get((instance_id, six)),
        hostname=hostname,
        instance_id=instance_id,
        account_id=address.account_id,
        operation_id=operation_id,
        firewall_id=firewall_id,
    )


def give_public_address(
    session: Session,
    *,
    instance_id: UUID,
    address: Address | None,
    create_operation_id: UUID,
    operation_id: UUID,
    actor: str,
) -> None:
    """The instance has this public address from now on, or none. One that it had is free, and billed like any other.

    The caller has locked the instance and both addresses. Its card is made, kept, or ended, with its IPv6 address.
    """
    nic_id = public_nic_id(create_operation_id)
    nic = session.get(Nic, nic_id)
    names: dict[IPv4Address | IPv6Address, str | None] = {}
    for old in session.scalars(
        select(Address).where(Address.nic_id == nic_id).with_for_update()
    ).all():
        if old.family == 6:
            names[old.inet] = old.rdns
            mark_stale(session, session.get_one(Pool, old.pool_id).location_id, [old.inet])
            session.delete(old)
        elif address is None or old.address_id != address.address_id:
            old.state, old.nic_id, old.operation_id = AddressState.FREE, None, None
            bill_address(session, old, actor=actor, operation_id=operation_id)
    session.flush()
    if address is None:
        if nic is not None:
            nic.deleted_at = now()
        session.flush()
        return
    assert address.account_id is not None
    pool, six = pool_with_ipv6(session, address.pool_id)
    if nic is None:
        nic = Nic(
            nic_id=nic_id,
            instance_id=instance_id,
            account_id=address.account_id,
            location_id=pool.location_id,
            role=NicRole.PUBLIC,
            mac=derived_mac(nic_id),
            operation_id=create_operation_id,
        )
        session.add(nic)
    nic.deleted_at = None
    session.flush()
    address.state, address.nic_id = AddressState.ATTACHED, nic_id
    bill_address(session, address, actor=actor, operation_id=operation_id)
    _add_ipv6(session, nic, six, names)
    session.flush()


def release_nics(
    session: Session,
    instance_id: UUID,
    *,
    release_ips: bool,
    made_by: UUID | None,
    actor: str,
    operation_id: UUID,
) -> None:
    """Ends the cards of an instance. Its IPv4 addresses stay the owner's unless they go too.

    The caller has locked the account's quota. An address goes when `release_ips`, or when the operation `made_by`
    allocated it (a creation that failed).
    """
    left: set[int] = set()
    for nic in session.scalars(
        select(Nic).where(Nic.instance_id == instance_id, Nic.deleted_at.is_(None))
    ):
        addresses = session.scalars(
            select(Address).where(Address.nic_id == nic.nic_id).with_for_update()
        ).all()
        for address in addresses:
            if address.family == 6:
                mark_stale(session, nic.location_id, [address.inet])
                session.delete(address)
                continue
            address.state, address.nic_id = AddressState.FREE, None
            if release_ips or (made_by is not None and address.operation_id == made_by):
                quotas.give_back(session, nic.account_id, public_ips=1)
                return_to_pool(session, address, actor=actor, operation_id=operation_id)
            else:
                address.operation_id = None
                bill_address(session, address, actor=actor, operation_id=operation_id)
        nic.deleted_at = now()
        if nic.network_id is not None:
            left.add(nic.network_id)
    mark_names_stale(session, left)
    session.flush()


def nics_of(session: Session, instance_id: UUID) -> Sequence[Nic]:
    """The cards of an instance that it shall have, the public one first, then in the order in which they came."""
    return session.scalars(_NICS, {"instance": instance_id}).all()


def public_port_specs(
    session: Session,
    nics: Sequence[Nic],
    *,
    hostname: str,
    operation_id: UUID,
    firewall_id: UUID,
) -> list[tuple[PublicNetworkSpec, PortSpec]]:
    """The ports that the fabric must have for the public ones of an instance's cards, each with its network."""
    specs = []
    for nic in nics:
        if nic.role != NicRole.PUBLIC:
            continue
        found = session.execute(_ADDRESSES, {"nic": nic.nic_id, "instance": nic.instance_id})
        rows = {row[0].family: row for row in found}
        four, (six, prefix) = rows[4][0], rows.get(6, (None, None))
        specs.append(
            (
                network_spec(session, four.pool_id),
                PortSpec(
                    port_id=nic.nic_id,
                    switch=switch_name(four.pool_id),
                    mac=nic.mac,
                    ipv4=four.inet if isinstance(four.inet, IPv4Address) else None,
                    ipv6=six.inet
                    if six is not None and isinstance(six.inet, IPv6Address)
                    else None,
                    ipv6_prefix=prefix,
                    hostname=hostname,
                    instance_id=nic.instance_id,
                    account_id=nic.account_id,
                    operation_id=operation_id,
                    firewall_id=firewall_id,
                ),
            )
        )
    return specs


def routed_prefixes(
    session: Session, instance_ids: Collection[UUID]
) -> dict[tuple[UUID, IPv4Address | IPv6Address | None], IPv6Network]:
    """The prefix that a port may use, by instance and by the IPv6 address of the port, to which it is routed."""
    rows = session.execute(_PREFIXES, {"instances": instance_ids})
    return {
        (row.instance_id, row.next_hop): row.cidr for row in rows if row.instance_id is not None
    }


def public_addresses(session: Session, instance_ids: Sequence[UUID]) -> dict[UUID, list[Address]]:
    """Instance id -> its addresses, IPv4 first, in one query; in none when no instance is given."""
    if not instance_ids:
        return {}
    rows = session.execute(_PUBLIC_ADDRESSES, {"instances": list(instance_ids)})
    found: dict[UUID, list[Address]] = {}
    for instance_id, address in rows:
        found.setdefault(instance_id, []).append(address)
    return found
