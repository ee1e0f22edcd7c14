"""Death, takeover, freezing and lateness of workers, within one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from uuid import UUID

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from awan.errors import QuotaExceeded
from awan.events import Event
from awan.kit.database import get_engine, transaction
from awan.operations import Plan, Target, durable, runner, wait_for_end, workers
from awan.operations.models import Operation, Worker
from awan.settings import Settings
from awan.worker import PeriodicTask, run_alone, start_tasks
from tests.operations import house
from tests.operations.house import (
    PARTS,
    Site,
    begin_build,
    make_plot,
    read_operation,
    read_resource,
)
from tests.support.in_process_worker import InProcessWorker, workflow_state

LEASE_S = 10.0


def wait_for(condition: object, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


class Freezer:
    """A hook in which the first worker that comes is frozen until `woken` is set; `then` is for those after it."""

    def __init__(self, then: Callable[[Target], None] = lambda target: None) -> None:
        self.frozen, self.woken, self._then = threading.Event(), threading.Event(), then

    def __call__(self, target: Target) -> None:
        if self.frozen.is_set():
            self._then(target)
        else:
            self.frozen.set()
            self.woken.wait(20)


def die_building(site: Site, settings: Settings, executor_id: str, session: Session) -> UUID:
    """Leaves an operation behind that a worker of this name began and did not end."""
    plot = make_plot(session)
    site.store.faults.die_at(2, "after")
    with InProcessWorker(settings, executor_id=executor_id):
        operation_id = begin_build(plot)
        wait_for(lambda: site.store.faults.is_dead)
    site.store.faults.clear()
    assert workflow_state(operation_id) == "PENDING"
    assert read_operation(operation_id).status == "running"
    return operation_id


def test_same_executor_resumes_and_repeats_no_finished_step(
    site: Site, settings: Settings, session: Session
) -> None:
    operation_id = die_building(site, settings, "one", session)
    with InProcessWorker(settings, executor_id="one"):
        operation = wait_for_end(operation_id, 10)
    assert operation.status == "succeeded"
    assert operation.resource_id is not None
    words = site.words(operation.resource_id)
    assert words == ["floor", "walls", "walls", "roof", "succeed", "then"]
    assert site.parts(operation.resource_id) == sorted(PARTS)


def test_another_executor_does_not_take_work_by_itself(
    site: Site, settings: Settings, session: Session
) -> None:
    operation_id = die_building(site, settings, "one", session)
    with InProcessWorker(settings, executor_id="two"):
        time.sleep(0.5)
        assert workflow_state(operation_id) == "PENDING"


def test_takeover_of_a_dead_worker(site: Site, settings: Settings, session: Session) -> None:
    workers.beat("one")
    operation_id = die_building(site, settings, "one", session)
    with InProcessWorker(settings, executor_id="two"):
        assert workers.take_over_dead("two", LEASE_S) == []  # its heart may still beat
        with transaction() as aged:
            aged.execute(update(Worker).values(seen_at=text("now() - interval '11 s'")))
        workers.beat("two")
        assert workers.take_over_dead("two", LEASE_S) == ["one"]
        assert workers.take_over_dead("two", LEASE_S) == []
        assert wait_for_end(operation_id, 10).status == "succeeded"
    assert session.scalars(select(Worker.executor_id)).all() == ["two"]


def test_takeover_of_work_without_any_heartbeat(
    site: Site, settings: Settings, session: Session
) -> None:
    operation_id = die_building(site, settings, "never-seen", session)
    with InProcessWorker(settings, executor_id="two"):
        workers.beat("two")
        assert workers.take_over_dead("two", LEASE_S) == ["never-seen"]
        assert wait_for_end(operation_id, 10).status == "succeeded"


def test_takeover_keeps_one_at_a_time_and_the_order(
    site: Site, settings: Settings, session: Session
) -> None:
    """The trap: resuming outside the queue would run two operations of one thing side by side."""
    first = die_building(site, settings, "one", session)
    plot = read_resource(read_operation(first).resource_id or first)
    second = house.start_build(session, plot, queue_behind=True).operation_id
    session.commit()
    inside: list[UUID] = []
    overlaps: list[UUID] = []
    lock = threading.Lock()

    def slow(target: Target) -> None:
        with lock:
            inside.append(target.operation_id)
            overlaps.extend(inside if len(inside) > 1 else [])
        time.sleep(0.1)
        with lock:
            inside.remove(target.operation_id)

    for part in PARTS:
        site.hooks[part] = slow
    with InProcessWorker(settings, executor_id="two"):
        assert durable.recover(["one"]) == 1
        ended = [wait_for_end(operation_id, 10) for operation_id in (first, second)]
    assert overlaps == []
    assert [operation.status for operation in ended] == ["succeeded", "succeeded"]
    assert ended[0].finished_at is not None
    assert ended[1].started_at is not None
    assert ended[0].finished_at <= ended[1].started_at


def test_a_returning_worker_waits_for_the_takeover_of_its_work(
    site: Site, settings: Settings, session: Session
) -> None:
    """Else it would resume the very workflows that are being handed to another."""
    beaten = threading.Event()

    def beat() -> None:
        workers.beat("one")
        beaten.set()

    with get_engine().begin() as taker:
        taker.execute(workers._LOCK_WORKER, {"executor_id": "one"})
        thread = threading.Thread(target=beat)
        thread.start()
        assert not beaten.wait(0.3)
    thread.join()
    assert beaten.is_set()


def test_what_we_rely_on_in_the_engine_for_takeover(
    site: Site, settings: Settings, session: Session
) -> None:
    """`recover` uses a private name of DBOS: this fails when a new version of it behaves otherwise."""
    operation_id = die_building(site, settings, "one", session)
    with InProcessWorker(settings, executor_id="two", queues=["none"]):
        assert durable.recover(["somebody-else"]) == 0
        assert workflow_state(operation_id) == "PENDING"
        assert durable.recover(["one"]) == 1
        with get_engine().connect() as connection:
            row = connection.execute(
                text(
                    "SELECT status, queue_name, queue_partition_key, owner_xid"
                    " FROM dbos.workflow_status WHERE workflow_uuid = :id"
                ),
                {"id": str(operation_id)},
            ).one()
        # Back in its own queue and partition, owned by nobody: exactly one runner will get it.
        resource_id = str(read_operation(operation_id).resource_id)
        assert tuple(row) == ("ENQUEUED", durable.OPERATIONS_QUEUE, resource_id, None)
        assert durable.recover(["one"]) == 0


def test_zombie_does_no_further_step(site: Site, settings: Settings, session: Session) -> None:
    """A worker frozen in a step wakes after another one took over: it stops, one end state remains."""
    plot = make_plot(session)
    freezer = Freezer()
    site.hooks["walls"] = freezer
    with InProcessWorker(settings, executor_id="one"):
        operation_id = begin_build(plot)
        assert freezer.frozen.wait(10)
        # The same process plays the other worker: the work is handed over as if "one" were dead.
        assert durable.recover(["one"]) == 1
        assert wait_for_end(operation_id, 10).status == "succeeded"
        freezer.woken.set()
        wait_for(lambda: "spared" in site.words(plot.resource_id), 20)
        time.sleep(0.5)
    words = site.words(plot.resource_id)
    assert words == ["floor", "walls", "walls", "roof", "succeed", "then", "spared"]
    assert site.parts(plot.resource_id) == sorted(PARTS)
    assert read_resource(plot.resource_id).name == f"{plot.name}+built"
    assert read_operation(operation_id).status == "succeeded"


@pytest.mark.parametrize("plan", [house.BUILD, house.BUILD_AT_ONCE], ids=lambda it: it.kind)
@pytest.mark.parametrize("part", ["walls", "roof"])
def test_what_a_zombie_did_late_does_not_stay(
    site: Site, settings: Settings, session: Session, part: str, plan: Plan
) -> None:
    """It wakes in a step, perhaps the last one, that another worker has undone meanwhile."""
    plot = make_plot(session)

    def refuse(target: Target) -> None:
        raise QuotaExceeded(f"No {part} today.")

    freezer = Freezer(refuse)
    site.hooks[part] = freezer
    with InProcessWorker(settings, executor_id="one"):
        operation_id = begin_build(plot, plan)
        assert freezer.frozen.wait(10)
        assert durable.recover(["one"]) == 1
        assert wait_for_end(operation_id, 10).status == "failed"
        assert site.parts(plot.resource_id) == []
        freezer.woken.set()
        wait_for(lambda: "cleared" in site.words(plot.resource_id))
        wait_for(lambda: workflow_state(operation_id) == "SUCCESS")
    assert site.parts(plot.resource_id) == []
    assert read_operation(operation_id).status == "failed"
    assert read_resource(plot.resource_id).name == f"{plot.name}+failed"
    assert "succeed" not in site.words(plot.resource_id)


@pytest.mark.parametrize("plan", [house.BUILD, house.BUILD_AT_ONCE], ids=lambda it: it.kind)
def test_a_zombie_of_the_last_step_leaves_the_end_alone(
    site: Site, settings: Settings, session: Session, plan: Plan
) -> None:
    plot = make_plot(session)
    freezer = Freezer()
    site.hooks["roof"] = freezer
    with InProcessWorker(settings, executor_id="one"):
        operation_id = begin_build(plot, plan)
        assert freezer.frozen.wait(10)
        assert durable.recover(["one"]) == 1
        assert wait_for_end(operation_id, 10).status == "succeeded"
        freezer.woken.set()
        wait_for(lambda: "spared" in site.words(plot.resource_id))
    assert site.parts(plot.resource_id) == sorted(PARTS)
    assert site.words(plot.resource_id).count("succeed") == 1
    assert read_resource(plot.resource_id).name == f"{plot.name}+built"


def test_a_zombie_whose_end_fails_is_noticed_all_the_same(
    site: Site, settings: Settings, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a plan with one checkpoint is its last look; where it cannot be written, there is another."""
    plot = make_plot(session)
    with InProcessWorker(settings):
        operation = wait_for_end(begin_build(plot, house.BUILD_AT_ONCE), 10)
    monkeypatch.setattr(runner, "_attempt_step", lambda step, turn: None)
    failure = runner.StoredFailure(type="INTERNAL", message="", detail="", cancelled=False)
    turn = runner._Turn(Target(operation.operation_id, plot.resource_id), 0)
    runner._do_steps(house.BUILD_AT_ONCE, house.STEPS, turn, then=lambda plan, turn: failure)
    assert "spared" in site.words(plot.resource_id)


