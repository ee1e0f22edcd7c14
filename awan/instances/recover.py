"""Putting an instance right after something happened to it outside of any operation.

instance.repair    disk is there -> seed -> ports -> definition, cards -> port up                    (power as it is)
instance.recover   disk is there -> seed -> ports -> definition, cards -> network -> power -> port up   (it should run)

The steps are those of every other change. Only the root disk is never made anew: an empty one would pass for the
customer's. The verbs below them are called by whoever compares nodes with rows; they take the instance locked, idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from awan.engines.hypervisor import CardHeld, Power
from awan.engines.volumes import VolumeHandle
from awan.errors import Conflict, EngineUnavailable
from awan.events import record
from awan.instances.left_over_addresses import give_back_left_over
from awan.instances.models import DesiredState, Instance, ObservedState
from awan.instances.rules import CRASHED_AGAIN, PAUSED, PAUSED_BY_DISK, repair_delay_s
from awan.instances.situation import (
    SECRET_GENERATION,
    SEED_TARGET,
    Situation,
    nic_specs,
    read_situation,
)
from awan.instances.steps import (
    define_over,
    lives,
    make_ports,
    observed_of,
    power_on,
    remove_left_over_port,
    settle_late_step,
    wait_for_ports,
)
from awan.instances.workflows import mark_change_failed, mark_changed, mark_running
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.operations import (
    ControlPlane,
    Operation,
    Plan,
    Step,
    Target,
    begin,
    register,
    wait_for_end,
)
from awan.operations.models import OperationStatus
from awan.resources import Resource, ResourceKind, lock
from awan.settings import get_settings

ACTOR = "system:reconcile"
DISK_MISSING = "The disk of the instance is missing on its server. The operator has been informed."
CARD_HELD = "The guest holds a network card that the instance should not have. It is gone with the next restart."
# After a node's reset many of its parts are still on their way up.
NODE_PATIENCE_S = 300.0
FAILURES_COUNTED_S = 86_400.0
# How often, and how long each time, a repair after a late step waits for the instance to be idle.
LATE_REPAIR_TRIES, LATE_REPAIR_WAIT_S = 60, 60.0

log = structlog.get_logger(__name__)


class Reason(StrEnum):
    """Why something was done or noted, as the owner's event log has it. Engines' own words are the operator's."""

    NETWORK = "network"
    SEED = "seed"
    NO_DOMAIN = "no_domain"
    NO_DEFINITION = "no_definition"
    POWER_LOST = "power_lost"
    CRASHED = "crashed"
    SHUT_DOWN = "shut_down"
    POWER_CUT = "power_cut"
    RUNNING = "running"
    PAUSED = "paused"
    DISK = "disk"
    OTHER = "other"


def check_disk(target: Target) -> None:
    """The root disk is on the node, whole. Raises: Conflict when it is not."""
    _find_disk(read_situation(target.subject_id))


def _find_disk(it: Situation) -> VolumeHandle:
    found = None
    if it.root is not None:
        found = it.engines.volumes.find_over_image(it.node, it.root.volume_id, it.image.sha256)
    if found is None:
        log.error("instance.disk_missing", instance=str(it.instance.instance_id), alarm=True)
        raise Conflict(DISK_MISSING)
    return found


def put_back_seed(target: Target) -> None:
    """The seed that counts lies on the node.

    The end of a first boot runs beside operations: it may have replaced and deleted the seed with secrets meanwhile.
    """
    it = read_situation(target.subject_id)
    it.ensure_seed()
    later = read_situation(target.subject_id)
    if later.instance.seed_generation != it.instance.seed_generation:
        _delete_older_seeds(later)


def _delete_older_seeds(it: Situation) -> None:
    it.engines.volumes.delete_seeds(
        it.node, it.instance.instance_id, keep=it.instance.seed_generation
    )


def put_back_definition(target: Target) -> None:
    """The domain has a definition, with the cards that it should have and the seed that counts in its drive.

    A definition that is there is kept but for these. A running domain gets the cards that it lacks at once.
    Raises: Conflict when the root disk has vanished since it was looked for, or the guest holds a card that must go.
    """
    it = read_situation(target.subject_id)
    found = it.engines.hypervisor.find_domain(it.node, it.instance.instance_id)
    if found is None or not found.is_persistent:
        define_over(it, lambda: _find_disk(it))
    later = read_situation(target.subject_id)
    _put_back_cards(later)
    if later.instance.seed_generation == SECRET_GENERATION:
        # The end of the first boot replaces this seed in any case.
        return
    seed = later.ensure_seed()
    later.engines.hypervisor.ensure_media(later.node, target.subject_id, SEED_TARGET, seed.path)
    _delete_older_seeds(later)


