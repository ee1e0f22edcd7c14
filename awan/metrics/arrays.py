"""Any number of rows in one statement whose text is always the same: one array for each column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def unnest(columns: Mapping[str, str]) -> str:
    """SQL that gives the rows of `arrays_of` back. `columns`: name -> type of PostgreSQL, constants of our own."""
    arrays = ", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in columns.items())
    return f"unnest({arrays})"


def arrays_of(columns: Mapping[str, str], rows: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """The parameters of `unnest`, of one row or more. Raises: ValueError for a row of another length."""
    return dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
