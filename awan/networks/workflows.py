"""Durable work on public addresses.

public_ip.set_rdns   the PTR record at the nameserver
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.orm import Session

from awan.catalogue import engines
from awan.catalogue.service import all_zones
from awan.errors import Conflict, NotFound
from awan.events import record
from awan.kit.database import transaction
from awan.networks.models import Address, Pool
from awan.networks.names import NO_NAMES, find_named, mark_stale, name_of
from awan.networks.rules import pointer_key
from awan.operations import Failure, Operation, Plan, Step, Target, register
from awan.resources import lock


def push_new_name(target: Target) -> None:
    """The PTR record has the new name. An address that was given back meanwhile is left alone."""
    _push_name(target.subject_id, is_new=True)


def undo_push_new_name(target: Target) -> None:
    """The PTR record has the name that the rows know."""
    _push_name(target.subject_id, is_new=False)


def _push_name(resource_id: UUID, *, is_new: bool) -> None:
    with transaction() as session:
        try:
            address, pool = find_named(session, resource_id)
        except NotFound:
            return
        old = name_of(address, all_zones(session).get(pool.location_id))
        name = address.new_rdns if is_new else old
        nameserver = engines(session, pool.location_id).nameserver
    if nameserver is None:
        raise Conflict(NO_NAMES)
    if name is not None:
        nameserver.ensure_records({pointer_key(address.inet): name})


def mark_named(session: Session, target: Target) -> None:
    """The new name is the address's own. Given back meanwhile: nothing."""
    found = _lock_named(session, target)
    if found is None or found[0].new_rdns is None:
        return
    address, pool = found
    zones = all_zones(session).get(pool.location_id)
    new, address.new_rdns, address.rdns = address.new_rdns, None, None
    if new != name_of(address, zones):
        address.rdns = new
    # Whoever pushed a mark while the name changed may have put the old one back.
    mark_stale(session, pool.location_id, [address.inet])
    record(
        session,
        kind="public_ip.rdns_changed",
        actor=session.get_one(Operation, target.operation_id).actor,
        account_id=address.account_id,
        resource_id=target.subject_id,
        operation_id=target.operation_id,
        data={"ip_address": str(address.inet), "rdns": new},
    )


def mark_not_named(session: Session, target: Target, failure: Failure) -> None:
    """The address keeps the name that it had, and the nameserver is told so once more."""
    found = _lock_named(session, target)
    if found is not None:
        address, pool = found
        address.new_rdns = None
        mark_stale(session, pool.location_id, [address.inet])


def _lock_named(session: Session, target: Target) -> tuple[Address, Pool] | None:
    lock(session, target.subject_id)
    try:
        return find_named(session, target.subject_id, locked=True)
    except NotFound:
        return None


SET_RDNS = register(
    Plan(
        workflow="public_ip.set_rdns.v1",
        kind="public_ip.set_rdns",
        steps=(Step("name", push_new_name, undo_push_new_name, percent=20, timeout_s=30),),
        succeed=mark_named,
        fail=mark_not_named,
        deadline_s=120,
    )
)
