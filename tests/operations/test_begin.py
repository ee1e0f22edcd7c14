"""Beginning: the row and its workflow live or die together, one change at a time, in order."""

from __future__ import annotations

import json
import threading
import time
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from awan.errors import Conflict
from awan.events import Event
from awan.kit.database import get_engine
from awan.operations import Plan, Target, durable, summary, wait_for_end
from awan.operations.models import Operation
from awan.settings import Settings
from tests.operations import house
from tests.operations.house import Site, begin_build, make_plot, read_operation, read_resource
from tests.support.builders import Requester, make_account
from tests.support.in_process_worker import InProcessWorker, workflow_state


def stored_workflow(operation_id: UUID) -> dict[str, object]:
    with get_engine().connect() as connection:
        row = connection.execute(
            text(
                "SELECT * FROM dbos.workflow_status LEFT JOIN (SELECT workflow_uuid, inputs AS stored"
                " FROM dbos.workflow_input) AS input USING (workflow_uuid) WHERE workflow_uuid = :id"
            ),
            {"id": str(operation_id)},
        )
        return dict(row.mappings().one())


def test_commit_makes_row_event_and_workflow(site: Site, session: Session) -> None:
    plot = make_plot(session)
    operation = house.start_build(session, plot)
    session.commit()
    assert summary(operation) == {
        "uuid": str(operation.operation_id),
        "kind": "house.build",
        "status": "queued",
    }
    assert read_resource(plot.resource_id).active_operation_id == operation.operation_id
    assert workflow_state(operation.operation_id) == "ENQUEUED"
    assert session.scalars(select(Event.kind)).all() == ["operation.queued"]


def test_rollback_leaves_nothing(site: Site, session: Session) -> None:
    plot = make_plot(session)
    operation_id = house.start_build(session, plot).operation_id
    session.rollback()
    assert session.get(Operation, operation_id) is None
    assert read_resource(plot.resource_id).active_operation_id is None
    assert workflow_state(operation_id) is None
    assert session.scalars(select(Event.kind)).all() == []


def test_arguments_are_ids_only_and_readable(site: Site, session: Session) -> None:
    plot = make_plot(session)
    operation_id = begin_build(plot)
    row = stored_workflow(operation_id)
    assert json.loads(str(row["inputs"] or row["stored"])) == {
        "positionalArgs": [str(operation_id), str(plot.resource_id)],
        "namedArgs": {},
    }
    assert row["queue_partition_key"] == str(plot.resource_id)
    assert row["application_version"] == durable.APPLICATION_VERSION


def test_busy_resource_names_the_running_operation(site: Site, session: Session) -> None:
    plot = make_plot(session)
    running = begin_build(plot)
    with pytest.raises(Conflict) as refusal:
        house.start_build(session, plot)
    assert refusal.value.type == "INVALID_OPERATION"
    assert refusal.value.retry_after_s
    assert f"house.build ({running})" in refusal.value.message
    session.rollback()
    assert session.scalars(select(Operation.operation_id)).all() == [running]


def test_two_begins_at_once_give_one_operation_and_one_conflict(
    site: Site, session: Session
) -> None:
    plot = make_plot(session)
    barrier, outcomes = threading.Barrier(8), []

    def attempt() -> None:
        barrier.wait()
        try:
            begin_build(plot)
            outcomes.append("begun")
        except Conflict:
            outcomes.append("conflict")

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["begun"] + ["conflict"] * 7


def test_a_partition_is_one_at_a_time_and_in_order(
    site: Site, session: Session, settings: Settings
) -> None:
    plot = make_plot(session)
    inside, most, lock = 0, 0, threading.Lock()

    def slow(target: Target) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.05)
        with lock:
            inside -= 1

    site.hooks["floor"] = slow
    begun = []
    for _ in range(5):
        begun.append(house.start_build(session, plot, queue_behind=True).operation_id)
        session.commit()
    assert read_resource(plot.resource_id).active_operation_id == begun[-1]
    with InProcessWorker(settings):
        ended = [wait_for_end(operation_id, 10) for operation_id in begun]
    assert most == 1
    starts = [operation.started_at for operation in ended]
    assert starts == sorted(starts)  # type: ignore[type-var]
    assert read_resource(plot.resource_id).active_operation_id is None


def test_the_end_of_an_earlier_operation_does_not_free_the_resource_of_a_later(
    site: Site, session: Session, settings: Settings
) -> None:
    plot = make_plot(session)
    first = house.start_build(session, plot)
    session.commit()
    second = house.start_build(session, plot, queue_behind=True)
    session.commit()
    seen = []
    site.hooks["floor"] = lambda target: seen.append(
        read_resource(plot.resource_id).active_operation_id
    )
    with InProcessWorker(settings):
        wait_for_end(first.operation_id, 10)
        wait_for_end(second.operation_id, 10)
    assert seen == [second.operation_id, second.operation_id]


def test_partitions_run_side_by_side(site: Site, session: Session, worker: InProcessWorker) -> None:
    plots = [make_plot(session), make_plot(session)]
    meeting = threading.Barrier(2, timeout=10)  # both floors must be under way at once
    site.hooks["floor"] = lambda target: meeting.wait() and None
    begun = [begin_build(plot) for plot in plots]
    assert [wait_for_end(operation_id, 10).status for operation_id in begun] == ["succeeded"] * 2


def test_a_missing_partition_key_is_refused(site: Site, session: Session) -> None:
    with pytest.raises(ValueError, match="partition key"):
        durable.enqueue_operation(session, "house.build.v1", uuid4(), uuid4(), None)  # type: ignore[arg-type]


def test_an_unknown_plan_is_refused(site: Site, session: Session) -> None:
    stranger = Plan(
        workflow="house.paint.v1",
        kind="house.paint",
        steps=house.BUILD.steps,
        succeed=house.BUILD.succeed,
        fail=house.BUILD.fail,
        deadline_s=1,
    )
    account = make_account(session)
    with pytest.raises(ValueError, match="not registered"):
        house.begin(
            session,
            caller=Requester(account.account_id),
            plan=stranger,
            resource=None,
            resource_kind="house",
            subject_id=uuid4(),
        )


def test_an_operators_own_operation_has_no_account(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    account = make_account(session, is_operator=True)
    operation = house.begin(
        session,
        caller=Requester(account.account_id, is_operator=True, actor="operator"),
        plan=house.BUILD,
        resource=None,
        resource_kind="template",
        subject_id=uuid4(),
    )
    session.commit()
    assert wait_for_end(operation.operation_id, 10).status == "succeeded"
    assert read_operation(operation.operation_id).account_id is None


def test_ten_operations_are_quick(site: Site, session: Session, worker: InProcessWorker) -> None:
    plots = [make_plot(session) for _ in range(10)]
    started = time.monotonic()
    begun = [begin_build(plot) for plot in plots]
    assert {wait_for_end(operation_id, 20).status for operation_id in begun} == {"succeeded"}
    assert time.monotonic() - started < 10
