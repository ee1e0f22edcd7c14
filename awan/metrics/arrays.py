"""Any number of rows in one statement whose text is always the same: one array for each column.

Arrays are sent as PostgreSQL writes them. The driver would send each as the narrowest type that holds its values, and
as another next time: every combination is a statement of its own, which is planned and kept anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from uuid import UUID

Value = UUID | datetime | int | float | None


def unnest(columns: Mapping[str, str]) -> str:
    """SQL that gives the rows of `arrays_of` back. `columns`: name -> type of PostgreSQL, constants of our own."""
    arrays = ", ".join(f"CAST(:{name} AS {kind}[])" for name, kind in columns.items())
    return f"unnest({arrays})"


def arrays_of(columns: Mapping[str, str], rows: Iterable[Sequence[Value]]) -> dict[str, str]:
    """The parameters of `unnest`, of one row or more. Raises: ValueError for a row of another length."""
    return dict(zip(columns, map(_written, zip(*rows, strict=True)), strict=True))


def _written(values: Iterable[Value]) -> str:
    """None of these needs quotes."""
    return f"{{{','.join(['NULL' if value is None else str(value) for value in values])}}}"
