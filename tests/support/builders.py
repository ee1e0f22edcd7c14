"""Rows that tests start from, one function each; everything has a default."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID, uuid4

from sqlalchemy.orm import Session

from awan.accounts.models import Account, AccountKind, Quota
from awan.resources.models import Resource, ResourceKind


@dataclass(frozen=True)
class Requester:
    """Who asks, where no API key is involved."""

    account_id: UUID
    is_operator: bool = False
    actor: str = "key:test"
    request_id: str = field(default_factory=lambda: uuid4().hex)


def make_account(session: Session, *, name: str = "Tenant", is_operator: bool = False) -> Account:
    """An account with default quotas."""
    kind = AccountKind.OPERATOR if is_operator else AccountKind.CUSTOMER
    account = Account(account_id=uuid4(), name=name, kind=kind.value)
    session.add(account)
    session.flush()
    session.add(Quota(account_id=account.account_id))
    session.flush()
    return account


def make_resource(session: Session, account: Account) -> Resource:
    """The ownership row of an instance, without the instance."""
    resource = Resource(
        resource_id=uuid4(),
        kind=ResourceKind.INSTANCE.value,
        account_id=account.account_id,
        name=f"thing-{uuid4().hex[:8]}",
        labels={},
    )
    session.add(resource)
    session.flush()
    return resource
