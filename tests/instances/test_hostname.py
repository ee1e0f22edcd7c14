"""Another name: in the API at once or not at all, in the guest now or at its next boot, and the answer says which."""

from __future__ import annotations

from uuid import uuid4

import httpx
import pytest
from sqlalchemy import select

from awan.engines.registry import sim_store
from awan.events import Event
from awan.instances.first_boot import mark_guest_ready
from awan.kit.database import transaction
from awan.operations import durable
from awan.settings import Settings
from tests.support.guests import cd, create_ready, guest, instance_row, seeds, set_sign
from tests.support.in_process_worker import InProcessWorker
from tests.support.simulated_cloud import SimulatedCloud

MESSAGE = "Hostname successfully updated"


def put(cloud: SimulatedCloud, uuid: str, hostname: str) -> httpx.Response:
    """The call."""
    return cloud.customer.http.put(f"/instances/{uuid}/hostname", data={"hostname": hostname})


def power(cloud: SimulatedCloud, uuid: str, verb: str) -> None:
    """A power change, waited for."""
    answer = cloud.customer.http.post(f"/instances/{uuid}/{verb}")
    assert answer.status_code == 202, answer.text
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"


def renamings(uuid: str) -> list[dict[str, object]]:
    """What the events of renaming say, in their order."""
    with transaction() as session:
        query = select(Event.data).where(Event.kind == "instance.renamed").order_by(Event.event_id)
        return list(session.scalars(query))


@pytest.mark.usefixtures("worker")
def test_a_running_guest_has_it_now(cloud: SimulatedCloud) -> None:
    uuid = create_ready(cloud, hostname="web-1")
    answer = put(cloud, uuid, "Web-2.Example.com")
    assert (answer.status_code, answer.json()["message"]) == (200, MESSAGE)
    data = answer.json()["data"]
    assert (data["hostname"], data["applied"]) == ("web-2.example.com", "now")
    assert data["active_operation"] is None
    assert guest(uuid)["hostname"] == "web-2.example.com"
    assert seeds(uuid) == [cd(uuid)] == [f"seed-{uuid}-3.iso"]
    port = sim_store().find_one("SELECT hostname FROM sim.fabric_port")
    assert port is not None
    assert port["hostname"] == "web-2.example.com"
    found = cloud.customer.http.get("/instances", params={"search": "web-2"}).json()["data"]["data"]
    assert [row["hostname"] for row in found] == ["web-2.example.com"]
    assert renamings(uuid) == [{"hostname": "web-2.example.com", "applied": "now"}]


@pytest.mark.usefixtures("worker")
def test_a_silent_guest_has_it_at_its_next_boot(cloud: SimulatedCloud) -> None:
    uuid = create_ready(cloud)
    set_sign(uuid, "none")
    answer = put(cloud, uuid, "web-2")
    assert answer.status_code == 200
    assert (answer.json()["data"]["hostname"], answer.json()["data"]["applied"]) == (
        "web-2",
        "next_boot",
    )
    assert guest(uuid) == {}
    assert instance_row(uuid).hostname_is_pending
    assert renamings(uuid) == [{"hostname": "web-2", "applied": "next_boot"}]
    shown = cloud.customer.http.get(f"/instances/{uuid}").json()["data"]
    assert shown["hostname_applied"] == "next_boot"
    power(cloud, uuid, "restart")
    shown = cloud.customer.http.get(f"/instances/{uuid}").json()["data"]
    assert shown["hostname_applied"] == "now"
    assert not instance_row(uuid).hostname_is_pending


@pytest.mark.usefixtures("worker")
def test_a_stopped_guest_has_it_at_its_next_boot(cloud: SimulatedCloud) -> None:
    uuid = create_ready(cloud)
    power(cloud, uuid, "stop")
    answer = put(cloud, uuid, "web-2")
    assert answer.json()["data"]["applied"] == "next_boot"
    assert seeds(uuid) == [cd(uuid)] == [f"seed-{uuid}-3.iso"]


def test_before_the_first_boot_is_over(cloud: SimulatedCloud, settings: Settings) -> None:
    """Off, the seed of the first boot is written anew; running, it may be in use."""
    with InProcessWorker(settings, queues=[durable.OPERATIONS_QUEUE]):
        uuid = cloud.create_running()["uuid"]
        refused = put(cloud, uuid, "web-2")
        assert refused.status_code == 409
        assert "first boot" in refused.json()["message"]
        mark_guest_ready(uuid, "none")
        silent = put(cloud, uuid, "web-2")
        assert silent.status_code == 409
        assert "ready_at" not in silent.json()["message"], "it is set"
        assert "stop the instance and rename it" in silent.json()["message"]
        query = "SELECT sha256 FROM sim.volume WHERE name LIKE 'seed-%'"
        before = sim_store().fetch_all(query)
        power(cloud, uuid, "stop")
        answer = put(cloud, uuid, "web-2")
        assert answer.json()["data"]["applied"] == "next_boot"
    assert seeds(uuid) == [cd(uuid)] == [f"seed-{uuid}-1.iso"]
    assert sim_store().fetch_all(query) != before


@pytest.mark.usefixtures("worker")
def test_names_are_unique_in_the_account(cloud: SimulatedCloud) -> None:
    uuid = create_ready(cloud, hostname="web-1")
    cloud.create(hostname="db-1")
    cloud.create(cloud.new_customer(), hostname="cache-1")
    taken = put(cloud, uuid, "DB-1")
    assert taken.status_code == 422
    assert taken.json()["errors"] == {"hostname": ["The hostname has already been taken."]}
    assert put(cloud, uuid, "cache-1").status_code == 200
    assert put(cloud, uuid, "cache-1").status_code == 200, "its own name is not taken"


def test_wrong_input(cloud: SimulatedCloud) -> None:
    uuid = cloud.create()["data"]["uuid"]
    for hostname in ("", "-a", "a_b", "a..b", "1234", "x" * 65, "a b", "é", "$(id)"):
        refused = put(cloud, uuid, hostname)
        assert (refused.status_code, set(refused.json()["errors"])) == (422, {"hostname"}), hostname
    assert put(cloud, str(uuid4()), "web-2").status_code == 404
    busy = put(cloud, uuid, "web-2")
    assert busy.status_code == 409
    assert "instance.create" in busy.json()["message"]


def test_while_it_is_renamed_both_names_are_taken(
    cloud: SimulatedCloud, settings: Settings
) -> None:
    with InProcessWorker(settings) as worker:
        uuid = create_ready(cloud, hostname="web-1")
        worker.stop()
    started = cloud.customer.http.put(
        f"/instances/{uuid}/hostname",
        json={"hostname": "web-2"},
    )
    assert started.status_code == 202
    assert started.json()["data"]["applied"] is None
    assert started.json()["data"]["hostname"] == "web-1", "the present name until it is changed"
    for hostname in ("web-1", "web-2"):
        answer = cloud.customer.http.post("/instances", json=cloud.order(hostname=hostname))
        assert (answer.status_code, set(answer.json()["errors"])) == (422, {"hostname"})
