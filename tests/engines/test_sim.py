"""The store of the simulated engines."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from awan.engines import sim
from awan.engines.sim import CONNECTIONS_MAX, SimStore
from awan.errors import EngineUnavailable
from awan.kit.database import REST_MAX_S


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
    time.sleep(REST_MAX_S)
    began_at = time.monotonic()
    assert store.fetch_all("SELECT 1 AS one") == [{"one": 1}]
    assert time.monotonic() - began_at < 10
    store.close()


def test_a_connection_that_is_lost_in_use_is_an_engine_out_of_reach(
    database_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the machine is, none has rested.
    monkeypatch.setattr(sim, "REST_MAX_S", 60.0)
    url = database_server.create(f"sim_{uuid4().hex[:8]}")
    store = SimStore(url)
    # The pool takes them by turns: so all that it has are in use.
    for _ in range(2 * CONNECTIONS_MAX):
        store.execute("SELECT 1")
    with psycopg.connect(url.replace("+psycopg", "", 1)) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    with pytest.raises(EngineUnavailable), store.call("hypervisor", "probe", "n1"):
        store.fetch_all("SELECT 1 AS one")
    with store.call("hypervisor", "probe", "n1"):
        assert store.fetch_all("SELECT 1 AS one") == [{"one": 1}]
    store.close()
