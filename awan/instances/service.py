"""Verbs of existing instances. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    RowMapping,
    Uuid,
    and_,
    bindparam,
    case,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
)
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.accounts.models import Account
from awan.catalogue import PricedItem, check_location
from awan.catalogue.models import Location, Template, Tier
from awan.credentials import SshKey
from awan.engines.nameserver import Zones
from awan.errors import Conflict, Protected
from awan.events import record
from awan.fleet import Node, NodeHealth
from awan.instances.models import DesiredState, Instance, InstanceSshKey, ObservedState
from awan.instances.rules import NODE_UNREACHABLE, SETTLED_STATES, STATUS_OF_OPERATION, Filters
from awan.instances.workflows import DELETE, RESTART, START, STOP
from awan.kit.clock import now
from awan.kit.database import execute_directly
from awan.kit.pagination import PageRequest
from awan.ledger import close_spans
from awan.networks import Address, Nic, NicRole
from awan.networks.models import RoutedPrefix
from awan.networks.private_networks import Member
from awan.operations import Operation, Plan, begin, request_cancel
from awan.operations.models import OperationStatus
from awan.operations.service import Requester, refuse_if_busy
from awan.resources import Resource, ResourceKind, get_owned, lock_owned

SORTS = {
    "created_at": (Resource.created_at.asc(), Resource.resource_id.asc()),
    "-created_at": (Resource.created_at.desc(), Resource.resource_id.desc()),
    "cost": (Instance.monthly_minor.asc(), Resource.resource_id.asc()),
    "-cost": (Instance.monthly_minor.desc(), Resource.resource_id.desc()),
}
UNREACHABLE_RETRY_AFTER_S = 30
_IS_NODE_SILENT = func.coalesce(Node.health == NodeHealth.UNREACHABLE, False).label(
    "is_node_silent"
)
ALIVE = (ObservedState.RUNNING, ObservedState.STOPPED)


@dataclass(frozen=True)
class InstanceView:
    """An instance with the rows that its answer needs."""

    instance: Instance
    resource: Resource
    location: Location
    tier: Tier
    template: Template
    operation: Operation | None
    is_node_silent: bool


@dataclass(frozen=True)
class PlacedView:
    """An instance as the operator sees it: also whose it is, and on which node. It has none before it was placed."""

    view: InstanceView
    account: Account
    node: Node | None


@dataclass(frozen=True)
class Belongings:
    """What an instance has and costs. `prices` are those that it was sold at; `ssh_keys` those of its creation.

    `zones`: of its location's names, None without a nameserver. The addresses are its public ones, IPv4 first.
    """

    addresses: Sequence[Address]
    prefix: RoutedPrefix | None
    prices: Sequence[PricedItem]
    zones: Zones | None
    members: Sequence[Member]
    ssh_keys: Sequence[SshKey]


_INSTANCE = (Instance, Instance.instance_id == Resource.resource_id)
_OPERATION = (Operation, Operation.operation_id == Resource.active_operation_id)
_NODE = (Node, Node.node_id == Instance.node_id)


def _views() -> Any:
    return (
        select(Instance, Resource, Location, Tier, Template, Operation, _IS_NODE_SILENT)
        .join(Resource, Resource.resource_id == Instance.instance_id)
        .join(Location, Location.location_id == Instance.location_id)
        .join(Tier, Tier.tier_id == Instance.tier_id)
        .join(Template, Template.template_id == Instance.template_id)
        .outerjoin(*_OPERATION)
        .outerjoin(*_NODE)
    )


def list_instances(
    session: Session,
    account_id: UUID,
    page: PageRequest,
    filters: Filters,
    sort: str,
) -> tuple[list[InstanceView], int]:
    """A page of the account's instances, and the number of all that match, in one query."""
    query = _matching(_views(), replace(filters, account_id=account_id))
    counted = query.add_columns(func.count().over().label("total"))
    rows = session.execute(
        counted.order_by(*SORTS[sort]).limit(page.limit).offset(page.offset)
    ).all()
    if rows:
        return [InstanceView(*row[:-1]) for row in rows], rows[0].total
    if page.page == 1:
        return [], 0
    ids = query.with_only_columns(Resource.resource_id)
    return [], session.scalar(select(func.count()).select_from(ids.subquery())) or 0


