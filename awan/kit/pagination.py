"""Pages of lists: `page` from 1, `limit` from 1 to 100, a page past the end is empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

LIMIT_DEFAULT = 20
LIMIT_MAX = 100


@dataclass(frozen=True)
class PageRequest:
    """Which page is asked for."""

    page: int = 1
    limit: int = LIMIT_DEFAULT

    @property
    def offset(self) -> int:
        """Rows before the page."""
        return (self.page - 1) * self.limit


class PageInfo(BaseModel):
    """Where a page is in its list: rows in all, rows here, and which page of how many."""

    total: int
    count: int
    per_page: int
    current_page: int
    total_pages: int


def page_info(request: PageRequest, total: int, count: int) -> PageInfo:
    """The `page` object of a list answer."""
    return PageInfo(
        total=total,
        count=count,
        per_page=request.limit,
        current_page=request.page,
        total_pages=max(1, -(-total // request.limit)),
    )


def paged(rows: Sequence[Any], request: PageRequest, total: int) -> dict[str, Any]:
    """A list answer's `data`: the rows and their `page`."""
    return {"data": list(rows), "page": page_info(request, total, len(rows))}
