"""Durable work on the private cards of instances, running or stopped.

instance.attach_network   networks -> ports -> cards -> ports up
instance.detach_network   cards -> ports gone

The cards that an attachment brings are those of its operation; those that a detachment takes away are marked. A guest
has to let go of a card: one that does not within the engine's time keeps it, and the detachment is a conflict.
"""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.engines.hypervisor import CardHeld
from awan.errors import Conflict
from awan.instances.recover import wait_for_ports_of_running
from awan.instances.rules import NIC_HELD
from awan.instances.situation import Situation, nic_specs, read_situation
from awan.instances.steps import make_ports, settle_late_step
from awan.instances.workflows import mark_change_failed, mark_changed
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.networks.models import Nic, NicRole
from awan.networks.private_names import mark_names_stale
from awan.operations import Failure, Plan, Step, Target, register


def plug_cards(target: Target) -> None:
    """The domain has all its cards, those that are new too."""
    it = read_situation(target.subject_id)
    _ensure_cards(it, frozenset())


def undo_plug_cards(target: Target) -> None:
    """The domain has the cards that it had before."""
    it = read_situation(target.subject_id)
    _ensure_cards(it, _cards_of(target))


def undo_make_ports(target: Target) -> None:
    """The ports of the new cards do not exist."""
    it = read_situation(target.subject_id)
    for port_id in _cards_of(target):
        it.engines.fabric.ensure_port_absent(port_id)


def unplug_cards(target: Target) -> None:
    """The domain has the cards that stay, and no others. Raises: Conflict when its guest holds one."""
    it = read_situation(target.subject_id)
    try:
        _ensure_cards(it, frozenset())
    except CardHeld as err:
        raise Conflict(NIC_HELD) from err


def undo_unplug_cards(target: Target) -> None:
    """The domain has all its cards again, and their ports exist."""
    with transaction() as session:
        for nic in _leaving(session, target.subject_id):
            nic.is_leaving = False
    make_ports(target)
    plug_cards(target)


def remove_ports(target: Target) -> None:
    """The ports of the cards that went do not exist; the others know whether they are the way out now."""
    it = read_situation(target.subject_id)
    with transaction() as session:
        gone = [nic.nic_id for nic in _leaving(session, target.subject_id)]
    for port_id in gone:
        it.engines.fabric.ensure_port_absent(port_id)


def _ensure_cards(it: Situation, without: frozenset[UUID]) -> None:
    ports = [(network, port) for network, port in it.ports if port.port_id not in without]
    it.engines.hypervisor.ensure_nics(it.node, it.instance.instance_id, nic_specs(ports))


def _cards_of(target: Target) -> frozenset[UUID]:
    """The cards that the operation brings."""
    with transaction() as session:
        return frozenset(
            session.scalars(select(Nic.nic_id).where(Nic.operation_id == target.operation_id))
        )


def _leaving(session: Session, instance_id: UUID) -> list[Nic]:
    return list(
        session.scalars(
            select(Nic).where(
                Nic.instance_id == instance_id, Nic.is_leaving, Nic.deleted_at.is_(None)
            )
        )
    )


def mark_attached(session: Session, target: Target) -> None:
    """The cards are in."""
    mark_changed(session, target)


def mark_not_attached(session: Session, target: Target, failure: Failure) -> None:
    """The new cards are gone, and their addresses free; what could not be undone stays, to be detached later."""
    if not failure.left_over:
        cards = session.scalars(select(Nic).where(Nic.operation_id == target.operation_id)).all()
        for nic in cards:
            nic.deleted_at = now()
        _mark_names(session, cards)
    mark_change_failed(session, target, failure)


def mark_detached(session: Session, target: Target) -> None:
    """The cards are gone, and their addresses free."""
    cards = list(_leaving(session, target.subject_id))
    for nic in cards:
        nic.is_leaving, nic.deleted_at = False, now()
    _mark_names(session, cards)
    mark_changed(session, target)


def _mark_names(session: Session, cards: Iterable[Nic]) -> None:
    networks = {nic.network_id for nic in cards if nic.network_id is not None}
    mark_names_stale(session, networks)


def mark_not_detached(session: Session, target: Target, failure: Failure) -> None:
    """The cards stay."""
    for nic in _leaving(session, target.subject_id):
        nic.is_leaving = False
    mark_change_failed(session, target, failure)


def remove_undone(target: Target) -> None:
    """A late step leaves nothing of an instance that is gone, nor ports of cards that are."""
    settle_late_step(target)
    with transaction() as session:
        gone = session.scalars(
            select(Nic.nic_id).where(
                Nic.instance_id == target.subject_id,
                Nic.role == NicRole.PRIVATE,
                Nic.deleted_at.is_not(None),
            )
        ).all()
    it = read_situation(target.subject_id)
    for port_id in gone:
        it.engines.fabric.ensure_port_absent(port_id)


ATTACH = register(
    Plan(
        workflow="instance.attach_network.v1",
        kind="instance.attach_network",
        steps=(
            Step("port", make_ports, undo_make_ports, percent=10),
            Step("card", plug_cards, undo_plug_cards, percent=40),
            Step("port_up", wait_for_ports_of_running, percent=80),
        ),
        succeed=mark_attached,
        fail=mark_not_attached,
        overtaken=remove_undone,
        deadline_s=300,
    )
)
DETACH = register(
    Plan(
        workflow="instance.detach_network.v1",
        kind="instance.detach_network",
        steps=(
            Step("card", unplug_cards, undo_unplug_cards, percent=10),
            Step("port", remove_ports, percent=70),
        ),
        succeed=mark_detached,
        fail=mark_not_detached,
        overtaken=remove_undone,
        deadline_s=300,
    )
)
