"""Text of customers and engines is shown as it was written: never as markup, never obeyed by the terminal."""

from __future__ import annotations

from uuid import UUID

import pytest
from sqlalchemy import update

from awan.cli.runtime_commands import print_line
from awan.cli.screen import printable
from awan.events import record
from awan.fleet import Node
from awan.instances.models import Instance
from awan.kit.database import transaction
from awan.operations import Operation
from awan.runtime.log_reader import LogLine
from tests.cli.conftest import Run
from tests.support.simulated_cloud import SimulatedCloud

HOSTILE = "ci [/x] [red]a[/] :smile: [link=http://x]y[/link] \x1b[2J\u202e"
SHOWN = "ci [/x] [red]a[/] :smile: [link=http://x]y[/link] \\x1b[2J\\u202e"


def test_customers_and_their_keys(cloud: SimulatedCloud, awan: Run) -> None:
    uuid = awan("customer", "add", HOSTILE).split()[-1]
    listed = awan("customer", "list")
    assert SHOWN in listed
    assert uuid in listed
    assert SHOWN in awan("customer", "show", uuid)
    assert awan("customer", "key", uuid, "--name", HOSTILE).split()[-1].startswith("awan_")
    assert SHOWN in awan("customer", "keys", uuid)
    assert "no_such[/x]_max" in awan("customer", "set", uuid, "--quota", "no_such[/x]=1", status=1)
    assert "'[/x]' is not" in awan("customer", "set", uuid, "--quota", "[/x]", status=1)


def test_the_catalogue(cloud: SimulatedCloud, awan: Run) -> None:
    assert "must be 2 to 16" in awan(
        "location", "add", "x", "--code", "[/X]", "--country", "ID", status=1
    )
    awan("location", "add", "Two [/x]", "--code", "two", "--country", "ID")
    assert "Two [/x]" in awan("location", "list")
    where = str(cloud.location_id)
    tier = ("tier", "add", "T [/x]", "--cpu-model", "[/x]", "--location", where)
    awan(*tier)
    assert "T [/x]" in awan("tier", "list")
    assert "JSON" in awan("location", "engine", where, "fabric", "x", "--options", "[/x]", status=1)
    name = {"name": "Debian [/x]", "version": "[/x]"}
    assert cloud.admin.post("/admin/templates", json=name).is_success
    assert "Debian [/x]" in awan("template", "list")


def test_an_instance_with_its_labels_notes_and_trace(cloud: SimulatedCloud, awan: Run) -> None:
    created = cloud.create(hostname="web-1")
    uuid, operation = created["data"]["uuid"], created["operation"]["uuid"]
    awan("instance", "note", "add", uuid, HOSTILE)
    assert SHOWN in awan("instance", "note", "list", uuid)
    assert "'[/x]' is not" in awan("instance", "label", uuid, "[/x]", status=1)
    with transaction() as session:
        account = session.get_one(Instance, UUID(uuid)).account_id
        session.execute(update(Instance).values(status_reason="qemu: [/x]", observed_state="error"))
        session.execute(
            update(Operation)
            .where(Operation.operation_id == UUID(operation))
            .values(status="failed", error_message="[/x]", error_detail="virsh: [/x]")
        )
        record(
            session,
            kind="instance.labelled",
            actor="[/x]",
            account_id=account,
            resource_id=UUID(uuid),
            data={"text": "[/x]"},
        )
    assert "qemu: [/x]" in awan("instance", "show", uuid)
    traced = awan("trace", uuid)
    for part in (
        "virsh: [/x]",
        "status_reason=qemu: [/x]",
        '{"text": "[/x]"}',
    ):
        assert part in traced


def test_nodes_and_findings(cloud: SimulatedCloud, awan: Run) -> None:
    with transaction() as session:
        session.execute(
            update(Node)
            .where(Node.node_id == UUID(cloud.node_ids[0]))
            .values(name="hv [/x]", facts={"cpu [/x]": "[/y]"})
        )
    assert "hv [/x]" in awan("node", "list")
    shown = awan("node", "show", "hv [/x]")
    assert "cpu [/x]" in shown
    assert "[/y]" in shown
    assert "[/z]" in awan("node", "show", "[/z]", status=1)
    awan("capacity")


def test_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    line = LogLine("", "api", "info", HOSTILE, {"name": HOSTILE, "exception": HOSTILE})
    print_line(line, as_json=False)
    assert capsys.readouterr().out.count(SHOWN) == 3


def test_what_is_printable() -> None:
    assert printable("a\tb\nc é 雪") == "a\tb\nc é 雪"
    assert printable("\r\x07\x9b\u2028") == "\\r\\x07\\x9b\\u2028"
