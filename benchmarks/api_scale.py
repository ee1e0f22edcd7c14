"""The API with 100,000 instances of 2,000 accounts, the largest with 5,000: list pages and accepted creations."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psycopg

from awan.runtime.control_plane import ControlPlane
from benchmarks.report import Row, percentile, publish, spread
from lab.http_api import Api
from lab.seed_catalogue import (
    Engine,
    SeedLocation,
    SeedNode,
    SeedPool,
    create_customer_key,
    ensure_customer,
    seed_location,
)

TITLE = "API with 100,000 instances"
ACCOUNTS, INSTANCES, LARGEST = 2_000, 100_000, 5_000
LIST_CALLS, CREATE_CALLS = 400, 120
CREATE_INTERVAL_S = 0.5
FAKE = {"node_threads": 4096, "node_memory_mib": 64 * 1024**2, "node_disk_gib": 4 * 1024**2}


def run(*, record: bool) -> None:
    """A control plane with simulated engines; rows are inserted in bulk, calls go over loopback HTTP."""
    with tempfile.TemporaryDirectory(prefix="awan-bench-") as directory:
        Path(directory).chmod(0o755)
        plane = ControlPlane(Path(directory) / "state")
        plane.up(lambda step, seconds: None, {"AWAN_LISTEN_PORT": "18070"})
        try:
            rows = _measure(plane)
        finally:
            plane.down()
    publish(TITLE, "python -m benchmarks api_scale", rows, record=record)


def _measure(plane: ControlPlane) -> list[Row]:
    admin_key = plane.run_command("init").strip().splitlines()[-1]
    with Api(plane.api_url, admin_key) as api:
        location_id = seed_location(api, _location())
        tier_id = int(api.get("admin/tiers")[0]["id"])
        template = api.post("admin/templates", {"name": "Debian", "version": "12"})
        account = ensure_customer(
            api,
            "Largest",
            instances_max=100_000,
            vcpus_max=10**6,
            memory_gib_max=10**6,
            storage_gib_max=10**7,
            public_ips_max=10**6,
        )
        key = create_customer_key(api, account, "bench")
    database_url = plane.environment()["AWAN_DATABASE_URL"]
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "UPDATE api_key SET reads_per_minute = 1000000, writes_per_minute = 1000000"
        )
        _fill(connection, account, location_id, tier_id, template["id"])
        plan = _plan(connection, account)
    client = httpx.Client(
        base_url=plane.api_url, headers={"x-apikey": key}, timeout=30, trust_env=False
    )
    lists = _time_lists(client)
    creates = _time_creates(client, location_id, tier_id, template["id"])
    return [
        Row(
            "list page of 50 with search and sort, account of 5,000: median", spread(lists, "ms", 1)
        ),
        Row("the same, p99", f"{percentile(lists, 99):.1f} ms", "≤ 100 ms"),
        Row("SQL statements of a list page", str(_count_statements(database_url, client)), "≤ 4"),
        Row("index that finds the account's rows", plan),
        Row(
            f"POST /instances accepted, {1 / CREATE_INTERVAL_S:.0f} a second: median",
            spread(creates, "ms", 1),
        ),
        Row("the same, p95", f"{percentile(creates, 95):.1f} ms", "≤ 80 ms"),
    ]


def _location() -> SeedLocation:
    return SeedLocation(
        name="Scale",
        code="scale",
        country="ID",
        engines={kind: Engine("fake", FAKE) for kind in ("hypervisor", "volumes", "fabric")},
        nodes=[SeedNode(f"n{number}", f"fake://n{number}/") for number in range(1, 5)],
        pools=[SeedPool("198.18.0.0/20", "198.18.0.1")],
    )


def _fill(connection: Any, largest: str, location_id: int, tier_id: int, template_id: int) -> None:
    """Accounts, an image, and instances spread over them; the largest account has LARGEST of them."""
    connection.execute(
        "INSERT INTO account (account_id, name) SELECT gen_random_uuid(), 'Account ' || n"
        " FROM generate_series(2, %s) n",
        [ACCOUNTS],
    )
    connection.execute(
        "INSERT INTO template_image (image_id, template_id, state, declared_format, format, sha256,"
        " size_bytes, virtual_size_bytes, has_agent)"
        " VALUES (gen_random_uuid(), %s, 'ready', 'qcow2', 'qcow2', repeat('ab', 32), 1024, 2147483648, true)",
        [template_id],
    )
    connection.execute(
        """
        CREATE TEMPORARY TABLE made AS
        WITH owner AS (
            SELECT account_id, row_number() OVER () - 1 AS number FROM account
            WHERE account_id <> %(largest)s AND kind = 'customer'
        )
        SELECT gen_random_uuid() AS id, n,
            CASE WHEN n <= %(most)s THEN %(largest)s ELSE owner.account_id END AS account_id
        FROM generate_series(1, %(all)s) n
        LEFT JOIN owner ON owner.number = n %% (SELECT count(*) FROM owner)
        """,
        {"largest": largest, "most": LARGEST, "all": INSTANCES},
    )
    connection.execute(
        "INSERT INTO resource (resource_id, kind, account_id, location_id, name, created_at)"
        " SELECT id, 'instance', account_id, %s, 'host-' || n || '-' || md5(n::text),"
        " now() - n * interval '1 minute' FROM made",
        [location_id],
    )
    connection.execute(
        """
        INSERT INTO instance (instance_id, account_id, location_id, tier_id, template_id, image_id, hostname, username,
            vcpus, cpu_mode, memory_mib, storage_gib, desired_state, observed_state, monthly_minor, currency,
            create_operation_id, created_at, updated_at, ready_at)
        SELECT id, account_id, %s, %s, %s, (SELECT image_id FROM template_image LIMIT 1),
            'host-' || n || '-' || md5(n::text), 'budi', 1, 'shared', 1024, 20, 'running',
            CASE WHEN n %% 5 = 0 THEN 'stopped' ELSE 'running' END,
            85000 + n %% 1000, 'IDR', gen_random_uuid(), now(), now(), now() FROM made
        """,
        [location_id, tier_id, template_id],
    )
    connection.execute("VACUUM ANALYZE")


def _plan(connection: Any, account: str) -> str:
    rows = connection.execute(
        "EXPLAIN SELECT * FROM resource JOIN instance ON instance_id = resource_id WHERE"
        " resource.account_id = %s AND kind = 'instance' AND resource.deleted_at IS NULL AND name ILIKE '%%1a%%'"
        " ORDER BY resource.created_at DESC, resource_id DESC LIMIT 50",
        [account],
    ).fetchall()
    scans = [text.strip() for (text,) in rows if "Scan" in text]
    return "; ".join(scan.partition("  (")[0].removeprefix("->  ") for scan in scans)


def _time_lists(client: httpx.Client) -> list[float]:
    sorts = ("created_at", "-created_at", "cost", "-cost")
    times = []
    for number in range(LIST_CALLS):
        query = {
            "limit": "50",
            "page": str(1 + number % 3),
            "search": f"{number % 256:02x}",
            "sort": sorts[number % len(sorts)],
        }
        if number % 2:
            query["statuses"] = "running"
        began_at = time.perf_counter()
        answer = client.get("/instances", params=query)
        times.append((time.perf_counter() - began_at) * 1000)
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"]["page"]["count"] > 0
    return times


def _time_creates(
    client: httpx.Client, location_id: int, tier_id: int, template_id: int
) -> list[float]:
    times = []
    for number in range(CREATE_CALLS):
        body = {
            "location_id": location_id,
            "tier_id": tier_id,
            "template_id": template_id,
            "hostname": f"new-{number}",
            "cpu": 1,
            "memory": 1,
            "storage": 20,
            "username": "budi",
            "password": "Correct-Horse-7",
            "use_public_ip": True,
        }
        began_at = time.perf_counter()
        answer = client.post("/instances", json=body)
        elapsed_s = time.perf_counter() - began_at
        times.append(elapsed_s * 1000)
        assert answer.status_code == 202, answer.text
        # The worker carries the creations out on the same cores: a rate is part of the figure.
        time.sleep(max(0.0, CREATE_INTERVAL_S - elapsed_s))
    return times


def _count_statements(database_url: str, client: httpx.Client) -> int:
    """SQL statements of one list call, counted in this process by the driver's event."""
    from fastapi.testclient import TestClient
    from sqlalchemy import event

    os.environ["AWAN_DATABASE_URL"] = database_url
    from awan.api import create_app
    from awan.kit.database import dispose_engine, get_engine
    from awan.settings import get_settings

    get_settings.cache_clear()
    dispose_engine()
    seen: list[str] = []
    event.listen(get_engine(), "before_cursor_execute", lambda *args: seen.append(str(args[2])))
    probe = TestClient(create_app(), base_url="http://testserver/api/v1")
    probe.get(
        "/instances?limit=50&search=1a&sort=-cost", headers={"x-apikey": client.headers["x-apikey"]}
    )
    dispose_engine()
    return len(seen)
