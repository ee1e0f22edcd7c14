"""`/instances`: operations 2, 3, 4, 9 to 13, 16, 17, 19, 22, 48 and 60 of the public API, and what goes beyond it."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from fastapi import APIRouter, Depends, Response
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, idempotent, once, replay
from awan.accounts.idempotency import EarlierAnswer
from awan.errors import Invalid
from awan.instances import bulk, captures, guest, private_cards, public_networks, service
from awan.instances import create as creation
from awan.instances.models import CaptureKind
from awan.instances.present import show_detail, show_key, show_left_over, show_rows
from awan.instances.rules import STATUSES, parse_label_filter, readable_serial
from awan.instances.schemas import (
    AddressAssignment,
    BulkAction,
    BulkResult,
    HostnameChange,
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
    PasswordChange,
    PowerRequest,
    PrivateNetworkChange,
    ProtectionChange,
    PublicNetworkAssignment,
    RenamedInstance,
    SerialLogQuery,
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
from awan.operations.models import OperationStatus
from awan.operations.quick import status_of, wait_for_success
from awan.resources import ResourceKind, in_path

CONSOLE_ONLY = "The instance has no network: it can be reached by the console only."

NOTHING_BEGUN = "Nothing was begun; each result has its error."
DETACHED = "Instance successfully detached from Private Network"
GOES_ON = "The change was accepted and takes longer: follow its operation."


class PngResponse(Response):
    """A picture."""

    media_type = "image/png"


class TextResponse(Response):
    """Text that nobody takes for anything else."""

    media_type = "text/plain"


router = APIRouter(prefix="/instances", tags=["Instance"])
addresses_router = APIRouter(prefix="/networks/public", tags=["Networks"])
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
            labels=parse_label_filter(query.label) if query.label is not None else None,
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
                warnings=None if body.use_public_ip or body.vswitch else [CONSOLE_ONLY],
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
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, bulk.recall(session, call.earlier.resource_id or ""))
        results = bulk.act(session, caller, body)
        status = 202 if any(result.operation for result in results) else 200
        return call.keep(answer("Bulk action", results, status=status), bulk.remember(results))


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
    return _power(
        request,
        caller,
        instance_uuid,
        "Reset process on instance",
        lambda session: guest.reset(session, caller, instance_uuid),
    )


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
    ended = _quick(
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
        operation=_operation(ended),
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
    ended = _quick(
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
        operation=_operation(ended),
    )


@router.post(
    "/{instance_uuid:uuid}/public-network",
    response_model=Envelope[InstanceDetail],
    responses={202: {"model": Envelope[InstanceDetail], "description": GOES_ON}},
)
def add_instance_public_network(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Add public network instance: a new address, and a card for it; a running guest gets both while it runs."""
    return _change_public_network(
        request,
        caller,
        instance_uuid,
        "Public Network Address successfully added to the instance",
        lambda session: public_networks.add(session, caller, instance_uuid),
    )


@router.put(
    "/{instance_uuid:uuid}/public-network",
    response_model=Envelope[InstanceDetail],
    responses={202: {"model": Envelope[InstanceDetail], "description": GOES_ON}},
)
def change_instance_public_network(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PublicNetworkAssignment = Depends(
        form_body(PublicNetworkAssignment, path_check=_check_path)
    ),
) -> Answer:
    """Change public network instance: another free address, or none. No reboot; the former address stays yours.

    A running guest's card is taken and given back, so that it asks for its address.
    """
    wanted = body.public_network
    return _change_public_network(
        request,
        caller,
        instance_uuid,
        f"Instance's Public Network successfully {'removed' if wanted is None else 'changed'}.",
        lambda session: public_networks.change(session, caller, instance_uuid, wanted),
    )


def _change_public_network(
    request: Request,
    caller: Caller,
    instance_id: UUID,
    message: str,
    change: Callable[[Session], Operation],
) -> Answer:
    ended = _quick(request, caller, instance_id, change)
    with transaction() as session:
        data = show_detail(session, service.get_kept_view(session, instance_id))
    return answer(message, data, status=status_of(ended), operation=_operation(ended))


@addresses_router.put(
    "/{ip_uuid:uuid}/instance",
    response_model=Envelope[list[str]],
    responses={202: {"model": Envelope[list[str]], "description": GOES_ON}},
)
def change_address_instance(
    ip_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: AddressAssignment = Depends(
        form_body(AddressAssignment, path_check=in_path(ResourceKind.PUBLIC_IP, "ip_uuid"))
    ),
) -> Answer:
    """Change instance IP: to another instance, also from one that has it, while both run; empty: detached.

    Between the two the address is unreachable for as long as the other guest takes to ask for it.
    """
    wanted = body.instance_id
    ended = _quick(
        request,
        caller,
        ip_uuid,
        lambda session: public_networks.attach(session, caller, ip_uuid, wanted),
    )
    return answer(
        f"Public network instance successfully {'removed' if wanted is None else 'changed'}.",
        [],
        status=status_of(ended),
        operation=_operation(ended),
    )