def list_everyones(
    session: Session, page: PageRequest, filters: Filters, sort: str
) -> tuple[list[PlacedView], int]:
    """A page of all accounts' instances, and the number of all that match.

    Of a whole fleet only the ids are counted and sorted; what is shown is read of the page alone.
    """
    found = _matching(select(Resource.resource_id).join(*_INSTANCE), filters)
    if filters.statuses is not None:
        found = found.outerjoin(*_OPERATION).outerjoin(*_NODE)
    total = session.scalar(select(func.count()).select_from(found.subquery())) or 0
    ids = found.order_by(*SORTS[sort]).limit(page.limit).offset(page.offset)
    rows = session.execute(
        _views()
        .join(Account, Account.account_id == Resource.account_id)
        .add_columns(Account, Node)
        .where(Resource.resource_id.in_(ids))
        .order_by(*SORTS[sort])
    )
    return [PlacedView(InstanceView(*row), account, node) for *row, account, node in rows], total


def _matching(query: Any, filters: Filters) -> Any:
    query = query.where(
        Resource.kind == ResourceKind.INSTANCE,
        Resource.deleted_at.is_(None),
        *with_labels(filters.labels or {}),
    )
    if filters.account_id is not None:
        query = query.where(Resource.account_id == filters.account_id)
    if filters.location_id is not None:
        query = query.where(Instance.location_id == filters.location_id)
    if filters.node_id is not None:
        query = query.where(Instance.node_id == filters.node_id)
    if filters.search is not None:
        query = query.where(Resource.name.icontains(filters.search, autoescape=True))
    if filters.statuses is not None:
        query = query.where(_status_column().in_(filters.statuses))
    return query


def with_labels(labels: Mapping[str, str | None]) -> list[ColumnElement[bool]]:
    """Conditions on `Resource`: it has all these labels, with any value where None."""
    exact = {key: value for key, value in labels.items() if value is not None}
    named = [Resource.labels.has_key(key) for key, value in labels.items() if value is None]
    return [Resource.labels.contains(exact), *named] if exact else named


_LIVE = (
    Resource.account_id == bindparam("account"),
    # Written out, for the index is one of instances alone.
    Resource.kind == literal_column(f"'{ResourceKind.INSTANCE}'"),
    Resource.deleted_at.is_(None),
    Resource.resource_id.is_distinct_from(bindparam("but", type_=Uuid)),
)
# Each half has an index of its own. Every creation asks it: built once, because building takes longer than sending.
_IS_TAKEN = select(
    or_(
        exists(Resource.resource_id).where(
            *_LIVE, func.lower(Resource.name) == func.lower(bindparam("hostname"))
        ),
        exists(Resource.resource_id).where(
            *_LIVE,
            Resource.resource_id == Instance.instance_id,
            Instance.account_id == bindparam("account"),
            Instance.hostname == bindparam("hostname"),
        ),
    )
)


def is_hostname_taken(
    session: Session, account_id: UUID, hostname: str, *, by_other_than: UUID | None = None
) -> bool:
    """Whether a live instance of the account has the name, is getting it, or may get it back when a change fails."""
    wanted = {"account": account_id, "hostname": hostname, "but": by_other_than}
    return bool(execute_directly(session, _IS_TAKEN, wanted).scalar_one())


def _status_column() -> Any:
    """`rules.status_of` in SQL, over instances joined with their operation and (outer) their node."""
    return case(
        *(
            (Operation.kind == kind, literal(status))
            for kind, status in STATUS_OF_OPERATION.items()
        ),
        (
            and_(
                _IS_NODE_SILENT,
                Instance.observed_state.in_(SETTLED_STATES),
            ),
            literal("unknown"),
        ),
        *((Instance.observed_state == state, literal(str(state))) for state in SETTLED_STATES),
        (
            and_(
                Instance.desired_state == DesiredState.DELETED,
                Instance.observed_state == ObservedState.DELETED,
            ),
            literal("terminated"),
        ),
        else_=literal("error"),
    )


def get_view(session: Session, caller: Caller, instance_id: UUID) -> InstanceView:
    """One instance. Raises: NotFound for one that is absent, deleted or another account's."""
    get_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    return get_kept_view(session, instance_id)


def get_kept_view(session: Session, instance_id: UUID) -> InstanceView:
    """One that the caller was given before, also when it is deleted since: its rows stay, and say `terminated`."""
    row = session.execute(
        _views()
        .where(Instance.instance_id == instance_id)
        .execution_options(populate_existing=True)
    ).one()
    return InstanceView(*row)


