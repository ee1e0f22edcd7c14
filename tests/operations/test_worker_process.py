"""The real worker process: killed and restarted, taken over, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from awan.kit.database import transaction
from awan.operations import wait_for_end
from awan.operations.models import Worker
from awan.settings import Settings
from tests.operations.house import PARTS, Site, begin_build, make_plot, read_operation

pytestmark = pytest.mark.faults

# The worker of the product, which also knows the toy plan. A step lasts as long as the toy engine's latency.
PROGRAM = """
from awan import assembly, worker
from awan.settings import get_settings
from tests.operations import house
house.open_site(get_settings().database_url)
assembly.WORKER_TASKS = ()
worker.main()
"""
CHECKOUT = Path(__file__).parents[2]
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(settings: Settings) -> Iterator[Start]:
    """Starts workers by name; all of them have ended after the test."""
    running: list[subprocess.Popen[bytes]] = []

    def start_worker(name: str, lease_s: float = 2.0) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "AWAN_WORKER_ID": name,
            "AWAN_WORKER_LEASE_S": str(lease_s),
            "AWAN_LOG_LEVEL": "WARNING",
            "PYTHONPATH": str(CHECKOUT),
        }
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, cwd=CHECKOUT)
        running.append(process)
        return process

    yield start_worker
    for process in running:
        process.kill()
        process.wait()


def wait_until(what: str, condition: Callable[[], object], timeout_s: float = 60.0) -> float:
    """Gives the seconds it took. Raises: AssertionError."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"{what}: not after {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - started


def is_alive(name: str) -> bool:
    with transaction() as session:
        return bool(
            session.scalar(
                select(Worker.executor_id).where(
                    Worker.executor_id == name, Worker.seen_at > text("now() - interval '2 s'")
                )
            )
        )


def test_killed_worker_resumes_after_restart(site: Site, session: Session, start: Start) -> None:
    site.store.set_latency(0.5)
    first = start("one")
    wait_until("start", lambda: is_alive("one"))
    operations = [begin_build(make_plot(session)) for _ in range(5)]
    wait_until("under way", lambda: all(read_operation(id_).step is not None for id_ in operations))
    first.kill()
    first.wait()
    start("one")
    for operation_id in operations:
        operation = wait_for_end(operation_id, 60)
        assert operation.status == "succeeded"
        assert operation.resource_id is not None
        assert site.parts(operation.resource_id) == sorted(PARTS)


def test_a_dead_worker_that_stays_away_is_taken_over(
    site: Site, session: Session, start: Start
) -> None:
    site.store.set_latency(0.5)
    first = start("one")
    wait_until("start", lambda: is_alive("one"))
    operation_id = begin_build(make_plot(session))
    wait_until("under way", lambda: read_operation(operation_id).step is not None)
    start("two")
    first.kill()
    first.wait()
    operation = wait_for_end(operation_id, 60)
    assert operation.status == "succeeded"
    assert operation.resource_id is not None
    assert site.parts(operation.resource_id) == sorted(PARTS)
    with transaction() as fresh:
        assert fresh.scalars(select(Worker.executor_id)).all() == ["two"]


def test_frozen_worker_is_taken_over_and_does_no_harm_when_it_wakes(
    site: Site, session: Session, start: Start
) -> None:
    site.store.set_latency(1.0)
    first = start("one")
    wait_until("start", lambda: is_alive("one"))
    operation_id = begin_build(make_plot(session))
    wait_until("under way", lambda: read_operation(operation_id).step is not None)
    first.send_signal(signal.SIGSTOP)
    start("two")
    operation = wait_for_end(operation_id, 60)
    assert operation.status == "succeeded"
    first.send_signal(signal.SIGCONT)
    wait_until("awake", lambda: is_alive("one"))
    time.sleep(2)
    assert first.poll() is None
    after = read_operation(operation_id)
    assert (after.status, after.finished_at) == ("succeeded", operation.finished_at)
    assert operation.resource_id is not None
    assert site.parts(operation.resource_id) == sorted(PARTS)


def test_sigterm_ends_it_quickly_and_leaves_the_work_to_recovery(
    site: Site, session: Session, start: Start
) -> None:
    site.store.set_latency(60.0)
    first = start("one", lease_s=30.0)
    wait_until("start", lambda: is_alive("one"))
    operation_id = begin_build(make_plot(session))
    wait_until("under way", lambda: read_operation(operation_id).step is not None)
    first.terminate()
    started = time.monotonic()
    assert first.wait(40) == 0
    assert time.monotonic() - started < 30
    assert read_operation(operation_id).status == "running"
    site.store.set_latency(0.0)
    start("one", lease_s=30.0)
    assert wait_for_end(operation_id, 60).status == "succeeded"