def test_zombie_waits_while_the_other_is_still_at_it(
    site: Site, settings: Settings, session: Session
) -> None:
    """A checkpoint of its own would make the other one yield to it."""
    plot = make_plot(session)
    entered = threading.Event()

    def be_slow(target: Target) -> None:
        entered.set()
        freezer.woken.wait(20)
        time.sleep(0.5)

    freezer = Freezer(be_slow)
    site.hooks["walls"] = freezer
    with InProcessWorker(settings, executor_id="one"):
        operation_id = begin_build(plot)
        assert freezer.frozen.wait(10)
        assert durable.recover(["one"]) == 1
        assert entered.wait(10)
        freezer.woken.set()
        assert wait_for_end(operation_id, 10).status == "succeeded"
        assert read_operation(operation_id).execution == 2
        wait_for(lambda: workflow_state(operation_id) == "SUCCESS")
        time.sleep(0.5)
    words = site.words(plot.resource_id)
    assert [word for word in words if word != "spared"] == [
        *("floor", "walls", "walls", "roof", "succeed", "then"),
    ]
    assert site.parts(plot.resource_id) == sorted(PARTS)


def test_frozen_step_that_is_retried_after_the_end_does_nothing(
    site: Site, settings: Settings, session: Session
) -> None:
    plot = make_plot(session)
    with InProcessWorker(settings):
        operation = wait_for_end(begin_build(plot), 10)
    target = Target(operation.operation_id, plot.resource_id)
    for execution in (1, 2):
        turn = runner._Turn(target, execution)
        assert runner._do_step(house.BUILD, house.BUILD.steps[0], turn) is None
    assert site.words(plot.resource_id).count("floor") == 1
    assert read_operation(operation.operation_id).status == "succeeded"


