"""The verbs of accounts and keys. Each works in the caller's transaction and commits nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from awan import events
from awan.accounts.access import Caller
from awan.accounts.models import Account, AccountKind, AccountState, ApiKey, KeyScope, Quota
from awan.accounts.quotas import LIMITS
from awan.accounts.rules import new_key_text
from awan.errors import Conflict, Invalid, NotFound, QuotaExceeded
from awan.kit.clock import now
from awan.kit.ids import new_id
from awan.kit.pagination import PageRequest

OPERATOR_NAME = "Operator"
OPERATOR_ACTOR = "operator"
KEYS_PER_ACCOUNT_MAX = 100
# Number of the advisory lock under which the operator's account is made once.
_INIT_LOCK = 0x6177616E01

Network = IPv4Network | IPv6Network


@dataclass(frozen=True)
class KeyWish:
    """What a new key should be. Absent limits: those of its maker, else the defaults of the table."""

    name: str
    scope: KeyScope = KeyScope.READ_WRITE
    expires_at: datetime | None = None
    allowed_cidrs: Sequence[Network] | None = None
    reads_per_minute: int | None = None
    writes_per_minute: int | None = None


def create_account(
    session: Session,
    name: str,
    currency: str = "IDR",
    *,
    kind: AccountKind = AccountKind.CUSTOMER,
    quotas: Mapping[str, int] | None = None,
    actor: str = OPERATOR_ACTOR,
) -> Account:
    """A new account with its quota row. `quotas` maps limits (`instances`, `memory_gib`, ...) to other maxima."""
    account = Account(account_id=new_id(), name=name, kind=kind, currency=currency)
    session.add(account)
    session.flush()
    maxima = {f"{limit}_max": most for limit, most in (quotas or {}).items()}
    session.add(Quota(account_id=account.account_id, **maxima))
    session.flush()
    session.refresh(account)
    events.record(
        session,
        kind="account.created",
        actor=actor,
        account_id=account.account_id,
        data={"name": name, "currency": currency},
    )
    return account


def create_key(
    session: Session,
    account_id: UUID,
    name: str,
    scope: KeyScope = KeyScope.READ_WRITE,
    *,
    expires_at: datetime | None = None,
    allowed_cidrs: Sequence[Network] | None = None,
    reads_per_minute: int | None = None,
    writes_per_minute: int | None = None,
    actor: str = OPERATOR_ACTOR,
) -> tuple[ApiKey, str]:
    """A new key and its text, which is stored nowhere: this is the only time it can be shown.

    Raises: QuotaExceeded when the account has `KEYS_PER_ACCOUNT_MAX` live keys.
    """
    # The lock makes the count below true for parallel calls.
    session.execute(select(Quota).where(Quota.account_id == account_id).with_for_update())
    if len(list_keys(session, account_id)) >= KEYS_PER_ACCOUNT_MAX:
        raise QuotaExceeded(f"An account can have {KEYS_PER_ACCOUNT_MAX} API keys.")
    text = new_key_text()
    limits = {"reads_per_minute": reads_per_minute, "writes_per_minute": writes_per_minute}
    key = ApiKey(
        key_id=text.key_id,
        account_id=account_id,
        name=name,
        secret_sha256=text.sha256,
        scope=scope,
        expires_at=expires_at,
        allowed_cidrs=None if allowed_cidrs is None else [str(cidr) for cidr in allowed_cidrs],
        **{column: limit for column, limit in limits.items() if limit is not None},
    )
    session.add(key)
    session.flush()
    session.refresh(key)
    events.record(
        session,
        kind="api_key.created",
        actor=actor,
        account_id=account_id,
        data={"key_id": key.key_id, "name": name, "scope": scope.value},
    )
    return key, text.plain_text


def create_key_as(session: Session, caller: Caller, wish: KeyWish) -> tuple[ApiKey, str]:
    """A new key of the caller's account, which can do nothing that the caller's own key cannot.

    It inherits the rate limits; a key that ends or is bound to networks makes only keys that end no later and are
    bound within them. Raises: Invalid, QuotaExceeded.
    """
    maker = session.get_one(ApiKey, caller.key_id)
    _check_within(maker, wish)
    return create_key(
        session,
        caller.account_id,
        wish.name,
        wish.scope,
        expires_at=wish.expires_at,
        allowed_cidrs=wish.allowed_cidrs,
        reads_per_minute=maker.reads_per_minute,
        writes_per_minute=maker.writes_per_minute,
        actor=caller.actor,
    )


def _check_within(maker: ApiKey, wish: KeyWish) -> None:
    if maker.scope != KeyScope.READ_WRITE and wish.scope != maker.scope:
        raise Invalid.field("scope", "The scope must not exceed that of the key you use.")
    if maker.expires_at is not None and (
        wish.expires_at is None or wish.expires_at > maker.expires_at
    ):
        raise Invalid.field("expires_at", "The key must not outlive the key you use.")
    if maker.allowed_cidrs is not None:
        bounds = [ip_network(str(cidr)) for cidr in maker.allowed_cidrs]
        if not wish.allowed_cidrs or not all(
            any(_contains(bound, cidr) for bound in bounds) for cidr in wish.allowed_cidrs
        ):
            raise Invalid.field(
                "allowed_cidrs", "The networks must lie within those of the key you use."
            )


def _contains(bound: Network, cidr: Network) -> bool:
    # Networks of different families contain nothing of each other.
    if isinstance(bound, IPv4Network):
        return isinstance(cidr, IPv4Network) and cidr.subnet_of(bound)
    return isinstance(cidr, IPv6Network) and cidr.subnet_of(bound)


def list_keys(session: Session, account_id: UUID) -> list[ApiKey]:
    """The account's keys that are not revoked, oldest first. Expired ones are among them."""
    query = select(ApiKey).where(ApiKey.account_id == account_id, ApiKey.revoked_at.is_(None))
    return list(session.scalars(query.order_by(ApiKey.created_at, ApiKey.key_id)))


