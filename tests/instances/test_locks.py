"""Locks are taken in one order everywhere (resource, instance, quota, node, address), so that none wait in a circle.

Each case lets one change run into a row that is held, and looks whether it holds what comes later in the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, text

from awan.instances.first_boot import _note_scrubbed, mark_guest_ready
from awan.kit.database import get_engine, transaction
from awan.resources import Resource, lock
from tests.support.in_process_worker import InProcessWorker
from tests.support.lock_waits import wait_for_waiters
from tests.support.simulated_cloud import SimulatedCloud

ORDER = ["resource", "instance", "quota", "node", "address"]
REMOVE = {"remove_ip": True, "remove_block_storage": False}


@contextmanager
def held(table: str) -> Iterator[Connection]:
    """All rows of the table are locked by somebody else meanwhile."""
    with get_engine().connect() as connection:
        connection.execute(text(f"SELECT 1 FROM {table} FOR UPDATE"))
        yield connection
        connection.rollback()


def assert_free(table: str) -> None:
    """No row of the table is locked."""
    with get_engine().connect() as connection:
        connection.execute(text(f"SELECT 1 FROM {table} FOR UPDATE NOWAIT"))
        connection.rollback()


def check(table: str, change: Callable[[], Any]) -> Any:
    """While the change waits for a row of the table, it holds none of a table that comes later."""
    with ThreadPoolExecutor(1) as pool:
        with held(table) as holder:
            running: Future[Any] = pool.submit(change)
            wait_for_waiters(holder)
            for later in ORDER[ORDER.index(table) + 1 :]:
                assert_free(later)
        return running.result(timeout=20)


@pytest.fixture
def address(cloud: SimulatedCloud) -> str:
    """A free address of the customer."""
    body = {"location_id": cloud.location_id}
    return str(cloud.customer.http.post("/networks/public", json=body).json()["data"]["uuid"])


@pytest.mark.parametrize("table", ["quota", "node"])
@pytest.mark.parametrize("brings_address", [True, False])
def test_create(cloud: SimulatedCloud, address: str, table: str, brings_address: bool) -> None:
    body = cloud.order(public_network=address if brings_address else None)
    answer = check(table, lambda: cloud.customer.http.post("/instances", json=body))
    assert answer.status_code == 202, answer.text


def test_release_of_an_address(cloud: SimulatedCloud, address: str) -> None:
    path = f"/networks/public/{address}"
    assert check("quota", lambda: cloud.customer.http.delete(path)).status_code == 200


@pytest.mark.parametrize("table", ["quota", "node"])
def test_end_of_a_deletion(cloud: SimulatedCloud, worker: InProcessWorker, table: str) -> None:
    uuid = cloud.create_running()["uuid"]
    worker.stop()
    answer = cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=REMOVE)
    operation = answer.json()["operation"]["uuid"]

    def carry_out() -> Any:
        worker.start()
        return None

    check(table, carry_out)
    assert cloud.wait(operation)["status"] == "succeeded"


def test_a_guest_that_becomes_ready(cloud: SimulatedCloud) -> None:
    uuid = cloud.create()["data"]["uuid"]
    check("resource", lambda: mark_guest_ready(uuid, "agent"))
    assert cloud.customer.http.get(f"/instances/{uuid}").json()["data"]["ready_at"]


def test_a_deletion_is_accepted(cloud: SimulatedCloud) -> None:
    uuid = cloud.create()["data"]["uuid"]
    path = f"/instances/{uuid}"
    answer = check("resource", lambda: cloud.customer.http.request("DELETE", path, json=REMOVE))
    assert answer.status_code == 202


def test_end_of_user_data(cloud: SimulatedCloud) -> None:
    """It locks the instance alone: a change that holds the resource, and waits for the instance, is not waited for."""
    uuid = UUID(cloud.create(user_data="#!/bin/sh\ntrue")["data"]["uuid"])
    with transaction() as session:
        session.get_one(Resource, uuid).active_operation_id = None
    with held("resource"), ThreadPoolExecutor(1) as pool:
        scrubbed = pool.submit(_note_scrubbed, uuid, has_password=False)
        scrubbed.result(timeout=20)
    with get_engine().connect() as connection:
        assert connection.scalar(text("SELECT user_data_secret_id FROM instance")) is None


def test_rows_that_refer_to_a_locked_resource_can_be_written(cloud: SimulatedCloud) -> None:
    """PostgreSQL checks them FOR KEY SHARE, in whatever order: that must not wait for who holds the resource."""
    uuid = UUID(cloud.create()["data"]["uuid"])
    one = text("SELECT 1 FROM resource WHERE resource_id = :uuid FOR KEY SHARE NOWAIT")
    with transaction() as session, get_engine().connect() as other:
        lock(session, uuid)
        assert other.scalar(one, {"uuid": uuid}) == 1


def test_an_attached_address_is_refused_without_its_quota(cloud: SimulatedCloud) -> None:
    """Who ends the instance holds the quota and goes on to the address's resource, which the refused call holds."""
    created = cloud.create()["data"]
    listed = cloud.customer.http.get("/networks/public").json()["data"]["data"]
    with held("quota"), ThreadPoolExecutor(1) as pool:
        path = f"/networks/public/{listed[0]['uuid']}"
        refused = pool.submit(cloud.customer.http.delete, path).result(timeout=20)
    assert refused.status_code == 409, (created, refused.text)
