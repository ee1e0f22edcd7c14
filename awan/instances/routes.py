"""`/instances`: operations 2, 3, 4, 9, 13 and 48 of the public API, bulk actions, labels and protection."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, once, replay
from awan.accounts.idempotency import EarlierAnswer
from awan.errors import Invalid
from awan.instances import bulk, guest, service
from awan.instances import create as creation
from awan.instances.answers import again, changed, operation_view
from awan.instances.present import show_detail, show_key, show_left_over, show_rows, show_with
from awan.instances.schemas import (
    BulkAction,
    BulkResult,
    InstalledKey,
    InstanceCreate,
    InstanceDelete,
    InstanceDeleteForm,
    InstanceDetail,
    InstanceOption,
    InstancePage,
    LabelsChange,
    LeftOver,
    LeftOverQuery,
    ListQuery,
    OptionsQuery,
    ProtectionChange,
)
from awan.kit.database import transaction
from awan.kit.http import Answer, Envelope, Request, answer, form_body, query_of
from awan.kit.pagination import PageRequest, page_info
from awan.operations import Operation
from awan.resources import ResourceKind, in_path

CONSOLE_ONLY = "The instance has no network: it can be reached by the console only."
NOTHING_BEGUN = "Nothing was begun; each result has its error."
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
            query.filters(),
            query.sort,
        )
        running = service.newest_running(session, caller.account_id)
        rows = show_rows(session, views)
    return answer(
        "Virtual machines list",
        {
            "data": rows,
            "active_operation": operation_view(running),
            "page": page_info(page, total, len(rows)),
        },
    )


@router.post("", status_code=202, response_model=Envelope[InstanceDetail])
def create_instance(
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: InstanceCreate = Depends(form_body(InstanceCreate)),
) -> Answer:
    """Create instance."""

    def create(session: Session) -> tuple[Answer, UUID]:
        view, belongings = creation.create_instance(session, caller, body)
        begun = answer(
            "Vm berhasil dibuat",
            show_with(view, belongings),
            status=202,
            operation=operation_view(view.operation),
            warnings=None if body.use_public_ip or body.vswitch else [CONSOLE_ONLY],
        )
        return begun, view.instance.instance_id

    return once(request, caller, create, again)


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


@router.post(
    "/actions",
    status_code=202,
    response_model=Envelope[list[BulkResult]],
    responses={200: {"model": Envelope[list[BulkResult]], "description": NOTHING_BEGUN}},
)
def act_on_instances(
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: BulkAction = Depends(form_body(BulkAction)),
) -> Answer:
    """Start, stop, restart or reset many instances, by uuids or by label; each has a result of its own.

    An instance on which nothing can be begun (busy, or in the wrong state) has an error and leaves the others alone.
    202 says that something was begun, 200 that nothing was: all were refused, or the label is on none.
    """

    def act(session: Session) -> tuple[Answer, str]:
        results = bulk.act(session, caller, body)
        status = 202 if any(result.operation for result in results) else 200
        return answer("Bulk action", results, status=status), bulk.remember(results)

    def recall(session: Session, earlier: EarlierAnswer) -> Answer:
        return replay(earlier, bulk.recall(session, earlier.resource_id or ""))

    return once(request, caller, act, recall)


@router.get("/{instance_uuid:uuid}", response_model=Envelope[InstanceDetail])
def get_instance(instance_uuid: UUID, caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get detail instance."""
    with transaction() as session:
        data = show_detail(session, service.get_view(session, caller, instance_uuid))
    return answer("Virtual machine details", data)


@router.get("/{instance_uuid:uuid}/left-over", response_model=Envelope[list[LeftOver]])
def list_left_over(
    instance_uuid: UUID,
    caller: Caller = Depends(authenticated("read")),
    query: LeftOverQuery = Depends(query_of(LeftOverQuery)),
) -> Answer:
    """What a deletion would leave: things that stay yours, and are billed on. Nothing is changed."""
    with transaction() as session:
        service.get_view(session, caller, instance_uuid)
        data = show_left_over(session, instance_uuid, remove_ip=query.remove_ip)
    return answer("Left over after deletion", data)


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

    def delete(session: Session) -> tuple[Answer, UUID]:
        operation = service.delete(session, caller, instance_uuid, remove_ip=body.remove_ip)
        begun = answer(
            "Virtual machine is on terminating process",
            [],
            status=202,
            operation=operation_view(operation),
        )
        return begun, instance_uuid

    def recall(session: Session, earlier: EarlierAnswer) -> Answer:
        operation = session.get(Operation, earlier.operation_id) if earlier.operation_id else None
        return replay(earlier, [], operation=operation_view(operation))

    return once(request, caller, delete, recall)


@router.post("/{instance_uuid:uuid}", status_code=202, response_model=Envelope[list[str]])
def delete_instance_by_form(
    instance_uuid: UUID,
    caller: Caller = Depends(authenticated("delete")),
    body: InstanceDeleteForm = Depends(form_body(InstanceDeleteForm, path_check=_check_path)),
) -> Answer:
    """Delete instance, as a form with `_method=DELETE`."""
    # The method is applied before routing: what comes here has named none.
    raise Invalid.field("_method", "The _method must be DELETE.")


@router.put("/{instance_uuid:uuid}/labels", response_model=Envelope[InstanceDetail])
def set_instance_labels(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: LabelsChange = Depends(form_body(LabelsChange, path_check=_check_path)),
) -> Answer:
    """Replace the labels of an instance. `GET /instances?label=env:prod` finds instances by them."""
    return changed(
        request,
        caller,
        instance_uuid,
        "Labels successfully updated",
        lambda session: guest.set_labels(session, caller, instance_uuid, body.labels),
    )


@router.put("/{instance_uuid:uuid}/protection", response_model=Envelope[InstanceDetail])
def set_instance_protection(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: ProtectionChange = Depends(form_body(ProtectionChange, path_check=_check_path)),
) -> Answer:
    """Protect an instance against deletion, or no longer. Deleting a protected one is 409 `PROTECTED`."""
    return changed(
        request,
        caller,
        instance_uuid,
        "Protection successfully updated",
        lambda session: guest.set_protection(session, caller, instance_uuid, body.is_protected),
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
