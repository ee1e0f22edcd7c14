"""Wire shapes of accounts, keys and events."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, Field, field_validator

from awan.accounts.models import Account, AccountState, ApiKey, KeyScope
from awan.accounts.quotas import LIMITS
from awan.kit.clock import now
from awan.kit.forms import Matching
from awan.kit.http import Timestamp
from awan.kit.money import MINOR_DIGITS
from awan.kit.pagination import LIMIT_DEFAULT, LIMIT_MAX, PageInfo

NAME_FORM = Matching(r"^\S(.*\S)?$", "The name must be one line, with no spaces around it.")
QUOTA_MAX = 1_000_000_000
RATE_MAX = 1_000_000
CIDRS_MAX = 50

Name = Annotated[str, Field(min_length=1, max_length=64), NAME_FORM]
QuotaMaximum = Annotated[int | None, Field(ge=0, le=QUOTA_MAX)]
RateLimit = Annotated[int | None, Field(ge=1, le=RATE_MAX)]


class KeyCreate(BaseModel):
    """A new API key. Without networks it works from everywhere, without `expires_at` until it is revoked."""

    name: Name
    scope: KeyScope = KeyScope.READ_WRITE
    expires_at: AwareDatetime | None = Field(default=None, description="ISO 8601 with a zone.")
    allowed_cidrs: list[IPv4Network | IPv6Network] | None = Field(
        default=None, min_length=1, max_length=CIDRS_MAX
    )

    @field_validator("expires_at")
    @classmethod
    def _lies_ahead(cls, value: AwareDatetime | None) -> AwareDatetime | None:
        if value is not None and value <= now():
            raise ValueError("The expires_at must lie in the future.")
        return value


class AdminKeyCreate(KeyCreate):
    """A new API key of any account; the operator also sets its limits per minute."""

    reads_per_minute: RateLimit = None
    writes_per_minute: RateLimit = None


class QuotaFields(BaseModel):
    """Maxima of an account; memory and storage in GiB. Absent: unchanged, or the default of a new account."""

    instances_max: QuotaMaximum = None
    vcpus_max: QuotaMaximum = None
    memory_gib_max: QuotaMaximum = None
    storage_gib_max: QuotaMaximum = None
    public_ips_max: QuotaMaximum = None
    private_networks_max: QuotaMaximum = None
    ssh_keys_max: QuotaMaximum = None

    def quotas(self) -> dict[str, int]:
        """The given maxima by limit."""
        given = {limit: getattr(self, f"{limit}_max") for limit in LIMITS}
        return {limit: most for limit, most in given.items() if most is not None}


class AccountCreate(QuotaFields):
    """A new customer."""

    name: Name
    currency: Literal["IDR", "USD", "EUR", "SGD"] = "IDR"

    @field_validator("currency")
    @classmethod
    def _is_known(cls, value: str) -> str:
        assert value in MINOR_DIGITS
        return value


class AccountChange(QuotaFields):
    """What should be different. Absent fields stay."""

    name: Name | None = None
    state: AccountState | None = None


class PageQuery(BaseModel):
    """Which page of a list."""

    page: int = Field(default=1, ge=1, le=1_000_000)
    limit: int = Field(default=LIMIT_DEFAULT, ge=1, le=LIMIT_MAX)


class AccountQuery(PageQuery):
    """Which accounts."""

    search: str | None = Field(default=None, max_length=64, description="Part of the name.")


class EventQuery(BaseModel):
    """Which events: `before` is the id of the last one seen."""

    limit: int = Field(default=50, ge=1, le=LIMIT_MAX)
    before: int | None = Field(default=None, ge=1)
    resource_uuid: UUID | None = None


class LimitView(BaseModel):
    """Use and maximum of one limit."""

    used: int
    max: int


class QuotasView(BaseModel):
    """All limits; memory and storage in GiB."""

    instances: LimitView
    vcpus: LimitView
    memory_gib: LimitView
    storage_gib: LimitView
    public_ips: LimitView
    private_networks: LimitView
    ssh_keys: LimitView


class KeyView(BaseModel):
    """An API key without its secret."""

    id: str
    name: str
    scope: KeyScope
    allowed_cidrs: list[str] | None
    reads_per_minute: int
    writes_per_minute: int
    expires_at: Timestamp | None
    last_used_at: Timestamp | None
    revoked_at: Timestamp | None
    created_at: Timestamp

    @classmethod
    def of(cls, key: ApiKey) -> KeyView:
        """The view of a row."""
        return cls(
            id=key.key_id,
            name=key.name,
            scope=KeyScope(key.scope),
            allowed_cidrs=None
            if key.allowed_cidrs is None
            else [str(c) for c in key.allowed_cidrs],
            reads_per_minute=key.reads_per_minute,
            writes_per_minute=key.writes_per_minute,
            expires_at=key.expires_at,
            last_used_at=key.last_used_at,
            revoked_at=key.revoked_at,
            created_at=key.created_at,
        )


class CreatedKeyView(KeyView):
    """A new key with its text in `key`, which is shown this once: a repeated call shows null."""

    key: str | None

    @classmethod
    def shown(cls, key: ApiKey, text: str | None) -> CreatedKeyView:
        """The view of a row with the key's text."""
        return cls(**dict(KeyView.of(key)), key=text)


class AccountView(BaseModel):
    """An account and its limits."""

    uuid: UUID
    name: str
    kind: str
    state: AccountState
    currency: str
    created_at: Timestamp
    quotas: QuotasView

    @classmethod
    def of(cls, account: Account, limits: dict[str, dict[str, int]]) -> AccountView:
        """The view of a row and what `quotas.limits` gave."""
        return cls(
            uuid=account.account_id,
            name=account.name,
            kind=account.kind,
            state=AccountState(account.state),
            currency=account.currency,
            created_at=account.created_at,
            quotas=QuotasView.model_validate(limits),
        )


class OwnAccountView(AccountView):
    """The caller's account, and the key it calls with."""

    api_key: KeyView


class AccountRow(BaseModel):
    """An account in a list."""

    uuid: UUID
    name: str
    kind: str
    state: AccountState
    currency: str
    created_at: Timestamp

    @classmethod
    def of(cls, account: Account) -> AccountRow:
        """The view of a row."""
        return cls(
            uuid=account.account_id,
            name=account.name,
            kind=account.kind,
            state=AccountState(account.state),
            currency=account.currency,
            created_at=account.created_at,
        )


class AccountList(BaseModel):
    """A page of accounts."""

    data: list[AccountRow]
    page: PageInfo
