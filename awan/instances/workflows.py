"""Durable work on instances.

instance.create   image -> volume -> seed -> port -> domain -> power -> port up
instance.delete   domain gone -> ports and firewall gone -> seeds gone -> volumes gone   (no undo: it only goes forward)
instance.start    ports -> power -> port up
instance.stop     power off
instance.restart  power off -> power on -> port up
instance.first_boot (queue `waits`)   wait for the guest -> ready, billing starts -> scrubbed seed

Names are derived from the instance and the operation that created it, so each step can be run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.accounts import quotas
from awan.catalogue import engines, image_source
from awan.catalogue.models import TemplateImage, Tier
from awan.credentials import SshKey
from awan.engines.fabric import PortSpec
from awan.engines.fabric.firewall import FirewallSpec
from awan.engines.hypervisor import (
    DiskSpec,
    DomainFacts,
    DomainSpec,
    GuestSign,
    NicSpec,
    NodeEndpoint,
    Power,
    StopOutcome,
)
from awan.engines.registry import LocationEngines
from awan.engines.seed import (
    SeedNic,
    SeedSpec,
    render_password_seed,
    render_scrubbed_seed,
    render_seed,
)
from awan.engines.volumes import ImageSource, VolumeHandle
from awan.errors import EngineError, EngineRejected, EngineUnavailable, OperationCancelled
from awan.events import record
from awan.firewall import (
    Firewall,
    firewall_id_of,
    note_applied,
    note_pushed,
    read_spec,
    retire_firewall,
)
from awan.fleet import Node, NodeState, NodeThreads, endpoint, node_threads, release
from awan.instances.models import CpuMode, DesiredState, Instance, InstanceSshKey, ObservedState
from awan.instances.rules import cpu_shares
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.ids import derived_id
from awan.kit.secrets import delete_secret, get_secret
from awan.ledger import close_spans, open_spans
from awan.networks import ensure_network, port_specs, public_addresses, release_nics
from awan.networks.models import Nic
from awan.networks.ports import NetworkSpec
from awan.operations import (
    ControlPlane,
    Failure,
    Operation,
    Plan,
    Step,
    Target,
    durable_step,
    enqueue_wait,
    is_cancel_requested,
    pause,
    register,
    waiting_workflow,
)
from awan.resources import Resource, lock, retire
from awan.settings import get_settings
from awan.volumes import Volume, mark_deleted, mark_ready, note_image, volumes_of

PASSWORD_PURPOSE = "instance.password_hash"  # noqa: S105 - a purpose, not a password
USER_DATA_PURPOSE = "instance.user_data"
FIRST_BOOT = "instance.first_boot.v1"
ROOT_TARGET, SEED_TARGET = 0, 1
SECRET_GENERATION, SCRUBBED_GENERATION = 1, 2
PORT_UP_TIMEOUT_S = 30.0
THREAD_ROUNDS_MAX = 10
READY_ROUND_S = 15.0
READY_POLL_S = 1.0
SILENT_ROUND_S = 3600.0
SILENT_POLL_S = 30.0
# A guest that is kept stopped costs one checkpoint in this time.
READY_IDLE_MAX_S = 3600.0
SYSTEM_ACTOR = "system:first_boot"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Situation:
    """Everything that the steps of one instance need, read in one transaction.

    A node that is lost is asked for nothing any more: what lay on it is gone with it.
    `firewall` is None once it has ended; `pushed_revision` is what the fabric was told of it before.
    """

    instance: Instance
    tier: Tier
    node: NodeEndpoint
    is_node_lost: bool
    threads: NodeThreads
    chassis: str
    engines: LocationEngines
    image: ImageSource
    root: Volume | None
    ports: list[tuple[NetworkSpec, PortSpec]]
    firewall_id: UUID
    firewall: FirewallSpec | None
    pushed_revision: int


def read_situation(instance_id: UUID) -> Situation:
    """The instance as the database has it now."""
    with transaction() as session:
        instance = session.get_one(Instance, instance_id)
        node = session.get_one(Node, instance.node_id)
        assert node.ovn_system_id is not None
        volumes = volumes_of(session, instance_id)
        firewall_id = firewall_id_of(instance_id)
        return Situation(
            instance=instance,
            tier=session.get_one(Tier, instance.tier_id),
            node=endpoint(node),
            is_node_lost=node.state == NodeState.LOST,
            threads=node_threads(session, node, instance_id),
            chassis=node.ovn_system_id,
            engines=engines(session, instance.location_id),
            image=image_source(session, instance.image_id),
            root=volumes[0] if volumes else None,
            ports=port_specs(
                session,
                instance_id,
                hostname=instance.hostname,
                operation_id=instance.create_operation_id,
                firewall_id=firewall_id,
            ),
            firewall_id=firewall_id,
            firewall=read_spec(session, firewall_id),
            pushed_revision=session.get_one(Firewall, firewall_id).pushed_revision,
        )


def ensure_image(target: Target) -> None:
    """The template image lies on the node (uploaded once per node and build)."""
    it = read_situation(target.subject_id)
    it.engines.volumes.ensure_image(it.node, it.image)
    with transaction() as session:
        note_image(session, it.node.node_id, it.instance.image_id)


def make_root_volume(target: Target) -> None:
    """The root disk exists over the image."""
    it = read_situation(target.subject_id)
    _root_handle(it)
    assert it.root is not None
    with transaction() as session:
        mark_ready(session, it.root.volume_id)


def undo_make_root_volume(target: Target) -> None:
    """The root disk does not exist."""
    it = read_situation(target.subject_id)
    if it.root is not None:
        it.engines.volumes.delete(it.node, it.root.volume_id)


def write_seed(target: Target) -> None:
    """The seed with login, keys and user data lies on the node."""
    it = read_situation(target.subject_id)
    seed_handle(it)


def undo_write_seed(target: Target) -> None:
    """No seed of the instance lies on the node."""
    it = read_situation(target.subject_id)
    it.engines.volumes.delete_seeds(it.node, it.instance.instance_id)


def make_ports(target: Target) -> None:
    """The instance's firewall exists, and its ports, in it and protected from their first instant."""
    it = read_situation(target.subject_id)
    push_firewall(it)
    for network, port in it.ports:
        ensure_network(it.engines.fabric, network)
        it.engines.fabric.ensure_port(port)


