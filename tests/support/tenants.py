"""Accounts with working API keys, committed, so that calls over HTTP can use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from uuid import UUID

from awan.accounts import KeyScope, create_account, create_key
from awan.accounts.models import AccountKind
from awan.kit.database import transaction


@dataclass(frozen=True)
class Tenant:
    """An account and one of its keys."""

    account_id: UUID
    key: str

    @property
    def headers(self) -> dict[str, str]:
        """What each call of this tenant carries."""
        return {"x-apikey": self.key}


def make_tenant(
    name: str = "Tenant",
    *,
    is_operator: bool = False,
    scope: KeyScope = KeyScope.READ_WRITE,
    allowed_cidrs: Sequence[IPv4Network | IPv6Network] | None = None,
    reads_per_minute: int = 100_000,
    writes_per_minute: int = 100_000,
    quotas: dict[str, int] | None = None,
) -> Tenant:
    """A fresh account with one key, which may call as often as a test wants."""
    kind = AccountKind.OPERATOR if is_operator else AccountKind.CUSTOMER
    with transaction() as session:
        account = create_account(session, name, kind=kind, quotas=quotas)
        _, text = create_key(
            session,
            account.account_id,
            "test",
            scope,
            allowed_cidrs=allowed_cidrs,
            reads_per_minute=reads_per_minute,
            writes_per_minute=writes_per_minute,
        )
        return Tenant(account.account_id, text)
