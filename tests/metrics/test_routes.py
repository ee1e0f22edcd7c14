"""Who may read what: charts, a customer's figures and the control plane's."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from awan.kit.clock import now
from awan.metrics import history
from awan.metrics.rules import floor
from tests.metrics.conftest import Meter
from tests.support.simulated_cloud import SimulatedCloud

GIB = 1024**3
ROOT = "http://testserver/metrics"


def samples(answer: httpx.Response) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Name -> labels -> value of a scrape."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_every_period_has_its_frame(cloud: SimulatedCloud) -> None:
    uuid = cloud.create()["data"]["uuid"]
    for periode, step_s, count in (
        ("hour", 60, 60), ("day", 1800, 70), ("week", 10800, 70), ("month", 43200, 70), ("year", 604800, 70),
    ):  # fmt: skip
        for query in ({}, {"cf": "MAX"}, {"cf": "AVERAGE"}):
            answer = cloud.customer.http.get(
                f"/instances/{uuid}/rrd", params={"periode": periode, **query}
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["message"] == "RRD data"
            data = answer.json()["data"]
            assert set(data) == {"periode", "resolution", "points"}
            assert (data["periode"], data["resolution"]) == (periode, step_s)
            times = [point["time"] for point in data["points"]]
            assert times == list(range(times[0], times[0] + count * step_s, step_s))
            assert abs(times[-1] - floor(now(), step_s).timestamp()) <= 60
            assert all(
                value is None
                for point in data["points"]
                for name, value in point.items()
                if name != "time"
            )


def test_refusals_in_their_order(cloud: SimulatedCloud) -> None:
    uuid = cloud.create()["data"]["uuid"]
    http = cloud.customer.http
    path = f"/instances/{uuid}/rrd"
    assert http.get(path, headers={"x-apikey": ""}).status_code == 401
    for unknown in (uuid4(), "not-a-uuid"):
        assert http.get(f"/instances/{unknown}/rrd?periode=decade").status_code == 404
    foreign = cloud.new_customer("Other").http
    assert foreign.get(f"{path}?periode=hour").status_code == 404
    assert foreign.get(f"{path}?periode=decade").status_code == 404
    for query, field in (
        ("", "periode"),
        ("periode=decade", "periode"),
        ("periode=HOUR", "periode"),
        ("periode=hour&cf=MIN", "cf"),
        ("periode=hour&x=1", "x"),
    ):
        refused = http.get(f"{path}?{query}")
        assert (refused.status_code, set(refused.json()["errors"])) == (422, {field})


def test_a_longer_step_shows_its_average_or_its_highest_minute(meter: Meter) -> None:
    meter.began_at = floor(now() - timedelta(minutes=45), 1800)
    meter.read(0, net_in_bytes=0, cpu_time_ns=0, memory_used_bytes=GIB // 4)
    meter.read(60, net_in_bytes=600, cpu_time_ns=30 * 10**9, memory_used_bytes=GIB // 2)
    meter.read(120, net_in_bytes=6600, cpu_time_ns=30 * 10**9, memory_used_bytes=GIB // 4)
    history.roll_up()
    average, highest = meter.chart("day")[0], meter.chart("day", cf="MAX")[0]
    assert (average["cpu"], average["netin"], average["mem"]) == (0.25, 55.0, GIB * 3 // 8)
    assert (highest["cpu"], highest["netin"], highest["mem"]) == (0.5, 100.0, GIB // 2)
    assert (average["maxmem"], highest["maxmem"]) == (GIB, GIB)
    for periode in ("week", "month", "year"):
        shown = [point for point in meter.chart(periode).values() if point["netin"] is not None]
        assert [point["netin"] for point in shown] == [55.0]
    assert meter.chart("hour", cf="MAX") == meter.chart("hour")


def test_a_customers_scrape(meter: Meter) -> None:
    http = meter.cloud.customer.http
    stopped = meter.cloud.create(hostname="stopped")["data"]["uuid"]
    meter.began_at = now() - timedelta(seconds=30)
    used = {
        "cpu_time_ns": 2_500_000_000, "net_in_bytes": 11, "net_out_bytes": 22, "disk_read_bytes": 33,
        "disk_written_bytes": 44, "disk_used_bytes": 5 * GIB, "memory_used_bytes": GIB // 2,
    }  # fmt: skip
    meter.read(0, **used)
    found = samples(http.get("/metrics/instances"))
    (labels,) = found["awan_instance_cpu_seconds_total"]
    assert dict(labels)["uuid"] == str(meter.uuid)
    assert set(dict(labels)) == {"uuid", "hostname", "location"}
    assert {name: values[labels] for name, values in found.items()} == {
        "awan_instance_up": 1.0,
        "awan_instance_cpu_seconds_total": 2.5,
        "awan_instance_vcpus": 1.0,
        "awan_instance_memory_bytes": float(GIB),
        "awan_instance_memory_used_bytes": GIB / 2,
        "awan_instance_storage_bytes": 20.0 * GIB,
        "awan_instance_storage_used_bytes": 5.0 * GIB,
        "awan_instance_network_receive_bytes_total": 11.0,
        "awan_instance_network_transmit_bytes_total": 22.0,
        "awan_instance_disk_read_bytes_total": 33.0,
        "awan_instance_disk_written_bytes_total": 44.0,
    }
    off = next(key for key in found["awan_instance_up"] if dict(key)["uuid"] == stopped)
    assert found["awan_instance_up"][off] == 0.0
    assert off not in found["awan_instance_memory_used_bytes"]
    assert found["awan_instance_memory_bytes"][off] == float(GIB)


def test_old_figures_are_not_shown(meter: Meter) -> None:
    meter.began_at = now() - timedelta(seconds=130)
    meter.read(0, net_in_bytes=1)
    found = samples(meter.cloud.customer.http.get("/metrics/instances"))
    assert list(found["awan_instance_up"].values()) == [0.0]
    assert "awan_instance_network_receive_bytes_total" not in found


def test_scrapers_may_send_a_bearer(cloud: SimulatedCloud) -> None:
    customer = cloud.customer.http
    key = str(customer.headers["x-apikey"])
    bearer = {"x-apikey": "", "authorization": f"Bearer {key}"}
    assert customer.get("/metrics/instances", headers=bearer).status_code == 200
    for wrong in ("Bearer x", f"Basic {key}", "Bearer", ""):
        headers = {"x-apikey": "", "authorization": wrong}
        assert customer.get("/metrics/instances", headers=headers).status_code == 401
        assert customer.get(ROOT, headers=headers).status_code == 401
    # Nowhere else.
    assert customer.get("/instances", headers=bearer).status_code == 401
    operators = {"x-apikey": "", "authorization": f"Bearer {cloud.admin.headers['x-apikey']}"}
    assert cloud.admin.get(ROOT, headers=operators).status_code == 200


def test_customers_see_nothing_of_each_other(meter: Meter) -> None:
    meter.began_at = now() - timedelta(seconds=10)
    meter.read(0, net_in_bytes=1)
    other = meter.cloud.new_customer("Other").http
    assert str(meter.uuid) not in other.get("/metrics/instances").text
    assert samples(other.get("/metrics/instances")) == {}


def test_customers_find_no_control_plane(cloud: SimulatedCloud) -> None:
    refused = cloud.customer.http.get(ROOT)
    words = "There is no such route: GET /metrics"
    assert (refused.status_code, refused.json()["message"]) == (404, words)


@pytest.mark.usefixtures("partitions")
def test_the_control_planes_scrape(meter: Meter) -> None:
    meter.began_at = now() - timedelta(seconds=10)
    meter.read(0, net_in_bytes=1)
    meter.cloud.customer.http.get("/instances")
    meter.cloud.customer.http.get(f"/instances/{uuid4()}")
    meter.cloud.customer.http.get("/no/such/route")
    found = samples(meter.cloud.admin.get(ROOT))

    def value(name: str, **labels: Any) -> float:
        return found[name][tuple(sorted(labels.items()))]

    assert value("awan_instances", location="jkt1", state="running") == 1.0
    assert len(found["awan_node_up"]) == 2
    assert value("awan_node_up", location="jkt1", node=meter.node.name) == 1.0
    assert value("awan_node_instances_measured", location="jkt1", node=meter.node.name) == 1.0
    assert value("awan_node_memory_placed_bytes", location="jkt1", node=meter.node.name) == GIB
    assert 0 < value("awan_node_metrics_age_seconds", location="jkt1", node=meter.node.name) < 60
    calls = found["awan_http_request_duration_seconds_count"]
    routes = {(dict(key)["route"], dict(key)["status"]) for key in calls}
    assert ("/api/v1/instances", "200") in routes
    assert ("/api/v1/instances/{instance_uuid}", "404") in routes
    assert not any("no/such" in route for route, _ in routes)
    assert found["process_cpu_seconds_total"][()] > 0


def test_unfinished_operations_are_counted(cloud: SimulatedCloud) -> None:
    cloud.create()
    cloud.create()
    found = samples(cloud.admin.get(ROOT))
    queued = (("kind", "instance.create"), ("status", "queued"))
    assert found["awan_operations_unfinished"][queued] == 2.0
    assert found["awan_operations_overdue"][queued] == 0.0
    assert found["awan_operations_queued_age_seconds"][(("kind", "instance.create"),)] >= 0
