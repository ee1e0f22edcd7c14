"""Rows of disks and of the images on nodes. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import ColumnElement, and_, bindparam, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import InstrumentedAttribute, Session

from awan.fleet import NodeImage
from awan.kit.clock import now
from awan.kit.database import execute_directly
from awan.kit.ids import derived_id
from awan.volumes.models import Volume, VolumeRole, VolumeState

# Steps of instances ask this all the time; built once, because building it takes longer than sending it.
_MARK_READY = (
    update(Volume)
    .where(Volume.volume_id == bindparam("volume"), Volume.state == VolumeState.CREATING)
    .values(state=VolumeState.READY.value)
)
_NOTE_IMAGE = insert(NodeImage).on_conflict_do_nothing()
_VOLUMES = (
    select(Volume)
    .where(Volume.instance_id == bindparam("instance"), Volume.state != VolumeState.DELETED)
    .order_by(Volume.role.desc(), Volume.created_at)
)


def is_root_disk_of(instance_id: InstrumentedAttribute[UUID]) -> ColumnElement[bool]:
    """The condition that a volume is the root disk of the instance in that column, and not deleted."""
    return and_(
        Volume.instance_id == instance_id,
        Volume.role == VolumeRole.ROOT,
        Volume.state != VolumeState.DELETED,
    )


def create_root_volume(
    session: Session,
    *,
    instance_id: UUID,
    account_id: UUID,
    location_id: int,
    node_id: UUID,
    image_id: UUID,
    size_gib: int,
    engine: str,
    operation_id: UUID,
) -> Volume:
    """The row of an instance's root disk, named from the operation that makes it."""
    volume = Volume(
        volume_id=derived_id(operation_id, "volume:root"),
        account_id=account_id,
        instance_id=instance_id,
        node_id=node_id,
        location_id=location_id,
        image_id=image_id,
        role=VolumeRole.ROOT,
        state=VolumeState.CREATING,
        engine=engine,
        format="qcow2",
        size_gib=size_gib,
        operation_id=operation_id,
    )
    session.add(volume)
    return volume


def volumes_of(session: Session, instance_id: UUID) -> Sequence[Volume]:
    """The disks of an instance that are not deleted, root first."""
    return session.scalars(_VOLUMES, {"instance": instance_id}).all()


def mark_ready(session: Session, volume_id: UUID) -> None:
    """The engine has the volume. Known already: no effect."""
    execute_directly(session, _MARK_READY, {"volume": volume_id})


def mark_deleted(session: Session, instance_id: UUID) -> None:
    """The engine has none of the instance's volumes any more."""
    for volume in volumes_of(session, instance_id):
        volume.state = VolumeState.DELETED
        volume.deleted_at = now()


def note_image(session: Session, node_id: UUID, image_id: UUID) -> None:
    """The image lies on the node."""
    execute_directly(session, _NOTE_IMAGE, {"node_id": node_id, "image_id": image_id})
