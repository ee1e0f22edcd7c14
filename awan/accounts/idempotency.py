"""`Idempotency-Key`: the same call sent twice has one effect and one answer, for 24 hours.

A mutating route makes its change through `once`, whose frame is that of all of them:

    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, read(session, caller, UUID(call.earlier.resource_id)))
        thing, operation = service.create_thing(session, caller, body)
        return call.keep(answer("Thing created", view(thing), status=202, operation=operation), thing.uuid)

A route that has more to do in its transaction writes the frame out.

Without the header nothing is asked of the database and `keep` only passes the answer on. What is kept is the status,
the message and ids, never a body: the route reads the thing again, so a replay shows it as it is now. Of a thing that
is gone it shows what its row still tells, and where no row is left `EarlierAnswer.remains`: its id. A replay is never
refused because the thing is gone. All of it commits with the change, so a crash leaves both or none, and a refused
call is not remembered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog
from fastapi import Request
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from awan.accounts.access import Caller
from awan.accounts.models import IdempotencyKey
from awan.errors import IdempotencyConflict, Invalid
from awan.kit.database import is_deadlock, transaction
from awan.kit.http import Answer, OperationView, RemainingId, RemainingUuid, Remains, answer
from awan.kit.secrets import keyed_digest

HEADER = "Idempotency-Key"
KEY_MAX_CHARACTERS = 255
LIFETIME = text("interval '24 hours'")
DEADLOCKS_MAX = 3

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class EarlierAnswer:
    """What is known of the answer that this call already got. Null ids: the call had none."""

    status: int
    message: str
    resource_id: str | None
    operation_id: UUID | None

    @property
    def remains(self) -> Remains:
        """The data of a replay when nothing but its id is left of the thing."""
        assert self.resource_id is not None
        if self.resource_id.isdecimal():
            return RemainingId(id=int(self.resource_id))
        return RemainingUuid(uuid=UUID(self.resource_id))


@dataclass(frozen=True)
class IdempotentCall:
    """A call under an Idempotency-Key, or (`key` is None) without one."""

    session: Session
    account_id: UUID
    key: str | None
    earlier: EarlierAnswer | None = None

    def keep(self, given: Answer, resource_id: UUID | int | str | None = None) -> Answer:
        """Remembers the answer with the change, and gives it back. Call it before the transaction ends."""
        if self.key is not None:
            self.session.execute(
                update(IdempotencyKey)
                .where(IdempotencyKey.account_id == self.account_id, IdempotencyKey.key == self.key)
                .values(
                    status=given.status_code,
                    message=given.message,
                    resource_id=None if resource_id is None else str(resource_id),
                    operation_id=given.operation.uuid if given.operation else None,
                )
                .execution_options(synchronize_session=False)
            )
        return given


def idempotent(session: Session, caller: Caller, request: Request) -> IdempotentCall:
    """Claims the call's Idempotency-Key for this transaction; `earlier` is set when it was answered before.

    Raises: IdempotencyConflict when the key stands for another method, path or body, or its first call is still in
    flight; Invalid for a malformed key.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return IdempotentCall(session, caller.account_id, None)
    if not (1 <= len(key) <= KEY_MAX_CHARACTERS and key.isascii() and key.isprintable()):
        raise Invalid.field(HEADER, f"The {HEADER} must be 1 to 255 printable ASCII characters.")
    _claim(session, caller, key)
    digest = _request_sha256(request)
    fresh = session.execute(
        insert(IdempotencyKey)
        .values(account_id=caller.account_id, key=key, request_sha256=digest)
        .on_conflict_do_update(
            index_elements=[IdempotencyKey.account_id, IdempotencyKey.key],
            set_={
                "request_sha256": digest,
                "created_at": func.now(),
                "status": None,
                "message": None,
                "resource_id": None,
                "operation_id": None,
            },
            where=IdempotencyKey.created_at < func.now() - LIFETIME,
        )
        .returning(IdempotencyKey.key)
    ).first()
    if fresh is not None:
        return IdempotentCall(session, caller.account_id, key)
    return IdempotentCall(session, caller.account_id, key, _earlier(session, caller, key, digest))


