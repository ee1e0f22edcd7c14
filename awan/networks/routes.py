"""`/networks/public`: operations 14, 57 to 59, 61 and 62 of the public API; `/admin/pools` for the operator."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy import RowMapping
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, idempotent, operator, replay
from awan.accounts.idempotency import EarlierAnswer, is_repeat
from awan.catalogue import check_location
from awan.catalogue.service import all_zones
from awan.errors import IdempotencyConflict, NotFound
from awan.kit.database import transaction
from awan.kit.http import (
    Answer,
    EmptyForm,
    Envelope,
    OperationView,
    PathId,
    Remains,
    Request,
    answer,
    form_body,
    query_of,
)
from awan.kit.pagination import PageRequest, paged
from awan.ledger import monthly_prices
from awan.networks import addresses, names, pools
from awan.networks.models import Pool
from awan.networks.schemas import (
    AddressOption,
    LocationQuery,
    PageQuery,
    PoolCreate,
    PoolView,
    PublicAddressPage,
    PublicAddressView,
    RdnsChange,
)
from awan.networks.workflows import SET_RDNS
from awan.operations import summary
from awan.operations.quick import status_of, wait_for_success
from awan.resources import Resource, ResourceKind, in_path

GOES_ON = "The change was accepted and takes longer: follow its operation."

router = APIRouter(prefix="/networks/public", tags=["Networks"])
instances_router = APIRouter(prefix="/instances/ips", tags=["Instance"])
_check_path = in_path(ResourceKind.PUBLIC_IP, "ip_uuid")
admin_router = APIRouter(prefix="/pools")


@router.get("/options", response_model=Envelope[list[AddressOption]])
def list_public_network_options(
    caller: Caller = Depends(authenticated("read")),
    query: LocationQuery = Depends(query_of(LocationQuery)),
) -> Answer:
    """Get free public network options."""
    with transaction() as session:
        check_location(session, query.location_id)
        free = addresses.free_addresses(session, caller.account_id, query.location_id)
    return answer(
        "Public Network Options",
        [AddressOption(uuid=row.resource_id, ip_address=str(row.inet)) for row in free],
    )


@router.get("", response_model=Envelope[PublicAddressPage])
def list_public_networks(
    caller: Caller = Depends(authenticated("read")),
    query: PageQuery = Depends(query_of(PageQuery)),
) -> Answer:
    """Get public network."""
    page = PageRequest(query.page, query.limit)
    with transaction() as session:
        rows, total = addresses.list_addresses(session, caller.account_id, page)
        views = _views(session, rows)
    return answer("Public Network", paged(views, page, total))


@router.post("", status_code=201, response_model=Envelope[PublicAddressView | Remains])
def create_public_network(
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: LocationQuery = Depends(form_body(LocationQuery)),
) -> Answer:
    """Create public network: an address that is yours, and billed, until you remove it."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _replay_address(session, caller, call.earlier)
        check_location(session, body.location_id)
        address = addresses.allocate(session, caller, body.location_id)
        assert address.resource_id is not None
        data = _view(session, caller, address.resource_id)
        return call.keep(
            answer("Public Network successfully created", data, status=201), address.resource_id
        )


