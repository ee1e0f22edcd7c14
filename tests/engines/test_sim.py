"""The store of the simulated engines."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import psycopg

from awan.engines.sim import CONNECTIONS_MAX, SimStore


def test_lost_connections_do_not_add_up(database_server: Any) -> None:
    """After a restart of the server the first call is not delayed once for each connection that was lost."""
    url = database_server.create(f"sim_{uuid4().hex[:8]}")
    store = SimStore(url)
    with ThreadPoolExecutor(CONNECTIONS_MAX) as threads:
        list(threads.map(lambda _: store.execute("SELECT pg_sleep(0.3)"), range(CONNECTIONS_MAX)))
    with psycopg.connect(url.replace("+psycopg", "", 1)) as other:
        lost = other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).fetchall()
    assert len(lost) > 5
    began_at = time.monotonic()
    assert store.fetch_all("SELECT 1 AS one") == [{"one": 1}]
    assert time.monotonic() - began_at < 10
    store.close()