def is_repeat(session: Session, caller: Caller, request: Request) -> bool:
    """Whether this call was answered before under its key. Claims nothing: `idempotent` has to be asked as well.

    For routes that do something slow before their transaction, which a repeat shall not do again.
    """
    key = request.headers.get(HEADER)
    query = select(IdempotencyKey.status).where(
        IdempotencyKey.account_id == caller.account_id,
        IdempotencyKey.key == key,
        IdempotencyKey.created_at >= func.now() - LIFETIME,
    )
    return key is not None and session.scalar(query) is not None


def once(
    request: Request,
    caller: Caller,
    change: Callable[[Session], tuple[Answer, UUID | int | str | None]],
    again: Callable[[Session, EarlierAnswer], Answer],
) -> Answer:
    """Makes a change in a transaction of its own and keeps its answer; a repeat of the call is answered by `again`.

    `change` gives the answer, and the id of the thing for `again`. It is called once more when PostgreSQL ended the
    transaction because two waited for each other, which has left nothing.
    Raises: as `idempotent`, and what the two raise.
    """
    for _ in range(DEADLOCKS_MAX):
        try:
            return _once(request, caller, change, again)
        except OperationalError as err:
            if not is_deadlock(err):
                raise
            log.warning("call.deadlock", detail=str(err.orig))
    return _once(request, caller, change, again)


def _once(
    request: Request,
    caller: Caller,
    change: Callable[[Session], tuple[Answer, UUID | int | str | None]],
    again: Callable[[Session, EarlierAnswer], Answer],
) -> Answer:
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return again(session, call.earlier)
        return call.keep(*change(session))


def replay(
    earlier: EarlierAnswer,
    data: Any,
    *,
    operation: OperationView | None = None,
    status: int | None = None,
    warnings: list[str] | None = None,
) -> Answer:
    """The earlier answer again, with the thing and its operation as they are now."""
    return answer(
        earlier.message,
        data,
        status=status or earlier.status,
        operation=operation,
        warnings=warnings,
    )


def forget_old_answers(session: Session) -> int:
    """Removes what is older than 24 hours and returns how many that were. For a schedule; nothing depends on it."""
    query = delete(IdempotencyKey).where(IdempotencyKey.created_at < func.now() - LIFETIME)
    return len(session.execute(query.returning(IdempotencyKey.key)).all())


def _claim(session: Session, caller: Caller, key: str) -> None:
    """Takes the advisory lock of (account, key) until the transaction ends; who comes meanwhile is refused at once.

    Without it the INSERT of a second call would wait for the first one's transaction.
    """
    name = hashlib.sha256(f"idempotency:{caller.account_id}:{key}".encode()).digest()
    number = int.from_bytes(name[:8], "big", signed=True)
    if not session.scalar(select(func.pg_try_advisory_xact_lock(number))):
        raise IdempotencyConflict(
            f"The first call with this {HEADER} is still in flight.", retry_after_s=1
        )


def _earlier(session: Session, caller: Caller, key: str, digest: bytes) -> EarlierAnswer:
    row = session.get_one(IdempotencyKey, (caller.account_id, key), populate_existing=True)
    if row.request_sha256 != digest:
        raise IdempotencyConflict(f"This {HEADER} was used for another request.")
    # A committed row without an answer is a route that forgot `keep`.
    assert row.status is not None, f"{HEADER} without answer"
    return EarlierAnswer(row.status, row.message or "", row.resource_id, row.operation_id)


def _request_sha256(request: Request) -> bytes:
    """Keyed hash of method, path and parsed body: the same call as form or as JSON is the same call.

    Keyed, because a body can hold a password that a plain hash would let a reader of the database guess.
    """
    said = [request.method, request.url.path, getattr(request.state, "parsed_body", None)]
    return keyed_digest("idempotency", json.dumps(said, sort_keys=True).encode())
