"""One plan on a real database and a real workflow engine: success, failure, cancellation, retries, endings."""

from __future__ import annotations

from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.errors import EngineRejected, EngineUnavailable, QuotaExceeded
from awan.events import Event
from awan.kit.database import transaction
from awan.operations import Target, request_cancel, runner, wait_for_end
from awan.settings import Settings
from tests.operations.house import (
    PARTS,
    Site,
    begin_build,
    make_plot,
    read_operation,
    read_resource,
)
from tests.support.in_process_worker import InProcessWorker


def events_of(operation_id: UUID) -> dict[str, UUID | None]:
    with transaction() as session:
        rows = session.scalars(select(Event).where(Event.operation_id == operation_id)).all()
    return {row.kind: row.account_id for row in rows}


def test_success_writes_the_end_once(site: Site, session: Session, worker: InProcessWorker) -> None:
    plot = make_plot(session)
    operation_id = begin_build(plot)
    operation = wait_for_end(operation_id, 10)
    assert (operation.status, operation.percent, operation.error_type) == ("succeeded", 100, None)
    assert operation.started_at is not None
    assert operation.finished_at is not None
    assert site.words(plot.resource_id) == [*PARTS, "succeed", "then"]
    after = read_resource(plot.resource_id)
    assert after.active_operation_id is None
    assert after.name == f"{plot.name}+built"
    assert events_of(operation_id) == {
        "operation.queued": plot.account_id,
        "operation.succeeded": plot.account_id,
    }


