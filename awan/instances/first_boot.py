"""instance.first_boot (queue `waits`): wait for the guest -> ready, billing starts -> scrubbed seed."""

from __future__ import annotations

import time
from datetime import timedelta
from uuid import UUID

import structlog
from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from awan.catalogue.models import LocationEngine, TemplateImage
from awan.catalogue.service import engines_of
from awan.engines.hypervisor import GuestSign
from awan.errors import EngineError, EngineRejected, EngineUnavailable, Unavailable
from awan.events import record
from awan.fleet import Node, endpoint
from awan.instances.models import DesiredState, Instance, ObservedState
from awan.instances.situation import (
    SCRUBBED_GENERATION,
    SEED_TARGET,
    read_situation,
    render_later_seed,
    seed_spec,
)
from awan.kit.clock import now
from awan.kit.database import single_statements, transaction
from awan.kit.secrets import delete_secret
from awan.ledger import open_spans
from awan.networks import public_addresses
from awan.operations import durable_step, pause, waiting_workflow
from awan.resources import Resource, lock
from awan.settings import get_settings

FIRST_BOOT = "instance.first_boot.v1"
READY_ROUND_S = 15.0
READY_POLL_S = 1.0
SILENT_ROUND_S = 3600.0
SILENT_POLL_S = 30.0
# A guest that is kept stopped costs one checkpoint in this time.
READY_IDLE_MAX_S = 3600.0
SYSTEM_ACTOR = "system:first_boot"
# Stopped since before the first sign, for so long that what it holds is charged all the same.
KEPT_STOPPED = "kept_stopped"
ENDED = "ended"
SIGNS = frozenset({GuestSign.AGENT, GuestSign.TRAFFIC})
EVENT_KINDS = {GuestSign.NONE: "instance.silent", KEPT_STOPPED: "instance.charged_stopped"}
log = structlog.get_logger(__name__)


@waiting_workflow(FIRST_BOOT)
def first_boot(instance_id: str) -> None:
    """Waits until a new guest is usable, then lets billing begin and takes the secrets out of its seed.

    Time in which the instance is stopped, an operation runs on it, or its node does not answer, does not count
    towards the time after which a silent guest alarms and is billed. One that its owner keeps stopped is billed as long
    after its creation, without an alarm: it holds its disk, its room and its address. Both are waited for all the same,
    since the seed may still be needed until there is a sign. Ends when the instance is deleted.
    """
    left_s = get_settings().ready_timeout_s
    while True:
        round_s = min(left_s, READY_ROUND_S) if left_s > 0 else SILENT_ROUND_S
        sign = durable_step("wait_round", _wait_and_end, instance_id, round_s)
        if sign in ("gone", ENDED):
            return
        if sign in SIGNS:
            durable_step("end", _end_first_boot, instance_id, sign)
            return
        if sign == KEPT_STOPPED:
            durable_step("mark_charged", mark_guest_ready, instance_id, sign)
        if sign == GuestSign.NONE and left_s > 0:
            left_s -= round_s
            if left_s <= 0:
                durable_step("mark_ready", mark_guest_ready, instance_id, GuestSign.NONE)


def _wait_and_end(instance_id: str, round_s: float) -> str:
    """As `wait_round`, with the end at a sign: "ended", or the sign when the end has to be tried again.

    Nearly every guest needs one round and one try, so one checkpoint is enough. Where the worker dies in between, the
    end comes with the next sign.
    """
    sign = wait_round(instance_id, round_s)
    if sign not in SIGNS:
        return sign
    try:
        _end_first_boot(instance_id, sign)
    except (EngineUnavailable, Unavailable) as err:
        log.info("first_boot.end_waits", instance=instance_id, error=str(err))
        return sign
    return ENDED


def _end_first_boot(instance_id: str, sign: str) -> None:
    mark_guest_ready(instance_id, sign)
    scrub_seed(instance_id)


