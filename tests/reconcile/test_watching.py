"""Leases share nodes and locations out among workers; the watching itself, driven by events as in a worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from awan.kit.database import get_engine, transaction
from awan.operations import workers
from awan.reconcile.leases import release_leases, take_leases
from awan.reconcile.watching import run_watches
from awan.settings import get_settings
from tests.reconcile.conftest import scalar
from tests.support.changed_settings import changed_settings
from tests.support.guests import create_settled
from tests.support.in_process_worker import wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.watched_guests import find_guest

LEASE_S = 60.0


def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    """Returns when it holds. Raises: AssertionError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def take(name: str, lease_s: float = LEASE_S) -> set[str]:
    """A beat of a worker and what it then watches."""
    workers.beat(name)
    with transaction() as session:
        return take_leases(session, name, lease_s)


def run_out(name: str) -> None:
    """The worker has been silent for a lease."""
    with get_engine().begin() as connection:
        for statement in (
            "UPDATE watch_lease SET leased_until = now() - interval '1 s' WHERE executor_id = :name",
            "DELETE FROM worker WHERE executor_id = :name",
        ):
            connection.execute(text(statement), {"name": name})


def subjects(cloud: SimulatedCloud) -> set[str]:
    """All that is to be watched."""
    return {f"node:{uuid}" for uuid in cloud.node_ids} | {f"location:{cloud.location_id}"}


@pytest.mark.usefixtures("worker")
def test_everything_is_watched_by_exactly_one(cloud: SimulatedCloud) -> None:
    everything = subjects(cloud)
    assert take("a") == everything
    assert take("a") == everything, "renewed"
    assert take("b") == set(), "all is taken"
    # Of three things with two workers, two are a share: the first lets one go, the second takes it.
    first = take("a")
    second = take("b")
    assert (len(first), len(second)) == (2, 1)
    assert first | second == everything
    run_out("a")
    assert take("b") == everything
    assert take("a") == set(), "what another has taken is lost, however late it is noticed"
    with transaction() as session:
        release_leases(session, "b")
    run_out("b")
    assert take("a") == everything


@pytest.mark.usefixtures("worker")
def test_a_lease_that_ran_out_and_that_nobody_took_is_still_ours(cloud: SimulatedCloud) -> None:
    assert take("a", lease_s=0.001) == subjects(cloud)
    assert take("a") == subjects(cloud)


@pytest.mark.usefixtures("worker")
def test_many_workers_at_once_never_share_a_thing(cloud: SimulatedCloud) -> None:
    names = [f"w{number}" for number in range(6)]
    for name in names:
        workers.beat(name)
    for _ in range(5):
        held: dict[str, set[str]] = {}
        begin = threading.Barrier(len(names))

        def beat(
            name: str, held: dict[str, set[str]] = held, begin: threading.Barrier = begin
        ) -> None:
            begin.wait()
            held[name] = take(name)

        threads = [threading.Thread(target=beat, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = [subject for found in held.values() for subject in found]
        assert len(taken) == len(set(taken)), held
    assert set(taken) == subjects(cloud)


@pytest.mark.usefixtures("worker")
def test_a_removed_node_is_not_watched(cloud: SimulatedCloud) -> None:
    take("a")
    assert cloud.admin.delete(f"/admin/nodes/{cloud.node_ids[0]}").is_success
    assert take("a") == subjects(cloud) - {f"node:{cloud.node_ids[0]}"}


@contextmanager
def watching() -> Iterator[None]:
    """The service, as it runs in a worker."""
    stopping = threading.Event()
    thread = threading.Thread(target=run_watches, args=(stopping,))
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(15)
        assert not thread.is_alive()


@pytest.mark.usefixtures("worker")
def test_a_worker_reacts_to_events_and_lets_go_at_its_end(cloud: SimulatedCloud) -> None:
    guest = find_guest(cloud, create_settled(cloud))
    other = find_guest(cloud, create_settled(cloud))
    workers.beat(get_settings().worker_id)
    with changed_settings(node_check_interval_s="300"), watching():
        until(lambda: scalar("SELECT count(*) FROM node WHERE seen_at IS NOT NULL") == 2)
        guest.shut_down()
        # By its event: the timer would not come before five minutes.
        until(lambda: guest.show()["status"] == "Stopped", timeout_s=30)
        other.undefine()
        other.shut_down()
        until(lambda: other.count("instance.recover") == 1, timeout_s=30)
        wait_until_idle()
        assert other.show()["status"] == "Running"
    assert scalar("SELECT count(*) FROM watch_lease WHERE executor_id IS NOT NULL") == 0
    assert threading_names() == []


def threading_names() -> list[str]:
    """Watchers whose thread is still there; each ends with its round."""
    until(lambda: not _watchers())
    return _watchers()


def _watchers() -> list[str]:
    return [it.name for it in threading.enumerate() if it.name.startswith("watch-")]


def test_without_anything_to_watch_nothing_is_leased(session: Session) -> None:
    assert take_leases(session, "a", LEASE_S) == set()
