"""What is charged, from when to when, at which price."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from awan.engines.registry import sim_store
from awan.events import history
from awan.instances.models import Instance
from awan.kit.database import transaction
from awan.ledger import locked_prices, spans_of
from awan.ledger.models import UsageSpan
from awan.operations import Operation, durable
from awan.settings import Settings
from awan.volumes import Volume
from tests.support.changed_settings import changed_settings
from tests.support.guests import set_sign, wait_until_booted
from tests.support.held_call import held
from tests.support.holdings import assert_counts, engine_state
from tests.support.in_process_worker import InProcessWorker
from tests.support.simulated_cloud import SimulatedCloud

REMOVE = {"remove_ip": True, "remove_block_storage": False}
COMPONENTS = {"cpu_shared": (1, 30000), "memory": (1, 30000), "storage": (20, 1250)}


def wait_until_ready(cloud: SimulatedCloud, uuid: str) -> None:
    """Returns when the guest has been found usable and its first boot has been dealt with."""
    deadline = time.monotonic() + 20
    while cloud.customer.http.get(f"/instances/{uuid}").json()["data"]["ready_at"] is None:
        assert time.monotonic() < deadline, "not ready"
        time.sleep(0.05)


def create_unawaited(cloud: SimulatedCloud, settings: Settings) -> dict[str, Any]:
    """The detail of an instance that runs, and whose first boot nobody waits for until a worker is started."""
    with InProcessWorker(settings, queues=[durable.OPERATIONS_QUEUE]):
        return cloud.create_running()


def spans(resource: str) -> list[UsageSpan]:
    """The spans of a thing, oldest first."""
    with transaction() as session:
        return list(spans_of(session, UUID(resource)))


def test_charging_begins_when_the_guest_is_usable_and_ends_when_the_deletion_is_accepted(
    cloud: SimulatedCloud, settings: Settings
) -> None:
    running = create_unawaited(cloud, settings)
    uuid, address = running["uuid"], running["public_network"]["uuid"]
    assert running["ready_at"] is None
    assert spans(uuid) == spans(address) == []
    with InProcessWorker(settings):
        wait_until_ready(cloud, uuid)
    with transaction() as session:
        instance = session.get_one(Instance, UUID(uuid))
    opened = spans(uuid)
    assert {span.component: (span.quantity, span.monthly_minor) for span in opened} == COMPONENTS
    for span in (*opened, *spans(address)):
        assert span.opened_at == instance.ready_at
        assert span.closed_at is None
        assert span.opened_by_operation_id == instance.create_operation_id
        assert span.currency == "IDR"
    assert [span.component for span in spans(address)] == ["public_ip"]
    answer = cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=REMOVE)
    operation = UUID(answer.json()["operation"]["uuid"])
    closed = spans(uuid)
    with transaction() as session:
        accepted_at = session.get_one(Operation, operation).created_at
    assert all(span.closed_by_operation_id == operation for span in closed)
    assert all(
        span.closed_at and abs((span.closed_at - accepted_at).total_seconds()) < 30
        for span in closed
    )
    with InProcessWorker(settings):
        cloud.wait(str(operation))
    assert all(span.closed_at is not None for span in spans(address))
    assert len(spans(uuid)) == 3


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("brings_address", [True, False])
def test_a_creation_that_fails_costs_and_holds_nothing(
    cloud: SimulatedCloud, brings_address: bool
) -> None:
    """One sentence says why; an address that the customer brought stays, a new one goes."""
    http, brought = cloud.customer.http, None
    if brings_address:
        body = {"location_id": cloud.location_id}
        brought = http.post("/networks/public", json=body).json()["data"]["uuid"]
    sim_store().faults.fail_at(5)
    created = cloud.create(public_network=brought, user_data="#!/bin/sh\necho hello")
    ended = cloud.wait(created["operation"]["uuid"])
    sim_store().faults.clear()
    assert ended["status"] == "failed"
    uuid = created["data"]["uuid"]
    shown = http.get(f"/instances/{uuid}").json()["data"]
    assert (shown["status"], shown["operation_flag"]) == ("Error", 0)
    assert shown["status_reason"] == ended["error"]["message"]
    assert shown["status_reason"].endswith(".")
    assert shown["ip_address"] is None
    assert spans(uuid) == []
    quotas = http.get("/account").json()["data"]["quotas"]
    assert {name: limit["used"] for name, limit in quotas.items() if limit["used"]} == (
        {"public_ips": 1} if brings_address else {}
    )
    rows = http.get("/networks/public").json()["data"]["data"]
    assert [(row["uuid"], row["status"]) for row in rows] == (
        [(brought, "free")] if brings_address else []
    )
    assert all(not rows for rows in engine_state(cloud).values())
    nodes = cloud.admin.get("/admin/nodes").json()["data"]
    assert all(node["memory_mib_used"] == node["disk_gib_used"] == 0 for node in nodes)
    with transaction() as session:
        instance = session.get_one(Instance, UUID(uuid))
        assert instance.password_secret_id is instance.user_data_secret_id is None
        assert [volume.state for volume in session.scalars(select(Volume))] == ["deleted"]
    again = cloud.create(hostname="second", public_network=brought)
    assert cloud.wait(again["operation"]["uuid"])["status"] == "succeeded"


def test_a_sold_price_never_changes(cloud: SimulatedCloud) -> None:
    old = cloud.create()["data"]
    for component, minor in (("cpu_shared", 1), ("memory", 2), ("storage", 3)):
        path = f"/admin/tiers/{cloud.tier_id}/prices"
        body = {"component": component, "monthly_minor": minor}
        assert cloud.admin.post(path, json=body).is_success
    new = cloud.create()["data"]
    assert new["estimated_monthly_cost"] == 1 + 2 + 20 * 3
    shown = cloud.customer.http.get(f"/instances/{old['uuid']}").json()["data"]
    assert shown["estimated_monthly_cost"] == old["estimated_monthly_cost"] == 85000
    assert shown["cost_detail"] == old["cost_detail"]
    with transaction() as session:
        locked = locked_prices(session, UUID(old["uuid"]))
    sold = {item.tag.component: (item.quantity, item.tag.monthly_minor) for item in locked}
    assert sold == COMPONENTS


def test_dedicated_cpus_and_licences_have_their_price(cloud: SimulatedCloud) -> None:
    template = cloud.admin.post(
        "/admin/templates", json={"name": "Licensed", "version": "1", "license_monthly_minor": 7000}
    ).json()["data"]["id"]
    cloud.add_image(template)
    data = cloud.create(template_id=template, cpu=2, use_dedicated_cpu=True)["data"]
    assert data["cpu_type"] == "dedicated"
    items = {item["component"]: item["price_per_month"] for item in data["cost_detail"]["items"]}
    assert items == {"cpu_dedicated": 120000, "memory": 30000, "storage": 25000, "license": 14000}
    assert data["cost_detail"]["per_month"] == sum(items.values())


@pytest.mark.usefixtures("worker")
def test_a_ready_guests_seed_holds_no_secret(cloud: SimulatedCloud) -> None:
    """The seed with the login is replaced by a scrubbed one, and the customer's script is forgotten."""
    running = cloud.create_running(user_data="#!/bin/sh\necho hello")
    uuid = running["uuid"]
    wait_until_ready(cloud, uuid)
    deadline = time.monotonic() + 10
    while len(seeds := seeds_of(cloud, uuid)) != 1 or not seeds[0].endswith("-2.iso"):
        assert time.monotonic() < deadline, seeds
        time.sleep(0.05)
    assert_counts(cloud, 1)
    drives = sim_store().fetch_all("SELECT live -> 'disks' AS disks FROM sim.domain")[0]["disks"]
    assert [
        disk["path"].rpartition("/")[2] for disk in drives if disk["device"] == "cdrom"
    ] == seeds
    with transaction() as session:
        instance = session.get_one(Instance, UUID(uuid))
        assert instance.user_data_secret_id is None
        assert instance.seed_generation == 2
        assert "instance.ready" in [event.kind for event in history(session, UUID(uuid))]


