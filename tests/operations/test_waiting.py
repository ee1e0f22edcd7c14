"""Waiting workflows, and waiting for the end of an operation."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from uuid import uuid4

import pytest
from dbos import DBOS
from sqlalchemy import text
from sqlalchemy.orm import Session

from awan.kit.database import get_engine, transaction
from awan.operations import (
    durable_step,
    enqueue_wait,
    pause,
    wait_for_end,
    waiting_workflow,
    watch,
)
from awan.settings import Settings
from tests.operations.house import Site, begin_build, make_plot
from tests.support.in_process_worker import InProcessWorker, workflow_state

waited: list[tuple[str, int]] = []


@waiting_workflow("house.dry.v1")
def dry(subject_id: str, seconds: int) -> None:
    DBOS.sleep(0.05)
    DBOS.run_step({"name": "note"}, lambda: waited.append((subject_id, seconds)))


def test_waiting_workflow_runs_after_commit_only(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    lost, kept = uuid4(), uuid4()
    enqueue_wait(session, "house.dry.v1", f"{lost}-dry", lost, 1)
    session.rollback()
    with transaction() as inner:
        enqueue_wait(inner, "house.dry.v1", f"{kept}-dry", kept, 2)
    deadline = time.monotonic() + 10
    while (str(kept), 2) not in waited:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not [entry for entry in waited if entry[0] == str(lost)]


rounds: list[str] = []


@waiting_workflow("house.settle.v1")
def settle(subject_id: str) -> None:
    durable_step("settle", patient_round, subject_id)


def patient_round(subject_id: str) -> None:
    rounds.append(subject_id)
    while rounds.count(subject_id) < 2:
        pause(0.05)


def test_wait_lets_go_of_a_stopping_worker_and_is_taken_up_again(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    subject = str(uuid4())
    with transaction() as inner:
        enqueue_wait(inner, "house.settle.v1", f"{subject}-settle", subject)
    until(lambda: rounds.count(subject) == 1)
    worker.stop()
    assert not [it for it in threading.enumerate() if "patient_round" in stack_of(it)]
    assert workflow_state(f"{subject}-settle") == "PENDING"
    worker.start()
    until(lambda: workflow_state(f"{subject}-settle") == "SUCCESS")


def until(question: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stack_of(thread: threading.Thread) -> list[str]:
    """The names of the functions that a thread is in."""
    frame = sys._current_frames().get(thread.ident or 0)
    return [it.f_code.co_name for it, _ in traceback.walk_stack(frame)] if frame else []


gate = threading.Event()


@waiting_workflow("house.long_dry.v1")
def long_dry() -> None:
    gate.wait(30)


def test_many_waits_do_not_hold_up_operations(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    gate.clear()
    ids = [f"{uuid4()}-dry" for _ in range(60)]
    with transaction() as inner:
        for workflow_id in ids:
            enqueue_wait(inner, "house.long_dry.v1", workflow_id)
    wait_for_state(ids, "PENDING")
    assert wait_for_end(begin_build(make_plot(session)), 10).status == "succeeded"
    gate.set()
    wait_for_state(ids, "SUCCESS")


def wait_for_state(workflow_ids: list[str], state: str) -> None:
    deadline = time.monotonic() + 20
    while any(workflow_state(workflow_id) != state for workflow_id in workflow_ids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_wait_is_resumed_after_a_death(site: Site, settings: Settings, session: Session) -> None:
    subject = uuid4()
    workflow_id = f"{subject}-dry"
    worker = InProcessWorker(settings)
    worker.start()
    with transaction() as inner:
        enqueue_wait(inner, "house.dry.v1", workflow_id, subject, 3)
    deadline = time.monotonic() + 10
    while workflow_state(workflow_id) == "ENQUEUED" and time.monotonic() < deadline:
        time.sleep(0.002)
    worker.restart()
    while workflow_state(workflow_id) != "SUCCESS":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    worker.stop()
    assert (str(subject), 3) in waited


def test_the_end_wakes_who_waits_at_once(
    site: Site, session: Session, worker: InProcessWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_end(begin_build(make_plot(session)), 10)  # the listener is up
    monkeypatch.setattr(watch, "RECHECK_S", 60.0)
    started = time.monotonic()
    operation_id = begin_build(make_plot(session))
    assert wait_for_end(operation_id, 50).status == "succeeded"
    # Far less than a recheck: the notification woke us.
    assert time.monotonic() - started < 30


def test_the_timeout_gives_the_operation_as_it_stands(site: Site, session: Session) -> None:
    operation_id = begin_build(make_plot(session))
    started = time.monotonic()
    assert wait_for_end(operation_id, 0.2).status == "queued"
    assert 0.2 <= time.monotonic() - started < 10


def test_an_unknown_operation_cannot_be_waited_for(settings: Settings) -> None:
    with pytest.raises(LookupError):
        wait_for_end(uuid4(), 1)


def test_waiting_holds_no_connection_of_the_pool(site: Site, session: Session) -> None:
    operation_ids = [begin_build(make_plot(session)) for _ in range(60)]
    session.close()
    threads = [
        threading.Thread(target=wait_for_end, args=(operation_id, 4.0))
        for operation_id in operation_ids
    ]
    for thread in threads:
        thread.start()
    in_use = []
    while all(thread.is_alive() for thread in threads):
        in_use.append(get_engine().pool.checkedout())  # type: ignore[attr-defined]
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    # Of sixty that wait each looks once a second. If they kept what they looked with, it would be all of the pool.
    assert min(in_use[len(in_use) // 4 :]) < 10


def test_a_lost_listener_comes_back(site: Site, session: Session, worker: InProcessWorker) -> None:
    wait_for_end(begin_build(make_plot(session)), 10)
    session.close()
    with get_engine().connect() as connection:
        cut = connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'awan-listener' AND datname = current_database()"
            )
        ).all()
    assert cut
    plot = make_plot(session)
    assert wait_for_end(begin_build(plot), 10).status == "succeeded"
