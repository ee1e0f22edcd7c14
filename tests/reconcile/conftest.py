"""Clouds to audit: a fresh one per test, and one that is built once and put back after each planted fault."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text

from awan.kit.database import get_engine
from awan.networks.names import push_stale_names
from awan.runtime.postgres import SUPERUSER
from awan.settings import Settings
from tests.support.database_server import ServerAddress, empty
from tests.support.in_process_worker import InProcessWorker
from tests.support.simulated_cloud import SimulatedCloud, make_cloud

READY_S = 20.0


@pytest.fixture
def cloud(worker: InProcessWorker) -> SimulatedCloud:
    """Location, tier, template, two nodes and a customer, over simulated engines."""
    return make_cloud()


def wait_until_booted(count: int) -> None:
    """Returns when so many first boots have been waited for to their end."""
    deadline = time.monotonic() + READY_S
    while (
        done := scalar(
            "SELECT count(*) FROM dbos.workflow_status"
            " WHERE name = 'instance.first_boot.v1' AND status = 'SUCCESS'"
        )
    ) < count:
        assert time.monotonic() < deadline, f"{done} of {count} guests are ready"
        time.sleep(0.05)


def scalar(query: str, **values: Any) -> Any:
    """The first column of the first row."""
    with get_engine().connect() as connection:
        return connection.execute(text(query), values).scalar()


@dataclass
class World:
    """A cloud at rest: one instance runs, one is stopped, one is deleted but its address was kept; no worker."""

    cloud: SimulatedCloud
    running: str
    stopped: str
    deleted: str
    ids: dict[str, str] = field(default_factory=dict)

    def plant(self, *statements: str) -> None:
        """Runs statements in one transaction; `:name` is one of `ids`, as a literal of whatever type fits."""
        with get_engine().begin() as connection:
            for statement in statements:
                literal = re.sub(r":(\w+)", self._literal, statement)
                connection.execute(text(literal.replace(":", "\\:")))

    def _literal(self, match: re.Match[str]) -> str:
        value = self.ids.get(match[1])
        return match[0] if value is None else f"'{value}'"


@pytest.fixture(scope="module")
def _world(
    _process_settings: Settings, database_server: ServerAddress
) -> Iterator[tuple[World, Callable[[], None]]]:
    empty(_process_settings.database_url)
    with InProcessWorker(_process_settings):
        world = _make_world()
    database = str(scalar("SELECT current_database()"))
    with psycopg.connect(database_server.url(database, SUPERUSER), autocommit=True) as connection:
        # As on a replica, triggers and foreign keys are silent: tables can be put back in any order.
        connection.execute("SET session_replication_role = replica")
        tables = _keep(connection)
        yield world, lambda: _put_back(connection, tables)
        connection.execute("DROP SCHEMA kept CASCADE")
    empty(_process_settings.database_url)


@pytest.fixture
def world(_world: tuple[World, Callable[[], None]]) -> Iterator[World]:
    """The shared world; whatever the test does to its rows is undone."""
    found, put_back = _world
    yield found
    put_back()


def _make_world() -> World:
    cloud = make_cloud()
    http = cloud.customer.http
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f me"
    added = http.post("/ssh-keys", json={"title": "laptop", "key": key})
    assert added.is_success, added.text
    uuids = [cloud.create_running(hostname=name)["uuid"] for name in ("runs", "stops", "goes")]
    wait_until_booted(len(uuids))
    push_stale_names()
    running, stopped, deleted = uuids
    cloud.wait(http.post(f"/instances/{stopped}/stop").json()["operation"]["uuid"])
    gone = http.request(
        "DELETE", f"/instances/{deleted}", json={"remove_ip": False, "remove_block_storage": False}
    )
    assert gone.is_success, gone.text
    cloud.wait(gone.json()["operation"]["uuid"])
    push_stale_names()
    world = World(cloud, running, stopped, deleted)
    world.ids = {
        "running": running,
        "stopped": stopped,
        "deleted": deleted,
        "location": str(cloud.location_id),
        "account": str(cloud.customer.account_id),
        **_ids_of(running),
        "pointer": "2.100.51.198.in-addr.arpa",
        "free": str(scalar("SELECT resource_id FROM address WHERE state = 'free'")),
        "other_node": str(
            scalar(
                "SELECT node_id FROM node WHERE node_id <> (SELECT node_id FROM instance"
                " WHERE instance_id = :id)",
                id=running,
            )
        ),
        "sha256": "ab" * 32,
        "new": "00000000-0000-4000-8000-000000000001",
    }
    return world


def _ids_of(instance_id: str) -> dict[str, str]:
    queries = {
        "node": "SELECT node_id FROM instance WHERE instance_id = :id",
        "create": "SELECT create_operation_id FROM instance WHERE instance_id = :id",
        "firewall": "SELECT firewall_id FROM firewall WHERE instance_id = :id",
        "nic": "SELECT nic_id FROM nic WHERE instance_id = :id",
        "volume": "SELECT volume_id FROM volume WHERE instance_id = :id",
        "address": "SELECT address_id FROM address JOIN nic USING (nic_id)"
        " WHERE instance_id = :id AND family = 4",
        "address6": "SELECT address_id FROM address JOIN nic USING (nic_id)"
        " WHERE instance_id = :id AND family = 6",
    }
    return {name: str(scalar(query, id=UUID(instance_id))) for name, query in queries.items()}


def _keep(connection: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    tables = connection.execute(
        "SELECT schemaname, tablename FROM pg_tables WHERE schemaname IN ('public', 'sim')"
        " OR (schemaname, tablename) = ('dbos', 'workflow_status')"
    ).fetchall()
    connection.execute("CREATE SCHEMA kept")
    for schema, table in tables:
        connection.execute(
            sql.SQL("CREATE TABLE kept.{} AS TABLE {}").format(
                sql.Identifier(f"{schema}.{table}"), sql.Identifier(schema, table)
            )
        )
    return tables


def _put_back(connection: psycopg.Connection[Any], tables: list[tuple[str, str]]) -> None:
    with connection.transaction():
        for schema, table in tables:
            there, kept = sql.Identifier(schema, table), sql.Identifier(f"{schema}.{table}")
            connection.execute(sql.SQL("DELETE FROM {}").format(there))
            connection.execute(
                sql.SQL("INSERT INTO {} OVERRIDING SYSTEM VALUE SELECT * FROM kept.{}").format(
                    there, kept
                )
            )
