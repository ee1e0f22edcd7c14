"""`/instances/{uuid}/start` and the like: operations 10, 11 and 12 of the public API, and a hard reset."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends

from awan.accounts import Caller, authenticated
from awan.instances import guest, service
from awan.instances.answers import begun
from awan.instances.schemas import InstanceDetail, PowerRequest
from awan.kit.http import Answer, EmptyForm, Envelope, Request, form_body
from awan.resources import ResourceKind, in_path

router = APIRouter(prefix="/instances", tags=["Instance"])
_check_path = in_path(ResourceKind.INSTANCE, "instance_uuid")


@router.post(
    "/{instance_uuid:uuid}/start", status_code=202, response_model=Envelope[InstanceDetail]
)
def start_instance(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Start instance."""
    return begun(
        request,
        caller,
        instance_uuid,
        "Start process on instance",
        lambda session: service.start(session, caller, instance_uuid),
    )


@router.post("/{instance_uuid:uuid}/stop", status_code=202, response_model=Envelope[InstanceDetail])
def stop_instance(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PowerRequest = Depends(form_body(PowerRequest, path_check=_check_path)),
) -> Answer:
    """Stop instance: the guest is asked by ACPI and has 60 s; then, or at once with `force`, the power is cut."""
    return begun(
        request,
        caller,
        instance_uuid,
        "Stop process on vm instance",
        lambda session: service.stop(session, caller, instance_uuid, force=bool(body.force)),
    )


@router.post(
    "/{instance_uuid:uuid}/restart", status_code=202, response_model=Envelope[InstanceDetail]
)
def restart_instance(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PowerRequest = Depends(form_body(PowerRequest, path_check=_check_path)),
) -> Answer:
    """Restart instance: stopped as by `stop`, then started in a new process of the hypervisor."""
    return begun(
        request,
        caller,
        instance_uuid,
        "Restart process on VM instance",
        lambda session: service.restart(session, caller, instance_uuid, force=bool(body.force)),
    )


@router.post(
    "/{instance_uuid:uuid}/reset", status_code=202, response_model=Envelope[InstanceDetail]
)
def reset_instance(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Reset instance: as by the reset button. The guest is not asked and may lose what it has not written yet."""
    return begun(
        request,
        caller,
        instance_uuid,
        "Reset process on instance",
        lambda session: guest.reset(session, caller, instance_uuid),
    )
