"""The control plane's own share: POST accepted → domain running and port up; DELETE accepted → gone."""

from __future__ import annotations

import time

from benchmarks.real_cloud import real_cloud
from benchmarks.report import Row, percentile, publish, spread
from tests.support.lab_cloud import LabCloud

TITLE = "Control plane's share of create and delete"
ROUNDS = 20


def run(*, record: bool) -> None:
    """One instance of the small template at a time, on otherwise idle nodes."""
    created, deleted = [], []
    with real_cloud() as cloud:
        _create_and_delete(cloud)
        for _ in range(ROUNDS):
            up_s, gone_s = _create_and_delete(cloud)
            created.append(up_s)
            deleted.append(gone_s)
    rows = [
        Row("POST accepted → QEMU running and port up, median", spread(created)),
        Row(
            "POST accepted → QEMU running and port up, p95",
            f"{percentile(created, 95):.2f} s",
            "≤ 1.5 s",
        ),
        Row("DELETE accepted → gone, median", spread(deleted)),
        Row("DELETE accepted → gone, p99", f"{percentile(deleted, 99):.2f} s", "≤ 5 s"),
    ]
    publish(TITLE, "python -m benchmarks control_plane", rows, record=record)


def _create_and_delete(cloud: LabCloud) -> tuple[float, float]:
    answer = cloud.create()
    began_at = time.monotonic()
    assert _wait(cloud, answer["operation"]["uuid"]) == "succeeded"
    up_s = time.monotonic() - began_at
    asked = cloud.client.request(
        "DELETE",
        f"/instances/{answer['data']['uuid']}",
        json={"remove_ip": True, "remove_block_storage": True},
    )
    began_at = time.monotonic()
    assert _wait(cloud, asked.json()["operation"]["uuid"]) == "succeeded"
    return up_s, time.monotonic() - began_at


def _wait(cloud: LabCloud, operation: str) -> str:
    """Polls every 10 ms, which is then the resolution of the figures."""
    while True:
        status = str(cloud.client.get(f"/operations/{operation}").json()["data"]["status"])
        if status in ("succeeded", "failed", "cancelled"):
            return status
        time.sleep(0.01)