def seeds_of(cloud: SimulatedCloud, uuid: str) -> list[str]:
    """The names of the instance's seeds on the node."""
    return [str(row[0]) for row in engine_state(cloud)["files"] if "seed" in str(row[0])]


@pytest.mark.parametrize(
    ("has_agent", "sign"), [(True, "none"), (True, "traffic"), (False, "none")]
)
def test_a_silent_guest_alarms(
    cloud: SimulatedCloud, settings: Settings, has_agent: bool, sign: str
) -> None:
    """After its time charging starts all the same, and the operator is told. Traffic is no proof where an agent is."""
    cloud.add_image(cloud.template_id, has_agent=has_agent)
    with changed_settings(ready_timeout_s="1.2") as hasty:
        uuid = create_unawaited(cloud, hasty)["uuid"]
        set_sign(uuid, sign)
        with InProcessWorker(hasty):
            wait_until_ready(cloud, uuid)
    with transaction() as session:
        kinds = [event.kind for event in history(session, UUID(uuid))]
        assert session.get_one(Instance, UUID(uuid)).seed_generation == 1
    assert "instance.silent" in kinds
    assert "instance.ready" not in kinds
    assert {span.component for span in spans(uuid)} == set(COMPONENTS)


def test_traffic_proves_a_guest_without_agent(cloud: SimulatedCloud, settings: Settings) -> None:
    cloud.add_image(cloud.template_id, has_agent=False)
    uuid = create_unawaited(cloud, settings)["uuid"]
    set_sign(uuid, "traffic")
    with InProcessWorker(settings):
        wait_until_ready(cloud, uuid)
    with transaction() as session:
        assert "instance.ready" in [event.kind for event in history(session, UUID(uuid))]


