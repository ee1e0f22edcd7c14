"""Other settings for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from awan.settings import Settings, get_settings


@contextmanager
def changed_settings(**values: str) -> Iterator[Settings]:
    """The settings with `values`, by name and as text: `changed_settings(stop_grace_s="0.5")`.

    They are read before the block and again after it, never left to whoever asks next: threads of earlier tests ask
    too, and a test that takes the environment away would give them the defaults, and all tests after it.
    """
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in values.items():
                patch.setenv(f"AWAN_{name.upper()}", value)
            get_settings.cache_clear()
            yield get_settings()
    finally:
        get_settings.cache_clear()
        get_settings()
