"""The steps of durable work on instances, and what undoes them.

Names are derived from the instance and the operation that created it, so each step can be run again.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import select

from awan.catalogue import engines
from awan.engines.hypervisor import DomainFacts, Power, StopOutcome
from awan.engines.volumes import VolumeHandle
from awan.errors import EngineUnavailable, OperationCancelled
from awan.firewall import (
    Firewall,
    firewall_id_of,
    note_applied,
    note_pushed,
    push_firewall,
    pushed_revision,
)
from awan.fleet import Node, NodeState, NodeThreads, endpoint
from awan.instances.models import DesiredState, Instance, ObservedState
from awan.instances.situation import (
    Situation,
    domain_spec,
    read_situation,
    situation_of,
)
from awan.kit.database import single_statements, transaction
from awan.networks import ensure_network
from awan.networks.cards import public_nic_id
from awan.networks.models import Nic
from awan.networks.prefixes import withdraw_prefix
from awan.operations import Target, is_cancel_requested
from awan.settings import get_settings
from awan.volumes import Volume, mark_ready, note_image, volumes_of

PORT_UP_TIMEOUT_S = 30.0
THREAD_ROUNDS_MAX = 10


def ensure_image(target: Target) -> None:
    """The template image lies on the node (uploaded once per node and build)."""
    it = situation_of(target)
    it.engines.volumes.ensure_image(it.node, it.image)
    with single_statements() as session:
        note_image(session, it.node.node_id, it.instance.image_id)


def make_root_volume(target: Target) -> None:
    """The root disk exists over the image."""
    it = situation_of(target)
    it.ensure_root_disk()
    assert it.root is not None
    with single_statements() as session:
        mark_ready(session, it.root.volume_id)


def undo_make_root_volume(target: Target) -> None:
    """The root disk does not exist."""
    it = read_situation(target.subject_id)
    if it.root is not None:
        it.engines.volumes.delete(it.node, it.root.volume_id)


def write_seed(target: Target) -> None:
    """The seed with login, keys and user data lies on the node."""
    it = situation_of(target)
    it.ensure_seed()


def undo_write_seed(target: Target) -> None:
    """No seed of the instance lies on the node."""
    it = read_situation(target.subject_id)
    it.engines.volumes.delete_seeds(it.node, it.instance.instance_id)


def make_ports(target: Target) -> None:
    """The instance's firewall exists, and its ports, in it and protected from their first instant."""
    it = situation_of(target)
    ensure_firewall(it)
    for network, port in it.ports:
        ensure_network(it.engines.fabric, network)
        it.engines.fabric.ensure_port(port)


def ensure_firewall(it: Situation) -> None:
    """The instance's firewall is in the fabric, for ports to be in it; one that has ended is left alone."""
    if it.firewall is not None:
        pushed = push_firewall(it.engines.fabric, it.firewall)
        with single_statements() as session:
            note_pushed(session, Firewall, it.firewall_id, pushed.revision)
        it.pushed_revision = pushed.revision


def undo_make_ports(target: Target) -> None:
    """Neither the instance's ports exist nor its firewall."""
    it = read_situation(target.subject_id)
    for _, port in it.ports:
        it.engines.fabric.ensure_port_absent(port.port_id)
    it.engines.fabric.ensure_firewall_absent(it.firewall_id)


def define_domain(target: Target) -> None:
    """The domain is defined on the node, and no shared domain runs on threads that are dedicated.

    Others may be given threads at the same time. Their row is written before they look at the domains, and we read
    the rows again after ours is defined: whoever acts last acts on the newest.
    """
    it = situation_of(target)
    define_over(it, it.ensure_root_disk)


def define_over(it: Situation, find_root: Callable[[], VolumeHandle]) -> None:
    """As `define_domain`, with the root disk that `find_root` gives or raises for."""

    def define(threads: NodeThreads) -> None:
        it.engines.hypervisor.ensure_defined(it.node, domain_spec(it, threads, find_root()))
        if threads.own and threads.shared:
            it.engines.hypervisor.ensure_shared_threads(it.node, threads.shared)

    _until_settled(it, define)


def undo_define_domain(target: Target) -> None:
    """The domain does not exist, and its own threads are for all again."""
    it = read_situation(target.subject_id)
    it.engines.hypervisor.ensure_absent(it.node, it.instance.instance_id)
    if it.threads.own:
        _until_settled(
            it,
            lambda threads: it.engines.hypervisor.ensure_shared_threads(
                it.node, threads.shared_without_own
            ),
        )


def _until_settled(it: Situation, act: Callable[[NodeThreads], None]) -> None:
    """Acts on the threads of the node, again when they were given to others meanwhile. Raises: EngineUnavailable."""
    threads = it.threads
    for _ in range(THREAD_ROUNDS_MAX):
        act(threads)
        acted_on = threads
        threads = it.read_threads()
        if threads == acted_on:
            return
    raise EngineUnavailable("hypervisor", "share threads", "they are given away all the time")


def power_on(target: Target) -> None:
    """The domain runs."""
    it = situation_of(target)
    it.engines.hypervisor.ensure_running(it.node, it.instance.instance_id)