def newest_running(session: Session, account_id: UUID) -> Operation | None:
    """The account's newest unfinished operation, or None."""
    return session.scalars(
        select(Operation)
        .where(
            Operation.account_id == account_id,
            Operation.status.in_([OperationStatus.QUEUED, OperationStatus.RUNNING]),
        )
        .order_by(Operation.created_at.desc())
        .limit(1)
    ).first()


def installed_keys(session: Session, instance_id: UUID) -> Sequence[SshKey]:
    """The keys an instance got at creation, in their order; also those deleted since."""
    return session.scalars(
        select(SshKey)
        .join(InstanceSshKey, InstanceSshKey.ssh_key_id == SshKey.ssh_key_id)
        .where(InstanceSshKey.instance_id == instance_id)
        .order_by(InstanceSshKey.position)
    ).all()


def without_public_network(
    session: Session, account_id: UUID, location_id: int
) -> Sequence[RowMapping]:
    """The account's instances of a location that have no public address. Raises: Invalid (location)."""
    check_location(session, location_id)
    has_nic = exists().where(
        Nic.instance_id == Instance.instance_id,
        Nic.role == NicRole.PUBLIC,
        Nic.deleted_at.is_(None),
    )
    return (
        session.execute(
            select(Instance.instance_id, Instance.hostname, _status_column().label("status"))
            .join(Resource, Resource.resource_id == Instance.instance_id)
            .outerjoin(Operation, Operation.operation_id == Resource.active_operation_id)
            .outerjoin(Node, Node.node_id == Instance.node_id)
            .where(
                Resource.account_id == account_id,
                Resource.kind == ResourceKind.INSTANCE,
                Resource.deleted_at.is_(None),
                Instance.location_id == location_id,
                ~has_nic,
            )
            .order_by(Instance.hostname)
        )
        .mappings()
        .all()
    )


def statuses_of(session: Session, instance_ids: Sequence[UUID]) -> dict[UUID, str]:
    """Instance id -> its status as the API shows it."""
    rows = session.execute(
        select(Instance.instance_id, _status_column())
        .join(Resource, Resource.resource_id == Instance.instance_id)
        .outerjoin(Operation, Operation.operation_id == Resource.active_operation_id)
        .outerjoin(Node, Node.node_id == Instance.node_id)
        .where(Instance.instance_id.in_(instance_ids))
    )
    return {instance_id: str(status).title() for instance_id, status in rows}


def start(session: Session, caller: Caller, instance_id: UUID) -> Operation:
    """Powers a stopped instance on, or lets a paused one go on.

    Raises: NotFound, Conflict (busy, running already, not usable).
    """
    resource, instance = lock_idle(session, caller, instance_id)
    if instance.observed_state == ObservedState.RUNNING:
        raise Conflict("The instance is already running.")
    require_state(instance, _paused_or(instance, ObservedState.STOPPED), "started")
    return begin_change(session, caller, START, resource, instance, DesiredState.RUNNING)


def stop(session: Session, caller: Caller, instance_id: UUID, *, force: bool) -> Operation:
    """Powers a running instance off: ACPI, then the power is cut after the grace time; at once with `force`.

    One that is off but wanted running, since it could not be brought back yet, is left off from now on.
    Raises: NotFound, Conflict (busy, stopped already, not usable).
    """
    resource, instance = lock_idle(session, caller, instance_id)
    if instance.observed_state != ObservedState.STOPPED:
        require_state(instance, _paused_or(instance, ObservedState.RUNNING), "stopped")
    elif instance.desired_state != DesiredState.RUNNING:
        raise Conflict("The instance is already stopped.")
    return begin_change(
        session, caller, STOP, resource, instance, DesiredState.STOPPED, force=force
    )


def restart(session: Session, caller: Caller, instance_id: UUID, *, force: bool) -> Operation:
    """Stops and starts a running instance. Raises: NotFound, Conflict (busy, not running)."""
    resource, instance = lock_idle(session, caller, instance_id)
    require_state(instance, _paused_or(instance, ObservedState.RUNNING), "restarted")
    return begin_change(
        session, caller, RESTART, resource, instance, DesiredState.RUNNING, force=force
    )


def delete(session: Session, caller: Caller, instance_id: UUID, *, remove_ip: bool) -> Operation:
    """Ends an instance, from every state; an operation that runs on it is asked to stop first.

    Charging ends now. With `remove_ip` its addresses go back too, else they stay the account's, unattached.
    Raises: NotFound, Protected, Conflict (its deletion runs already, or its address is on its way to another one).
    """
    resource, instance = lock_instance(session, caller, instance_id)
    if resource.is_protected:
        raise Protected(
            "The instance is protected against deletion. Take the protection away first."
        )
    operation = begin_deletion(session, caller, resource, instance, remove_ip=remove_ip)
    if operation is None:
        raise Conflict("The instance is being deleted already.")
    return operation


