"""Creations per second: 200 simulated nodes, one API process and one worker process, as many as they bear."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import psycopg

from benchmarks.processor import cpu_of_tree
from benchmarks.report import Row, percentile, publish, spread
from benchmarks.simulated_cloud import ManyNodes, many_nodes

TITLE = "Creations per second"
NODES = 200
CLIENTS = 8
WARM_UP, SECONDS, SLICE_S = 40, 60, 10
# Accepted and not ended yet: enough that the worker never waits for us, few enough that none waits for long.
IN_FLIGHT_MAX = 40
LOOK_S = 0.1


def run(*, record: bool) -> None:
    """Clients create for a minute, holding back only while too many of their creations have not ended."""
    with many_nodes(NODES, 18072) as cloud:
        _create(cloud, seconds=3600, count=WARM_UP)
        cloud.wait_until_idle()
        rows = _measure(cloud)
    publish(TITLE, "python -m benchmarks creates", rows, record=record)


@dataclass
class _Load:
    """What the clients share."""

    until: float
    left: int
    accepted_s: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    ended: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> bool | None:
        """True: create one now; None: later; False: no more."""
        with self.lock:
            if self.left <= 0 or time.monotonic() >= self.until:
                return False
            in_flight = len(self.accepted_s) - self.ended
            if in_flight >= IN_FLIGHT_MAX - CLIENTS:
                return None
            self.left -= 1
            return True

    def note(self, seconds: float, refusal: str | None) -> None:
        """One answer."""
        with self.lock:
            if refusal is None:
                self.accepted_s.append(seconds)
            else:
                self.refused.append(refusal)


def _create(cloud: ManyNodes, *, seconds: float, count: int) -> _Load:
    load = _Load(until=time.monotonic() + seconds, left=count)
    threads = [threading.Thread(target=_client, args=(cloud, load)) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    with cloud.connect() as connection:
        before = _count_ended(connection)
        while any(thread.is_alive() for thread in threads):
            load.ended = _count_ended(connection) - before
            time.sleep(LOOK_S)
    return load


def _count_ended(connection: psycopg.Connection[tuple[Any, ...]]) -> int:
    query = (
        "SELECT count(*) FROM operation WHERE kind = 'instance.create' AND finished_at IS NOT NULL"
    )
    row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0


def _client(cloud: ManyNodes, load: _Load) -> None:
    with cloud.client() as http:
        while (turn := load.take()) is not False:
            if turn is None:
                time.sleep(LOOK_S / 2)
                continue
            began = time.perf_counter()
            answer = http.post("/instances", json=cloud.order())
            refusal = None if answer.status_code == 202 else answer.text
            load.note(time.perf_counter() - began, refusal)


def _measure(cloud: ManyNodes) -> list[Row]:
    statuses = cloud.plane.statuses()
    pids = {name: statuses[name].pid for name in ("api", "worker", "postgres")}
    began_at = cloud.query("SELECT clock_timestamp()")[0][0]
    before = {name: cpu_of_tree(pid) for name, pid in pids.items()}
    ours, began = time.process_time(), time.monotonic()
    load = _create(cloud, seconds=SECONDS, count=1_000_000)
    wall_s = time.monotonic() - began
    shares = {name: (cpu_of_tree(pid) - before[name]) / wall_s for name, pid in pids.items()}
    ours_share = (time.process_time() - ours) / wall_s
    cloud.wait_until_idle()
    ended = cloud.query(
        "SELECT status, extract(epoch FROM finished_at - %s)::float8,"
        " extract(epoch FROM finished_at - created_at)::float8 FROM operation"
        " WHERE kind = 'instance.create' AND created_at >= %s",
        began_at,
        began_at,
    )
    succeeded = [row for row in ended if row[0] == "succeeded"]
    slices = [
        sum(start <= at < start + SLICE_S for _, at, _ in succeeded) / SLICE_S
        for start in range(0, SECONDS, SLICE_S)
    ]
    took = [took_s for _, _, took_s in succeeded]
    accepted_ms = [1000 * seconds for seconds in load.accepted_s]
    findings = cloud.audit()
    rows = [
        Row(
            f"creations ended in the minute, a second ({NODES} nodes)",
            f"{sum(at < SECONDS for _, at, _ in succeeded) / SECONDS:.1f}",
            "≥ 10",
        ),
        Row(f"the same, slowest {SLICE_S} s of it", f"{min(slices):.1f}", "≥ 10"),
        Row(
            "succeeded, of those that were asked for",
            f"{len(succeeded)} of {len(load.accepted_s) + len(load.refused)}",
            "all",
        ),
        Row("findings of the audit afterwards", str(len(findings)), "0"),
        Row("POST accepted → ended: median", spread(took, "s", 2)),
        Row("the same, p95", f"{percentile(took, 95):.2f} s"),
        Row("POST /instances answered: median", spread(accepted_ms, "ms", 1)),
        Row("the same, p95", f"{percentile(accepted_ms, 95):.1f} ms"),
    ]
    rows += [
        Row(f"{name}: share of a core", f"{100 * share:.0f} %") for name, share in shares.items()
    ]
    rows.append(Row("the clients of this benchmark: share of a core", f"{100 * ours_share:.0f} %"))
    for words in [*load.refused[:3], *findings[:10]]:
        print(words)
    return rows
