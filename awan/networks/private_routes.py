"""`/networks/private`: operations 49, 51 to 53, 55 and 56 of the public API, and what goes beyond it.

50 and 54 show instances, which this room does not know: see the routes of the rooms above.
"""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, idempotent, replay
from awan.accounts.idempotency import EarlierAnswer
from awan.catalogue import check_location
from awan.errors import Invalid, NotFound
from awan.kit.database import transaction
from awan.kit.http import (
    Answer,
    EmptyForm,
    Envelope,
    OperationView,
    Remains,
    Request,
    answer,
    form_body,
    query_of,
)
from awan.networks import private_networks as service
from awan.networks.private_schemas import (
    GatewayChange,
    GatewayOption,
    GatewayQuery,
    PrivateIps,
    PrivateNetworkCreate,
    PrivateNetworkDetail,
    PrivateNetworkOption,
    PrivateNetworkRename,
)
from awan.networks.schemas import LocationQuery
from awan.operations import Operation, summary
from awan.operations.quick import status_of, wait_for_success

router = APIRouter(prefix="/networks/private", tags=["Networks"])

GOES_ON = "The change was accepted and takes longer: follow its operation."


def check_path(request: Request) -> None:
    """The network named in the path is the caller's. Raises: NotFound."""
    with transaction() as session:
        service.resolve(session, request.state.caller, str(request.path_params["vswitch_uuid"]))


@router.get("", response_model=Envelope[list[PrivateNetworkDetail]])
def list_private_networks(caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get private networks."""
    with transaction() as session:
        views = service.list_private_networks(session, caller.account_id)
    return answer("Your Private Network", [PrivateNetworkDetail.of(view) for view in views])


@router.get("/options", response_model=Envelope[list[PrivateNetworkOption]])
def list_private_network_options(
    caller: Caller = Depends(authenticated("read")),
    query: LocationQuery = Depends(query_of(LocationQuery)),
) -> Answer:
    """Get private network options: those of a location that are active."""
    assert caller.account_id is not None
    with transaction() as session:
        views = service.active_networks(session, caller.account_id, query.location_id)
    return answer(
        "Your Private Networks",
        [
            PrivateNetworkOption(
                uuid=view.network.resource_id, name=view.resource.name, cidr=str(view.network.cidr)
            )
            for view in views
        ],
    )


@router.get("/gateways", response_model=Envelope[list[GatewayOption]])
def list_gateway_options(
    caller: Caller = Depends(authenticated("read")),
    query: GatewayQuery = Depends(query_of(GatewayQuery)),
) -> Answer:
    """Get private network gateway: free public networks of the location, and the present gateway."""
    assert caller.account_id is not None
    with transaction() as session:
        check_location(session, query.location_id)
        network = service.find_network(
            session, caller.account_id, str(query.vswitch_uuid), location_id=query.location_id
        )
        if network is None:
            raise Invalid.field("vswitch_uuid", "The selected vswitch_uuid is invalid.")
        found = service.gateway_candidates(session, caller.account_id, query.location_id, network)
    return answer(
        "Your Private Networkes",
        [
            GatewayOption(uuid=row.resource_id, ip_address=str(row.inet), selected=is_selected)
            for row, is_selected in found
        ],
    )


@router.post("", status_code=202, response_model=Envelope[PrivateNetworkDetail | Remains])
def create_private_network(
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PrivateNetworkCreate = Depends(form_body(PrivateNetworkCreate, or_query=True)),
) -> Answer:
    """Create private network. It is free, and reaches across all servers of the location."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, call.earlier)
        resource_id, operation = service.create_private_network(
            session, caller, location_id=body.location_id, name=body.name, cidr=body.cidr
        )
        return call.keep(
            answer(
                "Private Network will be created in a moment",
                _view(session, resource_id),
                status=202,
                operation=_operation(operation),
            ),
            resource_id,
        )


@router.get("/{vswitch_uuid}/ips", response_model=Envelope[PrivateIps])
def list_private_ips(vswitch_uuid: str, caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Retrieve private network IPs: which are in use, by whom, and how many are free."""
    with transaction() as session:
        resource_id = service.resolve(session, caller, vswitch_uuid)
        view = service.get_private_network(session, resource_id)
        members = service.members_of(session, network_id=view.network.network_id)
        data = PrivateIps.of(view, members)
    return answer("Private Network ips", data)


@router.put(
    "/{vswitch_uuid}/gateway",
    response_model=Envelope[PrivateNetworkDetail],
    responses={202: {"model": Envelope[PrivateNetworkDetail], "description": GOES_ON}},
)
def set_private_network_gateway(
    vswitch_uuid: str,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: GatewayChange = Depends(form_body(GatewayChange, path_check=check_path)),
) -> Answer:
    """Update private network gateway: the public address behind which members without one of their own go out.

    An empty `public_gateway` removes it. The address stays yours, and free.
    """
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            assert call.earlier.operation_id is not None
            resource_id = UUID(call.earlier.resource_id)
            operation_id = call.earlier.operation_id
        else:
            resource_id = service.resolve(session, caller, vswitch_uuid)
            operation = service.set_gateway(session, caller, resource_id, body.public_gateway)
            operation_id = operation.operation_id
            call.keep(answer("", None, operation=_operation(operation)), resource_id)
    ended = wait_for_success(operation_id)
    with transaction() as session:
        data = _view(session, resource_id)
    return answer(
        "Private Network Gateway updated successfully",
        data,
        status=status_of(ended),
        operation=_operation(ended),
    )


@router.put("/{vswitch_uuid}", response_model=Envelope[PrivateNetworkDetail | Remains])
def rename_private_network(
    vswitch_uuid: str,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PrivateNetworkRename = Depends(form_body(PrivateNetworkRename, path_check=check_path)),
) -> Answer:
    """Rename private network."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, call.earlier)
        resource_id = service.resolve(session, caller, vswitch_uuid)
        service.rename_private_network(session, caller, resource_id, body.name)
        data = _view(session, resource_id)
        return call.keep(answer("Private Network successfully renamed", data), resource_id)


@router.delete(
    "/{vswitch_uuid}", status_code=202, response_model=Envelope[PrivateNetworkDetail | Remains]
)
def delete_private_network(
    vswitch_uuid: str,
    request: Request,
    caller: Caller = Depends(authenticated("delete")),
    body: EmptyForm = Depends(form_body(EmptyForm, path_check=check_path)),
) -> Answer:
    """Delete private network: one without instances. The address of its gateway stays yours, and free."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _again(session, call.earlier)
        resource_id = service.resolve(session, caller, vswitch_uuid)
        operation = service.delete_private_network(session, caller, resource_id)
        return call.keep(
            answer(
                "Private Network will be deleted in a moment",
                _view(session, resource_id),
                status=202,
                operation=_operation(operation),
            ),
            resource_id,
        )


def _again(session: Session, earlier: EarlierAnswer) -> Answer:
    """The answer of a call that was made before, with the network as it is now."""
    operation = session.get(Operation, earlier.operation_id) if earlier.operation_id else None
    data: object = earlier.remains
    with suppress(NotFound, IndexError):
        data = _view(session, UUID(earlier.resource_id))
    return replay(earlier, data, operation=_operation(operation))


def _view(session: Session, resource_id: UUID) -> PrivateNetworkDetail:
    return PrivateNetworkDetail.of(service.get_private_network(session, resource_id))


def _operation(operation: Operation | None) -> OperationView | None:
    return OperationView(**summary(operation)) if operation is not None else None
