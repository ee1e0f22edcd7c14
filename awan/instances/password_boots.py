"""Taking passwords out of seeds that guests have booted with.

A guest may be stopped for months before it boots, so nothing waits for it: those that run are looked at by turns.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from awan.catalogue import engines
from awan.engines.hypervisor import GuestSign
from awan.errors import EngineError
from awan.fleet import Node, NodeHealth, endpoint
from awan.instances.guest_workflows import SCRUB_SEED
from awan.instances.models import DesiredState, Instance, ObservedState
from awan.instances.situation import SECRET_GENERATION
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.operations import begin
from awan.resources import Resource, ResourceKind, lock

LOOK_INTERVAL_S = 5.0
SILENT_INTERVAL_S = 30.0
LOOKS_MAX, LOOKS_AT_ONCE = 64, 8
# A guest may send its first packets a little before or after it has read its CD; the agent answers well after.
READ_MARGIN_S = 60.0


@dataclass(frozen=True)
class ControlPlane:
    """The control plane itself, as the requester of an operation."""

    actor: str
    account_id: UUID | None = None
    is_operator: bool = True
    request_id: str = ""


def scrub_booted() -> int:
    """Has the seeds scrubbed of guests that have booted with a password in theirs; how many. For a schedule.

    The agent's answer says that a guest is up. So does a minute of packets: cloud-init reads the CD before it brings
    the network up. The seed of a first boot is not for here: whoever waits for that boot replaces it.
    """
    with transaction() as session:
        looks = _due(session)
    if not looks:
        return 0
    with ThreadPoolExecutor(LOOKS_AT_ONCE, thread_name_prefix="password-boot") as lookers:
        signs = list(lookers.map(lambda look: look[1](), looks))
    return sum(
        note_sign(instance_id, sign) for (instance_id, _), sign in zip(looks, signs, strict=True)
    )


def _due(session: Session) -> list[tuple[UUID, Callable[[], GuestSign | None]]]:
    rows = session.execute(
        select(Instance, Node)
        .join(Resource, Resource.resource_id == Instance.instance_id)
        .join(Node, Node.node_id == Instance.node_id)
        .where(
            Instance.seed_has_password,
            Instance.seed_generation > SECRET_GENERATION,
            or_(Instance.seed_look_at.is_(None), Instance.seed_look_at <= func.now()),
            Instance.desired_state == DesiredState.RUNNING,
            Instance.observed_state == ObservedState.RUNNING,
            Resource.active_operation_id.is_(None),
            Node.health == NodeHealth.REACHABLE,
        )
        .order_by(Instance.seed_look_at)
        .limit(LOOKS_MAX)
    ).all()
    return [(row.instance_id, _looker(session, row, node)) for row, node in rows]


def _looker(session: Session, row: Instance, node: Node) -> Callable[[], GuestSign | None]:
    """Asks for the guest's sign; None when its node does not answer."""
    hypervisor = engines(session, row.location_id).hypervisor
    reached, instance_id = endpoint(node), row.instance_id

    def look() -> GuestSign | None:
        try:
            return hypervisor.guest_sign(reached, instance_id)
        except EngineError:
            return None

    return look


def note_sign(instance_id: UUID, sign: GuestSign | None) -> bool:
    """Notes what was seen, and begins the scrubbing when the guest has read its seed; whether it did."""
    with transaction() as session:
        resource = lock(session, instance_id)
        assert resource is not None
        instance = session.get_one(Instance, instance_id, with_for_update=True)
        if resource.active_operation_id is not None or not instance.seed_has_password:
            return False
        moment = now()
        is_heard = sign in (GuestSign.AGENT, GuestSign.TRAFFIC)
        interval_s = LOOK_INTERVAL_S if is_heard else SILENT_INTERVAL_S
        instance.seed_look_at = moment + timedelta(seconds=interval_s)
        if sign is not None:
            instance.seed_heard_at = (instance.seed_heard_at or moment) if is_heard else None
        if sign is not GuestSign.AGENT and not _is_heard_long(instance.seed_heard_at, moment):
            return False
        begin(
            session,
            caller=ControlPlane("system:password_boot"),
            plan=SCRUB_SEED,
            resource=resource,
            resource_kind=ResourceKind.INSTANCE,
            subject_id=instance_id,
        )
        return True


def _is_heard_long(since: datetime | None, moment: datetime) -> bool:
    return since is not None and moment - since >= timedelta(seconds=READ_MARGIN_S)
