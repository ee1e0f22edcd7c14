"""Pictures of the screen: taken by a worker, shared by those who ask at once, forgotten soon."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event, func, select, text, update

from awan.engines.hypervisor.pixmap import PNG_SIGNATURE
from awan.engines.registry import sim_store
from awan.instances.capture_workflows import CAPTURE_PURPOSE, KEPT_S
from awan.instances.captures import forget_captures
from awan.instances.models import CaptureKind, InstanceCapture
from awan.kit.clock import now
from awan.kit.database import get_engine, transaction
from awan.kit.secrets import Secret
from awan.reconcile import run_audit
from awan.reconcile.findings import FindingKind
from tests.support.changed_settings import changed_settings
from tests.support.simulated_cloud import SimulatedCloud


def count_pictures() -> tuple[int, int]:
    """How many pictures are kept, and how many workflows took them."""
    with transaction() as session:
        kept = session.scalar(select(func.count()).select_from(InstanceCapture)) or 0
        query = "SELECT count(*) FROM dbos.workflow_status WHERE name = 'instance.capture.v1'"
        return kept, session.scalar(text(query)) or 0


@pytest.mark.usefixtures("worker")
def test_a_picture_of_a_running_guest(cloud: SimulatedCloud) -> None:
    uuid = cloud.create_running()["uuid"]
    path = f"/instances/{uuid}/screenshot"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: cloud.customer.http.get(path), range(8)))
    for answer in answers:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        assert answer.content.startswith(PNG_SIGNATURE)
        assert answer.headers["cache-control"] == "no-store"
    kept, workflows = count_pictures()
    assert kept == 1
    assert workflows < len(answers)
    assert cloud.admin.get(path).status_code == 200
    taken = count_pictures()[1]
    with transaction() as session:
        old = now() - timedelta(seconds=KEPT_S + 1)
        session.execute(update(InstanceCapture).values(requested_at=old))
        session.execute(text("UPDATE dbos.workflow_status SET completed_at = completed_at - 70000"))
    assert cloud.customer.http.get(path).status_code == 200
    assert count_pictures() == (1, taken + 1)
    with transaction() as session:
        session.execute(update(InstanceCapture).values(requested_at=old))
    assert forget_captures() == 1
    kept, workflows = count_pictures()
    assert kept == 0
    assert workflows < 2
    with transaction() as session:
        left = session.scalars(select(Secret.purpose)).all()
    assert CAPTURE_PURPOSE not in left


@pytest.mark.usefixtures("worker")
def test_without_a_screen(cloud: SimulatedCloud) -> None:
    uuid = cloud.create_running()["uuid"]
    path = f"/instances/{uuid}/screenshot"
    sim_store().execute("UPDATE sim.domain SET power = 'stopped'")
    refused = cloud.customer.http.get(path)
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    sim_store().execute("UPDATE sim.domain SET power = 'running'")
    cloud.wait(cloud.customer.http.post(f"/instances/{uuid}/stop").json()["operation"]["uuid"])
    refused = cloud.customer.http.get(path)
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    assert cloud.customer.http.get(f"/instances/{uuid4()}/screenshot").status_code == 404


@pytest.mark.usefixtures("worker")
def test_asking_while_the_old_picture_is_forgotten(cloud: SimulatedCloud) -> None:
    """The old one is not taken away any more once somebody asks for the next."""
    uuid = cloud.create_running()["uuid"]
    with transaction() as session:
        old = now() - timedelta(seconds=KEPT_S + 1)
        earlier = InstanceCapture(
            instance_id=UUID(uuid), kind=CaptureKind.SCREEN, capture_id=uuid4(), requested_at=old
        )
        session.add(earlier)
    forgotten: list[Future[int]] = []
    with ThreadPoolExecutor(1) as pool:

        def forget_now(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            if statement.startswith("INSERT INTO instance_capture") and not forgotten:
                forgotten.append(pool.submit(forget_captures))
                # It either ends at once or waits for the transaction that is asking.
                wait(forgotten, timeout=2)

        event.listen(get_engine(), "after_cursor_execute", forget_now)
        try:
            answer = cloud.customer.http.get(f"/instances/{uuid}/screenshot")
        finally:
            event.remove(get_engine(), "after_cursor_execute", forget_now)
    assert answer.status_code == 200, answer.text
    assert [round_.result() for round_ in forgotten] == [0]
    assert count_pictures() == (1, 1)


def test_without_a_worker(cloud: SimulatedCloud) -> None:
    from awan.instances.models import ObservedState
    from tests.instances.test_list import settle

    uuid = cloud.create()["data"]["uuid"]
    settle(uuid, ObservedState.RUNNING)
    with changed_settings(operation_wait_s="0.3"):
        refused = cloud.customer.http.get(f"/instances/{uuid}/screenshot")
    assert (refused.status_code, refused.json()["type"]) == (503, "UNAVAILABLE")
    assert int(refused.headers["retry-after"]) > 0
    # What waits in the operations' queue is no operation without its row.
    found = {finding.kind for finding in run_audit()}
    assert FindingKind.WORKFLOW_WITHOUT_OPERATION not in found