def push_firewall(it: Situation) -> None:
    """The instance's firewall is in the fabric, for ports to be in it; one that has ended is left alone."""
    if it.firewall is not None:
        it.engines.fabric.ensure_firewall(it.firewall)
        with transaction() as session:
            note_pushed(session, it.firewall_id, it.firewall.revision)


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
    it = read_situation(target.subject_id)
    define_over(it, lambda: _root_handle(it))


def define_over(it: Situation, find_root: Callable[[], VolumeHandle]) -> None:
    """As `define_domain`, with the root disk that `find_root` gives or raises for."""

    def define(threads: NodeThreads) -> None:
        it.engines.hypervisor.ensure_defined(it.node, _domain_spec(it, threads, find_root()))
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
        with transaction() as session:
            node = session.get_one(Node, it.node.node_id)
            threads = node_threads(session, node, it.instance.instance_id)
        if threads == acted_on:
            return
    raise EngineUnavailable("hypervisor", "share threads", "they are given away all the time")


def power_on(target: Target) -> None:
    """The domain runs."""
    it = read_situation(target.subject_id)
    it.engines.hypervisor.ensure_running(it.node, it.instance.instance_id)


def wait_for_ports(target: Target) -> None:
    """The node has bound the ports and put their flows in place, and with them the firewall as it was pushed before.

    Raises: EngineUnavailable after 30 s.
    """
    it = read_situation(target.subject_id)
    for _, port in it.ports:
        if not it.engines.fabric.wait_port_up(
            port.port_id, it.chassis, timeout_s=PORT_UP_TIMEOUT_S
        ):
            raise EngineUnavailable("fabric", "wait_port_up", f"port {port.port_id} is not up")
    with transaction() as session:
        note_applied(session, it.firewall_id, it.pushed_revision)


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
    """The ports and the firewall are gone."""
    undo_make_ports(target)


def remove_seeds(target: Target) -> None:
    """The seeds are gone."""
    if not read_situation(target.subject_id).is_node_lost:
        undo_write_seed(target)


def remove_volumes(target: Target) -> None:
    """The disks are gone, their content unreadable."""
    it = read_situation(target.subject_id)
    if it.is_node_lost:
        return
    with transaction() as session:
        volumes = volumes_of(session, target.subject_id)
    for volume in volumes:
        it.engines.volumes.delete(it.node, volume.volume_id)


