"""Parts of the location die or freeze in the middle of work: it is finished or unwound, and nothing is done twice."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import httpx
import pytest

from lab.processes import start_ticks
from tests.faults.conftest import Durations
from tests.support import lab_inspection
from tests.support.fault_report import FaultRow
from tests.support.lab_cloud import FINAL, STOP_GRACE_S, LabCloud, until
from tests.support.lab_faults import kill_processes

pytestmark = [pytest.mark.lab, pytest.mark.faults, pytest.mark.timeout(900)]

OUTAGE_S = 3.0
CONVERGED_S = 120.0
Note = Callable[[FaultRow], None]


def row(
    operation: str, fault: str, moment_s: float, step: str | None, ended_s: float, end: str
) -> FaultRow:
    """A line of the table for a fault that does not restart the worker."""
    return FaultRow(
        operation,
        fault,
        f"{moment_s * 1000:.0f} ms",
        step or "queued",
        "-",
        "-",
        f"{ended_s:.1f}",
        end,
    )


def assert_one_or_none(cloud: LabCloud, uuid: str, status: str) -> None:
    """A creation that succeeded has made exactly one of everything, one that failed has left nothing."""
    holdings = lab_inspection.read_holdings(cloud.lab)
    if status != "succeeded":
        assert not holdings, holdings
        shown = cloud.show(uuid)
        assert shown["status"] == "Error"
        assert shown["status_reason"]
        return
    assert [found for _, found in holdings.domains] == [uuid]
    assert len(holdings.ports) == 1
    assert sorted(name.partition("-")[0] for _, name in holdings.files) == ["seed", "vol"]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        pytest.param("libvirtd", ".libvirtd", marks=pytest.mark.fault("libvirtd")),
        pytest.param("northbound", "central.nb", marks=pytest.mark.fault("northbound")),
        pytest.param("southbound", "central.sb", marks=pytest.mark.fault("southbound")),
        pytest.param("controller", ".ovn-controller", marks=pytest.mark.fault("controller")),
    ],
)
def test_engine_dies_during_create(
    cloud: LabCloud,
    durations: Durations,
    moments: random.Random,
    note: Note,
    name: str,
    suffix: str,
) -> None:
    began = time.monotonic()
    answer = cloud.create()
    uuid, operation = answer["data"]["uuid"], answer["operation"]["uuid"]
    time.sleep(moments.uniform(0, durations.create_s))
    kill_processes(cloud, suffix)
    killed = time.monotonic()
    at_kill = cloud.operation(operation)
    assert at_kill is not None
    time.sleep(OUTAGE_S)
    cloud.heal()
    ended = cloud.wait(operation, timeout_s=CONVERGED_S)
    note(
        row(
            "create",
            f"kill -9 {name}",
            killed - began,
            at_kill["step"],
            time.monotonic() - killed,
            ended["status"],
        )
    )
    assert ended["status"] in ("succeeded", "failed")
    assert_one_or_none(cloud, uuid, ended["status"])
    cloud.assert_green()
    assert cloud.delete_instance(uuid)["status"] == "succeeded"


@pytest.mark.fault("postgres")
def test_database_dies_during_create(
    cloud: LabCloud, durations: Durations, moments: random.Random, note: Note, outage_number: int
) -> None:
    """The API answers 503, never 500; a call that is repeated with its key is carried out once."""
    began = time.monotonic()
    answer = cloud.create()
    uuid, operation = answer["data"]["uuid"], answer["operation"]["uuid"]
    time.sleep(moments.uniform(0, durations.create_s))
    at_kill = cloud.operation(operation)
    with heard(cloud) as statuses:
        postgres = cloud.plane.statuses()["postgres"].pid
        os.kill(postgres, signal.SIGKILL)
        killed = time.monotonic()
        second = create_insistently(cloud)
        ended = cloud.wait(operation, timeout_s=CONVERGED_S)
        ended_s = time.monotonic() - killed
        assert cloud.wait(second["operation"]["uuid"])["status"] == "succeeded"
    step = at_kill["step"] if at_kill is not None else None
    note(row("create", "kill -9 postgres", killed - began, step, ended_s, ended["status"]))
    assert cloud.plane.statuses()["postgres"].pid not in (0, postgres)
    assert set(statuses) <= {200, 503}, statuses
    assert statuses[503] > 0, "the outage was too short to be seen"
    assert ended["status"] == "succeeded"
    assert sorted(found for _, found in lab_inspection.read_holdings(cloud.lab).domains) == sorted(
        [uuid, second["data"]["uuid"]]
    )
    cloud.assert_green()


@contextmanager
def heard(cloud: LabCloud) -> Iterator[Counter[int]]:
    """Counts the statuses with which the API answers reads inside the block."""
    statuses: Counter[int] = Counter()
    ended = threading.Event()

    def listen() -> None:
        # A client of its own: connections are not shared between threads here.
        with httpx.Client(
            base_url=cloud.client.base_url,
            headers=cloud.client.headers,
            timeout=60,
            trust_env=False,
        ) as client:
            while not ended.is_set():
                statuses[client.get("/instances").status_code] += 1

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        yield statuses
    finally:
        ended.set()
        listener.join()


def create_insistently(cloud: LabCloud) -> dict[str, dict[str, str]]:
    """A creation that is asked for with one Idempotency-Key until it is accepted."""
    order, headers = cloud.order(), {"Idempotency-Key": str(uuid4())}
    deadline = time.monotonic() + CONVERGED_S
    while True:
        answer = cloud.client.post("/instances", json=order, headers=headers)
        if answer.status_code == 202:
            break
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) > 0
        assert time.monotonic() < deadline
        time.sleep(0.1)
    again = cloud.client.post("/instances", json=order, headers=headers)
    assert again.status_code == 202
    assert again.json()["data"]["uuid"] == answer.json()["data"]["uuid"]
    return dict(answer.json())


@pytest.mark.fault("frozen_qemu")
def test_a_frozen_guest_does_not_stall_the_others(cloud: LabCloud, note: Note) -> None:
    _, *others = cloud.admin.get("/admin/nodes").json()["data"]
    for other in others:
        assert cloud.admin.post(f"/admin/nodes/{other['uuid']}/cordon").is_success
    try:
        frozen, free = cloud.create_instance()["uuid"], cloud.create_instance()["uuid"]
    finally:
        for other in others:
            assert cloud.admin.post(f"/admin/nodes/{other['uuid']}/uncordon").is_success
    assert lab_inspection.node_of(cloud.lab, frozen) == lab_inspection.node_of(cloud.lab, free)
    pid = lab_inspection.qemu_pid(frozen)
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        stop = cloud.client.post(f"/instances/{frozen}/stop", json={}).json()["operation"]["uuid"]
        time.sleep(1.0)
        for verb, body in (("stop", {"force": True}), ("start", {})):
            cloud.change(free, verb, **body)
        free_s = time.monotonic() - began
        shown = cloud.operation(stop)
        assert shown is not None
        assert shown["status"] not in FINAL, "the frozen guest was not busy meanwhile"
        assert free_s < STOP_GRACE_S
    finally:
        # Left frozen on purpose: the power is cut at the end of the grace all the same.
        ended = cloud.wait(stop, timeout_s=STOP_GRACE_S + 90)
        if start_ticks(pid):
            os.kill(pid, signal.SIGCONT)
    note(
        row("stop", "SIGSTOP of its QEMU", 0.0, "power", time.monotonic() - began, ended["status"])
    )
    assert ended["status"] == "succeeded"
    assert cloud.show(frozen)["status"] == "Stopped"
    cloud.assert_green()


@pytest.mark.fault("frozen_worker")
def test_a_frozen_worker_is_taken_over_and_does_no_harm_when_it_wakes(
    cloud: LabCloud, durations: Durations, moments: random.Random, note: Note
) -> None:
    with cloud.second_worker():
        until(lambda: "worker-2" in alive_workers(cloud), 60, "the second worker does not beat")
        # Either of the two may have taken it from the queue; the one that has is frozen.
        began = time.monotonic()
        answer = cloud.create()
        uuid, operation = answer["data"]["uuid"], answer["operation"]["uuid"]
        time.sleep(moments.uniform(0.1, 0.6) * durations.create_s)
        owner, pid = owner_of(cloud, operation)
        os.kill(pid, signal.SIGSTOP)
        frozen = time.monotonic()
        try:
            at_freeze = cloud.operation(operation)
            ended = cloud.wait(operation, timeout_s=CONVERGED_S)
            ended_s = time.monotonic() - frozen
        finally:
            os.kill(pid, signal.SIGCONT)
        assert at_freeze is not None
        note(
            row(
                "create",
                f"SIGSTOP {owner}",
                frozen - began,
                at_freeze["step"],
                ended_s,
                ended["status"],
            )
        )
        assert ended["status"] == "succeeded"
        until(lambda: owner in alive_workers(cloud), 60, "the frozen worker does not wake")
        time.sleep(3.0)
        after = cloud.operation(operation)
        assert after is not None
        assert (after["status"], after["finished_at"]) == ("succeeded", ended["finished_at"])
        assert_one_or_none(cloud, uuid, "succeeded")
        cloud.assert_green()
        assert cloud.delete_instance(uuid)["status"] == "succeeded"


@pytest.mark.fault("frozen_transaction")
def test_a_worker_that_freezes_in_a_transaction_does_not_keep_its_locks(
    cloud: LabCloud, note: Note
) -> None:
    """It holds the locks of the end when it is frozen in it; who takes over needs the same rows."""
    with cloud.second_worker():
        until(lambda: "worker-2" in alive_workers(cloud), 60, "the second worker does not beat")
        began = time.monotonic()
        answer = cloud.create()
        uuid, operation = answer["data"]["uuid"], answer["operation"]["uuid"]
        with cloud.connect() as ours:
            ours.execute("SELECT FROM instance WHERE instance_id = %s FOR UPDATE", [uuid])
            ((session,),) = until(
                lambda: cloud.query(WAITING, ours.info.backend_pid),
                30,
                "it does not come to its end",
            )
            owner, pid = owner_of(cloud, operation)
            os.kill(pid, signal.SIGSTOP)
            ours.rollback()
        frozen = time.monotonic()
        try:
            until(lambda: cloud.query(IDLE, session), 10, "the frozen worker holds no lock")
            at_freeze = cloud.operation(operation)
            ended = cloud.wait(operation, timeout_s=CONVERGED_S)
            ended_s = time.monotonic() - frozen
        finally:
            os.kill(pid, signal.SIGCONT)
        step = at_freeze["step"] if at_freeze is not None else None
        fault = f"SIGSTOP {owner} in a transaction"
        note(row("create", fault, frozen - began, step, ended_s, ended["status"]))
        assert ended["status"] == "succeeded", ended
        until(lambda: owner in alive_workers(cloud), 60, "the frozen worker does not wake")
        time.sleep(3.0)
        assert_one_or_none(cloud, uuid, "succeeded")
        cloud.assert_green()


# The session that waits for a lock of this one, and the same once it has it and says no more.
WAITING = "SELECT pid FROM pg_locks WHERE NOT granted AND %s = ANY (pg_blocking_pids(pid))"
IDLE = "SELECT FROM pg_stat_activity WHERE pid = %s AND state = 'idle in transaction'"


def alive_workers(cloud: LabCloud) -> list[str]:
    """Workers whose heart has beaten in the last two seconds."""
    seen = "SELECT executor_id FROM worker WHERE seen_at > now() - interval '2 s'"
    return [name for (name,) in cloud.query(seen)]


def owner_of(cloud: LabCloud, operation: str) -> tuple[str, int]:
    """Name and pid of the worker that carries an operation out."""
    (found,) = cloud.query(
        "SELECT executor_id, pid FROM dbos.workflow_status JOIN worker USING (executor_id)"
        " WHERE workflow_uuid = %s",
        operation,
    )
    return str(found[0]), int(found[1])