@pytest.mark.usefixtures("worker")
def test_the_wait_for_a_guest_ends_with_its_deletion(cloud: SimulatedCloud) -> None:
    """It is deleted while the wait looks at it."""
    with held("guest_sign") as look:
        uuid = cloud.create_running()["uuid"]
        set_sign(uuid, "none")
        assert look.entered.wait(20)
        answer = cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=REMOVE)
    cloud.wait(answer.json()["operation"]["uuid"])
    deadline = time.monotonic() + 15
    query = "SELECT status FROM dbos.workflow_status WHERE name = 'instance.first_boot.v1'"
    while (found := sim_store().fetch_all(query)[0]["status"]) != "SUCCESS":
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    assert spans(uuid) == []
    assert_counts(cloud, 0)


def test_one_that_is_kept_stopped_is_charged_all_the_same(
    cloud: SimulatedCloud, settings: Settings
) -> None:
    with changed_settings(ready_timeout_s="3") as hasty:
        with InProcessWorker(hasty, queues=[durable.OPERATIONS_QUEUE]):
            running = cloud.create_running()
            uuid, address = running["uuid"], running["public_network"]["uuid"]
            stop = cloud.customer.http.post(f"/instances/{uuid}/stop", json={"force": True})
            assert cloud.wait(stop.json()["operation"]["uuid"])["status"] == "succeeded"
        assert spans(uuid) == spans(address) == []
        with InProcessWorker(hasty):
            wait_until_ready(cloud, uuid)
            assert {span.component for span in spans(uuid)} == set(COMPONENTS)
            assert len(spans(address)) == 1
            with transaction() as session:
                instance = session.get_one(Instance, UUID(uuid))
                kinds = [event.kind for event in history(session, UUID(uuid))]
            assert "instance.charged_stopped" in kinds
            assert instance.ready_at is not None
            assert instance.ready_at - instance.created_at >= timedelta(seconds=3)
            start = cloud.customer.http.post(f"/instances/{uuid}/start")
            assert cloud.wait(start.json()["operation"]["uuid"])["status"] == "succeeded"
            wait_until_booted(uuid)
    assert len(spans(uuid)) == len(COMPONENTS), "charged once"
