"""Positions: as ordered as what they stand for, and the same after writing and reading."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awan.events import Position

POSITIONS = st.builds(Position, st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1))


@given(POSITIONS)
def test_written_and_read(position: Position) -> None:
    assert Position.parse(str(position)) == position


@given(POSITIONS, POSITIONS)
def test_order(one: Position, other: Position) -> None:
    assert (one < other) == ((one.xid, one.event_id) < (other.xid, other.event_id))


@pytest.mark.parametrize(
    "text",
    ["", "1", "1-", "-1", "1-1-1", "01-1", "1-01", "١-1", f"{2**64}-0", f"0-{2**63}", " 1-1"],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="position"):
        Position.parse(text)
