"""Verbs of SSH keys. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from awan.accounts import Caller, quotas
from awan.credentials.models import SshKey
from awan.credentials.rules import parse_public_key
from awan.errors import Invalid, NotFound
from awan.events import record
from awan.kit.clock import now
from awan.kit.ids import new_id
from awan.resources import ResourceKind, create, retire


def list_keys(session: Session, account_id: UUID) -> Sequence[SshKey]:
    """The account's keys, oldest first."""
    return session.scalars(
        select(SshKey)
        .where(SshKey.account_id == account_id, SshKey.deleted_at.is_(None))
        .order_by(SshKey.ssh_key_id)
    ).all()


def add_key(session: Session, caller: Caller, title: str, text: str) -> SshKey:
    """Stores a public key. Raises: Invalid (key, title taken, key stored already), QuotaExceeded."""
    try:
        parsed = parse_public_key(text)
    except ValueError as err:
        raise Invalid.field("key", str(err)) from err
    for key in list_keys(session, caller.account_id):
        if key.title == title:
            raise Invalid.field("title", "The title has already been taken.")
        if key.fingerprint == parsed.fingerprint:
            raise Invalid.field("key", f'This key is stored already, as "{key.title}".')
    quotas.take(session, caller.account_id, ssh_keys=1)
    resource_id = new_id()
    create(
        session,
        kind=ResourceKind.SSH_KEY,
        resource_id=resource_id,
        account_id=caller.account_id,
        name=title,
        location_id=None,
        operation_id=None,
        name_field="title",
    )
    key = SshKey(
        resource_id=resource_id,
        account_id=caller.account_id,
        title=title,
        key=parsed.line,
        type=parsed.type,
        fingerprint=parsed.fingerprint,
    )
    session.add(key)
    try:
        session.flush()
    except IntegrityError as err:
        raise Invalid.field("key", "This key has just been stored by another call.") from err
    record(
        session,
        kind="ssh_key.created",
        actor=caller.actor,
        account_id=caller.account_id,
        resource_id=resource_id,
        data={"title": title, "fingerprint": parsed.fingerprint},
    )
    return key


def remove_key(session: Session, caller: Caller, ssh_key_id: int) -> SshKey:
    """Deletes a key; instances that got it keep it. Raises: NotFound."""
    key = session.scalars(
        select(SshKey)
        .where(
            SshKey.ssh_key_id == ssh_key_id,
            SshKey.account_id == caller.account_id,
            SshKey.deleted_at.is_(None),
        )
        .with_for_update()
    ).first()
    if key is None:
        raise NotFound("SSH key not found.")
    key.deleted_at = now()
    retire(session, key.resource_id)
    quotas.give_back(session, caller.account_id, ssh_keys=1)
    record(
        session,
        kind="ssh_key.deleted",
        actor=caller.actor,
        account_id=caller.account_id,
        resource_id=key.resource_id,
    )
    return key


def find_keys(session: Session, account_id: UUID, ids: Sequence[int]) -> dict[int, SshKey]:
    """The account's live keys among `ids`, by id."""
    if not ids:
        return {}
    rows = session.scalars(
        select(SshKey).where(
            SshKey.ssh_key_id.in_(ids), SshKey.account_id == account_id, SshKey.deleted_at.is_(None)
        )
    )
    return {row.ssh_key_id: row for row in rows}
