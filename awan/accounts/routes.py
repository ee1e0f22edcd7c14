"""Routes of accounts and keys: the customer's own, and the operator's for everyone's."""

from __future__ import annotations

import re
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BeforeValidator
from sqlalchemy.orm import Session

from awan import events
from awan.accounts import quotas, service
from awan.accounts.access import Caller, authenticated, operator
from awan.accounts.idempotency import idempotent, replay
from awan.accounts.schemas import (
    AccountChange,
    AccountCreate,
    AccountList,
    AccountQuery,
    AccountRow,
    AccountView,
    AdminKeyCreate,
    CreatedKeyView,
    EventQuery,
    KeyCreate,
    KeyView,
    OwnAccountView,
)
from awan.events.schemas import EventView
from awan.kit.database import transaction
from awan.kit.http import Answer, EmptyForm, Envelope, answer, form_body, query_of
from awan.kit.pagination import PageRequest, paged

router = APIRouter(tags=["Account"])
admin_router = APIRouter()

KEY_ID = "[0-9a-f]{16}"
NO_KEY = "0" * 16


def _key_id(text: str) -> str:
    return text if re.fullmatch(KEY_ID, text) else NO_KEY


KeyId = Annotated[str, Path(pattern=f"^{KEY_ID}$"), BeforeValidator(_key_id)]
"""Anything else is answered as the id of a key that there is not."""

KEY_CREATED = "API key successfully created"
KEY_REVOKED = "API key successfully revoked"


@router.get("/account", response_model=Envelope[OwnAccountView])
def get_account(caller: Caller = Depends(authenticated("read", billing=True))) -> Answer:
    """The account behind the key: its state, limits and their use, and the key itself."""
    with transaction() as session:
        view = _account_view(session, caller.account_id)
        key = service.get_key(session, caller.account_id, caller.key_id)
        return answer("Account detail", OwnAccountView(**dict(view), api_key=KeyView.of(key)))


@router.get("/account/events", response_model=Envelope[list[EventView]])
def list_account_events(
    caller: Caller = Depends(authenticated("read")),
    query: EventQuery = Depends(query_of(EventQuery)),
) -> Answer:
    """What happened in the account, newest first; `before` = the last id goes on."""
    with transaction() as session:
        rows = events.account_events(
            session,
            caller.account_id,
            before=query.before,
            resource_id=query.resource_uuid,
            limit=query.limit,
        )
        return answer("Account events", [EventView.of(row) for row in rows])


@router.get("/api-keys", response_model=Envelope[list[KeyView]])
def list_api_keys(caller: Caller = Depends(authenticated("read"))) -> Answer:
    """The account's API keys that are not revoked, oldest first."""
    with transaction() as session:
        keys = service.list_keys(session, caller.account_id)
        return answer("API keys", [KeyView.of(key) for key in keys])


@router.post("/api-keys", status_code=201, response_model=Envelope[CreatedKeyView])
def create_api_key(
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: KeyCreate = Depends(form_body(KeyCreate)),
) -> Answer:
    """A new key of the account. `key` is shown this once; it can do nothing that your present key cannot."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            key = service.get_key(session, caller.account_id, str(call.earlier.resource_id))
            return replay(call.earlier, CreatedKeyView.shown(key, None))
        key, text = service.create_key_as(session, caller, service.KeyWish(**dict(body)))
        created = answer(KEY_CREATED, CreatedKeyView.shown(key, text), status=201)
        return call.keep(created, key.key_id)


@router.delete("/api-keys/{key_id}", response_model=Envelope[KeyView])
def revoke_api_key(
    key_id: KeyId,
    request: Request,
    caller: Caller = Depends(authenticated("delete")),
    _: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Ends a key at once, your own too."""
    return _revoke(request, caller, caller.account_id, key_id)


