"""`/firewall-groups`, and the groups of an instance's firewall: rules that many instances share."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, replay
from awan.accounts.idempotency import EarlierAnswer, once
from awan.errors import NotFound
from awan.firewall import groups as service
from awan.firewall.group_schemas import (
    GroupCreate,
    GroupDetail,
    GroupPage,
    GroupRulesReplace,
    GroupsChange,
    GroupShort,
    GroupUpdate,
    MemberPage,
    MemberView,
    PlacedGroup,
    show_placed,
)
from awan.firewall.service import find_firewall
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
from awan.kit.pagination import PageRequest, paged
from awan.networks.schemas import PageQuery
from awan.operations import Operation, summary
from awan.resources import ResourceKind, in_path

router = APIRouter(prefix="/firewall-groups", tags=["Firewall group"])
instances_router = APIRouter(prefix="/instances", tags=["Instance"])
_check_group = in_path(ResourceKind.FIREWALL_GROUP, "group_uuid")
_check_instance = in_path(ResourceKind.INSTANCE, "instance_uuid")

Changed = tuple[UUID, Operation | None]
"""What was changed, and the operation that brings it to the fabric, if there is anything to bring."""


@router.get("", response_model=Envelope[GroupPage])
def list_firewall_groups(
    caller: Caller = Depends(authenticated("read")),
    query: PageQuery = Depends(query_of(PageQuery)),
) -> Answer:
    """Get firewall groups."""
    page = PageRequest(query.page, query.limit)
    with transaction() as session:
        views, total = service.list_groups(session, caller, page)
        rows = [GroupShort.of(view) for view in views]
    return answer("Firewall groups", paged(rows, page, total))


@router.post("", status_code=201, response_model=Envelope[GroupDetail | Remains])
def create_firewall_group(
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: GroupCreate = Depends(form_body(GroupCreate)),
) -> Answer:
    """Create firewall group: rules that instances of a location share. Instances that have its labels are behind it."""

    def change(session: Session) -> Changed:
        group = service.create_group(
            session,
            caller,
            location_id=body.location_id,
            name=body.name,
            description=body.description,
            rules=[rule.stored for rule in body.rules],
            labels=body.labels,
        )
        return group.group_id, None

    message = "Firewall group successfully created"
    return _once(request, caller, message, change, _detail(caller), status=201)


@router.get("/{group_uuid:uuid}", response_model=Envelope[GroupDetail])
def get_firewall_group(group_uuid: UUID, caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get firewall group with its rules."""
    with transaction() as session:
        data = GroupDetail.of(service.find_group(session, caller, group_uuid))
    return answer("Firewall group", data)


@router.put("/{group_uuid:uuid}", response_model=Envelope[GroupDetail | Remains])
def update_firewall_group(
    group_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: GroupUpdate = Depends(form_body(GroupUpdate, path_check=_check_group)),
) -> Answer:
    """Update name, description or labels of a firewall group. Who comes or goes by the labels is pushed at once."""

    def change(session: Session) -> Changed:
        service.update_group(
            session,
            caller,
            group_uuid,
            name=body.name,
            description=body.description,
            labels=body.labels,
        )
        return group_uuid, None

    message = "Firewall group successfully updated"
    return _once(request, caller, message, change, _detail(caller))


@router.put("/{group_uuid:uuid}/rules", response_model=Envelope[GroupDetail | Remains])
def replace_firewall_group_rules(
    group_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: GroupRulesReplace = Depends(form_body(GroupRulesReplace, path_check=_check_group)),
) -> Answer:
    """Replace all rules of a firewall group, at once and for all instances that are behind it."""

    def change(session: Session) -> Changed:
        rules = [rule.stored for rule in body.rules]
        _, operation = service.replace_group_rules(session, caller, group_uuid, rules)
        return group_uuid, operation

    message = "Firewall group rules successfully replaced"
    return _once(request, caller, message, change, _detail(caller))


@router.delete("/{group_uuid:uuid}", response_model=Envelope[None])
def delete_firewall_group(
    group_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("delete")),
    _: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_group)),
) -> Answer:
    """Delete firewall group, when no instance is behind it."""

    def change(session: Session) -> Changed:
        return group_uuid, service.delete_group(session, caller, group_uuid)

    return _once(request, caller, "Firewall group successfully deleted", change)


@router.get("/{group_uuid:uuid}/instances", response_model=Envelope[MemberPage])
def list_firewall_group_instances(
    group_uuid: UUID,
    caller: Caller = Depends(authenticated("read")),
    query: PageQuery = Depends(query_of(PageQuery, path_check=_check_group)),
) -> Answer:
    """Get the instances that are behind a firewall group."""
    page = PageRequest(query.page, query.limit)
    with transaction() as session:
        found = service.members(session, service.find_group(session, caller, group_uuid).group)
    rows = [MemberView.of(it) for it in found[page.offset : page.offset + page.limit]]
    return answer("Firewall group instances", paged(rows, page, len(found)))


@instances_router.get(
    "/{instance_uuid:uuid}/firewall/groups", response_model=Envelope[list[PlacedGroup]]
)
def list_instance_firewall_groups(
    instance_uuid: UUID, caller: Caller = Depends(authenticated("read"))
) -> Answer:
    """Get firewall groups of an instance, in the order in which they are tried."""
    with transaction() as session:
        data = _placed(caller)(session, str(instance_uuid))
    return answer("Instance firewall groups", data)


@instances_router.put(
    "/{instance_uuid:uuid}/firewall/groups", response_model=Envelope[list[PlacedGroup]]
)
def set_instance_firewall_groups(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: GroupsChange = Depends(form_body(GroupsChange, path_check=_check_instance)),
) -> Answer:
    """Replace the firewall groups of an instance, in this order. Those that it has by its labels come after them."""

    def change(session: Session) -> Changed:
        _, operation = service.set_groups(session, caller, instance_uuid, body.groups)
        return instance_uuid, operation

    message = "Instance firewall groups successfully changed"
    return _once(request, caller, message, change, _placed(caller))


def _once(
    request: Request,
    caller: Caller,
    message: str,
    change: Callable[[Session], Changed],
    show: Callable[[Session, str], object] | None = None,
    *,
    status: int = 200,
) -> Answer:
    """Makes a change and answers with what it changed; a repeat gets that as it is now, or what is left of it."""

    def make(session: Session) -> tuple[Answer, UUID]:
        thing, operation = change(session)
        session.expire_all()
        data = show(session, str(thing)) if show is not None else None
        return answer(message, data, status=status, operation=_operation(operation)), thing

    def again(session: Session, earlier: EarlierAnswer) -> Answer:
        assert earlier.resource_id is not None
        try:
            data = show(session, earlier.resource_id) if show is not None else None
        except NotFound:
            data = earlier.remains
        operation = earlier.operation_id and session.get(Operation, earlier.operation_id)
        return replay(earlier, data, operation=_operation(operation or None))

    return once(request, caller, make, again)


def _detail(caller: Caller) -> Callable[[Session, str], GroupDetail]:
    def show(session: Session, group_id: str) -> GroupDetail:
        return GroupDetail.of(service.find_group(session, caller, UUID(group_id)))

    return show


def _placed(caller: Caller) -> Callable[[Session, str], list[PlacedGroup]]:
    def show(session: Session, instance_id: str) -> list[PlacedGroup]:
        firewall = find_firewall(session, caller, UUID(instance_id))
        return show_placed(firewall, *service.placed_groups(session, firewall.firewall_id))

    return show


def _operation(operation: Operation | None) -> OperationView | None:
    return OperationView(**summary(operation)) if operation is not None else None
