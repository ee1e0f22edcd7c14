"""The toy engine, ready for each test of the operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from awan.settings import Settings
from tests.operations import house


@pytest.fixture
def site(settings: Settings) -> Iterator[house.Site]:
    """The toy engine; the workers of this process use it."""
    opened = house.open_site(settings.database_url)
    yield opened
    opened.store.close()