@admin_router.get("/accounts", response_model=Envelope[AccountList])
def list_accounts(
    caller: Caller = Depends(operator("read")),
    query: AccountQuery = Depends(query_of(AccountQuery)),
) -> Answer:
    """All accounts, oldest first."""
    with transaction() as session:
        page = PageRequest(query.page, query.limit)
        rows, total = service.list_accounts(session, page, search=query.search)
        return answer("Accounts", paged([AccountRow.of(row) for row in rows], page, total))


@admin_router.post("/accounts", status_code=201, response_model=Envelope[AccountView])
def create_account(
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: AccountCreate = Depends(form_body(AccountCreate)),
) -> Answer:
    """A new customer's account, without keys."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            uuid = UUID(call.earlier.resource_id)
            return replay(call.earlier, _account_view(session, uuid))
        account = service.create_account(
            session, body.name, body.currency, quotas=body.quotas(), actor=caller.actor
        )
        view = _account_view(session, account.account_id)
        return call.keep(answer("Account successfully created", view, status=201), view.uuid)


@admin_router.get("/accounts/{account_uuid:uuid}", response_model=Envelope[AccountView])
def get_any_account(account_uuid: UUID, caller: Caller = Depends(operator("read"))) -> Answer:
    """One account, its limits and their use."""
    with transaction() as session:
        return answer("Account detail", _account_view(session, account_uuid))


@admin_router.patch("/accounts/{account_uuid:uuid}", response_model=Envelope[AccountView])
def change_account(
    account_uuid: UUID,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: AccountChange = Depends(form_body(AccountChange)),
) -> Answer:
    """Renames, suspends, reactivates or closes an account, or sets its limits."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, _account_view(session, account_uuid))
        service.change_account(
            session,
            account_uuid,
            name=body.name,
            state=body.state,
            quotas=body.quotas(),
            actor=caller.actor,
        )
        view = _account_view(session, account_uuid)
        return call.keep(answer("Account successfully changed", view), account_uuid)


@admin_router.get("/accounts/{account_uuid:uuid}/api-keys", response_model=Envelope[list[KeyView]])
def list_any_api_keys(account_uuid: UUID, caller: Caller = Depends(operator("read"))) -> Answer:
    """An account's API keys that are not revoked, oldest first."""
    with transaction() as session:
        service.get_account(session, account_uuid)
        keys = service.list_keys(session, account_uuid)
        return answer("API keys", [KeyView.of(key) for key in keys])


@admin_router.post(
    "/accounts/{account_uuid:uuid}/api-keys",
    status_code=201,
    response_model=Envelope[CreatedKeyView],
)
def create_any_api_key(
    account_uuid: UUID,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: AdminKeyCreate = Depends(form_body(AdminKeyCreate)),
) -> Answer:
    """A new key of any account. `key` is shown this once."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            key = service.get_key(session, account_uuid, str(call.earlier.resource_id))
            return replay(call.earlier, CreatedKeyView.shown(key, None))
        service.get_account(session, account_uuid)
        key, text = service.create_key(session, account_uuid, actor=caller.actor, **dict(body))
        created = answer(KEY_CREATED, CreatedKeyView.shown(key, text), status=201)
        return call.keep(created, key.key_id)


@admin_router.delete(
    "/accounts/{account_uuid:uuid}/api-keys/{key_id}", response_model=Envelope[KeyView]
)
def revoke_any_api_key(
    account_uuid: UUID,
    key_id: KeyId,
    request: Request,
    caller: Caller = Depends(operator("delete")),
    _: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Ends a key of any account at once."""
    return _revoke(request, caller, account_uuid, key_id)


def _revoke(request: Request, caller: Caller, account_id: UUID, key_id: str) -> Answer:
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            key = service.get_key(session, account_id, key_id)
            return replay(call.earlier, KeyView.of(key))
        key = service.revoke_key(session, account_id, key_id, caller.actor)
        return call.keep(answer(KEY_REVOKED, KeyView.of(key)), key_id)


def _account_view(session: Session, account_id: UUID) -> AccountView:
    account = service.get_account(session, account_id)
    return AccountView.of(account, quotas.limits(session, account_id))
