"""Rows of disks: named from the operation that makes them, marked as the engine has them."""

from __future__ import annotations

from uuid import UUID

import pytest
from sqlalchemy import select

from awan.fleet import NodeImage
from awan.kit.database import transaction
from awan.kit.ids import derived_id
from awan.volumes import Volume, mark_deleted, mark_ready, note_image, volumes_of
from tests.support.simulated_cloud import SimulatedCloud


def test_a_root_disk_is_ordered_with_its_instance(cloud: SimulatedCloud) -> None:
    created = cloud.create(storage=40)
    uuid, operation = UUID(created["data"]["uuid"]), UUID(created["operation"]["uuid"])
    with transaction() as session:
        (volume,) = volumes_of(session, uuid)
        assert volume.volume_id == derived_id(operation, "volume:root")
        assert (volume.role, volume.state, volume.engine) == ("root", "creating", "fake")
        assert (volume.format, volume.size_gib) == ("qcow2", 40)
        assert volume.account_id == cloud.customer.account_id
        for _ in range(2):
            mark_ready(session, volume.volume_id)
            session.refresh(volume)
            assert volume.state == "ready"
        for _ in range(2):
            mark_deleted(session, uuid)
        assert list(volumes_of(session, uuid)) == []
        deleted_at = volume.deleted_at
        assert (volume.state, deleted_at is None) == ("deleted", False)
        session.flush()
        mark_ready(session, volume.volume_id)
        session.refresh(volume)
        assert volume.state == "deleted"


@pytest.mark.usefixtures("worker")
def test_an_image_is_noted_once_a_node(cloud: SimulatedCloud) -> None:
    for _ in range(4):
        cloud.create_running()
    with transaction() as session:
        noted = session.scalars(select(NodeImage)).all()
        assert {str(row.node_id) for row in noted} == set(cloud.node_ids)
        assert len(noted) == 2
        note_image(session, noted[0].node_id, noted[0].image_id)
        assert [volume.state for volume in session.scalars(select(Volume))] == ["ready"] * 4
