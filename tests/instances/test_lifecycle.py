"""An instance's life through the API, on simulated engines."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.simulated_cloud import SimulatedCloud

pytestmark = pytest.mark.usefixtures("worker")


def test_create_shows_the_instance_and_ends_running(cloud: SimulatedCloud) -> None:
    answer = cloud.create(hostname="web-1")
    assert answer["message"] == "Vm berhasil dibuat"
    data = answer["data"]
    assert data["status"] == "Provisioning"
    assert data["operation_flag"] == 1
    assert data["memory"] == "1 GB"
    assert data["storage"] == "20GB"
    assert data["ip_address"].startswith("198.51.100.")
    assert data["price_per_hour"] == 118  # (30000 + 30000 + 20 * 1250) / 720, half up
    assert data["estimated_monthly_cost"] == 85000
    assert cloud.wait(answer["operation"]["uuid"])["status"] == "succeeded"
    shown = cloud.customer.http.get(f"/instances/{data['uuid']}").json()["data"]
    assert shown["status"] == "Running"
    assert shown["active_operation"] is None
    assert shown["public_network"]["ipv6_address"].startswith("2001:db8:0:1:")


def test_stop_start_restart_delete(cloud: SimulatedCloud) -> None:
    uuid = cloud.create_running()["uuid"]

    def act(verb: str, expected: str) -> None:
        answer = cloud.customer.http.post(f"/instances/{uuid}/{verb}")
        assert answer.status_code == 202, answer.text
        assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
        shown = cloud.customer.http.get(f"/instances/{uuid}").json()["data"]
        assert shown["status"] == expected

    act("stop", "Stopped")
    act("start", "Running")
    act("restart", "Running")
    body: dict[str, Any] = {
        "_method": "DELETE",
        "remove_ip": "true",
        "remove_block_storage": "false",
    }
    answer = cloud.customer.http.post(f"/instances/{uuid}", data=body)
    assert answer.status_code == 202, answer.text
    assert answer.json()["data"] == []
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    assert cloud.customer.http.get(f"/instances/{uuid}").status_code == 404
    assert cloud.customer.http.get("/networks/public").json()["data"]["page"]["total"] == 0