def begin_deletion(
    session: Session, caller: Requester, resource: Resource, instance: Instance, *, remove_ip: bool
) -> Operation | None:
    """Ends a locked instance; an operation that runs on it is asked to stop first. None: it is being deleted already.

    Charging ends now. Raises: Conflict while another instance's operation takes its address.
    """
    if resource.active_operation_id is not None:
        running = session.get_one(Operation, resource.active_operation_id)
        if running.kind == DELETE.kind:
            return None
        if running.resource_id != instance.instance_id:
            # It is another instance's, which takes this one's address: neither is cancelled for the other.
            refuse_if_busy(session, resource)
        request_cancel(session, running.operation_id)
    instance.releases_ips = remove_ip
    operation = begin_change(
        session, caller, DELETE, resource, instance, DesiredState.DELETED, queue_behind=True
    )
    close_spans(session, instance.instance_id, at=now(), operation_id=operation.operation_id)
    return operation


def lock_instance(session: Session, caller: Caller, instance_id: UUID) -> tuple[Resource, Instance]:
    """An instance with its ownership row, both locked. Raises: NotFound."""
    resource = lock_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    return resource, session.get_one(Instance, instance_id, with_for_update=True)


def lock_idle(session: Session, caller: Caller, instance_id: UUID) -> tuple[Resource, Instance]:
    """An instance on which nothing is running, locked. Raises: NotFound, Conflict (busy, its node is unreachable)."""
    resource, instance = lock_instance(session, caller, instance_id)
    refuse_if_busy(session, resource)
    refuse_if_unreachable(session, instance)
    return resource, instance


def refuse_if_unreachable(session: Session, instance: Instance) -> None:
    """Raises: Conflict, with a time to try again, while the instance's node does not answer."""
    node = session.get(Node, instance.node_id) if instance.node_id is not None else None
    if node is not None and node.health == NodeHealth.UNREACHABLE:
        raise Conflict(NODE_UNREACHABLE, retry_after_s=UNREACHABLE_RETRY_AFTER_S)


def refuse_unless_changeable(
    session: Session, resource: Resource, instance: Instance, verb: str = "changed"
) -> None:
    """Raises: Conflict (busy, its node is unreachable, neither running nor stopped) for a locked instance."""
    refuse_if_busy(session, resource)
    refuse_if_unreachable(session, instance)
    require_alive(instance, verb)


def require_alive(instance: Instance, verb: str = "changed") -> None:
    """Raises: Conflict, saying what cannot be done, unless the instance was seen running or stopped."""
    if instance.desired_state == DesiredState.DELETED or instance.observed_state not in ALIVE:
        raise Conflict(f"Only a running or stopped instance can be {verb}.")


def require_state(instance: Instance, state: ObservedState, verb: str) -> None:
    """Raises: Conflict, saying what cannot be done, unless the instance was seen in this state."""
    if instance.desired_state == DesiredState.DELETED or instance.observed_state != state:
        raise Conflict(f"Only a {state} instance can be {verb}.")


def _paused_or(instance: Instance, state: ObservedState) -> ObservedState:
    """A paused instance may be what is done to those in this state: its power can go on, and can be cut."""
    is_paused = instance.observed_state == ObservedState.PAUSED
    return ObservedState.PAUSED if is_paused else state


def begin_change(
    session: Session,
    caller: Requester,
    plan: Plan,
    resource: Resource,
    instance: Instance,
    desired: DesiredState,
    *,
    force: bool = False,
    queue_behind: bool = False,
    operation_id: UUID | None = None,
    data: dict[str, object] | None = None,
) -> Operation:
    """Begins an operation on a locked instance: what is wanted from now on, and the event. Raises: Conflict (busy)."""
    operation = begin(
        session,
        caller=caller,
        plan=plan,
        resource=resource,
        resource_kind=ResourceKind.INSTANCE,
        subject_id=instance.instance_id,
        queue_behind=queue_behind,
        operation_id=operation_id,
    )
    instance.desired_state = desired
    instance.stop_is_forced = force
    instance.updated_at = now()
    record(
        session,
        kind=plan.kind,
        actor=caller.actor,
        account_id=resource.account_id,
        resource_id=resource.resource_id,
        operation_id=operation.operation_id,
        data=data or ({"force": force} if force else None),
    )
    session.flush()
    return operation
