"""Pictures of guests' screens. A worker takes them, for only workers speak to engines; whoever asked waits for it."""

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
from awan.instances.guest_workflows import SCREEN, SCREEN_KEPT_S, SCREEN_PURPOSE
from awan.instances.models import InstanceScreen, ObservedState
from awan.instances.service import get_view, require_state
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.ids import new_id
from awan.kit.secrets import delete_secret, get_secret
from awan.operations import durable, enqueue_wait
from awan.operations.watch import wait_until
from awan.settings import get_settings

# Who asks again within this time gets the same picture: a screen that many look at is taken once.
SHARED_S = 2.0
HISTORY_BATCH = 500

NO_SCREEN = "The instance has no screen at the moment."
NO_ANSWER = "The screen could not be read in time. Please try again."


def request_screen(session: Session, caller: Caller, instance_id: UUID) -> UUID:
    """Asks for a picture of a running instance's screen; the id to wait for it by. Raises: NotFound, Conflict."""
    view = get_view(session, caller, instance_id)
    require_state(view.instance, ObservedState.RUNNING, "looked at")
    capture_id = new_id()
    wanted = insert(InstanceScreen).values(instance_id=instance_id, capture_id=capture_id)
    # An update that changes nothing locks the row in the same statement: `forget_screens` cannot come in between.
    row = session.scalars(
        wanted.on_conflict_do_update(
            index_elements=[InstanceScreen.instance_id],
            set_={"instance_id": wanted.excluded.instance_id},
        ).returning(InstanceScreen),
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
    enqueue_wait(session, SCREEN, str(capture_id), str(instance_id), str(capture_id))
    return capture_id


def _is_shared(row: InstanceScreen) -> bool:
    """Whether the picture is still awaited by others, or so fresh that it serves once more."""
    age = now() - row.requested_at
    return age < timedelta(
        seconds=SHARED_S if row.ended_at is not None else get_settings().operation_wait_s
    )


@dataclass(frozen=True)
class Outcome:
    """What became of a capture: a picture, or why there is none."""

    png: bytes = b""
    refused: Refused | None = None


def wait_for_screen(instance_id: UUID, capture_id: UUID) -> bytes:
    """The picture, a PNG. Blocks, outside transactions, as long as quick calls wait for their operations.

    Raises: Conflict when the guest has no screen now, Unavailable when there is no picture in time.
    """
    outcome = wait_until(
        capture_id, lambda: _read(instance_id, capture_id), get_settings().operation_wait_s
    )
    if outcome is None:
        raise Unavailable(NO_ANSWER)
    if outcome.refused is not None:
        raise outcome.refused
    return outcome.png


def _read(instance_id: UUID, capture_id: UUID) -> Outcome | None:
    """What became of the capture, or None while it is awaited."""
    with transaction() as session:
        row = session.get(InstanceScreen, instance_id)
        if row is None or row.capture_id != capture_id:
            # Somebody has asked again since, after the picture had been there for a while.
            return Outcome(refused=Unavailable(NO_ANSWER))
        if row.ended_at is None:
            return None
        if row.error_type == Conflict.type:
            return Outcome(refused=Conflict(NO_SCREEN))
        if row.secret_id is None:
            return Outcome(refused=Unavailable(NO_ANSWER))
        try:
            return Outcome(base64.b64decode(get_secret(session, row.secret_id, SCREEN_PURPOSE)))
        except NotFound:
            return Outcome(refused=Unavailable(NO_ANSWER))


def forget_screens() -> int:
    """Removes pictures that nobody fetches any more, and the history of their taking; how many. For a schedule."""
    before = now() - timedelta(seconds=SCREEN_KEPT_S)
    with transaction() as session:
        gone = session.scalars(
            delete(InstanceScreen)
            .where(InstanceScreen.requested_at < before)
            .returning(InstanceScreen.secret_id)
        ).all()
        for secret_id in gone:
            if secret_id is not None:
                delete_secret(session, secret_id)
    while durable.forget_finished(before, HISTORY_BATCH, name=SCREEN):
        pass
    return len(gone)
