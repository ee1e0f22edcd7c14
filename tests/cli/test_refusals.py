"""What a command cannot do is said with the thing that it is about."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from tests.cli.conftest import Run
from tests.support.simulated_cloud import SimulatedCloud


def test_what_was_not_found_is_named(cloud: SimulatedCloud, awan: Run) -> None:
    for command in (("instance", "show"), ("customer", "keys"), ("template", "remove-image")):
        assert "Invalid value" in awan(*command, "nope", status=2)
    assert 'no node "nope"' in awan("node", "show", "nope", status=1)
    unknown = str(uuid4())
    assert f"Instance not found: /api/v1/instances/{unknown}" in awan(
        "instance", "show", unknown, status=1
    )
    account = str(cloud.customer.account_id)
    assert "API key not found: /api/v1/admin/accounts" in awan(
        "customer", "revoke", account, "nope", status=1
    )


def test_no_such_log_lines(awan: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWAN_STATE_DIR", str(tmp_path))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "api.log").write_text('{"message": "begun", "operation": "abc"}\n')
    assert "begun" in awan("logs", "--operation", "abc")
    assert "No such lines" in awan("logs", "--operation", "nope", status=1)


def test_closing_an_account_asks(cloud: SimulatedCloud, awan: Run) -> None:
    account = awan("customer", "add", "PT [/x]").split()[-1]
    closing = ("customer", "set", account, "--state", "closed")
    assert "PT [/x]" in awan(*closing, status=1, typed="n\n")
    assert "active" in awan("customer", "show", account)
    assert "closed" in awan(*closing, typed="y\n")
    assert "suspended" in awan("customer", "set", account, "--state", "suspended")
    assert "closed" in awan(*closing, "--yes")


def test_a_template_that_is_there_is_named(
    cloud: SimulatedCloud, awan: Run, tmp_path: Path
) -> None:
    file = tmp_path / "junk.qcow2"
    file.write_bytes(b"junk")
    body = {"name": "Junk", "version": "1"}
    number = cloud.admin.post("/admin/templates", json=body).json()["data"]["id"]
    new = ("template", "import", str(file), "--name", "Junk", "--version", "1")
    assert f"There is Junk 1 already: give --template {number}." in awan(*new, status=1)


@pytest.mark.usefixtures("worker")
def test_a_thing_that_no_audit_has_seen(cloud: SimulatedCloud, awan: Run) -> None:
    awan("audit")
    uuid = cloud.create()["data"]["uuid"]
    assert "Last audit none since it is there" in awan("trace", uuid)
    assert cloud.admin.get(f"/admin/trace/{uuid}").json()["data"]["last_audit"]["is_earlier"]
    awan("audit", status=0)
    assert "nothing wrong with it" in awan("trace", uuid)
