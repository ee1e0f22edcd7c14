"""`awan` against the API in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from awan.api import create_app
from awan.cli import build_app, http_client
from tests.support.simulated_cloud import SimulatedCloud

Run = Callable[..., str]


def connect(*, base_url: str, headers: dict[str, str], **_: Any) -> TestClient:
    """A client of the application in this process, in the place of one that needs a server."""
    return TestClient(create_app(), base_url=base_url, headers=headers)


@pytest.fixture
def awan(cloud: SimulatedCloud, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`awan("node", "list", status=0, typed=None)` runs a command; the words that it has printed on both streams.

    The log of the API, which runs in this process, comes too.
    """
    monkeypatch.setenv("AWAN_API_URL", "http://testserver/api/v1")
    monkeypatch.setenv("AWAN_ADMIN_KEY", str(cloud.admin.headers["x-apikey"]))
    monkeypatch.setattr(http_client.httpx, "Client", connect)
    runner, app = CliRunner(), build_app()

    def run(*arguments: str, status: int = 0, typed: str | None = None) -> str:
        done = runner.invoke(app, list(arguments), input=typed)
        assert done.exit_code == status, done.output
        return " ".join(done.output.split())

    return run