def _root_handle(it: Situation) -> VolumeHandle:
    assert it.root is not None
    return it.engines.volumes.create_from_image(
        it.node, it.root.volume_id, it.image, it.root.size_gib
    )


def seed_handle(it: Situation) -> VolumeHandle:
    spec, generation = seed_spec(it), it.instance.seed_generation
    if generation == SECRET_GENERATION:
        iso = render_seed(spec, insists=it.instance.seed_has_password)
    else:
        iso = render_later_seed(spec, with_password=it.instance.seed_has_password)
    return it.engines.volumes.ensure_seed(it.node, it.instance.instance_id, generation, iso)


def render_later_seed(spec: SeedSpec, *, with_password: bool) -> bytes:
    """The seed of a guest that has been through its first boot."""
    return render_password_seed(spec) if with_password else render_scrubbed_seed(spec)


def seed_spec(it: Situation) -> SeedSpec:
    """What the guest is told; the secrets only as long as they are stored."""
    instance = it.instance
    with transaction() as session:
        keys = session.scalars(
            select(SshKey.key)
            .join(InstanceSshKey, InstanceSshKey.ssh_key_id == SshKey.ssh_key_id)
            .where(InstanceSshKey.instance_id == instance.instance_id)
            .order_by(InstanceSshKey.position)
        ).all()
        password_hash = (
            get_secret(session, instance.password_secret_id, PASSWORD_PURPOSE)
            if instance.password_secret_id is not None
            else None
        )
        user_data = (
            get_secret(session, instance.user_data_secret_id, USER_DATA_PURPOSE)
            if instance.user_data_secret_id is not None
            else None
        )
    return SeedSpec(
        instance_id=instance.instance_id,
        hostname=instance.hostname,
        username=instance.username,
        password_hash=password_hash,
        ssh_keys=tuple(keys),
        nics=tuple(
            SeedNic(port.mac, port.ipv4 is not None, port.ipv6 is not None) for _, port in it.ports
        ),
        user_data=user_data,
    )


def _domain_spec(it: Situation, threads: NodeThreads, root: VolumeHandle) -> DomainSpec:
    instance = it.instance
    seed = seed_handle(it)
    return DomainSpec(
        instance_id=instance.instance_id,
        operation_id=instance.create_operation_id,
        account_id=instance.account_id,
        title=instance.hostname,
        vcpus=instance.vcpus,
        vcpus_max=max(it.tier.cpu_max, instance.vcpus),
        memory_mib=instance.memory_mib,
        memory_max_mib=max(it.tier.memory_mib_max, instance.memory_mib),
        dedicated=instance.cpu_mode == CpuMode.DEDICATED,
        cpu_shares=cpu_shares(instance.vcpus),
        threads=threads.own or (threads.shared if threads.dedicated else ()),
        disks=(
            DiskSpec(
                path=root.path,
                format=root.format,
                target=ROOT_TARGET,
                serial=instance.instance_id.hex[:20],
                backing=root.backing,
            ),
            DiskSpec(
                path=seed.path, format="raw", target=SEED_TARGET, serial="seed", device="cdrom"
            ),
        ),
        nics=nic_specs(it.ports),
    )


def nic_specs(ports: Sequence[tuple[NetworkSpec, PortSpec]]) -> tuple[NicSpec, ...]:
    """The network cards of a domain with these ports."""
    return tuple(NicSpec(port.port_id, port.mac, network.mtu) for network, port in ports)


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
        port_ids, volume_ids = session.scalars(nics).all(), session.scalars(disks).all()
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


def mark_created(session: Session, target: Target) -> None:
    """The domain runs and its port is up: creation is finished."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    instance.observed_state = ObservedState.RUNNING
    instance.updated_at = now()


def wait_for_first_boot(session: Session, target: Target) -> None:
    """Enqueues the wait for the guest, under an id derived from the creation's."""
    enqueue_wait(
        session,
        FIRST_BOOT,
        str(derived_id(target.operation_id, "first_boot")),
        str(target.subject_id),
    )


def mark_create_failed(session: Session, target: Target, failure: Failure) -> None:
    """Nothing is left on the engines: the room, the address and the quota go back; the reason stays.

    Where an undo could not be finished, everything is kept until a deletion has removed what is left.
    """
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    instance.observed_state = ObservedState.ERROR
    instance.status_reason = failure.message
    instance.updated_at = now()
    _forget_secrets(session, instance)
    if failure.left_over:
        return
    _give_back(
        session,
        instance,
        release_ips=False,
        made_by=target.operation_id,
        operation_id=target.operation_id,
        actor="system:create",
    )


