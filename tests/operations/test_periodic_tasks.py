"""Periodic tasks of workers: some run in one worker at a time, others in all of them."""

from __future__ import annotations

import threading

import psycopg

from awan.settings import Settings
from awan.worker import PeriodicTask, start_tasks


def test_shared_tasks_run_in_every_worker(settings: Settings) -> None:
    """While another worker is at both, only the shared one runs here as well."""
    alone, shared, stopping = threading.Event(), threading.Event(), threading.Event()
    with psycopg.connect(settings.database_url) as other:
        for name in ("alone", "shared"):
            other.execute(
                "SELECT pg_advisory_xact_lock(hashtext('awan.task'), hashtext(%s))", [name]
            )
        start_tasks(
            [
                PeriodicTask("alone", 0.05, alone.set),
                PeriodicTask("shared", 0.05, shared.set, is_alone=False),
            ],
            stopping,
        )
        assert shared.wait(20)
        assert not alone.wait(0.5)
    assert alone.wait(20)
    stopping.set()
