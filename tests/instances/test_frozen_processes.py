"""Two worker processes: one is frozen in a call of an engine past its lease, the other takes over, the first wakes.

What the late call does must not be seen, or must be cleared up: one effect, one end, whatever the operation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from httpx import Response
from sqlalchemy import select, text

from awan.console import service as consoles
from awan.console.rules import read_ticket
from awan.engines.registry import sim_store
from awan.events import Event
from awan.kit.database import get_engine, transaction
from awan.operations import Operation
from tests.support import fault_report, sampling
from tests.support.changed_settings import changed_settings
from tests.support.fault_report import FaultRow
from tests.support.guests import create_ready, wait_until_booted
from tests.support.holdings import assert_counts
from tests.support.real_processes import WorkerProcesses
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.watched_guests import find_guest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

LEASE_S = 1.5
# Longer than it takes to freeze who is in the call; whoever takes over reads that calls are quick again.
HELD_S = 3.0
# Latencies are read again after this time.
LATENCY_TTL_S = 1.1
REMOVE = {"remove_ip": True, "remove_block_storage": False}
PASSWORD = {"password": "Brave-Donkey-8", "password_confirmation": "Brave-Donkey-8"}
SAMPLED = 2

TABLES = ("domain", "guest", "fabric_port", "volume", "console")


@dataclass(frozen=True)
class Change:
    """An operation on an instance, and the call of an engine, in one of its steps, in which its worker is frozen.

    `begin` gets the cloud and the instance that `prepare` made. `count` is how many instances there are afterwards.
    """

    name: str
    step: str
    engine: str
    verb: str
    begin: Callable[[SimulatedCloud, str], UUID]
    prepare: Callable[[SimulatedCloud], str] = create_ready
    count: int = 1
    # Whether a repair follows on the late call: the instance lives, and the operation was one of its own.
    is_repaired: bool = True
    # What the customer does after the other worker has ended it and before the first one wakes.
    then: Callable[[SimulatedCloud, UUID], None] = lambda cloud, operation: None


def nothing(cloud: SimulatedCloud) -> str:
    """No instance yet."""
    return ""


def stopped(cloud: SimulatedCloud) -> str:
    """An instance that is off."""
    uuid = create_ready(cloud)
    operation = post("stop")(cloud, uuid)
    assert cloud.wait(str(operation))["status"] == "succeeded"
    return uuid


def create(cloud: SimulatedCloud, _: str) -> UUID:
    """A creation."""
    return UUID(cloud.create()["operation"]["uuid"])


def begun(answer: Response) -> UUID:
    """The operation of an accepted change."""
    assert answer.status_code in (200, 202), answer.text
    return UUID(answer.json()["operation"]["uuid"])


def post(verb: str) -> Callable[[SimulatedCloud, str], UUID]:
    """A change of power."""
    return lambda cloud, uuid: begun(cloud.customer.http.post(f"/instances/{uuid}/{verb}"))


def put(field: str, body: dict[str, Any]) -> Callable[[SimulatedCloud, str], UUID]:
    """A change in the guest; its end is not waited for."""

    def begin(cloud: SimulatedCloud, uuid: str) -> UUID:
        with changed_settings(operation_wait_s="0"):
            return begun(cloud.customer.http.put(f"/instances/{uuid}/{field}", json=body))

    return begin


def delete(cloud: SimulatedCloud, uuid: str) -> UUID:
    """A deletion."""
    return begun(cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=REMOVE))


def wait_until_ready(cloud: SimulatedCloud, creation: UUID) -> None:
    """The first boot of what a creation has made is over."""
    with transaction() as session:
        uuid = str(session.get_one(Operation, creation).resource_id)
    wait_until_booted(uuid)


def delete_what_was_made(cloud: SimulatedCloud, creation: UUID) -> None:
    """The instance of a creation is deleted."""
    with transaction() as session:
        uuid = str(session.get_one(Operation, creation).resource_id)
    assert cloud.wait(str(delete(cloud, uuid)))["status"] == "succeeded"


def crash(cloud: SimulatedCloud, uuid: str) -> UUID:
    """The guest's QEMU dies; whoever watches the node begins the recovery."""
    find_guest(cloud, uuid).crash()
    deadline = time.monotonic() + 30
    while True:
        with transaction() as session:
            found = session.scalar(
                select(Operation.operation_id).where(Operation.kind == "instance.recover")
            )
        if found is not None:
            return found
        assert time.monotonic() < deadline, "nobody has seen the crash"
        time.sleep(0.05)


def open_console(cloud: SimulatedCloud, uuid: str) -> UUID:
    """A ticket is used; no relay follows."""
    answer = cloud.customer.http.post(f"/instances/{uuid}/vnc")
    assert answer.status_code == 200, answer.text
    with transaction() as session:
        consoles.use_ticket(session, read_ticket(answer.json()["data"]["token"]), "test")
    with transaction() as session:
        newest = select(Operation.operation_id).order_by(Operation.created_at.desc()).limit(1)
        return session.scalars(newest).one()


