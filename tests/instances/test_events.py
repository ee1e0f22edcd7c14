"""What the owner of an instance hears of its life, with a webhook on `instance.*`."""

from __future__ import annotations

import pytest

from awan.engines.registry import sim_store
from tests.support.guests import create_ready
from tests.support.in_process_worker import wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.webhook_deliveries import fan_out_all

pytestmark = pytest.mark.usefixtures("worker")
DELETE = {"remove_ip": True, "remove_block_storage": True}


def delete(cloud: SimulatedCloud, uuid: str) -> None:
    """Deletes an instance and waits until it is gone."""
    answer = cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=DELETE)
    assert answer.status_code == 202, answer.text
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"


def test_creation_and_deletion(cloud: SimulatedCloud) -> None:
    http = cloud.customer.http
    body = {"url": "https://owners-receiver.example", "event_types": ["instance.*"]}
    webhook = http.post("/webhooks", json=body).json()["data"]["uuid"]
    delete(cloud, create_ready(cloud))
    wait_until_idle()
    fan_out_all()
    told = http.get(f"/webhooks/{webhook}/deliveries").json()["data"]["data"]
    told.sort(key=lambda row: row["event_id"])
    assert [row["kind"] for row in told] == [
        *("instance.created", "instance.ready"),
        *("instance.delete", "instance.deleted"),
    ]


def test_a_creation_that_fails(cloud: SimulatedCloud) -> None:
    """The event has the sentence that the instance shows."""
    sim_store().faults.fail_at(4)
    created = cloud.create()
    ended = cloud.wait(created["operation"]["uuid"])
    sim_store().faults.clear()
    assert ended["status"] == "failed"
    delete(cloud, created["data"]["uuid"])
    wait_until_idle()
    rows = cloud.customer.http.get("/account/events").json()["data"]
    mine = [row for row in reversed(rows) if row["resource_uuid"] == created["data"]["uuid"]]
    told = [row for row in mine if row["kind"].startswith("instance.")]
    assert [row["kind"] for row in told] == [
        *("instance.create_failed", "instance.delete", "instance.deleted")
    ]
    assert told[0]["data"] == {"reason": ended["error"]["message"]}
    assert told[0]["operation_uuid"] == created["operation"]["uuid"]
    assert told[0]["actor"].startswith("key:")