def test_overdue_operations_alarm_once_and_go_on(
    site: Site, settings: Settings, session: Session
) -> None:
    late, punctual = begin_build(make_plot(session)), begin_build(make_plot(session))
    session.execute(
        update(Operation)
        .where(Operation.operation_id == late)
        .values(deadline_at=text("now() - interval '1 s'"))
    )
    session.commit()
    assert workers.alarm_overdue() == 1
    assert workers.alarm_overdue() == 0
    assert read_operation(late).alarmed_at is not None
    assert read_operation(punctual).alarmed_at is None
    events = session.scalars(select(Event).where(Event.kind == "operation.overdue")).all()
    assert [(event.operation_id, event.account_id) for event in events] == [(late, None)]
    with InProcessWorker(settings):
        assert wait_for_end(late, 10).status == "succeeded"
    assert workers.alarm_overdue() == 0


def test_database_connections_cut_in_the_middle(
    site: Site, settings: Settings, session: Session, worker: InProcessWorker
) -> None:
    """Every backend is terminated while operations run: all of them still succeed."""

    def cut(target: Target) -> None:
        if site.hooks.pop("walls", None) is None:
            return  # two came here at once
        with get_engine().connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )

    plots = [make_plot(session) for _ in range(3)]
    session.close()
    site.hooks["walls"] = cut
    begun = [begin_build(plot) for plot in plots]
    assert [wait_for_end(operation_id, 20).status for operation_id in begun] == ["succeeded"] * 3
    for plot in plots:
        assert site.parts(plot.resource_id) == sorted(PARTS)


