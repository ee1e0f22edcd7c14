"""A cloud with simulated engines whose API is on a real socket, and a running instance in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import func, select

from awan.api import create_app
from awan.console.models import LIVE, Console
from awan.engines.registry import sim_store
from awan.kit.database import transaction
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.live_api import LiveApi
from tests.support.simulated_cloud import Customer, SimulatedCloud


@dataclass
class ConsoleRig:
    """A running instance of `owner`, and the API on a socket."""

    cloud: SimulatedCloud
    live: LiveApi
    owner: Customer
    uuid: str

    def client(self, customer: Customer | None = None) -> httpx.Client:
        """A client of a customer over the socket; the owner's unless told otherwise."""
        key = (customer or self.owner).http.headers["x-apikey"]
        return httpx.Client(
            base_url=self.live.url, headers={"x-apikey": key}, trust_env=False, timeout=20
        )

    def password_on_node(self) -> str | None:
        """What opens the simulated screen now; None when it is locked."""
        row = sim_store().find_one(
            "SELECT password FROM sim.console WHERE uuid = %s AND valid_until > clock_timestamp()",
            [UUID(self.uuid)],
        )
        return row["password"] if row is not None else None

    def live_consoles(self) -> int:
        """How many consoles the API holds, or is about to."""
        with transaction() as session:
            held = select(func.count()).select_from(Console).where(Console.state.in_(LIVE))
            return session.scalar(held) or 0

    def operation(self, kind: str) -> dict[str, Any]:
        """The newest operation of a kind."""
        found = self.cloud.admin.get("/operations", params={"kind": kind}).json()["data"]["data"]
        return dict(found[0])


@pytest.fixture(scope="module")
def live_api() -> Iterator[LiveApi]:
    """The API on a socket; it reads its settings at each call."""
    with LiveApi(create_app()) as live:
        yield live


@pytest.fixture
def rig(cloud: SimulatedCloud, worker: InProcessWorker, live_api: LiveApi) -> Iterator[ConsoleRig]:
    """A running instance and everything that is needed to see its screen."""
    uuid = cloud.create_running()["uuid"]
    made = ConsoleRig(cloud, live_api, cloud.customer, uuid)
    yield made
    # The server is the module's: nothing of this test is to reach into the next one.
    deadline = time.monotonic() + 20
    while made.live_consoles():
        assert time.monotonic() < deadline, "a console has not ended"
        time.sleep(0.02)
    wait_until_idle()


@pytest.fixture
def http(rig: ConsoleRig) -> Iterator[httpx.Client]:
    """The owner's client."""
    with rig.client() as client:
        yield client
