"""Who is calling, and may they: one statement per call proves the key, counts the call and notes the use.

Order of refusals: 401, 429, 403 (scope, then suspension), and for the operator's routes 404. All of them come before
the body is looked at, because a route names its caller before its body.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID

import structlog
from fastapi import Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import APIKeyHeader
from sqlalchemy import RowMapping, text
from sqlalchemy.orm import Session

from awan.accounts.models import AccountKind, AccountState, KeyScope
from awan.accounts.rules import Address, parse_key, source_address
from awan.errors import AccountSuspended, Forbidden, RateLimited, Unauthenticated
from awan.kit.database import get_engine
from awan.kit.http import API_KEY_HEADER, no_such_route, refuse_unknown_query
from awan.settings import get_settings

Access = Literal["read", "write", "delete"]
"""What a route does. A deletion is a write that a suspended account may still do."""

api_key_header = APIKeyHeader(
    name=API_KEY_HEADER,
    scheme_name="ApiKeyAuth",
    description="An API key: `awan_<id>_<secret>`.",
    auto_error=False,
)


@dataclass(frozen=True)
class Caller:
    """The key behind a call and its account. The operator's caller may name any account's things."""

    account_id: UUID
    key_id: str
    scope: KeyScope
    is_operator: bool
    account_state: AccountState
    currency: str
    request_id: str
    source_ip: str

    @property
    def actor(self) -> str:
        """Who, as events and operations record it."""
        return f"key:{self.key_id}"


_IS_USABLE = text(
    """
    SELECT EXISTS (
        SELECT FROM api_key JOIN account USING (account_id)
        WHERE key_id = :key_id AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
            AND account.state <> 'closed'
    )
    """
)

# The digest is compared here so that only the key's holder can use up its calls, and once more, in constant time,
# by the caller. A call that is refused for its rate is counted too.
_AUTHENTICATE = text(
    """
    WITH presented AS (
        SELECT api_key.key_id, api_key.secret_sha256, api_key.scope, api_key.reads_per_minute,
            api_key.writes_per_minute, account.account_id, account.kind, account.state, account.currency,
            api_key.secret_sha256 = :sha256
                AND api_key.revoked_at IS NULL
                AND (api_key.expires_at IS NULL OR api_key.expires_at > now())
                AND account.state <> 'closed'
                AND (api_key.allowed_cidrs IS NULL
                    OR coalesce(CAST(:source_ip AS inet) <<= ANY (api_key.allowed_cidrs), false)) AS is_valid
        FROM api_key JOIN account USING (account_id)
        WHERE api_key.key_id = :key_id
    ), counted AS (
        INSERT INTO rate_counter (key_id, bucket, minute, calls)
        SELECT key_id, :bucket, date_trunc('minute', now()), 1 FROM presented WHERE is_valid
        ON CONFLICT (key_id, bucket) DO UPDATE SET
            calls = CASE WHEN rate_counter.minute = excluded.minute THEN rate_counter.calls + 1 ELSE 1 END,
            minute = excluded.minute
        RETURNING calls
    ), noted AS (
        UPDATE api_key SET last_used_at = now() FROM presented
        WHERE api_key.key_id = presented.key_id AND presented.is_valid
            AND (api_key.last_used_at IS NULL OR api_key.last_used_at < now() - interval '1 minute')
    )
    SELECT presented.*, counted.calls,
        CAST(ceil(60 - extract(second FROM now())) AS integer) AS seconds_left
    FROM presented LEFT JOIN counted ON true
    """
)


BEARER = "bearer "
"""Scrapers know no header of ours; where a route lets them, the key may come as `Authorization: Bearer <key>`."""


@lru_cache(maxsize=16)
def authenticated(
    access: Access, *, billing: bool = False, or_bearer: bool = False
) -> Callable[..., Awaitable[Caller]]:
    """A dependency that gives the `Caller` of a route which does `access`.

    `or_bearer=True` also takes the key from `Authorization: Bearer`.
    `billing=True` marks routes about money: keys with the billing scope may use them, and a suspended account may
    write to them (to pay). All other routes refuse billing keys.
    Raises: Unauthenticated, RateLimited, Forbidden, AccountSuspended; Invalid for unknown query parameters.
    """

    async def dependency(request: Request, key: str | None = Security(api_key_header)) -> Caller:
        given = key or (_bearer_key(request) if or_bearer else None)
        caller = await _identify(request, given, access)
        _check_scope(caller, access, billing=billing)
        refuse_unknown_query(request)
        return caller

    return dependency


@lru_cache(maxsize=4)
def operator(access: Access, *, or_bearer: bool = False) -> Callable[..., Awaitable[Caller]]:
    """A dependency that gives the `Caller` of an operator's route. `or_bearer` as for `authenticated`.

    Raises: Unauthenticated; NotFound, in the words of an unknown route, for a customer's key; RateLimited, Forbidden.
    """

    async def dependency(request: Request, key: str | None = Security(api_key_header)) -> Caller:
        given = key or (_bearer_key(request) if or_bearer else None)
        caller = await _identify(request, given, access)
        if not caller.is_operator:
            raise no_such_route(request)
        _check_scope(caller, access, billing=False)
        refuse_unknown_query(request)
        return caller

    return dependency


def _bearer_key(request: Request) -> str | None:
    given = request.headers.get("authorization", "")
    return given[len(BEARER) :].strip() if given.lower().startswith(BEARER) else None


def is_key_usable(session: Session, key_id: str) -> bool:
    """Whether a key that was accepted before still would be: for answers that last."""
    return bool(session.scalar(_IS_USABLE, {"key_id": key_id}))


async def _identify(request: Request, key: str | None, access: Access) -> Caller:
    """The caller, also kept in `request.state.caller` and in the log lines of this call."""
    source = source_address(
        request.client.host if request.client else None,
        request.headers.getlist("x-forwarded-for"),
        get_settings().trusted_proxies,
    )
    caller = await run_in_threadpool(
        _authenticate, key or "", access, source, str(request.state.request_id)
    )
    request.state.caller = caller
    structlog.contextvars.bind_contextvars(account=str(caller.account_id), key=caller.key_id)
    return caller


def _authenticate(key: str, access: Access, source: Address | None, request_id: str) -> Caller:
    presented = parse_key(key)
    if presented is None:
        raise _unauthenticated()
    bucket = "read" if access == "read" else "write"
    parameters: dict[str, Any] = {
        "key_id": presented.key_id,
        "sha256": presented.sha256,
        "source_ip": str(source) if source else None,
        "bucket": bucket,
    }
    with get_engine().connect() as connection:
        # One statement is its own transaction: no BEGIN and COMMIT to wait for.
        autocommit = connection.execution_options(isolation_level="AUTOCOMMIT")
        row = autocommit.execute(_AUTHENTICATE, parameters).mappings().one_or_none()
    if (
        row is None
        or not hmac.compare_digest(bytes(row["secret_sha256"]), presented.sha256)
        or not row["is_valid"]
    ):
        raise _unauthenticated()
    _check_rate(row, bucket)
    return Caller(
        account_id=row["account_id"],
        key_id=row["key_id"],
        scope=KeyScope(row["scope"]),
        is_operator=row["kind"] == AccountKind.OPERATOR,
        account_state=AccountState(row["state"]),
        currency=row["currency"],
        request_id=request_id,
        source_ip=str(source) if source else "",
    )


def _unauthenticated() -> Unauthenticated:
    """One sentence for every reason: which one it was is nobody's business but the key's holder's."""
    return Unauthenticated(
        f"The API key is missing or not valid: it goes into the header {API_KEY_HEADER}."
    )


def _check_rate(row: RowMapping, bucket: str) -> None:
    most = row[f"{bucket}s_per_minute"]
    if row["calls"] > most:
        raise RateLimited(
            f"Too many {bucket} calls: this key has {most} per minute.",
            retry_after_s=row["seconds_left"],
        )


def _check_scope(caller: Caller, access: Access, *, billing: bool) -> None:
    if caller.scope is KeyScope.BILLING and not billing:
        raise Forbidden("This API key is for billing calls only.")
    if caller.scope is KeyScope.READ and access != "read":
        raise Forbidden("This API key may only read.")
    if caller.account_state is AccountState.SUSPENDED and access == "write" and not billing:
        raise AccountSuspended(
            "The account is suspended: reading, paying and deleting are possible."
        )