def mark_deleted_instance(session: Session, target: Target) -> None:
    """The instance is gone: what it held goes back, its row stays for the bills."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    operation = session.get_one(Operation, target.operation_id)
    _give_back(
        session,
        instance,
        release_ips=instance.releases_ips,
        made_by=None,
        operation_id=target.operation_id,
        actor=operation.actor,
    )
    instance.observed_state = ObservedState.DELETED
    instance.deleted_at = instance.updated_at = now()
    _forget_secrets(session, instance)
    retire(session, instance.instance_id)


def _give_back(
    session: Session,
    instance: Instance,
    *,
    release_ips: bool,
    made_by: UUID | None,
    operation_id: UUID,
    actor: str,
) -> None:
    """Gives back all that admission took. What a failed creation gave back already is not given twice."""
    # Locks are taken in the same order everywhere: quota, node, address.
    if instance.holds_quota:
        instance.holds_quota = False
        quotas.give_back(
            session,
            instance.account_id,
            instances=1,
            vcpus=instance.vcpus,
            memory_gib=instance.memory_mib // 1024,
            storage_gib=instance.storage_gib,
        )
    close_spans(session, instance.instance_id, at=now(), operation_id=operation_id)
    mark_deleted(session, instance.instance_id)
    release(session, instance.instance_id)
    release_nics(
        session,
        instance.instance_id,
        release_ips=release_ips,
        made_by=made_by,
        actor=actor,
        operation_id=operation_id,
    )
    retire_firewall(session, instance.instance_id, ControlPlane(actor))


def _forget_secrets(session: Session, instance: Instance) -> None:
    for secret_id in (
        instance.password_secret_id,
        instance.user_data_secret_id,
        instance.new_password_secret_id,
    ):
        if secret_id is not None:
            delete_secret(session, secret_id)
    instance.password_secret_id = instance.user_data_secret_id = None
    instance.new_password_secret_id = None


def mark_running(session: Session, target: Target) -> None:
    """The domain runs again: its guest boots with what its seed says, unless it only stood still."""
    instance = session.get_one(Instance, target.subject_id)
    kind = session.get_one(Operation, target.operation_id).kind
    has_booted = instance.observed_state != ObservedState.PAUSED or kind == "instance.restart"
    _mark(session, target, ObservedState.RUNNING)
    if has_booted:
        instance.hostname_is_pending = False
        instance.seed_heard_at = None


def mark_stopped(session: Session, target: Target) -> None:
    """The domain is off."""
    _mark(session, target, ObservedState.STOPPED)


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


def mark_change_failed(session: Session, target: Target, failure: Failure) -> None:
    """A power change failed: the instance stays in the state that was seen, with the reason."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    if instance.deleted_at is not None:
        return
    if not failure.cancelled:
        instance.status_reason = failure.message
    instance.stop_is_forced = False
    instance.updated_at = now()


def mark_delete_failed(session: Session, target: Target, failure: Failure) -> None:
    """A deletion that could not be finished stays wanted; it can be asked for again."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    instance.observed_state = ObservedState.ERROR
    instance.status_reason = failure.message
    instance.updated_at = now()


def _mark(session: Session, target: Target, observed: ObservedState) -> None:
    """What a power change that succeeded leaves. One that was overtaken by a deletion leaves nothing."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    if instance.deleted_at is not None:
        return
    instance.observed_state = observed
    instance.status_reason = None
    instance.stop_is_forced = False
    instance.updated_at = now()


