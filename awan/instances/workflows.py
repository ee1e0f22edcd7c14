"""Durable work on instances: how one is made, deleted, started, stopped and restarted, and what that leaves in rows.

instance.create   image -> volume -> port -> seed -> domain -> power -> port up
instance.delete   domain gone -> ports and firewall gone -> seeds gone -> volumes gone   (no undo: it only goes forward)
instance.start    ports -> power -> port up
instance.stop     power off
instance.restart  power off -> power on -> port up

What a creation enqueues at its end is in `first_boot`; the steps are in `steps`.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.orm import Session

from awan.accounts import quotas
from awan.events import record
from awan.firewall import retire_firewall
from awan.fleet import release
from awan.instances.first_boot import FIRST_BOOT
from awan.instances.left_over_addresses import give_back_left_over
from awan.instances.models import Instance, ObservedState
from awan.instances.steps import (
    define_domain,
    ensure_image,
    make_ports,
    make_root_volume,
    note_power,
    power_off,
    power_on,
    remove_domain,
    remove_ports,
    remove_seeds,
    remove_volumes,
    settle_late_step,
    undo_define_domain,
    undo_make_ports,
    undo_make_root_volume,
    undo_write_seed,
    wait_for_ports,
    write_seed,
)
from awan.kit.clock import now
from awan.kit.ids import derived_id
from awan.kit.secrets import delete_secret
from awan.ledger import close_spans
from awan.networks import release_nics
from awan.networks.prefixes import release_prefix
from awan.operations import (
    ControlPlane,
    Failure,
    Operation,
    Plan,
    Step,
    Target,
    enqueue_wait,
    register,
)
from awan.resources import retire
from awan.volumes import mark_deleted


def mark_created(session: Session, target: Target) -> None:
    """The domain runs and its port is up: creation is finished."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    instance.observed_state = ObservedState.RUNNING
    instance.updated_at = now()
    _record(session, target, instance, "instance.created")


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
    _record(session, target, instance, "instance.create_failed", {"reason": failure.message})
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
    give_back_left_over(session, instance.instance_id, target.operation_id)
    instance.observed_state = ObservedState.DELETED
    instance.deleted_at = instance.updated_at = now()
    _forget_secrets(session, instance)
    retire(session, instance.instance_id)
    _record(session, target, instance, "instance.deleted")


def _record(
    session: Session,
    target: Target,
    instance: Instance,
    kind: str,
    data: dict[str, object] | None = None,
) -> None:
    """What became of the instance, by whoever asked for it."""
    record(
        session,
        kind=kind,
        actor=session.get_one(Operation, target.operation_id).actor,
        account_id=instance.account_id,
        resource_id=instance.instance_id,
        operation_id=target.operation_id,
        data=data,
    )


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
    release_prefix(session, instance.instance_id, operation_id=operation_id)
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


def mark_changed(session: Session, target: Target) -> None:
    """A change of what is beside the power succeeded: no reason is told any more."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    if instance.deleted_at is None:
        instance.status_reason = None
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
            Step("port", make_ports, undo_make_ports, percent=45),
            Step("seed", write_seed, undo_write_seed, percent=55),
            Step("domain", define_domain, undo_define_domain, percent=65),
            Step("power", power_on, undo_define_domain, percent=75),
            Step("port_up", wait_for_ports, percent=90),
        ),
        succeed=mark_created,
        fail=mark_create_failed,
        then=wait_for_first_boot,
        overtaken=settle_late_step,
        deadline_s=900,
        is_one_checkpoint=True,
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
        is_one_checkpoint=True,
    )
)


START = register(
    Plan(
        workflow="instance.start.v1",
        kind="instance.start",
        steps=(
            Step("port", make_ports, note_power, percent=10),
            Step("power", power_on, note_power, percent=40),
            Step("port_up", wait_for_ports, percent=80),
        ),
        succeed=mark_running,
        fail=mark_change_failed,
        overtaken=settle_late_step,
        deadline_s=300,
        is_one_checkpoint=True,
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
