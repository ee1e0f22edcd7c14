"""Quotas: how much an account may hold. Memory and storage count in GiB.

Usage is kept in the account's quota row, whose lock makes parallel takes wait for each other: two hundred parallel
creates against a limit of five admit exactly five.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypedDict, Unpack
from uuid import UUID

from sqlalchemy import BigInteger, ColumnElement, bindparam, func, select, update
from sqlalchemy.orm import Session

from awan.accounts.models import Account, AccountState, Quota
from awan.errors import AccountSuspended, NotFound, QuotaExceeded
from awan.kit.database import execute_directly

# Each limit as the column prefix and as customers read it.
LIMITS = {
    "instances": "instances",
    "vcpus": "vCPUs",
    "memory_gib": "GiB of memory",
    "storage_gib": "GiB of storage",
    "public_ips": "public IPs",
    "private_networks": "private networks",
    "ssh_keys": "SSH keys",
}

_STATE = select(Account.state).where(Account.account_id == bindparam("account"))


class Amounts(TypedDict, total=False):
    """So much of each limit."""

    instances: int
    vcpus: int
    memory_gib: int
    storage_gib: int
    public_ips: int
    private_networks: int
    ssh_keys: int


def take(session: Session, account_id: UUID, **amounts: Unpack[Amounts]) -> None:
    """Adds to the account's usage, all of it or nothing, and holds the quota row's lock until the transaction ends.

    Raises: QuotaExceeded naming the limit, its present use and its maximum; AccountSuspended when it was closed.
    """
    wanted = _positive(amounts)
    if not wanted:
        return
    query = _taking(tuple(wanted))
    parameters = {"account": account_id} | {f"more_{name}": wanted[name] for name in wanted}
    if execute_directly(session, query, parameters).first() is None:
        _refuse(session, account_id, wanted)
        # Something was given back in between; now that the row is locked, the second attempt cannot fail.
        assert execute_directly(session, query, parameters).first() is not None
    # Who closes an account holds its quota meanwhile: only a statement after the wait for it sees that.
    state = session.scalar(_STATE, {"account": account_id})
    if state == AccountState.CLOSED:
        raise AccountSuspended("The account is closed.")


@cache
def _taking(names: tuple[str, ...]) -> Any:
    """The statement that takes of these limits; built once, because building it takes longer than sending it."""
    more = {name: _used(name) + bindparam(f"more_{name}", type_=BigInteger) for name in names}
    return (
        update(Quota)
        .where(
            Quota.account_id == bindparam("account"),
            *(more[name] <= _max(name) for name in names),
        )
        .values({_used(name): more[name] for name in names})
        .returning(Quota.account_id)
    )


def give_back(session: Session, account_id: UUID, **amounts: Unpack[Amounts]) -> None:
    """Subtracts from the account's usage. Never goes below zero: a wrong count must not stop a deletion; the audit
    compares counts with rows.
    """
    returned = _positive(amounts)
    if not returned:
        return
    session.execute(
        update(Quota)
        .where(Quota.account_id == account_id)
        .values(
            {
                _used(name): func.greatest(_used(name) - amount, 0)
                for name, amount in returned.items()
            }
        )
        .execution_options(synchronize_session=False)
    )


def limits(session: Session, account_id: UUID) -> dict[str, dict[str, int]]:
    """Every limit as `{name: {"used": n, "max": n}}`. Raises: NotFound for an unknown account."""
    row = session.get(Quota, account_id, populate_existing=True)
    if row is None:
        raise NotFound("Account not found.")
    return {
        name: {"used": getattr(row, f"{name}_used"), "max": getattr(row, f"{name}_max")}
        for name in LIMITS
    }


def _positive(amounts: Amounts) -> dict[str, int]:
    given = {name: amount for name, amount in amounts.items() if isinstance(amount, int) and amount}
    assert all(amount > 0 for amount in given.values()), amounts
    return given


def _used(name: str) -> ColumnElement[int]:
    column: ColumnElement[int] = getattr(Quota, f"{name}_used")
    return column


def _max(name: str) -> ColumnElement[int]:
    column: ColumnElement[int] = getattr(Quota, f"{name}_max")
    return column


def _refuse(session: Session, account_id: UUID, wanted: dict[str, int]) -> None:
    """Names the first limit that is in the way. Returns, with the row locked, when by now none is any more."""
    row = session.scalar(
        select(Quota)
        .where(Quota.account_id == account_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if row is None:
        raise NotFound("Account not found.")
    for name, amount in wanted.items():
        used, most = getattr(row, f"{name}_used"), getattr(row, f"{name}_max")
        if used + amount > most:
            raise QuotaExceeded(
                f"The quota of {LIMITS[name]} would be exceeded:"
                f" {used} of {most} in use, {amount} more requested."
            )
