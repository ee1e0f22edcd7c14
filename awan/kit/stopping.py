"""Whether this process was told to end: answers that go on for hours look at it, so that they do not hold it up."""

from __future__ import annotations

import threading

_told = threading.Event()


def begin() -> None:
    """The process ends as soon as its answers have. May be called in a signal handler."""
    _told.set()


def is_begun() -> bool:
    """Whether the process was told to end."""
    return _told.is_set()
