"""Durable work for who looks at guests.

instance.capture   a picture of the guest's screen, or the end of its serial log, for whoever waits for it
"""

from __future__ import annotations

import base64
from datetime import timedelta
from uuid import UUID

import structlog

from awan.errors import Conflict, EngineError, EngineRejected, Unavailable
from awan.instances.models import CaptureKind, InstanceCapture
from awan.instances.rules import SERIAL_LOG_KIB_MAX
from awan.instances.situation import read_situation
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.secrets import put_secret
from awan.operations import durable_step, waiting_workflow
from awan.operations.watch import notify

CAPTURE = "instance.capture.v1"
# No secret of an instance: nothing refers to it from there.
CAPTURE_PURPOSE = "capture.content"
KEPT_S = 60

log = structlog.get_logger(__name__)


@waiting_workflow(CAPTURE)
def capture(instance_id: str, capture_id: str, kind: str) -> None:
    """Captures what a guest shows for whoever waits for it. A failure is an answer too."""
    durable_step("take", take, instance_id, capture_id, kind)


def take(instance_id: str, capture_id: str, kind: str) -> None:
    """What was captured, or why nothing was, is stored under the capture's id and its waiters are woken."""
    content, error_type = _take(UUID(instance_id), CaptureKind(kind))
    with transaction() as session:
        row = session.get(InstanceCapture, (UUID(instance_id), kind), with_for_update=True)
        if row is None or row.capture_id != UUID(capture_id) or row.ended_at is not None:
            return
        if content is not None:
            text = base64.b64encode(content).decode()
            secret_id = put_secret(
                session, CAPTURE_PURPOSE, text, now() + timedelta(seconds=KEPT_S)
            )
            session.flush()
            row.secret_id = secret_id
        row.error_type = error_type
        row.ended_at = now()
        notify(session, row.capture_id)


def _take(instance_id: UUID, kind: CaptureKind) -> tuple[bytes | None, str | None]:
    it = read_situation(instance_id)
    hypervisor = it.engines.hypervisor
    try:
        if kind is CaptureKind.SCREEN:
            return hypervisor.screenshot(it.node, instance_id), None
        size = SERIAL_LOG_KIB_MAX * 1024
        return hypervisor.read_serial_log(it.node, instance_id, bytes_max=size), None
    except EngineRejected as err:
        log.info("instance.capture_refused", instance=str(instance_id), kind=kind, error=str(err))
        return None, Conflict.type
    except EngineError as err:
        log.warning("instance.capture_failed", instance=str(instance_id), kind=kind, error=str(err))
        return None, Unavailable.type
