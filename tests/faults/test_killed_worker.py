"""kill -9 of the worker at a random moment of create and of delete: once done is done once."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.faults.conftest import Durations
from tests.support import lab_inspection
from tests.support.fault_report import FaultRow
from tests.support.lab_cloud import FINAL, LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.faults, pytest.mark.timeout(900)]

RESUMED_MAX_S = 10.0
TRIES_MAX = 6
ENDED = "ended"
WORKFLOW = """
SELECT status, recovery_attempts, updated_at FROM dbos.workflow_status WHERE workflow_uuid = %s
"""


@dataclass(frozen=True)
class Recovery:
    """What happened after a kill. Times in seconds since the kill; resumed None: it had ended before."""

    moment_s: float
    step: str
    restarted_s: float
    resumed_s: float | None
    ended_s: float
    status: str


def kill_and_follow(cloud: LabCloud, operation: str, moment_s: float, began: float) -> Recovery:
    """Kills the worker `moment_s` after the request was accepted and watches the operation to its end.

    Resumed is the moment at which a worker has taken the workflow up again.
    """
    worker = cloud.worker_pid()
    time.sleep(max(0.0, began + moment_s - time.monotonic()))
    assert cloud.kill_worker() == worker
    killed = time.monotonic()
    moment_s = killed - began
    at_kill = cloud.operation(operation)
    assert at_kill is not None
    restarted_s = until(
        lambda: (
            time.monotonic() - killed
            if cloud.plane.statuses()["worker"].pid not in (0, worker)
            else None
        ),
        30,
        "the supervisor did not start the worker",
    )
    before = workflow_of(cloud, operation)
    found = Recovery(moment_s, at_kill["step"] or "queued", restarted_s, None, 0.0, "")
    if at_kill["status"] in FINAL:
        return replace(found, step=ENDED, status=at_kill["status"])
    resumed_s = None
    while True:
        now_s = time.monotonic() - killed
        shown = cloud.operation(operation)
        has_ended = shown is not None and shown["status"] in FINAL
        if resumed_s is None:
            seen = workflow_of(cloud, operation)
            if has_ended or (seen != before and seen[0] == "PENDING"):
                resumed_s = now_s
        if has_ended:
            assert shown is not None
            return replace(found, resumed_s=resumed_s, ended_s=now_s, status=shown["status"])
        assert now_s < 120, f"operation {operation} has not ended: {shown}"
        time.sleep(0.02)


def workflow_of(cloud: LabCloud, operation: str) -> tuple[Any, ...]:
    """Status, attempts and last change of a workflow."""
    return cloud.query(WORKFLOW, operation)[0]


def patience_s() -> float:
    """The bound for an idle machine; longer on one that has more to do than processors."""
    return RESUMED_MAX_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def assert_resumed_in_time(it: Recovery) -> None:
    """The work went on soon after the worker was started again."""
    assert it.resumed_s is None or it.resumed_s <= it.restarted_s + patience_s()


def show(operation: str, it: Recovery) -> FaultRow:
    """The recovery as a line of the table."""
    return FaultRow(
        operation=operation,
        fault="kill -9 worker",
        moment=f"{it.moment_s * 1000:.0f} ms",
        step=it.step,
        restarted=f"{it.restarted_s:.1f}",
        resumed="-" if it.resumed_s is None else f"{it.resumed_s:.1f}",
        ended=f"{it.ended_s:.1f}",
        outcome=it.status,
    )


def assert_exactly_one(cloud: LabCloud, uuid: str) -> None:
    """One domain on one node, one port, one address of each family, one disk, one seed."""
    holdings = lab_inspection.read_holdings(cloud.lab)
    assert [found for _, found in holdings.domains] == [uuid]
    assert len(holdings.ports) == 1
    kinds = sorted(name.partition("-")[0] for _, name in holdings.files)
    assert kinds == ["seed", "vol"], holdings.files
    addresses = cloud.query(
        "SELECT family FROM address JOIN nic USING (nic_id) WHERE instance_id = %s ORDER BY 1", uuid
    )
    assert addresses == [(4,), (6,)]
    assert [pid for pid, argv in lab_inspection.command_lines() if uuid.encode() in argv] == [
        lab_inspection.qemu_pid(uuid)
    ]


def kill_in_the_middle(
    cloud: LabCloud, begin: Callable[[], tuple[str, str]], moments: random.Random, longest_s: float
) -> tuple[str, Recovery]:
    """Begins work (instance, operation) and kills the worker in it; begun anew when it ended before the kill."""
    for _ in range(TRIES_MAX):
        uuid, operation = begin()
        began = time.monotonic()
        it = kill_and_follow(cloud, operation, moments.uniform(0, longest_s), began)
        if it.step != ENDED:
            return uuid, it
        longest_s *= 0.7
    raise AssertionError(f"the work always ended before the kill, at last within {longest_s} s")


def test_create_and_delete_survive_it(
    cloud: LabCloud,
    durations: Durations,
    moments: random.Random,
    note: Callable[[FaultRow], None],
    kill_number: int,
) -> None:
    def begin_create() -> tuple[str, str]:
        cloud.delete_all()
        answer = cloud.create()
        return answer["data"]["uuid"], answer["operation"]["uuid"]

    uuid, it = kill_in_the_middle(cloud, begin_create, moments, durations.create_s)
    note(show("create", it))
    assert it.status == "succeeded"
    assert_exactly_one(cloud, uuid)
    cloud.assert_green()
    assert_resumed_in_time(it)

    def begin_delete() -> tuple[str, str]:
        present = cloud.client.get("/instances").json()["data"]["data"]
        uuid = present[0]["uuid"] if present else cloud.create_instance()["uuid"]
        return uuid, cloud.delete(uuid)

    uuid, it = kill_in_the_middle(cloud, begin_delete, moments, durations.delete_s)
    note(show("delete", it))
    assert it.status == "succeeded"
    assert cloud.is_gone(uuid)
    cloud.assert_nothing_left()
    cloud.assert_green()
    assert_resumed_in_time(it)