def _put_back_cards(it: Situation) -> None:
    instance_id = it.instance.instance_id
    try:
        it.engines.hypervisor.ensure_nics(it.node, instance_id, nic_specs(it.ports))
    except CardHeld as err:
        log.error("instance.card_held", instance=str(instance_id), error=str(err), alarm=True)
        raise Conflict(CARD_HELD) from err


def wait_for_network(target: Target) -> None:
    """The node knows all ports and their protection, so that not even a guest's first packet passes without.

    Raises: EngineUnavailable as long as it does not.
    """
    it = read_situation(target.subject_id)
    if not it.engines.fabric.wait_applied(it.chassis):
        raise EngineUnavailable("fabric", "wait_applied", f"chassis {it.chassis} is behind")


def wait_for_ports_of_running(target: Target) -> None:
    """The ports of a guest that runs are bound and up; others have nothing to be bound to."""
    it = read_situation(target.subject_id)
    found = it.engines.hypervisor.find_domain(it.node, it.instance.instance_id)
    if found is not None and found.power is Power.RUNNING:
        wait_for_ports(target)


def note_seen_power(target: Target) -> None:
    """What the node says of the domain's power is what is seen; what is wanted stays."""
    it = read_situation(target.subject_id)
    found = it.engines.hypervisor.find_domain(it.node, it.instance.instance_id)
    with transaction() as session:
        instance = session.get_one(Instance, target.subject_id, with_for_update=True)
        if instance.deleted_at is None:
            instance.observed_state = observed_of(found)


def put_back_ports(target: Target) -> None:
    """The ports are as they should be, and there is no public one that the instance does not have."""
    make_ports(target)
    remove_left_over_port(target)


def mark_repaired(session: Session, target: Target) -> None:
    """What was missing is back, and what was left over is gone."""
    mark_changed(session, target)
    give_back_left_over(session, target.subject_id, target.operation_id)


REPAIR = register(
    Plan(
        workflow="instance.repair.v1",
        kind="instance.repair",
        steps=(
            Step("disk", check_disk, percent=5),
            Step("seed", put_back_seed, percent=15),
            Step("port", put_back_ports, percent=30),
            Step("domain", put_back_definition, percent=60),
            Step("port_up", wait_for_ports_of_running, percent=80),
        ),
        succeed=mark_repaired,
        fail=mark_change_failed,
        overtaken=settle_late_step,
        deadline_s=600,
    )
)
RECOVER = register(
    Plan(
        workflow="instance.recover.v1",
        kind="instance.recover",
        steps=(
            Step("disk", check_disk, percent=5, timeout_s=NODE_PATIENCE_S),
            Step("seed", put_back_seed, percent=15),
            Step("port", make_ports, percent=25),
            Step("domain", put_back_definition, percent=40),
            Step("network", wait_for_network, percent=50, timeout_s=NODE_PATIENCE_S),
            Step("power", power_on, note_seen_power, percent=60),
            Step("port_up", wait_for_ports, percent=80),
        ),
        succeed=mark_running,
        fail=mark_change_failed,
        overtaken=settle_late_step,
        deadline_s=1200,
    )
)


def note_powered_on(session: Session, instance: Instance) -> None:
    """The guest was found running, though nobody here had started it or let it go on: so it is, and so it stays.

    One that was off has booted with what its seed says.
    """
    is_resumed = instance.observed_state == ObservedState.PAUSED
    kind = "instance.resumed" if is_resumed else "instance.powered_on"
    _note(session, instance, ObservedState.RUNNING, kind, {})
    instance.desired_state = DesiredState.RUNNING
    instance.status_reason = None
    if not is_resumed:
        instance.hostname_is_pending = False
        instance.seed_heard_at = None


def note_paused(session: Session, instance: Instance, reason: Reason) -> None:
    """The guest stands still: somebody has paused it on its node, or its QEMU could not write (`Reason.DISK`).

    What is wanted stays, and the operator is told.
    """
    _note(session, instance, ObservedState.PAUSED, "instance.paused", {"reason": reason})
    instance.status_reason = PAUSED_BY_DISK if reason is Reason.DISK else PAUSED
    log.error("instance.paused", instance=str(instance.instance_id), reason=reason, alarm=True)


def begin_resumption(
    session: Session, resource: Resource, instance: Instance, reason: Reason
) -> Operation | None:
    """Lets a guest go on whose disk could not be written. It is tried once in `crash_window_s`; None until then."""
    since = now() - timedelta(seconds=get_settings().crash_window_s)
    tried = select(func.count()).where(
        Operation.resource_id == instance.instance_id,
        Operation.kind == RECOVER.kind,
        Operation.created_at > since,
    )
    if session.scalar(tried):
        return None
    return _begin(session, RECOVER, resource, instance, reason)


def note_powered_off(session: Session, instance: Instance, reason: Reason) -> None:
    """The guest shut itself down, or somebody cut its power on the node: it stays off until it is started."""
    _note(session, instance, ObservedState.STOPPED, "instance.powered_off", {"reason": reason})
    instance.desired_state = DesiredState.STOPPED
    instance.status_reason = None


