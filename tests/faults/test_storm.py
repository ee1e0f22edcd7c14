"""Parts of the location die, freeze or are cut off under mixed changes of several customers.

No change is lost or done twice, the API says 503 and never 500, and soon after the repair all is as it should be.
With `--full` every fault is tried, with 105 changes in all; else two of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import httpx
import pytest

from tests.support import lab_inspection, sampling
from tests.support.fault_report import FaultRow
from tests.support.lab_cloud import LabCloud, until
from tests.support.lab_faults import cut_off, kill_processes
from tests.support.storm import Storm

pytestmark = [pytest.mark.lab, pytest.mark.faults, pytest.mark.timeout(900)]

CONVERGED_S = 60.0
CUSTOMERS = 3
CHANGES = {True: 15, False: 6}


@dataclass(frozen=True)
class Fault:
    """`break_it` breaks something, and mends it after the outage, at the end of its block. Outages in seconds."""

    name: str
    break_it: Callable[[LabCloud, float], AbstractContextManager[None]]
    outage_s: float
    sampled_outage_s: float = 3.0


@contextmanager
def killed(cloud: LabCloud, suffix: str, outage_s: float) -> Iterator[None]:
    """Processes of the lab are killed, and started again after the outage."""
    kill_processes(cloud, suffix)
    yield
    time.sleep(outage_s)
    cloud.heal()


@contextmanager
def no_postgres(cloud: LabCloud, _: float) -> Iterator[None]:
    """kill -9; the supervisor starts it again."""
    pid = cloud.plane.statuses()["postgres"].pid
    os.kill(pid, signal.SIGKILL)
    yield
    until(lambda: cloud.plane.health() == "ok", 60, "the control plane is not healthy")


@contextmanager
def frozen_guest(cloud: LabCloud, outage_s: float, *, ends: bool) -> Iterator[None]:
    """SIGSTOP of a guest's QEMU, which then goes on, or is killed."""
    running = (
        "SELECT instance_id::text FROM instance"
        " WHERE observed_state = 'running' AND desired_state = 'running'"
    )

    def find() -> int | None:
        for (uuid,) in cloud.query(running):
            for pid, argv in lab_inspection.command_lines():
                if b"-uuid" in argv and uuid.encode() in argv:
                    return pid
        return None

    pid = until(find, 60, "no guest runs")
    os.kill(pid, signal.SIGSTOP)
    yield
    time.sleep(outage_s)
    # A change may have cut its power meanwhile.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL if ends else signal.SIGCONT)


@contextmanager
def node_cut_off(cloud: LabCloud, outage_s: float) -> Iterator[None]:
    """The second node, which is spoken to with certificates, is not reached."""
    with cut_off(cloud, cloud.info.nodes[-1].name):
        yield
        time.sleep(outage_s)


FAULTS = (
    Fault("kill -9 postgres", no_postgres, 0),
    Fault("kill -9 libvirtd, both nodes", lambda it, s: killed(it, ".libvirtd", s), 5),
    Fault("kill -9 OVN northbound", lambda it, s: killed(it, "central.nb", s), 5),
    Fault("kill -9 OVN southbound", lambda it, s: killed(it, "central.sb", s), 5),
    Fault("SIGSTOP of a QEMU, SIGCONT", lambda it, s: frozen_guest(it, s, ends=False), 20),
    Fault("SIGSTOP of a QEMU, kill -9", lambda it, s: frozen_guest(it, s, ends=True), 20),
    Fault("management of a node cut", node_cut_off, 60, 5),
)
# What a sample takes.
SAMPLED = ("kill -9 postgres", "management of a node cut")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All faults in full, else the sampled ones."""
    if "fault" in metafunc.fixturenames:
        chosen = [it for it in FAULTS if sampling.is_full() or it.name in SAMPLED]
        metafunc.parametrize("fault", chosen, ids=lambda it: it.name)


@pytest.fixture(scope="session")
def customers(lab_cloud_session: LabCloud) -> dict[str, httpx.Client]:
    """Their clients, by name."""
    names = [f"Storm {number}" for number in range(1, CUSTOMERS + 1)]
    return {name: lab_cloud_session.customer(name) for name in names}


def test_mixed_changes_survive_it(
    cloud: LabCloud,
    customers: dict[str, httpx.Client],
    moments: random.Random,
    note: Callable[[FaultRow], None],
    fault: Fault,
) -> None:
    storm = Storm(cloud, customers, moments)
    before = operations_of(cloud)
    changes = CHANGES[sampling.is_full()]
    outage_s = fault.outage_s if sampling.is_full() else fault.sampled_outage_s
    with storm.going_on(changes):
        # In the middle of it: some have ended, some have been begun, some are still to come.
        storm.wait_for(changes // 3)
        time.sleep(moments.uniform(0, 1))
        with fault.break_it(cloud, outage_s):
            pass
        mended = time.monotonic()
        in_flight = unfinished(cloud)
        until(
            lambda: not in_flight & unfinished(cloud), CONVERGED_S, "what was begun has not ended"
        )
        settled_s = time.monotonic() - mended
    until(lambda: not unfinished(cloud), CONVERGED_S, "something still goes on")
    until(lambda: health(cloud) == {"reachable"}, CONVERGED_S, "a node is not reachable")
    cloud.assert_green(settle_s=CONVERGED_S)
    ends = [it.status for it in storm.accepted]
    note(
        FaultRow(
            f"{changes} mixed",
            fault.name,
            f"{outage_s:.0f} s long",
            "-",
            "-",
            "-",
            f"{settled_s:.1f}",
            f"{ends.count('succeeded')} ok, {len(ends) - ends.count('succeeded')} failed,"
            f" {storm.statuses[503]} x 503",
        )
    )
    storm.assert_each_once(before)
    assert_as_their_ends_say(cloud, storm)


def operations_of(cloud: LabCloud) -> set[str]:
    """All operations that there are."""
    return {uuid for (uuid,) in cloud.query("SELECT operation_id::text FROM operation")}


def unfinished(cloud: LabCloud) -> set[str]:
    """Those that have not ended, whoever began them."""
    query = "SELECT operation_id::text FROM operation WHERE status IN ('queued', 'running')"
    return {uuid for (uuid,) in cloud.query(query)}


def health(cloud: LabCloud) -> set[str]:
    """How the nodes are, in one word each."""
    return {node["health"] for node in cloud.admin.get("/admin/nodes").json()["data"]}


def assert_as_their_ends_say(cloud: LabCloud, storm: Storm) -> None:
    """Each guest is what its last change left, and the nodes have one domain for each and no other."""
    query = (
        "SELECT instance_id::text, initcap(observed_state) FROM instance WHERE deleted_at IS NULL"
    )
    shown = {str(uuid): str(status) for uuid, status in cloud.query(query)}
    wanted = storm.guests()
    assert shown.keys() == wanted.keys()
    wrong = {uuid: (shown[uuid], wanted[uuid]) for uuid in wanted if shown[uuid] != wanted[uuid]}
    # A guest that was killed twice within minutes stays off; nothing else may differ.
    assert all(
        pair == ("Stopped", "Running") and was_killed(cloud, uuid) for uuid, pair in wrong.items()
    ), wrong
    held = [uuid for _, uuid in lab_inspection.read_holdings(cloud.lab).domains]
    assert sorted(held) == sorted(uuid for uuid, status in shown.items() if status != "Error")


def was_killed(cloud: LabCloud, uuid: str) -> bool:
    """Whether its QEMU has died by itself."""
    query = "SELECT 1 FROM event WHERE resource_id = %s AND kind = 'instance.crashed'"
    return bool(cloud.query(query, uuid))