CHANGES = (
    Change(
        "create", "domain", "hypervisor", "ensure_defined", create, nothing, then=wait_until_ready
    ),
    Change(
        "create, then deleted",
        "domain",
        "hypervisor",
        "ensure_defined",
        create,
        nothing,
        count=0,
        is_repaired=False,
        then=delete_what_was_made,
    ),
    Change("delete", "volume", "volumes", "delete", delete, count=0, is_repaired=False),
    Change("start", "power", "hypervisor", "ensure_running", post("start"), stopped),
    Change("stop", "power", "hypervisor", "ensure_stopped", post("stop")),
    Change("restart", "power_on", "hypervisor", "ensure_running", post("restart")),
    Change("set password", "guest", "hypervisor", "set_password", put("password", PASSWORD)),
    Change(
        "rename", "guest", "hypervisor", "set_hostname", put("hostname", {"hostname": "renamed"})
    ),
    Change("recover", "power", "hypervisor", "ensure_running", crash),
    Change(
        "open console",
        "unlock",
        "hypervisor",
        "unlock_console",
        open_console,
        is_repaired=False,
    ),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All changes with `--full`, else some at random."""
    if "change" in metafunc.fixturenames:
        chosen = sampling.sample(CHANGES, SAMPLED)
        metafunc.parametrize("change", chosen, ids=lambda change: change.name)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[FaultRow], None]:
    """Adds a line to the table at the end of the run."""
    return fault_report.reporter(request)


@pytest.fixture
def workers(cloud: SimulatedCloud, tmp_path: Path) -> Iterator[WorkerProcesses]:
    """Two of them, over the rows of the cloud."""
    with WorkerProcesses(
        tmp_path,
        2,
        AWAN_WORKER_LEASE_S=str(LEASE_S),
        AWAN_NODE_CHECK_INTERVAL_S="0.5",
    ) as running:
        yield running


def test_whoever_wakes_late_does_no_harm(
    cloud: SimulatedCloud,
    workers: WorkerProcesses,
    note: Callable[[FaultRow], None],
    change: Change,
) -> None:
    uuid = change.prepare(cloud)
    sim_store().set_latency(HELD_S, engine=change.engine, verb=change.verb)
    time.sleep(LATENCY_TTL_S)
    operation = change.begin(cloud, uuid)
    owner = wait_for_call(operation, change.step)
    workers.freeze(owner)
    frozen = time.monotonic()
    try:
        sim_store().execute("DELETE FROM sim.setting")
        ended = cloud.wait(str(operation), timeout_s=60)
        ended_s = time.monotonic() - frozen
        assert ended["status"] == "succeeded", ended
        change.then(cloud, operation)
        before, row = state(), row_of(operation)
        assert row["execution"] == 2
    finally:
        workers.wake(owner)
    until(lambda: "step was overtaken" in workers.log(owner), "the late call has not come")
    if change.is_repaired:
        until(is_repaired, "nothing puts right what the late call did")
    until(lambda: owner in workers.alive(), "the frozen worker does not wake")
    until(lambda: state() == before, "what the late call did stays")
    assert row_of(operation) == row
    assert ends_of(operation) == ["operation.succeeded"]
    assert_counts(cloud, change.count)
    note(
        FaultRow(
            change.name,
            "SIGSTOP of its worker, then SIGCONT",
            "-",
            change.step,
            "-",
            "-",
            f"{ended_s:.1f}",
            "one effect",
        )
    )


def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Returns once it holds. Raises: AssertionError `what`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def wait_for_call(operation: UUID, step: str) -> str:
    """The worker that is in the held call of this step."""
    query = text(
        "SELECT executor_id FROM dbos.workflow_status JOIN operation ON workflow_uuid = operation_id::text"
        " WHERE operation_id = :id AND step = :step AND operation.status = 'running'"
    )
    found: list[str] = []

    def is_there() -> bool:
        with get_engine().connect() as connection:
            found[:] = connection.scalars(query, {"id": operation, "step": step})
        return bool(found)

    until(is_there, f"the operation does not come to the step {step}")
    # From the begin of the step to the call in it.
    time.sleep(0.5)
    return found[0]


def state() -> dict[str, list[tuple[Any, ...]]]:
    """All that the simulated engines hold, beside the moments at which things began."""
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for table in TABLES:
        with get_engine().connect() as connection:
            found = connection.execute(
                text(f"SELECT to_jsonb(one) - 'started_at' - 'valid_until' FROM sim.{table} AS one")
            )
            rows[table] = sorted((str(row[0]),) for row in found)
    return rows


def is_repaired() -> bool:
    """Whether a repair has ended well."""
    with transaction() as session:
        ended = select(Operation.status).where(Operation.kind == "instance.repair")
        return list(session.scalars(ended)) == ["succeeded"]


def row_of(operation: UUID) -> dict[str, Any]:
    """The operation as the database has it."""
    with get_engine().connect() as connection:
        query = text("SELECT * FROM operation WHERE operation_id = :id")
        return dict(connection.execute(query, {"id": operation}).mappings().one())


def ends_of(operation: UUID) -> list[str]:
    """The events of its end."""
    with transaction() as session:
        kinds = select(Event.kind).where(
            Event.operation_id == operation,
            Event.kind.in_([f"operation.{end}" for end in ("succeeded", "failed", "cancelled")]),
        )
        return list(session.scalars(kinds))