def test_several_beats_are_one_row(settings: Settings, session: Session) -> None:
    for _ in range(3):
        workers.beat("one")
    assert len(session.scalars(select(Worker)).all()) == 1


def test_history_of_long_ended_work_is_forgotten(
    site: Site, settings: Settings, session: Session
) -> None:
    old, fresh = make_plot(session), make_plot(session)
    waiting = make_plot(session)
    with InProcessWorker(settings):
        ended = [wait_for_end(begin_build(plot), 10).operation_id for plot in (old, fresh)]
        for operation_id in ended:
            wait_for(lambda id_=operation_id: workflow_state(id_) == "SUCCESS")
    queued = begin_build(waiting)
    session.execute(
        text(
            "UPDATE dbos.workflow_status SET completed_at = completed_at - 15 * 86400000::bigint,"
            " created_at = created_at - 15 * 86400000::bigint WHERE workflow_uuid IN (:old, :queued)"
        ),
        {"old": str(ended[0]), "queued": str(queued)},
    )
    session.commit()
    assert workers.forget_history() == 1
    assert workflow_state(ended[0]) is None
    assert workflow_state(ended[1]) == "SUCCESS"
    assert workflow_state(queued) == "ENQUEUED"
    assert read_operation(ended[0]).status == "succeeded"
    checkpoints = session.scalar(
        text("SELECT count(*) FROM dbos.operation_outputs WHERE workflow_uuid = :id"),
        {"id": str(ended[0])},
    )
    assert checkpoints == 0


def test_periodic_task_runs_in_one_worker_at_a_time(settings: Settings) -> None:
    inside, release = threading.Event(), threading.Event()

    def task() -> None:
        inside.set()
        release.wait(10)

    periodic = PeriodicTask("test.task", 1.0, task)
    thread = threading.Thread(target=run_alone, args=(periodic,))
    thread.start()
    assert inside.wait(10)
    assert not run_alone(periodic)  # another worker's turn is skipped, not queued
    assert run_alone(PeriodicTask("test.other", 1.0, lambda: None))
    release.set()
    thread.join()
    assert run_alone(periodic)


def test_periodic_task_goes_on_after_a_failure(settings: Settings) -> None:
    runs: list[int] = []
    stopping = threading.Event()

    def task() -> None:
        runs.append(1)
        if len(runs) == 1:
            raise ZeroDivisionError
        stopping.set()

    start_tasks([PeriodicTask("test.failing", 0.01, task)], stopping)
    assert stopping.wait(10)
    assert len(runs) == 2
