"""Removing images and templates: nothing of them is left, on the control plane or on a node; never under a disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import func, select, text

from awan.catalogue import engines, image_source
from awan.catalogue.models import Template, TemplateImage
from awan.catalogue.service import stored_path
from awan.engines.registry import sim_store
from awan.errors import EngineRejected
from awan.fleet import Node, NodeImage, endpoint
from awan.kit.database import get_engine, transaction
from awan.operations import wait_for_end
from awan.reconcile.audit import run_audit
from awan.reconcile.findings import FindingKind
from awan.settings import Settings
from awan.volumes import note_image
from awan.volumes.image_removal import begin_image_removal, begin_template_removal
from tests.support import proofs
from tests.support.builders import Requester
from tests.support.images import make_qcow2
from tests.support.in_process_worker import wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud

REMOVE = {"remove_ip": True, "remove_block_storage": False}
OPERATOR = Requester(uuid4(), is_operator=True, actor="operator")


def add_stored_image(cloud: SimulatedCloud, template_id: int | None = None) -> UUID:
    """A ready image with a content of its own: its file, and a copy on each node."""
    sha256 = uuid4().hex * 2
    image = cloud.add_image(template_id or cloud.template_id, sha256=sha256)
    stored_path(sha256).parent.mkdir(parents=True, exist_ok=True)
    stored_path(sha256).write_bytes(b"x")
    for node_id in cloud.node_ids:
        with transaction() as session:
            node = session.get_one(Node, UUID(node_id))
            volumes = engines(session, cloud.location_id).volumes
            source = image_source(session.get_one(TemplateImage, image))
            volumes.ensure_image(endpoint(node), source)
            note_image(session, node.node_id, image)
    return image


def sha256_of(image: UUID) -> str:
    """The image's content."""
    with transaction() as session:
        return str(session.get_one(TemplateImage, image).sha256)


def copies(image: UUID) -> tuple[int, int, bool]:
    """How many nodes have the image's content, by the engine and by our rows, and whether its file is kept."""
    sha256 = sha256_of(image)
    on_nodes = sim_store().fetch_all(
        "SELECT name FROM sim.volume WHERE name = %s", [f"image-{sha256}.qcow2"]
    )
    with transaction() as session:
        noted = session.scalar(
            select(func.count())
            .select_from(NodeImage)
            .join(TemplateImage, TemplateImage.image_id == NodeImage.image_id)
            .where(TemplateImage.sha256 == sha256)
        )
    return len(on_nodes), noted or 0, stored_path(sha256).exists()


def state_of(image: UUID) -> str:
    """The image's state."""
    with transaction() as session:
        return session.get_one(TemplateImage, image).state


def remove(cloud: SimulatedCloud, what: str) -> httpx.Response:
    """Asks for a removal and waits for it."""
    answer = cloud.admin.delete(f"/admin/{what}")
    wait_until_idle()
    return answer


def delete_instance(cloud: SimulatedCloud, uuid: str) -> None:
    """Deletes an instance and waits for it."""
    answer = cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=REMOVE)
    assert answer.is_success, answer.text
    wait_until_idle()


@pytest.mark.usefixtures("worker")
def test_an_image_goes_with_its_file_and_its_copies(cloud: SimulatedCloud) -> None:
    image = add_stored_image(cloud)
    assert copies(image) == (2, 2, True)
    answer = remove(cloud, f"images/{image}")
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"]["state"] == "removed"
    assert answer.json()["operation"]["status"] == "succeeded"
    assert copies(image) == (0, 0, False)
    (template,) = cloud.admin.get("/admin/templates").json()["data"]
    assert str(image) not in [row["uuid"] for row in template["images"]]
    assert remove(cloud, f"images/{image}").status_code == 404
    assert run_audit() == []
    assert cloud.create_running()["status"] == "Running"  # of the image that is left


@pytest.mark.usefixtures("worker")
def test_an_image_stays_until_the_last_instance_is_gone(cloud: SimulatedCloud) -> None:
    image = add_stored_image(cloud)
    uuids = [cloud.create_running()["uuid"] for _ in range(2)]
    for uuid in uuids:
        refused = remove(cloud, f"images/{image}")
        assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
        assert state_of(image) == "ready"
        delete_instance(cloud, uuid)
    assert remove(cloud, f"images/{image}").status_code == 200
    assert copies(image) == (0, 0, False)
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
def test_a_failed_creation_still_needs_its_image(cloud: SimulatedCloud) -> None:
    """Its deletion asks for the image, so an image must not go before it."""
    image = add_stored_image(cloud)
    sim_store().faults.clear()
    sim_store().faults.fail_at(2, EngineRejected)
    created = cloud.create()
    try:
        assert cloud.wait(created["operation"]["uuid"])["status"] == "failed"
    finally:
        sim_store().faults.clear()
    assert remove(cloud, f"images/{image}").status_code == 409
    delete_instance(cloud, created["data"]["uuid"])
    assert remove(cloud, f"images/{image}").status_code == 200


