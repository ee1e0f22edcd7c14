"""Whether a run does everything (`--full`) or a sample of it.

A sample is drawn from the numbers of pytest-randomly: `--randomly-seed=<n>` with the seed that is printed at the
beginning of a run draws the same one again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_is_full = False


def set_full(is_full: bool) -> None:
    """Says, before any test runs, whether this run was asked for everything."""
    global _is_full
    _is_full = is_full


def is_full() -> bool:
    """Whether this run does everything."""
    return _is_full


def sample(cases: Sequence[T], size: int) -> list[T]:
    """All cases when the run is full, else `size` of them at random, in their order."""
    if _is_full or size >= len(cases):
        return list(cases)
    return [cases[index] for index in sorted(random.sample(range(len(cases)), size))]