def _quick(
    request: Request,
    caller: Caller,
    instance_id: UUID,
    change: Callable[[Session], Operation],
) -> Operation:
    """Begins a change and waits for its end. Raises: as `wait_for_success`.

    A repeat of the call waits for the same operation: of one that went on at the first answer, it tells the end.
    """

    def begin(session: Session) -> tuple[Answer, UUID]:
        return answer("", None, operation=_operation(change(session))), instance_id

    def again(session: Session, earlier: EarlierAnswer) -> Answer:
        operation = session.get_one(Operation, earlier.operation_id)
        return replay(earlier, None, operation=_operation(operation))

    begun = once(request, caller, begin, again)
    assert begun.operation is not None
    return wait_for_success(begun.operation.uuid)


@router.put(
    "/{instance_uuid:uuid}/private-network",
    response_model=Envelope[InstanceDetail],
    responses={202: {"model": Envelope[InstanceDetail], "description": GOES_ON}},
)
def change_private_network(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PrivateNetworkChange = Depends(form_body(PrivateNetworkChange, path_check=_check_path)),
) -> Answer:
    """Update private network instance: attaches it to one more private network, also while it runs.

    An empty `vswitch` detaches it from all of them. A guest that does not let go of its card is 409.
    """
    vswitch = body.vswitch
    if vswitch is None:
        return _network_change(
            request,
            caller,
            instance_uuid,
            DETACHED,
            lambda session: private_cards.detach(session, caller, instance_uuid, None),
        )
    return _network_change(
        request,
        caller,
        instance_uuid,
        "Instance successfully attached to Private Network",
        lambda session: private_cards.attach(
            session, caller, instance_uuid, vswitch, body.private_ip
        ),
    )


@router.delete(
    "/{instance_uuid:uuid}/private-network/{vswitch_uuid}",
    response_model=Envelope[InstanceDetail],
    responses={202: {"model": Envelope[InstanceDetail], "description": GOES_ON}},
)
def leave_private_network(
    instance_uuid: UUID,
    vswitch_uuid: str,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Detach an instance from one of its private networks, also while it runs."""
    return _network_change(
        request,
        caller,
        instance_uuid,
        DETACHED,
        lambda session: private_cards.detach(session, caller, instance_uuid, vswitch_uuid),
    )


def _network_change(
    request: Request,
    caller: Caller,
    instance_id: UUID,
    message: str,
    change: Callable[[Session], Operation],
) -> Answer:
    ended = _quick(request, caller, instance_id, change)
    with transaction() as session:
        data = show_detail(session, service.get_kept_view(session, instance_id))
    return answer(message, data, status=status_of(ended), operation=_operation(ended))


@router.put("/{instance_uuid:uuid}/labels", response_model=Envelope[InstanceDetail])
def set_instance_labels(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: LabelsChange = Depends(form_body(LabelsChange, path_check=_check_path)),
) -> Answer:
    """Replace the labels of an instance. `GET /instances?label=env:prod` finds instances by them."""
    return _change(
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
    return _change(
        request,
        caller,
        instance_uuid,
        "Protection successfully updated",
        lambda session: guest.set_protection(session, caller, instance_uuid, body.is_protected),
    )


def _change(
    request: Request,
    caller: Caller,
    instance_id: UUID,
    message: str,
    change: Callable[[Session], None],
) -> Answer:
    """A change of rows alone."""

    def make(session: Session) -> tuple[Answer, UUID]:
        change(session)
        data = show_detail(session, service.get_view(session, caller, instance_id))
        return answer(message, data), instance_id

    return once(request, caller, make, _again)


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


def _power(
    request: Request,
    caller: Caller,
    instance_id: UUID,
    message: str,
    change: Callable[[Session], Operation],
) -> Answer:
    """A change that an operation makes, which is not waited for."""

    def begin(session: Session) -> tuple[Answer, UUID]:
        operation = change(session)
        data = show_detail(session, service.get_view(session, caller, instance_id))
        begun = answer(message, data, status=202, operation=_operation(operation))
        return begun, instance_id

    return once(request, caller, begin, _again)


@router.get("/{instance_uuid:uuid}/ssh-keys", response_model=Envelope[list[InstalledKey]])
def list_instance_ssh_keys(
    instance_uuid: UUID, caller: Caller = Depends(authenticated("read"))
) -> Answer:
    """Get SSH keys instance: those installed at creation."""
    with transaction() as session:
        view = service.get_view(session, caller, instance_uuid)
        keys = service.installed_keys(session, view.instance.instance_id)
    return answer("VM", [show_key(key) for key in keys])
