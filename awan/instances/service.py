"""Verbs of existing instances. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import RowMapping, and_, case, exists, func, literal, select
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.catalogue import check_location
from awan.catalogue.models import Location, Template, Tier
from awan.credentials import SshKey
from awan.errors import Conflict
from awan.events import record
from awan.instances.models import DesiredState, Instance, InstanceSshKey, ObservedState
from awan.instances.rules import STATUS_OF_OPERATION
from awan.instances.workflows import DELETE, RESTART, START, STOP
from awan.kit.clock import now
from awan.kit.pagination import PageRequest
from awan.ledger import close_spans
from awan.networks import Nic
from awan.operations import Operation, Plan, begin, request_cancel
from awan.operations.models import OperationStatus
from awan.operations.service import refuse_if_busy
from awan.resources import Resource, ResourceKind, get_owned, lock_owned

SORTS = {
    "created_at": (Resource.created_at.asc(), Resource.resource_id.asc()),
    "-created_at": (Resource.created_at.desc(), Resource.resource_id.desc()),
    "cost": (Instance.monthly_minor.asc(), Resource.resource_id.asc()),
    "-cost": (Instance.monthly_minor.desc(), Resource.resource_id.desc()),
}


@dataclass(frozen=True)
class InstanceView:
    """An instance with the rows that its answer needs."""

    instance: Instance
    resource: Resource
    location: Location
    tier: Tier
    template: Template
    operation: Operation | None


def _views() -> Any:
    return (
        select(Instance, Resource, Location, Tier, Template, Operation)
        .join(Resource, Resource.resource_id == Instance.instance_id)
        .join(Location, Location.location_id == Instance.location_id)
        .join(Tier, Tier.tier_id == Instance.tier_id)
        .join(Template, Template.template_id == Instance.template_id)
        .outerjoin(Operation, Operation.operation_id == Resource.active_operation_id)
    )


def list_instances(
    session: Session,
    account_id: UUID,
    page: PageRequest,
    *,
    search: str | None,
    sort: str,
    statuses: Sequence[str] | None,
) -> tuple[list[InstanceView], int]:
    """A page of the account's instances, and the number of all that match, in one query.

    `search` is a case-blind part of the hostname; `statuses` are values of `rules.STATUSES`.
    """
    query = _views().where(
        Resource.account_id == account_id,
        Resource.kind == ResourceKind.INSTANCE,
        Resource.deleted_at.is_(None),
    )
    if search is not None:
        query = query.where(Resource.name.icontains(search, autoescape=True))
    if statuses is not None:
        query = query.where(_status_column().in_(statuses))
    counted = query.add_columns(func.count().over().label("total"))
    rows = session.execute(
        counted.order_by(*SORTS[sort]).limit(page.limit).offset(page.offset)
    ).all()
    if rows:
        return [InstanceView(*row[:-1]) for row in rows], rows[0].total
    if page.page == 1:
        return [], 0
    return [], session.scalar(select(func.count()).select_from(query.subquery())) or 0


def _status_column() -> Any:
    """`rules.status_of` in SQL."""
    return case(
        *(
            (Operation.kind == kind, literal(status))
            for kind, status in STATUS_OF_OPERATION.items()
        ),
        (Instance.observed_state == ObservedState.RUNNING, literal("running")),
        (Instance.observed_state == ObservedState.STOPPED, literal("stopped")),
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
    has_nic = exists().where(Nic.instance_id == Instance.instance_id, Nic.deleted_at.is_(None))
    return (
        session.execute(
            select(Instance.instance_id, Instance.hostname, _status_column().label("status"))
            .join(Resource, Resource.resource_id == Instance.instance_id)
            .outerjoin(Operation, Operation.operation_id == Resource.active_operation_id)
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


def start(session: Session, caller: Caller, instance_id: UUID) -> Operation:
    """Powers a stopped instance on. Raises: NotFound, Conflict (busy, running already, not usable)."""
    resource, instance = _lock_idle(session, caller, instance_id)
    if instance.observed_state == ObservedState.RUNNING:
        raise Conflict("The instance is already running.")
    _require(instance, ObservedState.STOPPED, "started")
    return _begin(session, caller, START, resource, instance, DesiredState.RUNNING)


def stop(session: Session, caller: Caller, instance_id: UUID, *, force: bool) -> Operation:
    """Powers a running instance off: ACPI, then the power is cut after the grace time; at once with `force`.

    Raises: NotFound, Conflict (busy, stopped already, not usable).
    """
    resource, instance = _lock_idle(session, caller, instance_id)
    if instance.observed_state == ObservedState.STOPPED:
        raise Conflict("The instance is already stopped.")
    _require(instance, ObservedState.RUNNING, "stopped")
    return _begin(session, caller, STOP, resource, instance, DesiredState.STOPPED, force=force)


def restart(session: Session, caller: Caller, instance_id: UUID, *, force: bool) -> Operation:
    """Stops and starts a running instance. Raises: NotFound, Conflict (busy, not running)."""
    resource, instance = _lock_idle(session, caller, instance_id)
    _require(instance, ObservedState.RUNNING, "restarted")
    return _begin(session, caller, RESTART, resource, instance, DesiredState.RUNNING, force=force)


def delete(session: Session, caller: Caller, instance_id: UUID, *, remove_ip: bool) -> Operation:
    """Ends an instance, from every state; an operation that runs on it is asked to stop first.

    Charging ends now. With `remove_ip` its addresses go back too, else they stay the account's, unattached.
    Raises: NotFound, Conflict (protected, or its deletion runs already).
    """
    resource, instance = _lock(session, caller, instance_id)
    if resource.is_protected:
        raise Conflict("The instance is protected against deletion.")
    if resource.active_operation_id is not None:
        running = session.get_one(Operation, resource.active_operation_id)
        if running.kind == DELETE.kind:
            raise Conflict("The instance is being deleted already.")
        request_cancel(session, running.operation_id)
    instance.releases_ips = remove_ip
    operation = _begin(
        session, caller, DELETE, resource, instance, DesiredState.DELETED, queue_behind=True
    )
    close_spans(session, instance_id, at=now(), operation_id=operation.operation_id)
    return operation


def _lock(session: Session, caller: Caller, instance_id: UUID) -> tuple[Resource, Instance]:
    resource = lock_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    return resource, session.get_one(Instance, instance_id, with_for_update=True)


def _lock_idle(session: Session, caller: Caller, instance_id: UUID) -> tuple[Resource, Instance]:
    resource, instance = _lock(session, caller, instance_id)
    refuse_if_busy(session, resource)
    return resource, instance


def _require(instance: Instance, state: ObservedState, verb: str) -> None:
    if instance.desired_state == DesiredState.DELETED or instance.observed_state != state:
        raise Conflict(f"Only a {state} instance can be {verb}.")


def _begin(
    session: Session,
    caller: Caller,
    plan: Plan,
    resource: Resource,
    instance: Instance,
    desired: DesiredState,
    *,
    force: bool = False,
    queue_behind: bool = False,
) -> Operation:
    operation = begin(
        session,
        caller=caller,
        plan=plan,
        resource=resource,
        resource_kind=ResourceKind.INSTANCE,
        subject_id=instance.instance_id,
        queue_behind=queue_behind,
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
        data={"force": force} if force else None,
    )
    session.flush()
    return operation