def wait_round(instance_id: str, round_s: float) -> str:
    """Waits for `round_s` of running time, or an hour in all; the sign that was seen, or why there was none.

    None of them: "gone", "kept_stopped" (at once), "busy", "stopped", "unreachable" or "none". A guest whose image has
    an agent is believed only when the agent answers; other guests when they send packets.
    """
    poll_s = READY_POLL_S if round_s <= READY_ROUND_S else SILENT_POLL_S
    end = time.monotonic() + READY_IDLE_MAX_S
    running_s = 0.0
    while True:
        began_at = time.monotonic()
        state = _sign(UUID(instance_id))
        if state in ("gone", KEPT_STOPPED) or state in SIGNS:
            return state
        if running_s >= round_s or began_at >= end:
            return state
        pause(min(poll_s, round_s))
        if state == GuestSign.NONE:
            running_s += time.monotonic() - began_at


# Asked of each new guest, for some every second; built once, because building it takes longer than sending it.
_GUEST = (
    select(Instance, Resource.active_operation_id, Node, TemplateImage.has_agent, LocationEngine)
    .join(Resource, Resource.resource_id == Instance.instance_id)
    .join(Node, Node.node_id == Instance.node_id)
    .join(TemplateImage, TemplateImage.image_id == Instance.image_id)
    .outerjoin(LocationEngine, LocationEngine.location_id == Instance.location_id)
    .where(Instance.instance_id == bindparam("instance"))
)

_DESIRED = select(Instance.desired_state).where(Instance.instance_id == bindparam("instance"))


def _sign(instance_id: UUID) -> str:
    with single_statements() as session:
        rows = session.execute(_GUEST, {"instance": instance_id}).all()
        instance, active_operation_id, row, has_agent, _ = rows[0]
        if instance.desired_state == DesiredState.DELETED or instance.deleted_at is not None:
            return "gone"
        if active_operation_id is not None:
            return "busy"
        if instance.observed_state != ObservedState.RUNNING:
            is_off = instance.observed_state == ObservedState.STOPPED
            due_at = instance.created_at + timedelta(seconds=get_settings().ready_timeout_s)
            is_due = instance.ready_at is None and now() >= due_at
            return KEPT_STOPPED if is_off and is_due else "stopped"
        opened = engines_of(session, instance.location_id, (engine for *_, engine in rows))
        node, hypervisor = endpoint(row), opened.hypervisor
    try:
        sign = hypervisor.guest_sign(node, instance_id)
    except EngineError:
        return "unreachable"
    return GuestSign.NONE if has_agent and sign is GuestSign.TRAFFIC else sign


def mark_guest_ready(instance_id: str, sign: str) -> None:
    """The instance is usable, or was waited for long enough: charging starts now. Twice is once."""
    with transaction() as session:
        # Spans refer to the resource: it is locked before the instance, as by every change.
        lock(session, UUID(instance_id))
        instance = session.get_one(Instance, UUID(instance_id), with_for_update=True)
        if instance.desired_state == DesiredState.DELETED or instance.ready_at is not None:
            return
        instance.ready_at = now()
        open_spans(
            session,
            account_id=instance.account_id,
            resource_ids=[instance.instance_id, *_billed_addresses(session, instance.instance_id)],
            at=instance.ready_at,
            operation_id=instance.create_operation_id,
            actor=SYSTEM_ACTOR,
        )
        kind = EVENT_KINDS.get(sign, "instance.ready")
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
        iso = render_later_seed(seed_spec(it, with_secrets=is_unread), with_password=is_unread)
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
    """Raises: EngineUnavailable while an operation runs, which may write the seed of the first boot anew."""
    with transaction() as session:
        instance = session.get_one(Instance, instance_id, with_for_update=True)
        # Read after the wait for the instance, which every change locks as it begins; the resource is not locked here.
        resource = session.get_one(Resource, instance_id, populate_existing=True)
        is_busy = resource.active_operation_id is not None
        if is_busy and instance.desired_state != DesiredState.DELETED:
            raise EngineUnavailable("seed", "scrub", "an operation runs on the instance")
        instance.seed_generation = SCRUBBED_GENERATION
        instance.seed_has_password = has_password
        instance.seed_look_at, instance.seed_heard_at = now(), None
        user_data, instance.user_data_secret_id = instance.user_data_secret_id, None
        session.flush()
        if user_data is not None:
            delete_secret(session, user_data)


def _is_being_deleted(instance_id: UUID) -> bool:
    with single_statements() as session:
        wanted = session.scalars(_DESIRED, {"instance": instance_id}).one()
    return wanted == DesiredState.DELETED
