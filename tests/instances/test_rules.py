"""Validation and display of instances."""

from __future__ import annotations

import re
import string
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from awan.instances import rules
from awan.instances.models import DesiredState, ObservedState
from awan.instances.service import _status_column
from awan.networks.models import ADDRESS_MOVES, Address
from awan.operations.models import FINAL, MOVES, Operation, OperationStatus

label = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
PASSWORD_CHARACTERS = "".join(set(string.printable) - set(string.whitespace) - {":"})


@given(st.lists(label, min_size=1, max_size=4))
def test_host_names_of_good_labels_are_good_in_any_case(labels: list[str]) -> None:
    name = ".".join(labels)
    if name.replace(".", "").isdigit():
        with pytest.raises(ValueError, match="number"):
            rules.check_hostname(name)
    else:
        assert rules.check_hostname(name.upper()) == name


@given(st.text(max_size=80))
def test_whatever_passes_as_a_host_name_is_one(name: str) -> None:
    try:
        checked = rules.check_hostname(name)
    except ValueError:
        return
    assert re.fullmatch(r"[a-z0-9.-]{1,64}", checked)
    assert all(1 <= len(part) <= 63 for part in checked.split("."))
    assert not any(part.startswith("-") or part.endswith("-") for part in checked.split("."))


@given(st.text(max_size=40))
def test_whatever_passes_as_a_username_is_one(name: str) -> None:
    try:
        checked = rules.check_username(name)
    except ValueError:
        return
    assert checked == name
    assert re.fullmatch(r"[a-z_][a-z0-9_-]{0,29}", name)
    assert name not in rules.RESERVED_USERNAMES


@pytest.mark.parametrize("name", ["root", "budi", "_x", "a" * 30, "a-b_c9"])
def test_good_usernames(name: str) -> None:
    assert rules.check_username(name) == name


@given(st.text(PASSWORD_CHARACTERS, min_size=5, max_size=61))
def test_a_password_with_all_classes_is_good(rest: str) -> None:
    assert rules.check_password(f"aA1{rest}", username="budi", hostname="web-1") == []


@given(st.text(max_size=80))
def test_whatever_passes_as_a_password_can_be_given_to_chpasswd(password: str) -> None:
    if rules.check_password(password, username="budi", hostname="web-1") == []:
        assert 8 <= len(password) <= 64
        assert password.isascii()
        assert password.isprintable()
        assert ":" not in password


@pytest.mark.parametrize(
    ("mib", "shown"), [(1024, "1 GB"), (2048, "2 GB"), (65536, "64 GB"), (1536, "1.5 GB")]
)
def test_memory_is_shown_as_always(mib: int, shown: str) -> None:
    assert rules.display_memory(mib) == shown


def test_times_are_shown_as_always() -> None:
    moment = datetime(2024, 1, 25, 7, 43, tzinfo=UTC)
    assert rules.display_time(moment, "Asia/Jakarta") == "25 January 2024, 14:43"
    assert rules.display_time(datetime(2024, 1, 1, 23, 5, tzinfo=UTC), "Asia/Jakarta") == (
        "2 January 2024, 06:05"
    )


@given(st.integers(1, 4096))
def test_shares_stay_within_libvirts_bounds(vcpus: int) -> None:
    assert 2 <= rules.cpu_shares(vcpus) <= 262_144


def test_the_status_in_sql_is_the_status_in_python(session: Session) -> None:
    """Filtering and showing must never disagree: every combination there can be."""
    kinds = [None, "node.add", *rules.STATUS_OF_OPERATION]
    states = [(desired, observed) for desired in DesiredState for observed in ObservedState]
    column = _status_column().compile(
        dialect=postgresql.dialect(), compile_kwargs={"literal_binds": True}
    )
    instances = ", ".join(f"('{desired}', '{observed}')" for desired, observed in states)
    operations = ", ".join("(NULL::text)" if kind is None else f"('{kind}')" for kind in kinds)
    rows = session.execute(
        text(
            f"SELECT desired_state, observed_state, kind, {column}"
            f" FROM (VALUES {instances}) AS instance (desired_state, observed_state)"
            f" CROSS JOIN (VALUES {operations}) AS operation (kind)"
        )
    ).all()
    assert len(rows) == len(states) * len(kinds)
    for desired, observed, kind, status in rows:
        assert status == rules.status_of(desired, observed, kind), (desired, observed, kind)
        assert status in {*rules.STATUSES, "terminated"}


@pytest.mark.parametrize(
    ("model", "column", "moves"), [(Operation, "status", MOVES), (Address, "state", ADDRESS_MOVES)]
)
def test_a_row_makes_only_the_moves_of_its_table(
    model: type[Operation] | type[Address], column: str, moves: dict[Any, frozenset[Any]]
) -> None:
    for was in moves:
        for becomes in moves:
            row = model(**{column: was.value})
            if becomes == was or becomes in moves[was]:
                setattr(row, column, becomes)
                assert getattr(row, column) == becomes
            else:
                with pytest.raises(ValueError, match="cannot become"):
                    setattr(row, column, becomes)
                assert getattr(row, column) == was


def test_moves_of_operations_end() -> None:
    assert set(MOVES) == set(OperationStatus)
    assert all(MOVES[status] == frozenset() for status in FINAL)
    assert MOVES[OperationStatus.QUEUED] | MOVES[OperationStatus.RUNNING] == {
        OperationStatus.RUNNING,
        *FINAL - {OperationStatus.SUCCEEDED},
        OperationStatus.SUCCEEDED,
    }
