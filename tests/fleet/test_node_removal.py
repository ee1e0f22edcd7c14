"""A node that leaves takes the copies of template images with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select

from awan.catalogue import engines, image_source
from awan.catalogue.models import TemplateImage
from awan.engines.registry import sim_store
from awan.fleet import Node, NodeImage, endpoint
from awan.fleet.service import start_removal
from awan.fleet.workflows import REMOVE
from awan.kit.database import transaction
from awan.operations import begin, wait_for_end
from awan.reconcile.audit import run_audit
from awan.settings import Settings
from awan.volumes import note_image
from tests.support import proofs
from tests.support.builders import Requester
from tests.support.in_process_worker import wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud

OPERATOR = Requester(uuid4(), is_operator=True, actor="operator")


@dataclass
class World:
    """A cloud, and the node under proof."""

    cloud: SimulatedCloud
    node_id: UUID


def make_world(cloud: SimulatedCloud) -> World:
    """A further node, on which two images lie."""
    name = f"n-{uuid4().hex[:8]}"
    body = {
        "location_id": cloud.location_id,
        "name": name,
        "libvirt_uri": f"fake://{name}/",
        "tier_ids": [cloud.tier_id],
    }
    added = cloud.admin.post("/admin/nodes", json=body)
    assert added.status_code == 201, added.text
    node_id = UUID(added.json()["data"]["uuid"])
    for _ in range(2):
        image = cloud.add_image(cloud.template_id, sha256=uuid4().hex * 2)
        with transaction() as session:
            node = session.get_one(Node, node_id)
            volumes = engines(session, cloud.location_id).volumes
            source = image_source(session.get_one(TemplateImage, image))
            volumes.ensure_image(endpoint(node), source)
            note_image(session, node_id, image)
    assert held(node_id) == (2, 2)
    return World(cloud, node_id)


def held(node_id: UUID) -> tuple[int, int]:
    """How many images the node has, by the engine and by our rows."""
    files = sim_store().fetch_all(
        "SELECT name FROM sim.volume WHERE node_id = %s AND name LIKE 'image-%%'", [node_id]
    )
    with transaction() as session:
        noted = session.scalar(select(func.count()).where(NodeImage.node_id == node_id))
    return len(files), noted or 0


def state_of(node_id: UUID) -> str:
    """The node's state."""
    with transaction() as session:
        return session.get_one(Node, node_id).state


def start(world: World) -> UUID:
    """Begins the removal without waiting for its end."""
    with transaction() as session:
        start_removal(session, OPERATOR, world.node_id)  # type: ignore[arg-type]
        return begin(
            session,
            caller=OPERATOR,
            plan=REMOVE,
            resource=None,
            resource_kind="node",
            subject_id=world.node_id,
        ).operation_id


def assert_gone(world: World) -> None:
    """The node is removed, and nothing lies on it."""
    assert state_of(world.node_id) == "removed"
    assert held(world.node_id) == (0, 0)


def assert_removed_at_the_second_attempt(world: World) -> None:
    """The node stays, cordoned; rows and engine agree; asked again, it goes."""
    assert state_of(world.node_id) == "cordoned"
    files, rows = held(world.node_id)
    assert files == rows
    assert wait_for_end(start(world), 20).status == "succeeded"
    assert_gone(world)


@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_outage_at_each_call,
        proofs.survives_death_at_each_call,
    ],
)
def test_proofs(settings: Settings, cloud: SimulatedCloud, proof: Callable[..., None]) -> None:
    proof(
        proofs.Case(
            settings=settings,
            faults=sim_store().faults,
            prepare=lambda: make_world(cloud),
            begin=start,
            succeeded=assert_gone,
            undone=assert_removed_at_the_second_attempt,
        )
    )
    assert run_audit() == []


def test_a_node_that_is_being_removed_takes_nothing(cloud: SimulatedCloud) -> None:
    """No worker runs: the removal is accepted and waits."""
    first, second = cloud.node_ids
    start(World(cloud, UUID(first)))
    for verb in ("cordon", "uncordon"):
        assert cloud.admin.post(f"/admin/nodes/{first}/{verb}").status_code == 409
    assert cloud.admin.delete(f"/admin/nodes/{first}").status_code == 409
    assert cloud.admin.post(f"/admin/nodes/{second}/cordon").is_success
    assert cloud.customer.http.post("/instances", json=cloud.order()).status_code == 503


@pytest.mark.usefixtures("worker")
def test_a_lost_node_is_forgotten_without_being_asked(cloud: SimulatedCloud) -> None:
    world = make_world(cloud)
    sim_store().execute(
        "INSERT INTO sim.hypervisor_node SELECT location, node_id, false FROM sim.pool"
        " WHERE node_id = %s",
        [world.node_id],
    )
    before = len(sim_store().faults.calls)
    answer = cloud.admin.delete(f"/admin/nodes/{world.node_id}", params={"lost": "true"})
    assert answer.status_code == 200, answer.text
    assert "operation" not in answer.json()
    assert answer.json()["data"]["state"] == "removed"
    assert len(sim_store().faults.calls) == before
    assert held(world.node_id) == (2, 0)
    wait_until_idle()
    assert run_audit() == []
