"""A change that PostgreSQL ends because two waited for each other is made again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from uuid import UUID

from fastapi import Request
from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.accounts import Caller, KeyScope, once
from awan.accounts.models import Account, AccountState
from awan.kit.database import transaction
from awan.kit.http import Answer, answer
from awan.settings import Settings
from tests.support.tenants import make_tenant


def test_both_of_two_that_wait_for_each_other_are_made(settings: Settings) -> None:
    first, second = (make_tenant().account_id for _ in range(2))
    barrier, calls = Barrier(2), []

    def swap(order: tuple[UUID, UUID]) -> Answer:
        request = Request({"type": "http", "method": "POST", "path": "/", "headers": []})
        state = AccountState.ACTIVE
        caller = Caller(first, "k", KeyScope.READ_WRITE, False, state, "IDR", "r", "127.0.0.1")

        def change(session: Session) -> tuple[Answer, UUID]:
            calls.append(order)
            for account_id in order:
                query = select(Account).where(Account.account_id == account_id)
                session.scalars(query.with_for_update()).one().name += "+"
                session.flush()
                if len(calls) <= 2 and account_id == order[0]:
                    barrier.wait(timeout=10)
            return answer("Renamed", None), first

        return once(request, caller, change, lambda *_: answer("Again", None))

    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(swap, [(first, second), (second, first)]))
    assert {it.message for it in answers} == {"Renamed"}
    assert len(calls) > 2, "one of the two was ended, and called again"
    with transaction() as session:
        names = [session.get_one(Account, it).name for it in (first, second)]
    assert [name.count("+") for name in names] == [2, 2]
