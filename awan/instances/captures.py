"""What guests show: pictures of their screens, and what they print on their serial consoles.

A worker captures it, for only workers speak to engines; whoever asked waits for it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import delete
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.errors import Conflict, NotFound, Refused, Unavailable
from awan.instances.capture_workflows import CAPTURE, CAPTURE_PURPOSE, KEPT_S
from awan.instances.models import CaptureKind, DesiredState, InstanceCapture, ObservedState
from awan.instances.service import get_view, refuse_if_unreachable, require_state
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.ids import derived_id, new_id
from awan.kit.secrets import delete_secret, get_secret
from awan.operations import durable, enqueue_prompt
from awan.operations.watch import wait_until
from awan.settings import get_settings

# Who asks again within this time gets the same: a screen that many look at is captured once.
SHARED_S = 2.0
HISTORY_BATCH = 500

NOT_THERE = {
    CaptureKind.SCREEN: "The instance has no screen at the moment.",
    CaptureKind.SERIAL_LOG: "The serial console of the instance cannot be read at the moment.",
}
NO_ANSWER = {
    CaptureKind.SCREEN: "The screen could not be read in time. Please try again.",
    CaptureKind.SERIAL_LOG: "The serial console could not be read in time. Please try again.",
}


def request_screen(session: Session, caller: Caller, instance_id: UUID) -> UUID:
    """Asks for a picture of a running instance's screen; the id to wait for it by. Raises: NotFound, Conflict."""
    view = get_view(session, caller, instance_id)
    require_state(view.instance, ObservedState.RUNNING, "looked at")
    return _request(session, instance_id, CaptureKind.SCREEN)


def request_serial_log(session: Session, caller: Caller, instance_id: UUID) -> UUID:
    """Asks for what an instance has printed on its serial console, also while it is stopped; the id to wait by.

    Raises: NotFound; Conflict while its node does not answer, and for one that was never made.
    """
    instance = get_view(session, caller, instance_id).instance
    refuse_if_unreachable(session, instance)
    if instance.node_id is None or instance.desired_state == DesiredState.DELETED:
        raise Conflict(NOT_THERE[CaptureKind.SERIAL_LOG])
    return _request(session, instance_id, CaptureKind.SERIAL_LOG)


def _request(session: Session, instance_id: UUID, kind: CaptureKind) -> UUID:
    capture_id = new_id()
    wanted = insert(InstanceCapture).values(
        instance_id=instance_id, kind=kind, capture_id=capture_id
    )
    # An update that changes nothing locks the row in the same statement: `forget_captures` cannot come in between.
    row = session.scalars(
        wanted.on_conflict_do_update(
            index_elements=[InstanceCapture.instance_id, InstanceCapture.kind],
            set_={"instance_id": wanted.excluded.instance_id},
        ).returning(InstanceCapture),
        execution_options={"populate_existing": True},
    ).one()
    if row.capture_id != capture_id:
        if _is_shared(row):
            return row.capture_id
        if row.secret_id is not None:
            delete_secret(session, row.secret_id)
        row.capture_id, row.requested_at = capture_id, now()
        row.ended_at = row.secret_id = row.error_type = None
        session.flush()
    # One at a time of each instance: a guest whose QEMU hangs holds one place of the queue.
    enqueue_prompt(
        session,
        CAPTURE,
        str(capture_id),
        derived_id(instance_id, "capture"),
        str(instance_id),
        str(capture_id),
        str(kind),
    )
    return capture_id


def _is_shared(row: InstanceCapture) -> bool:
    """Whether the capture is still awaited by others, or so fresh that it serves once more."""
    age = now() - row.requested_at
    return age < timedelta(
        seconds=SHARED_S if row.ended_at is not None else get_settings().operation_wait_s
    )


@dataclass(frozen=True)
class Outcome:
    """What became of a capture: its content, or why there is none."""

    content: bytes = b""
    refused: Refused | None = None


def wait_for_capture(instance_id: UUID, kind: CaptureKind, capture_id: UUID) -> bytes:
    """What was captured. Blocks, outside transactions, as long as quick calls wait for their operations.

    Raises: Conflict when the guest has no such thing now, Unavailable when it is not there in time.
    """
    outcome = wait_until(
        capture_id, lambda: _read(instance_id, kind, capture_id), get_settings().operation_wait_s
    )
    if outcome is None:
        raise Unavailable(NO_ANSWER[kind])
    if outcome.refused is not None:
        raise outcome.refused
    return outcome.content


def _read(instance_id: UUID, kind: CaptureKind, capture_id: UUID) -> Outcome | None:
    """What became of the capture, or None while it is awaited."""
    with transaction() as session:
        row = session.get(InstanceCapture, (instance_id, kind))
        if row is None or row.capture_id != capture_id:
            # Somebody has asked again since, after the capture had been there for a while.
            return Outcome(refused=Unavailable(NO_ANSWER[kind]))
        if row.ended_at is None:
            return None
        if row.error_type == Conflict.type:
            return Outcome(refused=Conflict(NOT_THERE[kind]))
        if row.secret_id is None:
            return Outcome(refused=Unavailable(NO_ANSWER[kind]))
        try:
            return Outcome(base64.b64decode(get_secret(session, row.secret_id, CAPTURE_PURPOSE)))
        except NotFound:
            return Outcome(refused=Unavailable(NO_ANSWER[kind]))


def forget_captures() -> int:
    """Removes what nobody fetches any more, and the history of its capture; how many. For a schedule."""
    before = now() - timedelta(seconds=KEPT_S)
    with transaction() as session:
        gone = session.scalars(
            delete(InstanceCapture)
            .where(InstanceCapture.requested_at < before)
            .returning(InstanceCapture.secret_id)
        ).all()
        for secret_id in gone:
            if secret_id is not None:
                delete_secret(session, secret_id)
    while durable.forget_finished(before, HISTORY_BATCH, name=CAPTURE):
        pass
    return len(gone)
