"""Guests of the simulated cloud: until they are ready, what was set in them, how they behave."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

from awan.engines.registry import sim_store
from awan.instances.first_boot import mark_guest_ready, scrub_seed
from awan.instances.models import Instance
from awan.instances.situation import SCRUBBED_GENERATION
from awan.kit.database import transaction
from awan.kit.ids import derived_id
from tests.support.in_process_worker import workflow_state
from tests.support.simulated_cloud import SimulatedCloud


def instance_row(uuid: str) -> Instance:
    """The instance as the database has it."""
    with transaction() as session:
        return session.get_one(Instance, UUID(uuid))


def create_ready(cloud: SimulatedCloud, **order: Any) -> str:
    """An instance whose first boot is over. Needs a worker that carries out waits too."""
    uuid = str(cloud.create_running(**order)["uuid"])
    wait_until_booted(uuid)
    return uuid


def create_settled(cloud: SimulatedCloud, **order: Any) -> str:
    """An instance that nothing happens to by itself any more: its first boot lasts no time, and is over.

    Audits and watches leave out what changes while they look, so tests of theirs need one at rest.
    """
    answer = cloud.admin.put(
        f"/admin/locations/{cloud.location_id}/engines/hypervisor",
        json={"driver": "fake", "options": {"boot_s": 0}},
    )
    assert answer.status_code == 200, answer.text
    uuid = create_ready(cloud, **order)
    waiting = derived_id(instance_row(uuid).create_operation_id, "first_boot")
    deadline = time.monotonic() + 20
    while workflow_state(waiting) != "SUCCESS":
        assert time.monotonic() < deadline, "the wait for the first boot does not end"
        time.sleep(0.02)
    return uuid


def wait_until_booted(uuid: str) -> None:
    """Returns when the first boot is over and its seed scrubbed."""
    deadline = time.monotonic() + 20
    while instance_row(uuid).seed_generation != SCRUBBED_GENERATION:
        assert time.monotonic() < deadline, "the guest is not ready"
        time.sleep(0.05)


def finish_first_boot(uuid: str) -> None:
    """What the wait for the first boot does at its end, where no worker carries out waits."""
    mark_guest_ready(uuid, "agent")
    scrub_seed(uuid)


def guest(uuid: str) -> dict[str, Any]:
    """What was set inside the guest."""
    return sim_store().find_one("SELECT * FROM sim.guest WHERE uuid = %s", [UUID(uuid)]) or {}


def set_sign(uuid: str, sign: str) -> None:
    """What sign the guest gives from now on: agent, traffic or none."""
    sim_store().execute("UPDATE sim.domain SET sign = %s WHERE uuid = %s", [sign, UUID(uuid)])


def seeds(uuid: str) -> list[str]:
    """The names of the instance's seeds on its node."""
    rows = sim_store().fetch_all(
        "SELECT name FROM sim.volume WHERE starts_with(name, %s) ORDER BY name", [f"seed-{uuid}-"]
    )
    return [str(row["name"]) for row in rows]


def cd(uuid: str) -> str:
    """The name of the image in the guest's CD drive."""
    row = sim_store().find_one("SELECT config FROM sim.domain WHERE uuid = %s", [UUID(uuid)])
    assert row is not None
    (path,) = [disk["path"] for disk in row["config"]["disks"] if disk["device"] == "cdrom"]
    return str(path).rpartition("/")[2]
