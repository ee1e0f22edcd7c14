"""From the commit of an event to its client: 200 open streams of 50 accounts, 20 events a second."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from uuid import UUID

import httpx
import psycopg

from awan import events
from awan.kit.database import dispose_engine, transaction
from awan.runtime.control_plane import ControlPlane
from awan.settings import get_settings
from benchmarks.report import Row, percentile, publish, spread
from lab.http_api import Api
from lab.seed_catalogue import create_customer_key, ensure_customer

TITLE = "Event to client"
ACCOUNTS, STREAMS_PER_ACCOUNT = 50, 4
EVENTS, INTERVAL_S = 400, 0.05


def run(*, record: bool) -> None:
    """A control plane of its own; streams over loopback HTTP, events recorded by this process as a worker does."""
    with tempfile.TemporaryDirectory(prefix="awan-bench-") as directory:
        Path(directory).chmod(0o755)
        plane = ControlPlane(Path(directory) / "state")
        plane.up(lambda step, seconds: None, {"AWAN_LISTEN_PORT": "18071"})
        try:
            rows = _measure(plane)
        finally:
            plane.down()
    publish(TITLE, "python -m benchmarks events", rows, record=record)


def _measure(plane: ControlPlane) -> list[Row]:
    admin_key = plane.run_command("init").strip().splitlines()[-1]
    keys: dict[UUID, str] = {}
    with Api(plane.api_url, admin_key) as api:
        for number in range(ACCOUNTS):
            account = ensure_customer(api, f"Account {number}")
            keys[UUID(account)] = create_customer_key(api, account, "bench")
    os.environ["AWAN_DATABASE_URL"] = plane.environment()["AWAN_DATABASE_URL"]
    get_settings.cache_clear()
    dispose_engine()
    try:
        latencies = asyncio.run(_follow(plane, keys))
    finally:
        dispose_engine()
    streams = ACCOUNTS * STREAMS_PER_ACCOUNT
    return [
        Row(
            f"commit of an event → line read by the client, {streams} streams,"
            f" {1 / INTERVAL_S:.0f} events a second: median",
            spread(latencies, "ms", 1),
        ),
        Row("the same, p95", f"{percentile(latencies, 95):.1f} ms", "≤ 200 ms"),
        Row("the same, p99", f"{percentile(latencies, 99):.1f} ms"),
        Row("connections of the database that listen", str(_listeners(plane)), "1"),
    ]


async def _follow(plane: ControlPlane, keys: dict[UUID, str]) -> list[float]:
    """Milliseconds from before each commit to each of its clients."""
    wanted = EVENTS * STREAMS_PER_ACCOUNT
    latencies: list[float] = []
    is_complete, opened = asyncio.Event(), asyncio.Semaphore(0)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, trust_env=False, limits=limits) as client:

        async def read(key: str) -> None:
            headers = {"x-apikey": key}
            async with client.stream("GET", f"{plane.api_url}/events", headers=headers) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    if line.startswith("id: ") and line.endswith("-0"):
                        opened.release()
                    if line.startswith("data: "):
                        began_at = json.loads(line[6:])["data"]["began_at"]
                        latencies.append((time.monotonic() - began_at) * 1000)
                        if len(latencies) == wanted:
                            is_complete.set()

        readers = [
            asyncio.create_task(read(key))
            for key in keys.values()
            for _ in range(STREAMS_PER_ACCOUNT)
        ]
        for _ in readers:
            await opened.acquire()
        accounts = list(keys)
        for number in range(EVENTS):
            due_at = time.monotonic() + INTERVAL_S
            await asyncio.to_thread(_record, accounts[number % len(accounts)])
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
        async with asyncio.timeout(60):
            await is_complete.wait()
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    return latencies


def _record(account_id: UUID) -> None:
    with transaction() as session:
        data = {"began_at": time.monotonic()}
        events.record(
            session, kind="firewall.applied", actor="operator", account_id=account_id, data=data
        )


def _listeners(plane: ControlPlane) -> int:
    with psycopg.connect(plane.environment()["AWAN_DATABASE_URL"]) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'awan-listener'"
        ).fetchone()
    return int(row[0]) if row else 0