@pytest.mark.usefixtures("worker")
def test_a_template_goes_with_all_its_images(cloud: SimulatedCloud) -> None:
    body = {"name": "Old", "version": "1"}
    template = cloud.admin.post("/admin/templates", json=body).json()["data"]["id"]
    images = [add_stored_image(cloud, template) for _ in range(2)]
    uuid = cloud.create_running(template_id=template)["uuid"]
    refused = remove(cloud, f"templates/{template}")
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    delete_instance(cloud, uuid)
    answer = remove(cloud, f"templates/{template}")
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"]["is_enabled"] is False
    assert [copies(image) for image in images] == [(0, 0, False)] * 2
    assert [row["id"] for row in cloud.admin.get("/admin/templates").json()["data"]] == [
        cloud.template_id
    ]
    path = f"/admin/templates/{template}"
    assert cloud.admin.patch(path, json={"is_enabled": True}).status_code == 404
    assert cloud.admin.post(f"{path}/images", content=b"x").status_code == 404
    assert remove(cloud, f"templates/{template}").status_code == 404
    order = cloud.customer.http.post("/instances", json=cloud.order(template_id=template))
    assert set(order.json()["errors"]) == {"template_id"}
    # Its name is free again.
    assert cloud.admin.post("/admin/templates", json=body).status_code == 201
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
def test_a_twin_keeps_file_and_copies(cloud: SimulatedCloud) -> None:
    """Two images of the same content share them; they go with the second one."""
    first = add_stored_image(cloud)
    second = cloud.add_image(cloud.template_id, sha256=sha256_of(first))
    assert remove(cloud, f"images/{first}").status_code == 200
    assert copies(second) == (2, 2, True)
    assert run_audit() == []
    assert remove(cloud, f"images/{second}").status_code == 200
    assert copies(second) == (0, 0, False)
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
def test_the_same_content_is_not_imported_while_it_is_being_removed(
    cloud: SimulatedCloud, tmp_path: Path
) -> None:
    content = make_qcow2(tmp_path / "a.qcow2")

    def upload() -> dict[str, Any]:
        answer = cloud.admin.post(
            f"/admin/templates/{cloud.template_id}/images",
            content=content,
            headers={"content-type": "application/octet-stream"},
        )
        assert answer.status_code == 202, answer.text
        cloud.wait(answer.json()["operation"]["uuid"])
        (template,) = cloud.admin.get("/admin/templates").json()["data"]
        return dict(template["images"][0])

    image = upload()
    with get_engine().begin() as connection:
        connection.execute(
            text("UPDATE template_image SET state = 'removing' WHERE image_id = :id"),
            {"id": image["uuid"]},
        )
    refused = upload()
    assert (refused["state"], "being removed" in refused["refusal"]) == ("refused", True)
    assert remove(cloud, f"images/{image['uuid']}").status_code == 200
    again = upload()
    assert (again["state"], again["sha256"]) == ("ready", image["sha256"])
    assert copies(UUID(again["uuid"])) == (0, 0, True)
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
def test_a_removal_that_failed_is_found_and_can_be_asked_for_again(cloud: SimulatedCloud) -> None:
    image = add_stored_image(cloud)
    name = f"image-{sha256_of(image)}.qcow2"
    sim_store().execute(
        "INSERT INTO sim.volume (location, node_id, name, capacity_bytes, allocation_bytes, backing)"
        " SELECT location, node_id, 'vol-00000000-0000-4000-8000-000000000001.qcow2', 1, 1, name"
        " FROM sim.volume WHERE name = %s",
        [name],
    )
    refused = remove(cloud, f"images/{image}")
    assert refused.status_code == 409, refused.text
    assert "based on it" in refused.json()["message"]
    assert state_of(image) == "removing"
    found = {finding.kind: finding for finding in run_audit()}
    assert set(found) == {FindingKind.IMAGE_STUCK, FindingKind.FILE_STRAY}
    assert "based on it" in found[FindingKind.IMAGE_STUCK].sentence
    sim_store().execute("DELETE FROM sim.volume WHERE backing = %s", [name])
    assert remove(cloud, f"images/{image}").status_code == 200
    assert copies(image) == (0, 0, False)
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
def test_what_is_left_over_is_found(cloud: SimulatedCloud) -> None:
    image = add_stored_image(cloud)
    sha256 = sha256_of(image)
    kept = sim_store().fetch_all(
        "SELECT * FROM sim.volume WHERE name = %s", [f"image-{sha256}.qcow2"]
    )
    assert remove(cloud, f"images/{image}").status_code == 200
    columns = ("location", "node_id", "name", "capacity_bytes", "allocation_bytes")
    sim_store().execute(
        "INSERT INTO sim.volume (location, node_id, name, capacity_bytes, allocation_bytes)"
        " VALUES (%s, %s, %s, %s, %s)",
        [kept[0][column] for column in columns],
    )
    stored_path(sha256).write_bytes(b"x")
    assert {(finding.kind, finding.subject) for finding in run_audit()} == {
        (FindingKind.FILE_STRAY, f"image-{sha256}.qcow2"),
        (FindingKind.IMAGE_STRAY, sha256),
    }


