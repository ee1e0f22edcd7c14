"""`/instances`: operations 2, 3, 4, 9 to 13 and 48 of the public API."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, idempotent, replay
from awan.accounts.idempotency import EarlierAnswer
from awan.errors import Invalid
from awan.instances import create as creation
from awan.instances import service
from awan.instances.present import show_detail, show_key, show_rows
from awan.instances.rules import STATUSES
from awan.instances.schemas import (
    InstalledKey,
    InstanceCreate,
    InstanceDelete,
    InstanceDeleteForm,
    InstanceDetail,
    InstanceOption,
    InstancePage,
    ListQuery,
    OptionsQuery,
    PowerRequest,
)
from awan.kit.database import transaction
from awan.kit.http import (
    Answer,
    EmptyForm,
    Envelope,
    OperationView,
    Request,
    answer,
    form_body,
    query_of,
)
from awan.kit.pagination import PageRequest, page_info
from awan.operations import Operation, summary
from awan.resources import ResourceKind, in_path

CONSOLE_ONLY = "The instance has no network: it can be reached by the console only."

router = APIRouter(prefix="/instances", tags=["Instance"])
_check_path = in_path(ResourceKind.INSTANCE, "instance_uuid")


@router.get("", response_model=Envelope[InstancePage])
def list_instances(
    caller: Caller = Depends(authenticated("read")),
    query: ListQuery = Depends(query_of(ListQuery)),
) -> Answer:
    """Get all instances."""
    page = PageRequest(query.page, query.limit)
    with transaction() as session:
        views, total = service.list_instances(
            session,
            caller.account_id,
            page,
            search=query.search,
            sort=query.sort,
            statuses=_statuses(query.statuses),
        )
        running = service.newest_running(session, caller.account_id)
        rows = show_rows(session, views)
    return answer(
        "Virtual machines list",
        {
            "data": rows,
            "active_operation": _operation(running),
            "page": page_info(page, total, len(rows)),
        },
    )


def _statuses(text: str | None) -> list[str] | None:
    if text is None:
        return None
    wanted = [part.strip().lower() for part in text.split(",")]
    if unknown := [status for status in wanted if status not in STATUSES]:
        raise Invalid.field(
            "statuses", f'Unknown status "{unknown[0]}"; there are {", ".join(STATUSES)}.'
        )
    return wanted


def _operation(operation: Operation | None) -> OperationView | None:
    return OperationView(**summary(operation)) if operation is not None else None


@router.post("", status_code=202, response_model=Envelope[InstanceDetail])
def create_instance(
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: InstanceCreate = Depends(form_body(InstanceCreate)),
) -> Answer:
    """Create instance."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, call.earlier)
        instance, operation = creation.create_instance(session, caller, body)
        data = show_detail(session, service.get_view(session, caller, instance.instance_id))
        return call.keep(
            answer(
                "Vm berhasil dibuat",
                data,
                status=202,
                operation=_operation(operation),
                warnings=None if body.use_public_ip else [CONSOLE_ONLY],
            ),
            instance.instance_id,
        )


def _again(session: Session, earlier: EarlierAnswer) -> Answer:
    """The answer of a call that was made before, with the instance and its operation as they are now."""
    data = show_detail(session, service.get_kept_view(session, UUID(earlier.resource_id)))
    operation = session.get(Operation, earlier.operation_id) if earlier.operation_id else None
    return replay(earlier, data, operation=_operation(operation))


@router.get("/options", response_model=Envelope[list[InstanceOption]])
def list_instance_options(
    caller: Caller = Depends(authenticated("read")),
    query: OptionsQuery = Depends(query_of(OptionsQuery)),
) -> Answer:
    """Get options: instances of a location that have no public network."""
    with transaction() as session:
        rows = service.without_public_network(session, caller.account_id, query.location_id)
    return answer(
        "Instance options with no public network",
        [
            InstanceOption(
                uuid=row["instance_id"], hostname=row["hostname"], status=row["status"].title()
            )
            for row in rows
        ],
    )


@router.get("/{instance_uuid:uuid}", response_model=Envelope[InstanceDetail])
def get_instance(instance_uuid: UUID, caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get detail instance."""
    with transaction() as session:
        data = show_detail(session, service.get_view(session, caller, instance_uuid))
    return answer("Virtual machine details", data)


@router.delete("/{instance_uuid:uuid}", status_code=202, response_model=Envelope[list[str]])
def delete_instance(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("delete")),
    body: InstanceDelete = Depends(
        form_body(InstanceDelete, path_check=_check_path, or_query=True)
    ),
) -> Answer:
    """Delete instance. The same as `POST` with `_method=DELETE`."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            operation = (
                session.get(Operation, call.earlier.operation_id)
                if call.earlier.operation_id
                else None
            )
            return replay(call.earlier, [], operation=_operation(operation))
        operation = service.delete(session, caller, instance_uuid, remove_ip=body.remove_ip)
        return call.keep(
            answer(
                "Virtual machine is on terminating process",
                [],
                status=202,
                operation=_operation(operation),
            ),
            instance_uuid,
        )


@router.post("/{instance_uuid:uuid}", status_code=202, response_model=Envelope[list[str]])
def delete_instance_by_form(
    instance_uuid: UUID,
    caller: Caller = Depends(authenticated("delete")),
    body: InstanceDeleteForm = Depends(form_body(InstanceDeleteForm, path_check=_check_path)),
) -> Answer:
    """Delete instance, as a form with `_method=DELETE`."""
    # The method is applied before routing: what comes here has named none.
    raise Invalid.field("_method", "The _method must be DELETE.")


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
    return _power(
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
    return _power(
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
    return _power(
        request,
        caller,
        instance_uuid,
        "Restart process on VM instance",
        lambda session: service.restart(session, caller, instance_uuid, force=bool(body.force)),
    )


def _power(
    request: Request,
    caller: Caller,
    instance_id: UUID,
    message: str,
    change: Callable[[Session], Operation],
) -> Answer:
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, call.earlier)
        operation = change(session)
        data = show_detail(session, service.get_view(session, caller, instance_id))
        return call.keep(
            answer(message, data, status=202, operation=_operation(operation)), instance_id
        )


@router.get("/{instance_uuid:uuid}/ssh-keys", response_model=Envelope[list[InstalledKey]])
def list_instance_ssh_keys(
    instance_uuid: UUID, caller: Caller = Depends(authenticated("read"))
) -> Answer:
    """Get SSH keys instance: those installed at creation."""
    with transaction() as session:
        view = service.get_view(session, caller, instance_uuid)
        keys = service.installed_keys(session, view.instance.instance_id)
    return answer("VM", [show_key(key) for key in keys])
