"""Volumes: one table for all disks, and which images lie on which node."""

from awan.volumes.models import Volume
from awan.volumes.service import (
    create_root_volume,
    mark_deleted,
    mark_ready,
    note_image,
    volumes_of,
)

__all__ = ["Volume", "create_root_volume", "mark_deleted", "mark_ready", "note_image", "volumes_of"]