@router.delete("/{ip_uuid:uuid}", response_model=Envelope[PublicAddressView | Remains])
def delete_public_network(
    ip_uuid: UUID, request: Request, caller: Caller = Depends(authenticated("delete"))
) -> Answer:
    """Delete public network. It rests before another account can get it."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return _replay_address(session, caller, call.earlier)
        addresses.release_address(session, caller, ip_uuid)
        data = _released(session, caller, ip_uuid)
        return call.keep(answer("Public Network successfully removed", data), ip_uuid)


@router.put(
    "/{ip_uuid:uuid}/rdns",
    response_model=Envelope[str],
    responses={202: {"model": Envelope[str], "description": GOES_ON}},
)
def set_public_network_rdns(
    ip_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RdnsChange = Depends(form_body(RdnsChange, path_check=_check_path)),
) -> Answer:
    """Update RDNS IP: the name that a reverse lookup of the address gives.

    The name must lead to the address at this moment (an A record). Empty: the default name. Ten changes an hour; when
    the address is given back, its default name returns.
    """
    return _set_rdns(request, caller, ip_uuid, body.rdns)


@instances_router.put(
    "/{ip_uuid:uuid}/rdns",
    response_model=Envelope[str],
    responses={202: {"model": Envelope[str], "description": GOES_ON}},
)
def set_instance_rdns(
    ip_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: RdnsChange = Depends(form_body(RdnsChange, path_check=_check_path)),
) -> Answer:
    """Update RDNS IP instance. The same as `PUT /networks/public/{ip_uuid}/rdns`."""
    return _set_rdns(request, caller, ip_uuid, body.rdns)


def _set_rdns(request: Request, caller: Caller, ip_uuid: UUID, rdns: str | None) -> Answer:
    """The name is looked up between two transactions, and only by the first of several equal calls."""
    with transaction() as session:
        if not (is_known := is_repeat(session, caller, request)):
            names.check_often(session, caller, SET_RDNS, ip_uuid)
            wish = names.check_wish(session, caller, ip_uuid, rdns)
    if not is_known:
        names.confirm(wish)
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            assert call.earlier.operation_id is not None
            operation_id = call.earlier.operation_id
        elif is_known:
            raise IdempotencyConflict("The first call with this key was forgotten just now.")
        else:
            operation = names.set_rdns(session, caller, SET_RDNS, ip_uuid, rdns)
            operation_id = operation.operation_id
            call.keep(answer("", None, operation=OperationView(**summary(operation))), ip_uuid)
    ended = wait_for_success(operation_id)
    with transaction() as session:
        name = names.shown_name(session, ip_uuid)
    return answer(
        "RDNS successfully updated",
        name,
        status=status_of(ended),
        operation=OperationView(**summary(ended)),
    )


def _replay_address(session: Session, caller: Caller, earlier: EarlierAnswer) -> Answer:
    """The address of an earlier call: as it is, as it was when it was given back, or what is left of it."""
    resource_id = UUID(earlier.resource_id)
    for show in (_view, _released):
        with suppress(NotFound):
            return replay(earlier, show(session, caller, resource_id))
    return replay(earlier, earlier.remains)


def _released(session: Session, caller: Caller, resource_id: UUID) -> PublicAddressView:
    account_id = session.get_one(
        Resource, resource_id
    ).account_id  # an operator releases for its owner
    row = addresses.get_released_row(session, account_id, resource_id)
    return _views(session, [row])[0].model_copy(update={"status": "releasing"})


def _view(session: Session, caller: Caller, resource_id: UUID) -> PublicAddressView:
    row = addresses.get_owned_row(session, caller.account_id, resource_id)
    return _views(session, [row])[0]


def _views(session: Session, rows: list[RowMapping]) -> list[PublicAddressView]:
    prices = monthly_prices(session, [row["uuid"] for row in rows])
    zones = all_zones(session)
    return [
        PublicAddressView.of(row, prices[row["uuid"]], zones.get(row["Location"].location_id))
        for row in rows
    ]


@admin_router.post("", status_code=201, response_model=Envelope[PoolView | Remains])
def create_pool(
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: PoolCreate = Depends(form_body(PoolCreate)),
) -> Answer:
    """Add a public prefix to a location."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            known = session.get(Pool, int(call.earlier.resource_id or 0))
            shown = call.earlier.remains if known is None else _pool(session, known)
            return replay(call.earlier, shown)
        pool = pools.create_pool(session, caller, **body.model_dump())
        return call.keep(answer("Pool created", _pool(session, pool), status=201), pool.pool_id)


@admin_router.get("", response_model=Envelope[list[PoolView]])
def list_pools(caller: Caller = Depends(operator("read"))) -> Answer:
    """List public prefixes and what of them is in use."""
    with transaction() as session:
        views = [PoolView.of(pool, counts) for pool, counts in pools.list_pools(session)]
    return answer("Pools", views)


@admin_router.delete("/{pool_id}", response_model=Envelope[None])
def delete_pool(
    pool_id: PathId,
    request: Request,
    caller: Caller = Depends(operator("write")),
    _: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Remove a prefix of which no customer has an address."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, None)
        pools.delete_pool(session, caller, pool_id)
        return call.keep(answer("Pool removed", None), pool_id)


def _pool(session: Session, wanted: Pool) -> PoolView:
    found = {pool.pool_id: counts for pool, counts in pools.list_pools(session)}
    return PoolView.of(wanted, found.get(wanted.pool_id, {}))
