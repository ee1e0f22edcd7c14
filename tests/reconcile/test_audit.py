"""The audit through the API and the command line, and beside work that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from typer.testing import CliRunner

from awan.api import create_app
from awan.catalogue.models import Location
from awan.cli import build_app, http_client
from awan.engines.fabric.fake import FakeFabric
from awan.engines.nameserver.fake import FakeNameserver
from awan.engines.registry import sim_store
from awan.errors import EngineUnavailable
from awan.events import record
from awan.kit.database import get_engine, transaction
from awan.reconcile import FindingKind, run_audit
from awan.reconcile.expected import Expectations, look_first
from tests.reconcile.conftest import scalar, wait_until_booted
from tests.support.simulated_cloud import SimulatedCloud


@pytest.fixture
def command_line(cloud: SimulatedCloud, monkeypatch: pytest.MonkeyPatch) -> Iterator[CliRunner]:
    """`awan`, whose HTTP calls go to the application in this process."""

    def connect(*, base_url: str, headers: dict[str, str], **_: Any) -> TestClient:
        return TestClient(create_app(), base_url=base_url, headers=headers)

    monkeypatch.setattr(http_client.httpx, "Client", connect)
    monkeypatch.setenv("AWAN_API_URL", "http://testserver/api/v1")
    monkeypatch.setenv("AWAN_ADMIN_KEY", cloud.admin.headers["x-apikey"])
    monkeypatch.setenv("COLUMNS", "200")
    return CliRunner()


def plant_stray_file(cloud: SimulatedCloud) -> None:
    """A file in a pool that nothing explains."""
    with get_engine().begin() as connection:
        connection.execute(
            text(
                "INSERT INTO sim.volume (location, node_id, name, capacity_bytes, allocation_bytes)"
                " VALUES (:location, :node, 'notes.txt', 1, 1)"
            ),
            {"location": str(cloud.location_id), "node": cloud.node_ids[0]},
        )


def test_green_at_every_moment_of_an_instances_life(cloud: SimulatedCloud) -> None:
    assert run_audit() == []
    answer = cloud.create(hostname="web-1")
    # While it is made, while its first boot is waited for, while its seed is replaced.
    while cloud.admin.get(f"/operations/{answer['operation']['uuid']}").json()["data"][
        "status"
    ] in (
        "queued",
        "running",
    ):
        assert run_audit() == []
    assert run_audit() == []
    wait_until_booted(1)
    assert run_audit() == []
    uuid = answer["data"]["uuid"]
    for verb in ("stop", "start", "restart"):
        begun = cloud.customer.http.post(f"/instances/{uuid}/{verb}").json()
        assert run_audit() == []
        assert cloud.wait(begun["operation"]["uuid"])["status"] == "succeeded"
        assert run_audit() == []
    gone = cloud.customer.http.request(
        "DELETE", f"/instances/{uuid}", json={"remove_ip": True, "remove_block_storage": True}
    ).json()
    assert run_audit() == []
    assert cloud.wait(gone["operation"]["uuid"])["status"] == "succeeded"
    assert run_audit() == []


def test_a_failed_creation_leaves_a_green_cloud(cloud: SimulatedCloud) -> None:
    sim_store().faults.fail_at(6)
    try:
        answer = cloud.create()
        assert cloud.wait(answer["operation"]["uuid"])["status"] == "failed"
    finally:
        sim_store().faults.clear()
    assert run_audit() == []


def test_what_changed_while_the_engines_were_read_is_left_alone(cloud: SimulatedCloud) -> None:
    shown = cloud.create_running()
    wait_until_booted(1)
    with transaction() as session:
        first = look_first(session)
        record(
            session, kind="instance.found", actor="test", account_id=None, resource_id=shown["uuid"]
        )
    with transaction() as session:
        location = session.get_one(Location, cloud.location_id)
        expected = Expectations(session, first).of_location(location)
        assert expected.instances == []
        assert expected.ports == []
        assert {str(uuid) for uuid in expected.unsettled.instance_ids} == {shown["uuid"]}
        again = Expectations(session, look_first(session)).of_location(location)
        assert [str(it.instance_id) for it in again.instances] == [shown["uuid"]]


def test_a_fabric_that_does_not_answer_is_a_finding(
    cloud: SimulatedCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.create_running()
    wait_until_booted(1)

    def silent(_: FakeFabric) -> list[Any]:
        raise EngineUnavailable("fabric", "list_ports", "no answer within 5 s")

    monkeypatch.setattr(FakeFabric, "list_ports", silent)
    (finding,) = run_audit()
    assert finding.kind is FindingKind.FABRIC_SILENT
    assert finding.location == "jkt1"
    assert "no answer within 5 s" in finding.sentence


def test_a_nameserver_that_does_not_answer_is_a_finding(
    cloud: SimulatedCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_: FakeNameserver) -> dict[Any, Any]:
        raise EngineUnavailable("nameserver", "transfer", "no answer within 5 s")

    monkeypatch.setattr(FakeNameserver, "list_records", silent)
    (finding,) = run_audit()
    assert (finding.kind, finding.location) == (FindingKind.NAMESERVER_SILENT, "jkt1")
    assert "no answer within 5 s" in finding.sentence


def test_over_http(cloud: SimulatedCloud) -> None:
    answer = cloud.admin.post("/admin/audit")
    assert answer.status_code == 200, answer.text
    shown = answer.json()
    assert shown["message"] == "Audit finished"
    assert shown["operation"]["kind"] == "audit.run"
    assert shown["data"]["is_green"] is True
    assert shown["data"]["findings"] == []
    plant_stray_file(cloud)
    shown = cloud.admin.post("/admin/audit").json()["data"]
    assert shown["status"] == "succeeded"
    assert shown["is_green"] is False
    assert [(it["kind"], it["subject"]) for it in shown["findings"]] == [
        ("file.stray", "notes.txt")
    ]
    assert cloud.admin.get(f"/admin/audit/{shown['uuid']}").json()["data"] == shown
    assert cloud.admin.get(f"/admin/audit/{uuid4()}").status_code == 404
    for answer in (
        cloud.customer.http.post("/admin/audit"),
        cloud.customer.http.get(f"/admin/audit/{shown['uuid']}"),
        cloud.customer.http.get(f"/admin/trace/{shown['uuid']}"),
    ):
        assert answer.status_code == 404


def test_on_the_command_line(cloud: SimulatedCloud, command_line: CliRunner) -> None:
    app = build_app()
    result = command_line.invoke(app, ["audit"])
    assert result.exit_code == 0, result.output
    assert "no findings" in result.output
    plant_stray_file(cloud)
    result = command_line.invoke(app, ["audit"])
    assert result.exit_code == 1, result.output
    assert "file.stray" in result.output
    assert "notes.txt" in result.output
    result = command_line.invoke(app, ["audit", "--json"])
    # Before it stands the log line of the call, because the API runs in this process.
    shown = json.loads(result.output[result.output.index("{\n") :])
    assert shown["findings"][0]["subject"] == "notes.txt"


def test_the_command_says_when_it_could_not_be_run(
    cloud: SimulatedCloud, command_line: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = build_app()
    monkeypatch.setenv("AWAN_ADMIN_KEY", cloud.customer.http.headers["x-apikey"])
    assert command_line.invoke(app, ["audit"]).exit_code == 2
    monkeypatch.delenv("AWAN_ADMIN_KEY")
    assert command_line.invoke(app, ["audit"]).exit_code == 2


def test_trace_of_an_instance_and_its_parts(cloud: SimulatedCloud, command_line: CliRunner) -> None:
    user_data = "#cloud-config\npackages: [marker-in-user-data]\n"
    shown = cloud.create_running(hostname="web-1", user_data=user_data)
    wait_until_booted(1)
    assert cloud.admin.post("/admin/audit").is_success
    uuid = shown["uuid"]
    answer = cloud.admin.get(f"/admin/trace/{uuid}")
    assert answer.status_code == 200, answer.text
    trace = answer.json()["data"]
    assert trace["title"] == "instance web-1"
    tables = [row["table"] for row in trace["rows"]]
    assert tables[:5] == ["resource", "instance", "placement", "volume", "nic"]
    assert {"address", "locked_price", "usage_span"} <= set(tables)
    (operation,) = trace["operations"]
    (checkpoint,) = operation["workflow"]["steps"]
    steps = ["image", "volume", "port", "seed", "domain", "power", "port_up"]
    assert [part["name"] for part in checkpoint["parts"]] == steps
    assert checkpoint["failure"] is None
    (wait,) = trace["waits"]
    assert wait["status"] == "SUCCESS"
    assert {"instance.ready", "operation.succeeded"} <= {it["kind"] for it in trace["events"]}
    assert trace["last_audit"]["findings"] == []
    assert "marker-in-user-data" not in answer.text
    assert "Correct-Horse" not in answer.text
    for query in (
        "SELECT nic_id FROM nic",
        "SELECT volume_id FROM volume",
        "SELECT create_operation_id FROM instance",
    ):
        part = cloud.admin.get(f"/admin/trace/{scalar(query)}").json()["data"]
        assert part["uuid"] == uuid
    node = cloud.admin.get(f"/admin/trace/{cloud.node_ids[0]}").json()["data"]
    assert node["title"] == "node"
    assert [it["kind"] for it in node["operations"]] == ["node.add"]
    address = cloud.admin.get(
        f"/admin/trace/{scalar('SELECT resource_id FROM address WHERE resource_id IS NOT NULL')}"
    ).json()["data"]
    assert address["title"].startswith("public_ip 198.51.100.")
    assert cloud.admin.get(f"/admin/trace/{uuid4()}").status_code == 404
    printed = command_line.invoke(build_app(), ["trace", uuid])
    assert printed.exit_code == 0, printed.output
    for part in ("instance web-1", "usage_span", "port_up", "instance.ready", "Last audit"):
        assert part in printed.output


def test_trace_shows_what_the_last_audit_found(cloud: SimulatedCloud) -> None:
    uuid = cloud.create_running()["uuid"]
    wait_until_booted(1)
    with get_engine().begin() as connection:
        connection.execute(text("DELETE FROM sim.volume WHERE name LIKE 'vol-%'"))
    assert cloud.admin.post("/admin/audit").is_success
    found = cloud.admin.get(f"/admin/trace/{uuid}").json()["data"]["last_audit"]["findings"]
    assert [it["kind"] for it in found] == ["file.missing"]