def wait_for_ports(target: Target) -> None:
    """The node has bound the ports and put their flows in place, and with them the firewall as it was pushed before.

    Raises: EngineUnavailable after 30 s.
    """
    it = situation_of(target)
    if it.pushed_revision is None:
        with single_statements() as session:
            it.pushed_revision = pushed_revision(session, it.firewall_id)
    for _, port in it.ports:
        if not it.engines.fabric.wait_port_up(
            port.port_id, it.chassis, timeout_s=PORT_UP_TIMEOUT_S
        ):
            raise EngineUnavailable("fabric", "wait_port_up", f"port {port.port_id} is not up")
    with single_statements() as session:
        note_applied(session, Firewall, it.firewall_id, it.pushed_revision)


def power_off(target: Target) -> None:
    """The domain is off: ACPI first, then the power is cut; at once when the operation says force.

    Raises: OperationCancelled when that is asked for while the guest has its grace.
    """
    it = read_situation(target.subject_id)
    outcome = it.engines.hypervisor.ensure_stopped(
        it.node,
        it.instance.instance_id,
        grace_s=get_settings().stop_grace_s,
        force=it.instance.stop_is_forced,
        gives_up=lambda: is_cancel_requested(target),
    )
    if outcome is StopOutcome.GIVEN_UP:
        raise OperationCancelled("while the guest was shutting down")


def remove_domain(target: Target) -> None:
    """The domain is gone."""
    if not read_situation(target.subject_id).is_node_lost:
        undo_define_domain(target)


def remove_ports(target: Target) -> None:
    """The ports and the firewall are gone, and nothing is routed to them; nor is there a port that was left over."""
    withdraw_prefix(target.subject_id)
    remove_left_over_port(target)
    undo_make_ports(target)


def remove_left_over_port(target: Target) -> None:
    """There is no public port unless the instance has a public card."""
    it = read_situation(target.subject_id)
    public = public_nic_id(it.instance.create_operation_id)
    if all(port.port_id != public for _, port in it.ports):
        it.engines.fabric.ensure_port_absent(public)


def remove_seeds(target: Target) -> None:
    """The seeds are gone."""
    if not read_situation(target.subject_id).is_node_lost:
        undo_write_seed(target)


def remove_volumes(target: Target) -> None:
    """The disks are gone, their content unreadable."""
    it = read_situation(target.subject_id)
    if it.is_node_lost:
        return
    with single_statements() as session:
        volumes = volumes_of(session, target.subject_id)
    for volume in volumes:
        it.engines.volumes.delete(it.node, volume.volume_id)


def settle_late_step(target: Target) -> None:
    """What an overtaken step did late is undone: of an instance that is gone nothing stays, one that lives is repaired.

    The definition, seed or port of the late step may be older than what the instance has got since.
    """
    from awan.instances.recover import repair_after_late_step  # it stands on this module

    remove_if_gone(target)
    repair_after_late_step(target.subject_id)


def remove_if_gone(target: Target) -> None:
    """Nothing is on the engines of an instance that is deleted or was never made; one that lives keeps everything.

    The rows of disks and cards may say already that these are gone.
    """
    with transaction() as session:
        instance = session.get_one(Instance, target.subject_id)
        if lives(instance):
            return
        row = session.get_one(Node, instance.node_id)
        node, is_lost = endpoint(row), row.state == NodeState.LOST
        opened = engines(session, instance.location_id)
        nics = select(Nic.nic_id).where(Nic.instance_id == target.subject_id)
        disks = select(Volume.volume_id).where(
            Volume.instance_id == target.subject_id,
            Volume.operation_id == instance.create_operation_id,
        )
        public = public_nic_id(instance.create_operation_id)
        port_ids, volume_ids = {public, *session.scalars(nics)}, session.scalars(disks).all()
    if not is_lost:
        opened.hypervisor.ensure_absent(node, target.subject_id)
    for port_id in port_ids:
        opened.fabric.ensure_port_absent(port_id)
    opened.fabric.ensure_firewall_absent(firewall_id_of(target.subject_id))
    if is_lost:
        return
    opened.volumes.delete_seeds(node, target.subject_id)
    for volume_id in volume_ids:
        opened.volumes.delete(node, volume_id)


def lives(instance: Instance) -> bool:
    """Whether the engines hold something of the instance, and shall go on doing so."""
    return instance.desired_state != DesiredState.DELETED and instance.holds_quota


def note_power(target: Target) -> None:
    """What the node says of the domain's power now is what is seen and wanted (after a change that failed)."""
    it = read_situation(target.subject_id)
    found = it.engines.hypervisor.find_domain(it.node, it.instance.instance_id)
    if found is None:
        return
    seen = observed_of(found)
    with transaction() as session:
        instance = session.get_one(Instance, target.subject_id, with_for_update=True)
        if instance.desired_state != DesiredState.DELETED:
            is_on = seen is not ObservedState.STOPPED
            instance.desired_state = DesiredState.RUNNING if is_on else DesiredState.STOPPED
        instance.observed_state = seen


def observed_of(found: DomainFacts | None) -> ObservedState:
    """What a domain that was found like this, or not found, shows of its instance."""
    if found is None:
        return ObservedState.STOPPED
    states = {Power.RUNNING: ObservedState.RUNNING, Power.PAUSED: ObservedState.PAUSED}
    return states.get(found.power, ObservedState.STOPPED)