CREATE = register(
    Plan(
        workflow="instance.create.v1",
        kind="instance.create",
        steps=(
            Step("image", ensure_image, percent=5, timeout_s=600),
            Step("volume", make_root_volume, undo_make_root_volume, percent=30),
            Step("seed", write_seed, undo_write_seed, percent=45),
            Step("port", make_ports, undo_make_ports, percent=55),
            Step("domain", define_domain, undo_define_domain, percent=65),
            Step("power", power_on, undo_define_domain, percent=75),
            Step("port_up", wait_for_ports, percent=90),
        ),
        succeed=mark_created,
        fail=mark_create_failed,
        then=wait_for_first_boot,
        overtaken=settle_late_step,
        deadline_s=900,
    )
)
DELETE = register(
    Plan(
        workflow="instance.delete.v1",
        kind="instance.delete",
        steps=(
            Step("domain", remove_domain, percent=10, timeout_s=300, cancellable=False),
            Step("port", remove_ports, percent=50, timeout_s=300, cancellable=False),
            Step("seed", remove_seeds, percent=65, timeout_s=300, cancellable=False),
            Step("volume", remove_volumes, percent=80, timeout_s=300, cancellable=False),
        ),
        succeed=mark_deleted_instance,
        fail=mark_delete_failed,
        deadline_s=900,
    )
)
START = register(
    Plan(
        workflow="instance.start.v1",
        kind="instance.start",
        steps=(
            Step("port", make_ports, percent=10),
            Step("power", power_on, note_power, percent=40),
            Step("port_up", wait_for_ports, percent=80),
        ),
        succeed=mark_running,
        fail=mark_change_failed,
        overtaken=settle_late_step,
        deadline_s=300,
    )
)
STOP = register(
    Plan(
        workflow="instance.stop.v1",
        kind="instance.stop",
        steps=(Step("power", power_off, note_power, percent=10, timeout_s=120),),
        succeed=mark_stopped,
        fail=mark_change_failed,
        overtaken=settle_late_step,
        deadline_s=300,
    )
)
RESTART = register(
    Plan(
        workflow="instance.restart.v1",
        kind="instance.restart",
        steps=(
            Step("power_off", power_off, note_power, percent=10, timeout_s=120),
            Step("power_on", power_on, note_power, percent=50),
            Step("port_up", wait_for_ports, percent=80),
        ),
        succeed=mark_running,
        fail=mark_change_failed,
        overtaken=settle_late_step,
        deadline_s=300,
    )
)


@waiting_workflow(FIRST_BOOT)
def first_boot(instance_id: str) -> None:
    """Waits until a new guest is usable, then lets billing begin and takes the secrets out of its seed.

    Time in which the instance is stopped, an operation runs on it, or its node does not answer, does not count
    towards the time after which a silent guest alarms and is billed. Such a guest is waited for all the same, since
    its seed may still be needed until it gives a sign. Ends when the instance is deleted.
    """
    left_s = get_settings().ready_timeout_s
    while True:
        round_s = min(left_s, READY_ROUND_S) if left_s > 0 else SILENT_ROUND_S
        sign = durable_step("wait_round", wait_round, instance_id, round_s)
        if sign == "gone":
            return
        if sign in (GuestSign.AGENT, GuestSign.TRAFFIC):
            durable_step("mark_ready", mark_guest_ready, instance_id, sign)
            durable_step("scrub_seed", scrub_seed, instance_id)
            return
        if sign == GuestSign.NONE and left_s > 0:
            left_s -= round_s
            if left_s <= 0:
                durable_step("mark_ready", mark_guest_ready, instance_id, GuestSign.NONE)


def wait_round(instance_id: str, round_s: float) -> str:
    """Waits for `round_s` of running time, or an hour in all; the sign that was seen, or why there was none.

    None of them: "gone", "busy", "stopped", "unreachable" or "none". A guest whose image has an agent is believed
    only when the agent answers; other guests when they send packets.
    """
    poll_s = READY_POLL_S if round_s <= READY_ROUND_S else SILENT_POLL_S
    end = time.monotonic() + READY_IDLE_MAX_S
    running_s = 0.0
    while True:
        began_at = time.monotonic()
        state = _sign(UUID(instance_id))
        if state in ("gone", GuestSign.AGENT, GuestSign.TRAFFIC):
            return state
        if running_s >= round_s or began_at >= end:
            return state
        pause(min(poll_s, round_s))
        if state == GuestSign.NONE:
            running_s += time.monotonic() - began_at


def _sign(instance_id: UUID) -> str:
    with transaction() as session:
        instance = session.get_one(Instance, instance_id)
        if instance.desired_state == DesiredState.DELETED or instance.deleted_at is not None:
            return "gone"
        if session.get_one(Resource, instance_id).active_operation_id is not None:
            return "busy"
        if instance.observed_state != ObservedState.RUNNING:
            return "stopped"
        node = endpoint(session.get_one(Node, instance.node_id))
        hypervisor = engines(session, instance.location_id).hypervisor
        has_agent = _image_has_agent(session, instance.image_id)
    try:
        sign = hypervisor.guest_sign(node, instance_id)
    except EngineError:
        return "unreachable"
    return GuestSign.NONE if has_agent and sign is GuestSign.TRAFFIC else sign


