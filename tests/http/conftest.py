"""The probe application over HTTP, in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from awan.settings import Settings
from tests.support.probe_app import make_probe_app


@pytest.fixture
def probe(settings: Settings) -> Iterator[TestClient]:
    """A client of the probe application."""
    with TestClient(make_probe_app(), base_url="http://api.test/api/v1") as client:
        yield client