def test_refusal_undoes_in_reverse_from_the_step_that_failed(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    plot = make_plot(session)
    site.store.faults.fail_at(2)
    operation = wait_for_end(begin_build(plot), 10)
    assert operation.status == "failed"
    assert site.words(plot.resource_id) == ["floor", "walls", "undo_walls", "undo_floor", "fail"]
    assert site.parts(plot.resource_id) == []
    assert operation.error_type == "ENGINE_ERROR"
    assert (operation.error_message or "").startswith("The infrastructure refused a part of")
    assert "planned fault" not in operation.error_message
    assert "planned fault at call 2" in (operation.error_detail or "")
    after = read_resource(plot.resource_id)
    assert (after.name, after.active_operation_id) == (f"{plot.name}+failed", None)
    assert "operation.failed" in events_of(operation.operation_id)


def test_outage_is_retried(site: Site, session: Session, worker: InProcessWorker) -> None:
    plot = make_plot(session)
    site.store.faults.fail_at(2, EngineUnavailable)
    site.store.faults.fail_at(3, EngineUnavailable)
    assert wait_for_end(begin_build(plot), 10).status == "succeeded"
    assert site.words(plot.resource_id)[:4] == ["floor", "walls", "walls", "walls"]


def test_outage_longer_than_the_step_allows_fails(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    plot = make_plot(session)

    def away(target: Target) -> None:
        raise EngineUnavailable("builder", "make_walls", "no route to host")

    site.hooks["walls"] = away
    operation = wait_for_end(begin_build(plot), 15)
    assert (operation.status, operation.error_type) == ("failed", "UNAVAILABLE")
    assert "no route to host" not in (operation.error_message or "")
    assert "no route to host" in (operation.error_detail or "")
    assert site.parts(plot.resource_id) == []


def test_bug_unwinds_and_tells_nothing_inside(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    plot = make_plot(session)

    def bug(target: Target) -> None:
        raise KeyError("secret inside")

    site.hooks["roof"] = bug
    operation = wait_for_end(begin_build(plot), 10)
    assert (operation.status, operation.error_type) == ("failed", "INTERNAL")
    assert "secret inside" not in (operation.error_message or "")
    assert site.parts(plot.resource_id) == []


def test_refused_speaks_to_the_customer(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    plot = make_plot(session)

    def refuse(target: Target) -> None:
        raise QuotaExceeded("You may have 3 houses.")

    site.hooks["walls"] = refuse
    operation = wait_for_end(begin_build(plot), 10)
    assert operation.error_type == "QUOTA_EXCEEDED"
    assert operation.error_message == "You may have 3 houses."


def test_cancel_stops_at_the_next_boundary(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    plot = make_plot(session)

    def cancel(target: Target) -> None:
        with transaction() as inner:
            request_cancel(inner, target.operation_id)

    site.hooks["floor"] = cancel
    operation = wait_for_end(begin_build(plot), 10)
    assert (operation.status, operation.error_type) == ("cancelled", "CANCELLED")
    assert site.words(plot.resource_id) == [
        "floor",
        "undo_walls",
        "undo_floor",
        "fail",
    ]
    assert site.parts(plot.resource_id) == []
    assert read_resource(plot.resource_id).name == f"{plot.name}+cancelled"


def test_cancel_after_the_point_of_no_return_is_too_late(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    plot = make_plot(session)

    def cancel(target: Target) -> None:
        with transaction() as inner:
            request_cancel(inner, target.operation_id)

    site.hooks["walls"] = cancel  # the roof is not cancellable
    assert wait_for_end(begin_build(plot), 10).status == "succeeded"


def test_cancel_while_queued(site: Site, session: Session, settings: Settings) -> None:
    plot = make_plot(session)
    operation_id = begin_build(plot)
    with transaction() as inner:
        request_cancel(inner, operation_id)
    with InProcessWorker(settings):
        assert wait_for_end(operation_id, 10).status == "cancelled"
    assert site.parts(plot.resource_id) == []


def test_cancel_of_an_ended_operation_has_no_effect(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    operation = wait_for_end(begin_build(make_plot(session)), 10)
    with transaction() as inner:
        request_cancel(inner, operation.operation_id)
    assert read_operation(operation.operation_id).cancel_requested_at is None


def test_undo_that_fails_alarms_and_the_others_still_run(
    site: Site, session: Session, worker: InProcessWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RETRY_FIRST_S", 0.01)
    plot = make_plot(session)

    def refuse(target: Target) -> None:
        raise EngineRejected("builder", "remove_walls", "held by somebody")

    site.hooks["undo_walls"] = refuse
    site.store.faults.fail_at(3)
    operation = wait_for_end(begin_build(plot), 10)
    assert operation.status == "failed"
    assert operation.alarmed_at is not None
    assert "held by somebody" in (operation.error_detail or "")
    assert site.parts(plot.resource_id) == ["walls"]
    words = site.words(plot.resource_id)
    assert words.count("undo_walls") == runner.UNDO_ATTEMPTS_MAX
    assert words[-2:] == ["undo_floor", "fail"]
    # An engine's words are for the operator alone.
    assert events_of(operation.operation_id)["operation.undo_failed"] is None


def test_cancel_whose_undo_fails_is_a_failure(
    site: Site, session: Session, worker: InProcessWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "RETRY_FIRST_S", 0.01)
    plot = make_plot(session)

    def cancel(target: Target) -> None:
        with transaction() as inner:
            request_cancel(inner, target.operation_id)

    def refuse(target: Target) -> None:
        raise EngineRejected("builder", "remove_floor", "no")

    site.hooks.update(floor=cancel, undo_floor=refuse)
    assert wait_for_end(begin_build(plot), 10).status == "failed"


def test_bug_in_succeed_unwinds(site: Site, session: Session, worker: InProcessWorker) -> None:
    plot = make_plot(session)

    def bug(target: Target) -> None:
        raise ZeroDivisionError

    site.hooks["then"] = bug
    operation = wait_for_end(begin_build(plot), 10)
    assert (operation.status, operation.error_type) == ("failed", "INTERNAL")
    assert site.parts(plot.resource_id) == []
    assert read_resource(plot.resource_id).name == f"{plot.name}+failed"


def test_bug_in_fail_still_ends_and_alarms(
    site: Site, session: Session, worker: InProcessWorker
) -> None:
    plot = make_plot(session)

    def bug(target: Target) -> None:
        raise ZeroDivisionError

    site.hooks["fail"] = bug
    site.store.faults.fail_at(1)
    operation = wait_for_end(begin_build(plot), 10)
    assert operation.status == "failed"
    assert operation.alarmed_at is not None
    assert read_resource(plot.resource_id).active_operation_id is None
    assert "operation.undo_failed" in events_of(operation.operation_id)
