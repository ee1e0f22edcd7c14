"""`/instances/{uuid}/password` and what else reaches into the guest: operations 19 and 22, screen and serial log."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends, Response

from awan.accounts import Caller, authenticated
from awan.instances import captures, guest, service
from awan.instances.answers import GOES_ON, operation_view, quick
from awan.instances.models import CaptureKind
from awan.instances.present import show_detail
from awan.instances.rules import readable_serial
from awan.instances.schemas import HostnameChange, PasswordChange, RenamedInstance, SerialLogQuery
from awan.kit.database import transaction
from awan.kit.http import Answer, Envelope, Request, answer, form_body, query_of
from awan.operations.models import OperationStatus
from awan.operations.quick import status_of
from awan.resources import ResourceKind, in_path

router = APIRouter(prefix="/instances", tags=["Instance"])
_check_path = in_path(ResourceKind.INSTANCE, "instance_uuid")


class PngResponse(Response):
    """A picture."""

    media_type = "image/png"


class TextResponse(Response):
    """Text that nobody takes for anything else."""

    media_type = "text/plain"


@router.put(
    "/{instance_uuid:uuid}/password",
    response_model=Envelope[None],
    responses={202: {"model": Envelope[None], "description": GOES_ON}},
)
def set_instance_password(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PasswordChange = Depends(form_body(PasswordChange, path_check=_check_path)),
) -> Answer:
    """Set password instance: that of its first account, `username`.

    A running guest's agent sets it at once. When the agent does not answer, that is 409 and nothing is changed: stop
    the instance and set the password then. A stopped guest takes it at its next boot, by cloud-init: `warnings` says
    so.
    """
    ended = quick(
        request,
        caller,
        instance_uuid,
        lambda session: guest.set_password(session, caller, instance_uuid, body),
    )
    with transaction() as session:
        view = service.get_kept_view(session, instance_uuid)
    return answer(
        "Virtual machine password successfully updated",
        None,
        status=status_of(ended),
        operation=operation_view(ended),
        warnings=[guest.NEXT_BOOT] if view.instance.seed_has_password else None,
    )


@router.put(
    "/{instance_uuid:uuid}/hostname",
    response_model=Envelope[RenamedInstance],
    responses={202: {"model": Envelope[RenamedInstance], "description": GOES_ON}},
)
def rename_instance(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: HostnameChange = Depends(form_body(HostnameChange, path_check=_check_path)),
) -> Answer:
    """Update hostname, in the guest too.

    `applied` says when the guest has it: `now`, by its agent, or at its `next_boot`, when it is stopped or has no agent
    that answers.
    """
    ended = quick(
        request,
        caller,
        instance_uuid,
        lambda session: guest.rename(session, caller, instance_uuid, body.hostname),
    )
    with transaction() as session:
        shown = show_detail(session, service.get_kept_view(session, instance_uuid))
    is_known = ended.status == OperationStatus.SUCCEEDED
    return answer(
        "Hostname successfully updated",
        RenamedInstance(**dict(shown), applied=shown.hostname_applied if is_known else None),
        status=status_of(ended),
        operation=operation_view(ended),
    )


@router.get(
    "/{instance_uuid:uuid}/screenshot",
    response_class=PngResponse,
    responses={409: {"$ref": "#/components/responses/Conflict"}},
)
def get_instance_screenshot(
    instance_uuid: UUID, caller: Caller = Depends(authenticated("read"))
) -> Response:
    """What the screen of a running instance shows, as a PNG. Calls within two seconds share one picture."""
    with transaction() as session:
        capture_id = captures.request_screen(session, caller, instance_uuid)
    return PngResponse(captures.wait_for_capture(instance_uuid, CaptureKind.SCREEN, capture_id))


@router.get(
    "/{instance_uuid:uuid}/console/log",
    response_class=TextResponse,
    responses={409: {"$ref": "#/components/responses/Conflict"}},
)
def get_instance_serial_log(
    instance_uuid: UUID,
    caller: Caller = Depends(authenticated("read")),
    query: SerialLogQuery = Depends(query_of(SerialLogQuery, path_check=_check_path)),
) -> Response:
    """What the instance has printed last on its serial console (`console=ttyS0`), also while it is stopped.

    Plain text: control sequences of terminals, and all characters that cannot be printed, are taken out. What it says
    is the guest's own word. It goes over all runs of the instance; some megabytes are kept, and calls within two
    seconds share one reading.
    """
    with transaction() as session:
        capture_id = captures.request_serial_log(session, caller, instance_uuid)
    content = captures.wait_for_capture(instance_uuid, CaptureKind.SERIAL_LOG, capture_id)
    return TextResponse(readable_serial(content, query.kib * 1024))
