"""`awan instance ...`: each command once, against the API in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from awan.api import create_app
from awan.cli import build_app, http_client
from awan.engines.hypervisor.pixmap import PNG_SIGNATURE
from tests.support.guests import create_ready, guest
from tests.support.in_process_worker import wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud


def connect(*, base_url: str, headers: dict[str, str], **_: Any) -> TestClient:
    """A client of the application in this process, in the place of one that needs a server."""
    return TestClient(create_app(), base_url=base_url, headers=headers)


@pytest.mark.usefixtures("worker")
def test_every_command(
    cloud: SimulatedCloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWAN_API_URL", "http://testserver/api/v1")
    monkeypatch.setenv("AWAN_ADMIN_KEY", str(cloud.admin.headers["x-apikey"]))
    monkeypatch.setattr(http_client.httpx, "Client", connect)
    monkeypatch.setenv("COLUMNS", "200")
    runner, app = CliRunner(), build_app()

    # The log of the API in this process comes before what a command prints.
    def run(*arguments: str, status: int = 0, typed: str | None = None) -> str:
        done = runner.invoke(app, ["instance", *arguments], input=typed)
        assert done.exit_code == status, done.output
        return " ".join(done.output.split())

    uuid, other = create_ready(cloud, hostname="web-1"), create_ready(cloud)
    assert "web-1" in run("show", uuid)
    name = cloud.admin.get(f"/admin/nodes/{cloud.node_ids[0]}").json()["data"]["name"]
    mine = str(cloud.customer.account_id)
    assert "2 instances" in run("list", "--customer", mine, "--status", "running,paused")
    assert "1 instances" in run("list", "--search", "WEB-1")
    assert "0 instances" in run("list", "--label", "env:prod")
    on_node = [run("list", "--node", node) for node in (name, cloud.node_ids[0])]
    assert on_node[0].split("name")[-1] == on_node[1].split("name")[-1]
    assert 'no node "[/x]"' in run("list", "--node", "[/x]", status=1)
    assert "successfully" in run("password", uuid, typed="Brave-Donkey-8\nBrave-Donkey-8\n")
    assert guest(uuid)["username"] == "budi"
    assert "Brave" not in run("password", uuid, typed="Brave-Donkey-9\nBrave-Donkey-9\n")
    assert "Hostname successfully updated" in run("hostname", uuid, "web-2")
    assert "Reset process" in run("reset", uuid)
    assert run("label", uuid, "env=prod", "team=web").endswith(" env=prod, team=web")
    assert run("label", uuid).endswith(" none")
    run("label", uuid, "env", status=1)
    run("protect", uuid)
    assert "protected yes" in run("show", uuid)
    run("unprotect", uuid)
    assert uuid in run("power", "restart", uuid, other, "--force")
    wait_until_idle()
    assert "already running" in run("power", "start", other, status=1)
    assert "sim login:" in run("log", uuid, "--kib", "8")
    file = tmp_path / "screen.png"
    run("screenshot", uuid, str(file))
    assert file.read_bytes().startswith(PNG_SIGNATURE)
    assert " note " in run("note", "add", uuid, "quiet [night]")
    shown = run("note", "list", uuid)
    assert "quiet [night]" in shown
    number = cloud.admin.get(f"/admin/instances/{uuid}/notes").json()["data"][0]["id"]
    assert run("note", "remove", uuid, str(number)).endswith("Note removed")
    assert "not found" in run("show", str(uuid4()), status=1)
    assert "not found" in run("screenshot", str(uuid4()), str(file), status=1)
