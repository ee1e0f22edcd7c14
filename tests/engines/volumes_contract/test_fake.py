"""Faults and latency of the fakes, seen through the volumes fake."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from awan.engines.hypervisor import NodeEndpoint
from awan.engines.sim import Call, SimStore, WorkerDied
from awan.engines.volumes.fake import FakeVolumes
from awan.errors import EngineRejected, EngineUnavailable

NODE = NodeEndpoint(uuid4(), "fake-1", "fake://")


@pytest.fixture
def store(database_server: Any) -> Iterator[SimStore]:
    opened = SimStore(database_server.create(f"sim_{uuid4().hex[:8]}"))
    yield opened
    opened.close()


@pytest.fixture
def volumes(store: SimStore) -> FakeVolumes:
    fake = FakeVolumes(store, location="one")
    fake.ensure_pool(NODE)
    store.faults.clear()
    return fake


def test_calls_are_recorded(store: SimStore, volumes: FakeVolumes) -> None:
    volume_id = uuid4()
    volumes.create_blank(NODE, volume_id, 1)
    volumes.find(NODE, volume_id)
    name = f"vol-{volume_id}.qcow2"
    assert store.faults.calls == [
        Call("volumes", "create_blank", name),
        Call("volumes", "find", name),
    ]


@pytest.mark.parametrize("error", [EngineRejected, EngineUnavailable])
def test_a_planned_failure_has_no_effect_and_happens_once(
    store: SimStore, volumes: FakeVolumes, error: type[EngineRejected]
) -> None:
    volume_id = uuid4()
    store.faults.fail_at(2, error)
    assert volumes.find(NODE, volume_id) is None
    with pytest.raises(error):
        volumes.create_blank(NODE, volume_id, 1)
    assert volumes.find(NODE, volume_id) is None
    volumes.create_blank(NODE, volume_id, 1)


@pytest.mark.parametrize(("when", "exists"), [("before", False), ("after", True)])
def test_a_death_keeps_what_was_done_and_stops_everything_else(
    store: SimStore, volumes: FakeVolumes, when: Any, exists: bool
) -> None:
    volume_id = uuid4()
    store.faults.die_at(1, when)
    with pytest.raises(WorkerDied):
        volumes.create_blank(NODE, volume_id, 1)
    with pytest.raises(WorkerDied):
        volumes.delete(NODE, volume_id)
    store.faults.clear()
    assert (volumes.find(NODE, volume_id) is not None) == exists


def test_locations_do_not_see_each_other(store: SimStore, volumes: FakeVolumes) -> None:
    other = FakeVolumes(store, location="two")
    other.ensure_pool(NODE)
    volumes.create_blank(NODE, uuid4(), 1)
    other.create_blank(NODE, uuid4(), 1)
    store.wipe("one")
    assert len(other.list_volumes(NODE)) == 1
    with pytest.raises(EngineRejected):
        volumes.list_volumes(NODE)


def test_latency_of_the_most_specific_setting_counts(store: SimStore, volumes: FakeVolumes) -> None:
    store.set_latency(30.0)
    store.set_latency(0.0, engine="volumes")
    store.set_latency(0.2, engine="volumes", verb="find")
    started_at = time.monotonic()
    volumes.create_blank(NODE, uuid4(), 1)
    volumes.find(NODE, uuid4())
    assert 0.2 <= time.monotonic() - started_at < 20