def _image_has_agent(session: Session, image_id: UUID) -> bool:
    return session.get_one(TemplateImage, image_id).has_agent


def mark_guest_ready(instance_id: str, sign: str) -> None:
    """The instance is usable (or 15 minutes have passed, with an alarm): charging starts now. Twice is once."""
    with transaction() as session:
        # Spans refer to the resource: it is locked before the instance, as by every change.
        lock(session, UUID(instance_id))
        instance = session.get_one(Instance, UUID(instance_id), with_for_update=True)
        if instance.desired_state == DesiredState.DELETED or instance.ready_at is not None:
            return
        instance.ready_at = now()
        resources = [instance.instance_id, *_billed_addresses(session, instance.instance_id)]
        for resource_id in resources:
            open_spans(
                session,
                account_id=instance.account_id,
                resource_id=resource_id,
                at=instance.ready_at,
                operation_id=instance.create_operation_id,
                actor=SYSTEM_ACTOR,
            )
        kind = "instance.ready" if sign != GuestSign.NONE else "instance.silent"
        if sign == GuestSign.NONE:
            log.error("instance.silent", instance=instance_id, alarm=True)
        record(
            session,
            kind=kind,
            actor=SYSTEM_ACTOR,
            account_id=instance.account_id,
            resource_id=instance.instance_id,
            operation_id=instance.create_operation_id,
            data={"sign": sign},
        )


def _billed_addresses(session: Session, instance_id: UUID) -> list[UUID]:
    found = public_addresses(session, [instance_id]).get(instance_id, [])
    return [row.resource_id for row in found if row.resource_id is not None]


def scrub_seed(instance_id: str) -> None:
    """The guest's CD holds a seed without secrets, and the one with secrets is deleted.

    Same instance-id, hostname and network, so that cloud-init goes on working at later boots. An operation may
    run at the same time: a deletion that has passed its own removal of seeds is cleaned up after.
    """
    it = read_situation(UUID(instance_id))
    volumes, subject = it.engines.volumes, it.instance.instance_id
    if it.instance.seed_generation > SCRUBBED_GENERATION:
        # Run again after the guest's owner has changed something: that seed holds no secret of the first boot.
        return
    if it.instance.desired_state != DesiredState.DELETED:
        # Set while it was off, perhaps after its first boot: it has not read that yet.
        is_unread = (
            it.instance.seed_has_password and it.instance.observed_state != ObservedState.RUNNING
        )
        iso = render_later_seed(seed_spec(it), with_password=is_unread)
        seed = volumes.ensure_seed(it.node, subject, SCRUBBED_GENERATION, iso)
        try:
            it.engines.hypervisor.ensure_media(it.node, subject, SEED_TARGET, seed.path)
        except EngineRejected as err:
            if not _is_being_deleted(subject):
                # The domain may have vanished for a moment, and whoever watches its node puts it back.
                raise EngineUnavailable(
                    "hypervisor", f"change the seed of {subject}", str(err)
                ) from err
        else:
            _note_scrubbed(subject, has_password=is_unread)
            volumes.delete_seeds(it.node, subject, keep=SCRUBBED_GENERATION)
    if _is_being_deleted(subject):
        volumes.delete_seeds(it.node, subject)


def _note_scrubbed(instance_id: UUID, *, has_password: bool) -> None:
    """Raises: EngineUnavailable while a password is being set, whose seed is still that of the first boot."""
    with transaction() as session:
        instance = session.get_one(Instance, instance_id, with_for_update=True)
        if instance.new_password_secret_id is not None:
            raise EngineUnavailable("seed", "scrub", "a password is being set")
        instance.seed_generation = SCRUBBED_GENERATION
        instance.seed_has_password = has_password
        instance.seed_look_at, instance.seed_heard_at = now(), None
        if instance.user_data_secret_id is not None:
            delete_secret(session, instance.user_data_secret_id)
            instance.user_data_secret_id = None


def _is_being_deleted(instance_id: UUID) -> bool:
    with transaction() as session:
        instance = session.get_one(Instance, instance_id)
        return instance.desired_state == DesiredState.DELETED
