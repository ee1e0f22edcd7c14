"""Names that owners give to IPv6 addresses: the instance's own, and any of the prefix that is routed to it.

They are rows that are pushed like all names: see `names`. The caller holds the transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.catalogue.service import all_zones
from awan.errors import Conflict, Invalid, QuotaExceeded
from awan.events import record
from awan.kit.inet import parse_ipv6
from awan.networks.models import Address, Nic, PrefixName, RoutedPrefix
from awan.networks.names import NO_NAMES, Wish, mark_stale, name_of, parse_given
from awan.networks.prefix_rules import NAMES_MAX
from awan.networks.prefixes import find_prefix
from awan.networks.rules import default_name, pointer_key
from awan.resources import Resource, ResourceKind, get_owned, lock_owned

NOT_ITS_OWN = "The ip_address must be the instance's own IPv6 address, or one of the prefix that is routed to it."


@dataclass(frozen=True)
class NamedAddress:
    """An IPv6 address of an instance and the name that a reverse lookup gives; None: none."""

    address: IPv6Address
    name: str | None


@dataclass(frozen=True)
class _Holder:
    """Whose the address is: the row of the instance's own, or its prefix."""

    location_id: int
    address: IPv6Address
    own: Address | None
    prefix: RoutedPrefix | None


def check_ipv6_wish(
    session: Session, caller: Caller, instance_id: UUID, ip_address: str, rdns: str | None
) -> Wish | None:
    """The name that the address is to get; None: the default one, or none at all, which nobody need confirm.

    Raises: NotFound, Invalid, Conflict where there is no nameserver for the address.
    """
    get_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    holder = _find_holder(session, instance_id, ip_address)
    name = _wanted(session, holder, rdns)
    return None if name is None else Wish(name, holder.address, is_own=False)


def set_ipv6_name(
    session: Session, caller: Caller, instance_id: UUID, ip_address: str, rdns: str | None
) -> str | None:
    """Gives the address a name that was confirmed, or takes it back; the name that it has then.

    Raises: as `check_ipv6_wish`; QuotaExceeded for too many names of one prefix.
    """
    resource = lock_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    holder = _find_holder(session, instance_id, ip_address, locked=True)
    name = _wanted(session, holder, rdns)
    if holder.own is not None:
        holder.own.rdns = name
    else:
        assert holder.prefix is not None
        _set_prefix_name(session, holder.prefix, holder.address, name)
    session.flush()
    mark_stale(session, holder.location_id, [holder.address])
    record(
        session,
        kind="instance.ipv6_name_changed",
        actor=caller.actor,
        account_id=resource.account_id,
        resource_id=instance_id,
        data={"ip_address": str(holder.address), "rdns": name},
    )
    return shown_ipv6_name(session, instance_id, ip_address)


def _set_prefix_name(
    session: Session, prefix: RoutedPrefix, address: IPv6Address, name: str | None
) -> None:
    row = session.get(PrefixName, address)
    if name is None:
        if row is not None:
            session.delete(row)
    elif row is not None:
        row.rdns = name
    else:
        count = session.scalar(select(func.count()).where(PrefixName.prefix_id == prefix.prefix_id))
        if (count or 0) >= NAMES_MAX:
            raise QuotaExceeded(f"A prefix has at most {NAMES_MAX} names.")
        session.add(PrefixName(inet=address, prefix_id=prefix.prefix_id, rdns=name))


def shown_ipv6_name(session: Session, instance_id: UUID, ip_address: str) -> str | None:
    """The name of an address of the instance; None where it has none, or is not the instance's any more."""
    try:
        holder = _find_holder(session, instance_id, ip_address)
    except Invalid:
        return None
    if holder.own is not None:
        return name_of(holder.own, all_zones(session).get(holder.location_id))
    row = session.get(PrefixName, holder.address)
    return row.rdns if row is not None else None


def names_of_prefix(session: Session, prefix: RoutedPrefix) -> list[NamedAddress]:
    """The addresses of a prefix that have names, in order."""
    rows = session.scalars(
        select(PrefixName).where(PrefixName.prefix_id == prefix.prefix_id).order_by(PrefixName.inet)
    )
    return [NamedAddress(row.inet, row.rdns) for row in rows]


def _find_holder(
    session: Session, instance_id: UUID, ip_address: str, *, locked: bool = False
) -> _Holder:
    try:
        address = parse_ipv6(ip_address)
    except ValueError as err:
        raise Invalid.field("ip_address", "The ip_address must be an IPv6 address.") from err
    query = (
        select(Address, Nic.location_id)
        .join(Nic, Nic.nic_id == Address.nic_id)
        .where(Nic.instance_id == instance_id, Nic.deleted_at.is_(None), Address.inet == address)
    )
    if locked:
        query = query.with_for_update(of=Address)
    found = session.execute(query.execution_options(populate_existing=True)).first()
    if found is not None:
        return _Holder(found.location_id, address, found.Address, None)
    prefix = find_prefix(session, instance_id, locked=locked)
    if prefix is None or prefix.is_leaving or address not in prefix.cidr:
        raise Invalid.field("ip_address", NOT_ITS_OWN)
    resource = session.get_one(Resource, instance_id)
    assert resource.location_id is not None
    return _Holder(resource.location_id, address, None, prefix)


def _wanted(session: Session, holder: _Holder, rdns: str | None) -> str | None:
    """What the row is to hold: the owner's name, or None for the default one of its own address, or for none."""
    zones = all_zones(session)
    own = zones.get(holder.location_id)
    if own is None or own.zone_of(pointer_key(holder.address).name) is None:
        raise Conflict(NO_NAMES)
    if rdns is None:
        return None
    default = default_name(holder.address, own.forward) if holder.own is not None else None
    name = parse_given(rdns, zones, default)
    return None if name == default else name