def get_key(session: Session, account_id: UUID, key_id: str) -> ApiKey:
    """The account's key, revoked or not. Raises: NotFound."""
    key = session.get(ApiKey, key_id, populate_existing=True)
    if key is None or key.account_id != account_id:
        raise NotFound("API key not found.")
    return key


def revoke_key(session: Session, account_id: UUID, key_id: str, actor: str) -> ApiKey:
    """Ends the key at once. Raises: NotFound (also when it is revoked already); Conflict for the operator's last."""
    account = _lock_account(session, account_id)
    key = get_key(session, account_id, key_id)
    if key.revoked_at is not None:
        raise NotFound("API key not found.")
    if account.kind == AccountKind.OPERATOR and not _usable_keys(session, account_id, but=key_id):
        raise Conflict("This is the operator's last usable key: create another one first.")
    key.revoked_at = now()
    session.flush()
    events.record(
        session,
        kind="api_key.revoked",
        actor=actor,
        account_id=account_id,
        data={"key_id": key_id, "name": key.name},
    )
    return key


def _usable_keys(session: Session, account_id: UUID, but: str) -> list[ApiKey]:
    return [
        key
        for key in list_keys(session, account_id)
        if key.key_id != but
        and key.scope == KeyScope.READ_WRITE
        and (key.expires_at is None or key.expires_at > now())
    ]


def get_account(session: Session, account_id: UUID) -> Account:
    """The account in any state. Raises: NotFound."""
    account = session.get(Account, account_id, populate_existing=True)
    if account is None:
        raise NotFound("Account not found.")
    return account


def _lock_account(session: Session, account_id: UUID) -> Account:
    """The row locked against other changes of it, but not against rows that refer to it.

    Who makes such a row holds the quota already, which is locked after the account here.
    """
    lock = {"key_share": True}
    account = session.get(Account, account_id, with_for_update=lock, populate_existing=True)
    if account is None:
        raise NotFound("Account not found.")
    return account


def list_accounts(
    session: Session, page: PageRequest, *, search: str | None = None
) -> tuple[list[Account], int]:
    """A page of all accounts, oldest first, and how many there are; `search` is part of the name, in any case."""
    query = select(Account)
    if search:
        query = query.where(func.strpos(func.lower(Account.name), search.lower()) > 0)
    total = session.scalar(select(func.count()).select_from(query.subquery())) or 0
    ordered = query.order_by(Account.created_at, Account.account_id)
    return list(session.scalars(ordered.limit(page.limit).offset(page.offset))), total


def change_account(
    session: Session,
    account_id: UUID,
    *,
    name: str | None = None,
    state: AccountState | None = None,
    quotas: Mapping[str, int] | None = None,
    actor: str,
) -> Account:
    """Changes what is given. A maximum may be set below the present use: it only stops more.

    Raises: NotFound; Conflict for another state of the operator's account, or closing one that still holds things.
    """
    account = _lock_account(session, account_id)
    changes: dict[str, object] = {}
    if state is not None and state != account.state:
        _check_state_change(session, account, state)
        account.state = state
        changes["state"] = state.value
    if name is not None:
        account.name = name
        changes["name"] = name
    if quotas:
        session.execute(
            update(Quota)
            .where(Quota.account_id == account_id)
            .values({f"{limit}_max": most for limit, most in quotas.items()})
            .execution_options(synchronize_session=False)
        )
        changes["quotas"] = dict(quotas)
    session.flush()
    if changes:
        events.record(
            session, kind="account.changed", actor=actor, account_id=account_id, data=changes
        )
    return account


def _check_state_change(session: Session, account: Account, state: AccountState) -> None:
    if account.kind == AccountKind.OPERATOR:
        raise Conflict("The operator's account is always active.")
    if state is AccountState.CLOSED:
        quota = session.get_one(
            Quota, account.account_id, with_for_update=True, populate_existing=True
        )
        held = [LIMITS[limit] for limit in LIMITS if getattr(quota, f"{limit}_used")]
        if held:
            raise Conflict(f"The account still holds {', '.join(held)}: delete them first.")


def init_operator(session: Session) -> str:
    """Makes the operator's account and its first key, once; gives the key's text.

    Raises: Conflict when there is an operator's account already.
    """
    session.execute(select(func.pg_advisory_xact_lock(_INIT_LOCK)))
    if session.scalar(select(Account.account_id).where(Account.kind == AccountKind.OPERATOR)):
        raise Conflict("This cloud has an operator already: the first key was shown then.")
    account = create_account(session, OPERATOR_NAME, kind=AccountKind.OPERATOR)
    _, text = create_key(
        session,
        account.account_id,
        "first operator key",
        reads_per_minute=6000,
        writes_per_minute=6000,
    )
    return text
