"""A simulated instance whose counters and clock stand where a test wants them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from awan.catalogue import engines
from awan.engines.hypervisor import NodeEndpoint
from awan.engines.hypervisor.fake import FakeHypervisor
from awan.fleet import Node, endpoint
from awan.instances.models import Instance
from awan.kit.clock import now
from awan.kit.database import get_engine, transaction
from awan.metrics import collector, history
from awan.metrics.rules import floor
from awan.settings import Settings
from tests.support.in_process_worker import InProcessWorker
from tests.support.simulated_cloud import Customer, SimulatedCloud

FIELDS = (
    "cpu", "maxcpu", "mem", "maxmem", "disk", "maxdisk", "netin", "netout", "diskread", "diskwrite",
)  # fmt: skip
NULLS = dict.fromkeys(FIELDS)


@dataclass
class Meter:
    """One instance, measured. Moments are seconds after `began_at`, a full minute some minutes ago."""

    cloud: SimulatedCloud
    uuid: UUID
    node: NodeEndpoint
    fake: FakeHypervisor
    began_at: datetime

    def read(self, after_s: float, **counters: int) -> None:
        """The collector reads the node at that moment; the instance's counters stand at these values."""
        if counters:
            self.fake.set_counters(self.node, self.uuid, **counters)
        self.fake.set_clock(self.node, self.began_at + timedelta(seconds=after_s))
        assert collect_all() >= 1

    def chart(self, periode: str = "hour", **query: str) -> dict[int, dict[str, Any]]:
        """The points of the instance by seconds after `began_at`, times taken out."""
        answer = self.cloud.customer.http.get(
            f"/instances/{self.uuid}/rrd", params={"periode": periode, **query}
        )
        assert answer.status_code == 200, answer.text
        began = int(self.began_at.timestamp())
        return {point.pop("time") - began: point for point in answer.json()["data"]["points"]}


def collect_all() -> int:
    """A round on every node, whenever the last one was; how many stored something."""
    with transaction() as session:
        session.execute(text("UPDATE metric_node SET due_at = now()"))
    return sum(collector.collect(claim) for claim in collector.claim_due())


def drop_partitions() -> None:
    """The tables of all points are gone, as before the first worker."""
    with get_engine().begin() as connection:
        names = connection.scalars(
            text(
                "SELECT inhrelid::regclass::text FROM pg_inherits"
                " WHERE inhparent IN (to_regclass('metric_point'), to_regclass('metric_card_point'))"
            )
        ).all()
        for name in names:
            connection.execute(text(f"DROP TABLE {name}"))


@pytest.fixture
def partitions(settings: Settings) -> Iterator[None]:
    """Room for points of the last minutes and of now."""
    history.make_partitions(now() - timedelta(hours=1))
    history.make_partitions()
    yield
    drop_partitions()


@pytest.fixture
def meter(cloud: SimulatedCloud, worker: InProcessWorker, partitions: None) -> Meter:
    """A running instance with 1 vCPU, 1 GiB of memory and 20 GiB of storage."""
    return make_meter(cloud)


def make_meter(cloud: SimulatedCloud, customer: Customer | None = None, **order: Any) -> Meter:
    uuid = UUID(cloud.create_running(customer, **order)["uuid"])
    with transaction() as session:
        instance = session.get_one(Instance, uuid)
        node = session.get_one(Node, instance.node_id)
        hypervisor = engines(session, instance.location_id).hypervisor
        assert isinstance(hypervisor, FakeHypervisor)
        return Meter(
            cloud, uuid, endpoint(node), hypervisor, floor(now() - timedelta(minutes=30), 60)
        )
