"""Verbs of consoles. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.accounts.models import Account, AccountState, ApiKey
from awan.console.models import LIVE, Console, ConsoleState
from awan.console.rules import TICKET_REFUSED
from awan.console.workflows import OPEN
from awan.errors import Conflict, QuotaExceeded, Unauthenticated
from awan.events import record
from awan.instances.models import DesiredState, Instance, ObservedState
from awan.instances.service import refuse_if_unreachable
from awan.kit.clock import now
from awan.kit.ids import derived_id, new_id
from awan.operations import begin
from awan.resources import ResourceKind, get_owned
from awan.settings import get_settings

SYSTEM_ACTOR = "system:console"
LOST_AFTER_S = 60.0
"""Silence of an API process after which its consoles are taken to be gone with it."""
SEEN_INTERVAL_S = 5.0
KEPT_DAYS = 30
NOT_RUNNING = "Only a running instance has a console."

# Why a console may not stay open, first reason first; null when it may.
_REFRESH = text(
    """
    SELECT console_id, CASE
        WHEN console.state = 'closed' THEN coalesce(closed_reason, 'closed')
        WHEN instance.desired_state = 'deleted' OR instance.deleted_at IS NOT NULL
            THEN 'the instance was deleted'
        WHEN instance.observed_state NOT IN ('running', 'paused') THEN 'the instance was stopped'
        WHEN node.health = 'unreachable' THEN 'the server of the instance does not answer'
        WHEN api_key.revoked_at IS NOT NULL OR api_key.expires_at <= now()
            THEN 'the API key that opened it is not valid any more'
        WHEN account.state <> 'active' THEN 'the account is not active any more'
        END AS reason
    FROM console JOIN instance USING (instance_id)
        LEFT JOIN node ON node.node_id = instance.node_id
        JOIN api_key ON api_key.key_id = console.key_id
        JOIN account ON account.account_id = console.account_id
    WHERE console_id = ANY(:ids)
    """
)


@dataclass(frozen=True)
class _Requester:
    """Who uses a ticket: whoever was given it."""

    account_id: UUID
    actor: str
    request_id: str
    is_operator: bool = False


def issue(session: Session, caller: Caller, instance_id: UUID) -> Console:
    """A ticket for the screen of a running instance.

    Raises: NotFound, Conflict (not running, its node unreachable, or all its consoles are open), QuotaExceeded (those
    of the account).
    """
    resource = get_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    instance = session.get_one(Instance, instance_id)
    _check_running(session, instance)
    _check_room(session, resource.account_id, instance_id)
    console = Console(
        console_id=new_id(),
        instance_id=instance_id,
        account_id=resource.account_id,
        key_id=caller.key_id,
        state=ConsoleState.ISSUED,
        ticket_expires_at=now() + timedelta(seconds=get_settings().console_ticket_s),
    )
    session.add(console)
    session.flush()
    _record(session, console, "console.requested", caller.actor)
    return console


def use_ticket(session: Session, console_id: UUID, request_id: str) -> Console:
    """The ticket is used up, and a worker is asked to unlock the screen.

    Raises: Unauthenticated (used, expired, its API key has ended), Conflict, QuotaExceeded as in `issue`.
    """
    console = session.get(Console, console_id, with_for_update=True)
    if (
        console is None
        or console.state != ConsoleState.ISSUED
        or console.ticket_expires_at <= now()
        or not _is_key_valid(session, console.key_id)
    ):
        raise Unauthenticated(TICKET_REFUSED)
    instance = session.get_one(Instance, console.instance_id)
    _check_running(session, instance)
    # Those of an account are counted one after the other.
    session.execute(
        text("SELECT pg_advisory_xact_lock(hashtext('awan.console'), hashtext(:account))"),
        {"account": str(console.account_id)},
    )
    _check_room(session, console.account_id, console.instance_id)
    console.state, console.seen_at = ConsoleState.OPENING, now()
    begin(
        session,
        caller=_Requester(console.account_id, f"key:{console.key_id}", request_id),
        plan=OPEN,
        # It changes nothing of the instance: neither waits for the other.
        resource=None,
        resource_kind="console",
        subject_id=console_id,
        # One opening of an instance at a time: a screen has one password.
        partition_key=derived_id(console.instance_id, "console"),
    )
    return console


def mark_open(session: Session, console_id: UUID) -> bool:
    """The relay is through to the node; False when the console was closed meanwhile."""
    console = session.get_one(Console, console_id, with_for_update=True)
    if console.state != ConsoleState.READY:
        return False
    console.state, console.opened_at = ConsoleState.OPEN, now()
    _record(session, console, "console.opened", f"key:{console.key_id}")
    return True


def close(session: Session, console_id: UUID, reason: str) -> None:
    """The console is over. Closed already: no effect."""
    console = session.get_one(Console, console_id, with_for_update=True)
    if console.state != ConsoleState.CLOSED:
        _end(session, console, reason)


def refresh(session: Session, console_ids: Collection[UUID]) -> dict[UUID, str]:
    """Says that these are still held by a process; gives those that must end, and why."""
    ids = sorted(console_ids)
    session.execute(
        update(Console)
        .where(
            Console.console_id.in_(ids),
            Console.state.in_(LIVE),
            Console.seen_at < func.now() - timedelta(seconds=SEEN_INTERVAL_S),
        )
        .values(seen_at=func.now())
        .execution_options(synchronize_session=False)
    )
    rows = session.execute(_REFRESH, {"ids": ids}).all()
    return {row.console_id: row.reason for row in rows if row.reason is not None}


def end_lost(session: Session) -> int:
    """Closes consoles whose process has died, and forgets old rows; how many were closed. For a schedule."""
    silent = now() - timedelta(seconds=LOST_AFTER_S)
    lost = session.scalars(
        select(Console)
        .where(Console.state.in_(LIVE), Console.seen_at < silent)
        .with_for_update(skip_locked=True)
    ).all()
    for console in lost:
        _end(session, console, "the server that relayed it has ended")
    old = now() - timedelta(days=KEPT_DAYS)
    session.execute(delete(Console).where(Console.created_at < old, Console.state.not_in(LIVE)))
    return len(lost)


def _check_running(session: Session, instance: Instance) -> None:
    refuse_if_unreachable(session, instance)
    if (
        instance.desired_state != DesiredState.RUNNING
        or instance.observed_state != ObservedState.RUNNING
        or instance.node_id is None
    ):
        raise Conflict(NOT_RUNNING)


def _check_room(session: Session, account_id: UUID, instance_id: UUID) -> None:
    """Raises: Conflict, QuotaExceeded when no further console may be opened."""
    settings = get_settings()
    seen_since = now() - timedelta(seconds=LOST_AFTER_S)
    live = (Console.state.in_(LIVE), Console.seen_at >= seen_since)
    own, all_of_account = session.execute(
        select(
            func.count().filter(Console.instance_id == instance_id),
            func.count(),
        ).where(Console.account_id == account_id, *live)
    ).one()
    if own >= settings.console_per_instance_max:
        raise Conflict(
            f"The instance has {own} open consoles, and there may be no more; close one first."
        )
    if all_of_account >= settings.console_per_account_max:
        raise QuotaExceeded(f"The account has {all_of_account} open consoles; close one first.")


def _is_key_valid(session: Session, key_id: str) -> bool:
    is_valid: Any = session.scalar(
        select(func.count())
        .select_from(ApiKey)
        .join(Account, Account.account_id == ApiKey.account_id)
        .where(
            ApiKey.key_id == key_id,
            ApiKey.revoked_at.is_(None),
            (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > func.now()),
            Account.state == AccountState.ACTIVE,
        )
    )
    return bool(is_valid)


def _end(session: Session, console: Console, reason: str) -> None:
    was_open = console.state == ConsoleState.OPEN
    console.state, console.closed_at, console.closed_reason = ConsoleState.CLOSED, now(), reason
    if was_open:
        _record(session, console, "console.closed", SYSTEM_ACTOR, reason=reason)


def _record(session: Session, console: Console, kind: str, actor: str, **data: str) -> None:
    record(
        session,
        kind=kind,
        actor=actor,
        account_id=console.account_id,
        resource_id=console.instance_id,
        data={"console": str(console.console_id), **data},
    )
