"""Statements to PostgreSQL, as they are sent: the product's own and those of the workflow engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from sqlalchemy import Engine, event

Filter = Callable[[dict[str, Any]], bool]


@contextmanager
def recorded(is_wanted: Filter = lambda context: True) -> Iterator[list[str]]:
    """The statements of this process while the block runs, without BEGIN and COMMIT, in order.

    `is_wanted` sees what the log lines of the thread carry: a request's id, or an operation's workflow.
    """
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if is_wanted(structlog.contextvars.get_contextvars()):
            sent.append(" ".join(statement.split()))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)
