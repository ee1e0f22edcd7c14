"""The API over HTTP, in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from awan.api import create_app
from awan.settings import Settings


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    """A client of the API, at its base path."""
    with TestClient(create_app(), base_url="http://api.test/api/v1") as client:
        yield client
