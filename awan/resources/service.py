"""Ownership: making, finding, locking and retiring the rows that say who owns what."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from sqlalchemy import Select, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.errors import Invalid, NotFound
from awan.kit.database import transaction
from awan.kit.http import Request
from awan.resources.models import Resource, ResourceKind

TITLES = {
    ResourceKind.FIREWALL_GROUP: "Firewall group",
    ResourceKind.INSTANCE: "Instance",
    ResourceKind.PRIVATE_NETWORK: "Private network",
    ResourceKind.PUBLIC_IP: "Public network",
    ResourceKind.SSH_KEY: "SSH key",
    ResourceKind.WEBHOOK: "Webhook",
}


def create(
    session: Session,
    *,
    kind: ResourceKind,
    resource_id: UUID,
    account_id: UUID,
    name: str,
    location_id: int | None,
    operation_id: UUID | None,
    name_field: str = "name",
    is_active: bool = False,
) -> Resource:
    """Writes the ownership row, before the thing's own row, under the same uuid.

    `is_active`: the operation that makes it is about to be begun, and works on it until it ends.

    Raises: Invalid on the field `name_field` when the account already has a live thing of that kind and name (only
    for kinds whose names are unique: instances, whatever the case, SSH keys, and private networks and firewall groups
    of a location).
    """
    row: Resource | None = session.scalar(
        insert(Resource)
        .values(
            resource_id=resource_id,
            kind=kind,
            account_id=account_id,
            name=name,
            location_id=location_id,
            created_by_operation_id=operation_id,
            active_operation_id=operation_id if is_active else None,
        )
        .on_conflict_do_nothing()
        .returning(Resource)
    )
    if row is None:
        raise Invalid.field(name_field, f"The {name_field} has already been taken.")
    return row


def get_owned(session: Session, caller: Caller, kind: ResourceKind, uuid: UUID) -> Resource:
    """The caller's live thing of this kind; the operator may name anyone's.

    Raises: NotFound, in the same words, when it is absent, deleted, of another kind or another account's.
    """
    return _found(session, _owned(caller, kind, uuid), kind)


def lock_owned(session: Session, caller: Caller, kind: ResourceKind, uuid: UUID) -> Resource:
    """As `get_owned`, with the row locked (as `lock` does) and read fresh: whoever changes a thing starts here."""
    query = _owned(caller, kind, uuid).with_for_update(key_share=True)
    return _found(session, query.execution_options(populate_existing=True), kind)


def lock(session: Session, resource_id: UUID) -> Resource | None:
    """The row locked and read fresh, deleted or not, whoever owns it: for workflows. None when it never existed.

    FOR NO KEY UPDATE: one who holds a later lock may write a row that refers to the resource, which PostgreSQL checks
    with a lock of its own (see `docs/decisions/0031-locks-of-resources-let-references-pass.md`).
    """
    query = select(Resource).where(Resource.resource_id == resource_id)
    locked = query.with_for_update(key_share=True).execution_options(populate_existing=True)
    return session.scalar(locked)


def retire(session: Session, resource_id: UUID) -> bool:
    """Marks the thing as deleted and idle. The row stays: bills and events refer to it.

    Returns whether this call did it; a second call has no effect and gives False, so counts are given back once.
    """
    result = session.execute(
        update(Resource)
        .where(Resource.resource_id == resource_id, Resource.deleted_at.is_(None))
        .values(deleted_at=func.now(), active_operation_id=None)
        .returning(Resource.resource_id)
        .execution_options(synchronize_session="fetch")
    )
    return result.first() is not None


def in_path(kind: ResourceKind, parameter: str = "uuid") -> Callable[[Request], None]:
    """A check for `form_body(..., path_check=)`: the thing named in the path is the caller's, else NotFound.

    It is asked only when the body is about to be refused, so that 404 comes before 422 and costs nothing otherwise.
    """

    def check(request: Request) -> None:
        try:
            uuid = UUID(str(request.path_params[parameter]))
        except ValueError:
            raise _absent(kind) from None
        with transaction() as session:
            get_owned(session, request.state.caller, kind, uuid)

    return check


def _owned(caller: Caller, kind: ResourceKind, uuid: UUID) -> Select[Resource]:
    query = select(Resource).where(
        Resource.resource_id == uuid, Resource.kind == kind, Resource.deleted_at.is_(None)
    )
    return query if caller.is_operator else query.where(Resource.account_id == caller.account_id)


def _found(session: Session, query: Select[Resource], kind: ResourceKind) -> Resource:
    row = session.scalar(query)
    if row is None:
        raise _absent(kind)
    return row


def _absent(kind: ResourceKind) -> NotFound:
    return NotFound(f"{TITLES[kind]} not found.")