def wait_for_waiter() -> None:
    """Returns when some transaction of this test's database waits for another one."""
    query = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND cardinality(pg_blocking_pids(pid)) > 0"
    )
    deadline = time.monotonic() + 20
    with get_engine().connect() as connection:
        while not connection.scalar(query):
            assert time.monotonic() < deadline, "nobody waits"
            # A transaction goes on seeing the sessions that there were at its first look.
            connection.rollback()
            time.sleep(0.01)


def test_a_creation_waits_for_a_removal_and_gets_the_image_before(cloud: SimulatedCloud) -> None:
    image = add_stored_image(cloud)
    with ThreadPoolExecutor(1) as pool:
        with transaction() as session:
            begin_image_removal(session, OPERATOR, image)  # type: ignore[arg-type]
            created = pool.submit(cloud.create)
            wait_for_waiter()
        uuid = created.result()["data"]["uuid"]
    with get_engine().connect() as connection:
        chosen = connection.scalar(
            text("SELECT image_id FROM instance WHERE instance_id = :id"), {"id": uuid}
        )
    assert chosen != image


def test_a_removal_waits_for_a_creation_and_is_refused(
    cloud: SimulatedCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    from awan.instances import create

    image = add_stored_image(cloud)
    place = create.place
    with ThreadPoolExecutor(1) as pool:

        def place_late(*args: Any, **kwargs: Any) -> Any:
            removed.append(pool.submit(cloud.admin.delete, f"/admin/images/{image}"))
            wait_for_waiter()
            return place(*args, **kwargs)

        removed: list[Any] = []
        monkeypatch.setattr(create, "place", place_late)
        cloud.create()
        assert removed[0].result().status_code == 409
    assert state_of(image) == "ready"


@dataclass
class World:
    """A cloud, and the images under proof."""

    cloud: SimulatedCloud
    images: list[UUID]
    template: int | None = None


def assert_gone(world: World) -> None:
    """Nothing of the images is left."""
    assert [state_of(image) for image in world.images] == ["removed"] * len(world.images)
    assert [copies(image) for image in world.images] == [(0, 0, False)] * len(world.images)
    if world.template is not None:
        with transaction() as session:
            assert session.get_one(Template, world.template).removed_at is not None


def begin(world: World) -> UUID:
    """Begins the removal without waiting for its end."""
    with transaction() as session:
        if world.template is not None:
            removal = begin_template_removal(session, OPERATOR, world.template)[1]  # type: ignore[arg-type]
        else:
            removal = begin_image_removal(session, OPERATOR, world.images[0])[1]  # type: ignore[arg-type]
        return removal.operation_id


def assert_removed_at_the_second_attempt(world: World) -> None:
    """The images are out of use and say why they are there; asked again, they go."""
    assert {state_of(image) for image in world.images} == {"removing"}
    assert wait_for_end(begin(world), 20).status == "succeeded"
    assert_gone(world)


def one_image(cloud: SimulatedCloud) -> World:
    """An image with a file and copies."""
    return World(cloud, [add_stored_image(cloud)])


def whole_template(cloud: SimulatedCloud) -> World:
    """A template with two such images."""
    body = {"name": f"t-{uuid4().hex[:8]}", "version": "1"}
    template = cloud.admin.post("/admin/templates", json=body).json()["data"]["id"]
    return World(cloud, [add_stored_image(cloud, template) for _ in range(2)], template)


@pytest.mark.parametrize("make", [one_image, whole_template])
@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_outage_at_each_call,
        proofs.survives_death_at_each_call,
    ],
)
def test_proofs(
    settings: Settings,
    cloud: SimulatedCloud,
    proof: Callable[..., None],
    make: Callable[[SimulatedCloud], World],
) -> None:
    proof(
        proofs.Case(
            settings=settings,
            faults=sim_store().faults,
            prepare=lambda: make(cloud),
            begin=begin,
            succeeded=assert_gone,
            undone=assert_removed_at_the_second_attempt,
        )
    )
    assert run_audit() == []
