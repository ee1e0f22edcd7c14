"""Repair and recovery: never an empty disk, never a seed that is scrubbed, nothing of engines for customers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, update

from awan.engines.registry import sim_store
from awan.errors import Conflict
from awan.events import Event
from awan.instances.models import Instance
from awan.instances.recover import check_disk, put_back_definition, put_back_seed
from awan.kit.database import transaction
from awan.operations import Target
from awan.operations.plans import registered_plans
from awan.reconcile.locations import check_location
from awan.settings import Settings
from tests.support.guests import cd, create_ready, finish_first_boot, instance_row, seeds
from tests.support.held_call import held
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.watched_guests import find_guest

ABSENT = "DELETE FROM sim.volume WHERE name LIKE 'vol-%%'"
TORN = "UPDATE sim.volume SET allocation_bytes = 0 WHERE name LIKE 'vol-%%'"


@pytest.fixture
def worker_without_waits(settings: Settings) -> Iterator[InProcessWorker]:
    """A worker that leaves it to the test to end a first boot."""
    with InProcessWorker(settings, queues=["operations"]) as running:
        yield running


def target_of(uuid: str) -> Target:
    """What a step is given."""
    return Target(uuid4(), UUID(uuid))


def disks() -> list[dict[str, object]]:
    """The files of disks on all nodes."""
    return sim_store().fetch_all("SELECT * FROM sim.volume WHERE name LIKE 'vol-%%'")


@pytest.mark.parametrize("harm", [ABSENT, TORN])
def test_a_disk_that_is_damaged_stays_as_it_is(
    cloud: SimulatedCloud, worker: InProcessWorker, harm: str
) -> None:
    target = target_of(create_ready(cloud))
    guest = find_guest(cloud, str(target.subject_id))
    guest.hypervisor.ensure_absent(guest.node, guest.id)
    check_disk(target)
    sim_store().execute(harm)
    before = disks()
    with pytest.raises(Conflict, match="disk of the instance is missing"):
        check_disk(target)
    # Also when that happens after the disk was looked at.
    with pytest.raises(Conflict, match="disk of the instance is missing"):
        put_back_definition(target)
    assert disks() == before
    assert guest.power() is None


@pytest.mark.parametrize("step", [put_back_seed, put_back_definition])
def test_a_seed_that_was_scrubbed_meanwhile_does_not_come_back(
    cloud: SimulatedCloud, worker_without_waits: InProcessWorker, step: Callable[[Target], None]
) -> None:
    uuid = str(cloud.create_running()["uuid"])
    guest = find_guest(cloud, uuid)
    if step is put_back_definition:
        guest.undefine()
    target = target_of(uuid)
    with held("ensure_seed") as call:
        late = threading.Thread(target=step, args=(target,))
        late.start()
        assert call.entered.wait(20)
        finish_first_boot(uuid)
        assert not call.left.is_set()
    late.join(20)
    assert not late.is_alive()
    assert seeds(uuid) == [f"seed-{uuid}-2.iso"]
    assert cd(uuid) == f"seed-{uuid}-2.iso"


def test_every_change_clears_up_after_a_step_that_was_overtaken() -> None:
    """A deletion needs none: what its steps do late has been done already."""
    without = {
        plan.kind
        for plan in registered_plans()
        if plan.kind.startswith("instance.") and plan.overtaken is None
    }
    assert without == {"instance.delete"}


def test_the_customer_is_told_a_reason_and_the_operator_what_was_found(
    cloud: SimulatedCloud, worker: InProcessWorker
) -> None:
    uuid = create_ready(cloud)
    guest = find_guest(cloud, uuid)
    other = str(uuid4())
    sim_store().execute(
        "UPDATE sim.fabric_port SET instance_id = %s, address_line = address_line || ' 198.51.100.66'",
        [UUID(other)],
    )
    check_location(cloud.location_id)
    wait_until_idle()
    sim_store().execute("DELETE FROM sim.volume WHERE starts_with(name, 'seed-')")
    check_location(cloud.location_id)
    wait_until_idle()
    guest.undefine()
    guest.watch().look()
    wait_until_idle()
    guest.hypervisor.lose_power(guest.node)
    guest.watch().look()
    wait_until_idle()
    guest.shut_down()
    guest.watch().look()
    with transaction() as session:
        events = session.scalars(
            select(Event).where(Event.resource_id == UUID(uuid)).order_by(Event.event_id)
        ).all()
    told = [
        (event.kind, event.data)
        for event in events
        if event.account_id is not None and "reason" in event.data
    ]
    assert told == [
        ("instance.repair", {"reason": "network"}),
        ("instance.repair", {"reason": "seed"}),
        ("instance.repair", {"reason": "no_definition"}),
        ("instance.lost_power", {"reason": "power_lost"}),
        ("instance.recover", {"reason": "power_lost"}),
        ("instance.powered_off", {"reason": "shut_down"}),
    ]
    found = [event.data for event in events if event.kind == "instance.found"]
    assert [event["reason"] for event in found] == [
        "network",
        "seed",
        "no_definition",
        "power_lost",
        "shut_down",
    ]
    assert other in found[0]["found"] or "198.51.100.66" in found[0]["found"]
    assert all(event.account_id is None for event in events if event.kind == "instance.found")


def test_a_guest_that_was_started_by_hand_has_its_new_name(
    cloud: SimulatedCloud, worker: InProcessWorker
) -> None:
    uuid = create_ready(cloud)
    guest = find_guest(cloud, uuid)
    guest.shut_down()
    guest.watch().look()
    with transaction() as session:
        session.execute(
            update(Instance)
            .where(Instance.instance_id == guest.id)
            .values(hostname_is_pending=True)
        )
    guest.hypervisor.ensure_running(guest.node, guest.id)
    guest.watch().look()
    assert guest.count("instance.powered_on") == 1
    assert not instance_row(uuid).hostname_is_pending