def note_crash(session: Session, resource: Resource, instance: Instance) -> Operation | None:
    """The guest's QEMU died. It is restarted once; a second time within `crash_window_s` it stays off, with the reason.

    Returns the operation that restarts it.
    """
    moment = now()
    window = timedelta(seconds=get_settings().crash_window_s)
    is_again = instance.crashed_at is not None and moment - instance.crashed_at < window
    _note(
        session, instance, ObservedState.STOPPED, "instance.crashed", {"is_restarted": not is_again}
    )
    if is_again:
        instance.desired_state = DesiredState.STOPPED
        instance.status_reason = CRASHED_AGAIN
        return None
    instance.crashed_at = moment
    return _begin(session, RECOVER, resource, instance, Reason.CRASHED)


def begin_recovery(
    session: Session, resource: Resource, instance: Instance, reason: Reason
) -> Operation | None:
    """Brings back an instance that should run and does not. None while an earlier attempt is too recent."""
    if not is_due(session, instance.instance_id, [REPAIR.kind, RECOVER.kind]):
        return None
    if instance.observed_state != ObservedState.STOPPED:
        _note(session, instance, ObservedState.STOPPED, "instance.lost_power", {"reason": reason})
    return _begin(session, RECOVER, resource, instance, reason)


def begin_repair(
    session: Session, resource: Resource, instance: Instance, reason: Reason
) -> Operation | None:
    """Puts back what an instance lacks on the engines. None while an earlier attempt is too recent."""
    if not is_due(session, instance.instance_id, [REPAIR.kind, RECOVER.kind]):
        return None
    return _begin(session, REPAIR, resource, instance, reason)


def repair_after_late_step(instance_id: UUID) -> None:
    """Begins a repair of an instance that lives: what a step does that was overtaken may be long out of date.

    Waits for the operation that runs on it. Raises: EngineUnavailable when it is never idle.
    """
    for _ in range(LATE_REPAIR_TRIES):
        with transaction() as session:
            resource = lock(session, instance_id)
            instance = session.get_one(Instance, instance_id, with_for_update=True)
            if resource is None or not lives(instance):
                return
            running = resource.active_operation_id
            if running is None:
                _begin(session, REPAIR, resource, instance, Reason.OTHER)
                return
        wait_for_end(running, LATE_REPAIR_WAIT_S)
    raise EngineUnavailable("instances", f"repair {instance_id}", "it is always busy")


def note_found(session: Session, instance: Instance, reason: Reason, words: str) -> None:
    """The operator's own event of what led to an action: the engine's `words`, which no customer is shown."""
    record(
        session,
        kind="instance.found",
        actor=ACTOR,
        account_id=None,
        resource_id=instance.instance_id,
        data={"reason": reason, "found": words},
    )


def _begin(
    session: Session, plan: Plan, resource: Resource, instance: Instance, reason: Reason
) -> Operation:
    caller = ControlPlane(ACTOR)
    operation = begin(
        session,
        caller=caller,
        plan=plan,
        resource=resource,
        resource_kind=ResourceKind.INSTANCE,
        subject_id=instance.instance_id,
    )
    instance.updated_at = now()
    record(
        session,
        kind=plan.kind,
        actor=caller.actor,
        account_id=instance.account_id,
        resource_id=instance.instance_id,
        operation_id=operation.operation_id,
        data={"reason": reason},
    )
    return operation


def _note(
    session: Session,
    instance: Instance,
    observed: ObservedState,
    kind: str,
    data: dict[str, object],
) -> None:
    instance.observed_state = observed
    instance.updated_at = now()
    record(
        session,
        kind=kind,
        actor=ACTOR,
        account_id=instance.account_id,
        resource_id=instance.instance_id,
        data=data,
    )


def is_due(session: Session, resource_id: UUID, kinds: Sequence[str]) -> bool:
    """Whether the last failed attempts of today are long enough ago, of these kinds. A success makes them forgotten."""
    since = now() - timedelta(seconds=FAILURES_COUNTED_S)
    attempts = (
        Operation.resource_id == resource_id,
        Operation.created_at > since,
        Operation.kind.in_(kinds),
    )
    succeeded = (
        select(func.max(Operation.created_at))
        .where(*attempts, Operation.status == OperationStatus.SUCCEEDED)
        .scalar_subquery()
    )
    failures, last = session.execute(
        select(func.count(), func.max(Operation.finished_at)).where(
            *attempts,
            Operation.status == OperationStatus.FAILED,
            Operation.created_at > func.coalesce(succeeded, since),
        )
    ).one()
    if not failures:
        return True
    assert isinstance(last, datetime)
    delay_s = repair_delay_s(failures, get_settings().repair_retry_s)
    return (now() - last).total_seconds() >= delay_s
