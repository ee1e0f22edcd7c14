"""Durable work on the public addresses of instances: given, taken away, changed, moved from one to another.

instance.change_public_network
    port gone (of who loses its address) -> port (of who gets one) -> card -> card gone -> port up

What is to change is in rows of `PublicNetworkChange`, one for each of at most two instances; until the end, cards and
addresses are as before. Each step pushes the one or the other, so an undo is a step with the former state.
A running guest that gets another address has its card taken and given back: then it asks for an address again.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from uuid import UUID

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from awan.catalogue import engines
from awan.engines.fabric import PortSpec, PublicNetworkSpec
from awan.engines.hypervisor import CardHeld, NicSpec, Power
from awan.errors import Conflict, EngineUnavailable
from awan.events import record
from awan.instances.left_over_addresses import ACTOR, CHANGE_KIND
from awan.instances.models import Instance, PublicNetworkChange
from awan.instances.recover import repair_after_late_step
from awan.instances.rules import NIC_HELD
from awan.instances.situation import Situation, nic_specs, read_situation
from awan.instances.steps import PORT_UP_TIMEOUT_S, ensure_firewall, lives
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.networks import Address
from awan.networks.addresses import give_back_allocated
from awan.networks.cards import give_public_address, public_nic_id, public_port_spec
from awan.networks.models import AddressState
from awan.operations import Failure, Operation, Plan, Step, Target, register

Port = tuple[PublicNetworkSpec, PortSpec]


@dataclass(frozen=True)
class Change:
    """An instance, and its public port as it was and as it shall be; None: it has none."""

    it: Situation
    old: Port | None
    new: Port | None

    @property
    def port_id(self) -> UUID:
        """Its public port, there or not."""
        return public_nic_id(self.it.instance.create_operation_id)

    def nics(self, public: Port | None) -> tuple[NicSpec, ...]:
        """All cards of the instance, with this public one."""
        others = [port for port in self.it.ports if port[1].port_id != self.port_id]
        return nic_specs([public, *others] if public is not None else others)


def _changes(target: Target) -> list[Change]:
    """What is to be done; first the instances that lose their address."""
    with transaction() as session:
        rows = session.scalars(
            select(PublicNetworkChange)
            .where(PublicNetworkChange.operation_id == target.operation_id)
            .order_by(
                PublicNetworkChange.new_address_id.is_not(None), PublicNetworkChange.instance_id
            )
        ).all()
    return [_read_change(row) for row in rows]


def _read_change(row: PublicNetworkChange) -> Change:
    it = read_situation(row.instance_id)
    with transaction() as session:

        def port(address_id: UUID | None) -> Port | None:
            if address_id is None:
                return None
            return public_port_spec(
                session,
                session.get_one(Address, address_id),
                instance_id=row.instance_id,
                hostname=it.instance.hostname,
                operation_id=it.instance.create_operation_id,
                firewall_id=it.firewall_id,
            )

        return Change(it, port(row.old_address_id), port(row.new_address_id))


def _put_port(change: Change, port: Port | None) -> None:
    fabric = change.it.engines.fabric
    ensure_firewall(change.it)
    if port is None:
        fabric.ensure_port_absent(change.port_id)
    else:
        fabric.ensure_public_network(port[0])
        fabric.ensure_port(port[1])
    for _, other in change.it.ports:
        if other.port_id != change.port_id:
            # The public card, where there is one, is the way out.
            fabric.ensure_port(replace(other, is_routed=port is None))


def _put_card(change: Change, public: Port | None) -> None:
    it = change.it
    it.engines.hypervisor.ensure_nics(it.node, it.instance.instance_id, change.nics(public))


def _put_card_or_refuse(change: Change, public: Port | None) -> None:
    """Raises: Conflict when the guest holds a card that must go."""
    try:
        _put_card(change, public)
    except CardHeld as err:
        raise Conflict(NIC_HELD) from err


def _is_running(change: Change) -> bool:
    found = change.it.engines.hypervisor.find_domain(change.it.node, change.it.instance.instance_id)
    return found is not None and found.power is Power.RUNNING


def take_ports(target: Target) -> None:
    """Who loses its address cannot use it any more."""
    for change in _changes(target):
        if change.new is None:
            _put_port(change, None)


def undo_take_ports(target: Target) -> None:
    """Who was to lose its address may use it."""
    for change in _changes(target):
        if change.new is None:
            _put_port(change, change.old)


def put_ports(target: Target) -> None:
    """Who gets an address has a port with it."""
    for change in _changes(target):
        if change.new is not None:
            _put_port(change, change.new)


def undo_put_ports(target: Target) -> None:
    """Who was to get an address has its former port, or none."""
    for change in _changes(target):
        if change.new is not None:
            _put_port(change, change.old)


def put_cards(target: Target) -> None:
    """Who gets an address has its card, and asks for the address: a card that was there is taken and given back.

    Raises: Conflict when the guest does not let go of it.
    """
    for change in _changes(target):
        if change.new is None:
            continue
        if change.old is not None and _is_running(change):
            _put_card_or_refuse(change, None)
        _put_card_or_refuse(change, change.new)


def undo_put_cards(target: Target) -> None:
    """Who was to get an address has the card that it had, or none. A guest that never let go of it keeps it."""
    for change in _changes(target):
        if change.new is None:
            continue
        if change.old is not None and _is_running(change):
            with suppress(CardHeld):
                _put_card(change, None)
        _put_card(change, change.old)


def take_cards(target: Target) -> None:
    """Who has no address has no card. Raises: Conflict when a running guest does not let go of it."""
    for change in _changes(target):
        if change.new is None:
            _put_card_or_refuse(change, None)


def undo_take_cards(target: Target) -> None:
    """Who was to lose its card has it."""
    for change in _changes(target):
        if change.new is None:
            _put_card(change, change.old)


def wait_for_new_ports(target: Target) -> None:
    """The nodes have bound the ports of running guests. Raises: EngineUnavailable after 30 s."""
    for change in _changes(target):
        if change.new is None or not _is_running(change):
            continue
        port_id = change.new[1].port_id
        if not change.it.engines.fabric.wait_port_up(
            port_id, change.it.chassis, timeout_s=PORT_UP_TIMEOUT_S
        ):
            raise EngineUnavailable("fabric", "wait_port_up", f"port {port_id} is not up")


def mark_changed(session: Session, target: Target) -> None:
    """The addresses are where they should be; those that are left over are free, and billed on."""
    actor = session.get_one(Operation, target.operation_id).actor
    for row in _end_changes(session, target):
        instance = session.get_one(Instance, row.instance_id, with_for_update=True)
        addresses = _lock_addresses(session, row)
        address = addresses.get(row.new_address_id) if row.new_address_id is not None else None
        if instance.deleted_at is not None:
            continue
        give_public_address(
            session,
            instance_id=row.instance_id,
            address=address,
            create_operation_id=instance.create_operation_id,
            operation_id=target.operation_id,
            actor=actor,
        )
        instance.status_reason = None
        instance.updated_at = now()
        old = addresses.get(row.old_address_id) if row.old_address_id is not None else None
        record(
            session,
            kind="instance.public_network_changed",
            actor=actor,
            account_id=instance.account_id,
            resource_id=row.instance_id,
            operation_id=target.operation_id,
            data={
                "from": str(old.inet) if old is not None else None,
                "to": str(address.inet) if address is not None else None,
            },
        )


def mark_unchanged(session: Session, target: Target, failure: Failure) -> None:
    """All is as before; an address that was allocated for this goes back.

    Unless its port could not be undone: then it goes back when a repair or a deletion has removed the port.
    """
    for row in _end_changes(session, target):
        instance = session.get_one(Instance, row.instance_id, with_for_update=True)
        if instance.deleted_at is None and not failure.cancelled:
            instance.status_reason = failure.message
            instance.updated_at = now()
    if failure.left_over:
        return
    allocated = select(Address).where(
        Address.operation_id == target.operation_id, Address.state == AddressState.FREE
    )
    for address in session.scalars(allocated).all():
        give_back_allocated(session, address, actor=ACTOR, operation_id=target.operation_id)


def _end_changes(session: Session, target: Target) -> list[PublicNetworkChange]:
    """The rows, which are gone with this transaction; first the instances that lose their address."""
    rows = session.scalars(
        select(PublicNetworkChange)
        .where(PublicNetworkChange.operation_id == target.operation_id)
        .order_by(PublicNetworkChange.new_address_id.is_not(None), PublicNetworkChange.instance_id)
    ).all()
    session.execute(
        delete(PublicNetworkChange)
        .where(PublicNetworkChange.operation_id == target.operation_id)
        .execution_options(synchronize_session=False)
    )
    for row in rows:
        session.expunge(row)
    return list(rows)


def _lock_addresses(session: Session, row: PublicNetworkChange) -> dict[UUID, Address]:
    ids = {it for it in (row.old_address_id, row.new_address_id) if it is not None}
    found = session.scalars(
        select(Address)
        .where(Address.address_id.in_(ids))
        .order_by(Address.address_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    return {address.address_id: address for address in found}


def remove_late_ports(target: Target) -> None:
    """A port that a late step has made of an instance that is gone is not there; one that lives is repaired."""
    with transaction() as session:
        operation = session.get_one(Operation, target.operation_id)
        assert operation.resource_id is not None
        instance = session.get_one(Instance, operation.resource_id)
        port_id = public_nic_id(instance.create_operation_id)
        fabric = engines(session, instance.location_id).fabric
        is_alive = lives(instance)
    if is_alive:
        repair_after_late_step(instance.instance_id)
    else:
        fabric.ensure_port_absent(port_id)


CHANGE = register(
    Plan(
        workflow="instance.change_public_network.v1",
        kind=CHANGE_KIND,
        steps=(
            Step("take_port", take_ports, undo_take_ports, percent=5),
            Step("port", put_ports, undo_put_ports, percent=15),
            Step("card", put_cards, undo_put_cards, percent=30),
            Step("take_card", take_cards, undo_take_cards, percent=60),
            Step("port_up", wait_for_new_ports, percent=80),
        ),
        succeed=mark_changed,
        fail=mark_unchanged,
        overtaken=remove_late_ports,
        deadline_s=300,
    )
)
