"""Ownership: found by its owner and the operator alone, named once, retired once."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest
from sqlalchemy.orm import Session

from awan import resources
from awan.accounts import Caller, KeyScope
from awan.accounts.models import AccountState
from awan.errors import Invalid, NotFound
from awan.resources import ResourceKind
from tests.support.builders import make_account


def caller_of(session: Session, *, is_operator: bool = False) -> Caller:
    """A caller with an account of its own."""
    account = make_account(session, is_operator=is_operator)
    return Caller(
        account.account_id,
        "k",
        KeyScope.READ_WRITE,
        is_operator,
        AccountState.ACTIVE,
        "IDR",
        "r",
        "",
    )


def make(session: Session, caller: Caller, name: str, kind: ResourceKind = ResourceKind.INSTANCE):
    """A thing of the caller's."""
    return resources.create(
        session,
        kind=kind,
        resource_id=uuid4(),
        account_id=caller.account_id,
        name=name,
        location_id=None,
        operation_id=None,
        name_field="hostname",
    )


@pytest.mark.parametrize("find", [resources.get_owned, resources.lock_owned])
def test_only_owner_and_operator_find_a_thing(session: Session, find) -> None:
    mine, other = caller_of(session), caller_of(session)
    operator = caller_of(session, is_operator=True)
    uuid = make(session, mine, "web").resource_id
    assert find(session, mine, ResourceKind.INSTANCE, uuid).name == "web"
    assert find(session, operator, ResourceKind.INSTANCE, uuid).name == "web"
    messages = set()
    for caller, kind, wanted in (
        (other, ResourceKind.INSTANCE, uuid),
        (replace(mine, account_id=uuid4()), ResourceKind.INSTANCE, uuid),
        (mine, ResourceKind.INSTANCE, uuid4()),
    ):
        with pytest.raises(NotFound) as caught:
            find(session, caller, kind, wanted)
        messages.add(caught.value.message)
    assert messages == {"Instance not found."}
    with pytest.raises(NotFound, match="SSH key not found"):
        find(session, mine, ResourceKind.SSH_KEY, uuid)
    assert resources.retire(session, uuid)
    assert not resources.retire(session, uuid)
    with pytest.raises(NotFound):
        find(session, operator, ResourceKind.INSTANCE, uuid)
    locked = resources.lock(session, uuid)
    assert locked is not None
    assert locked.deleted_at is not None


def test_names_are_taken_until_deletion(session: Session) -> None:
    mine, other = caller_of(session), caller_of(session)
    first = make(session, mine, "web")
    with pytest.raises(Invalid) as caught:
        make(session, mine, "WEB")
    assert caught.value.errors == {"hostname": ["The hostname has already been taken."]}
    make(session, other, "web")
    make(session, mine, "web", ResourceKind.SSH_KEY)
    make(session, mine, "WEB", ResourceKind.SSH_KEY)
    resources.retire(session, first.resource_id)
    make(session, mine, "Web")
