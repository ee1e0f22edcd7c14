"""Names of the files in a pool: made from our ids, and read back for an audit. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from uuid import UUID

from awan.engines.volumes import VolumeKind

VOLUME = re.compile(r"vol-(?P<uuid>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.qcow2")
IMAGE = re.compile(r"image-(?P<sha256>[0-9a-f]{64})\.qcow2")
SEED = re.compile(
    r"seed-(?P<uuid>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-(?P<generation>[0-9]+)\.iso"
)


def name_volume(volume_id: UUID) -> str:
    """The file of a volume."""
    return f"vol-{volume_id}.qcow2"


def name_image(sha256: str) -> str:
    """The file of a template image."""
    return f"image-{sha256}.qcow2"


def name_seed(instance_id: UUID, generation: int) -> str:
    """The file of an instance's seed."""
    return f"seed-{instance_id}-{generation}.iso"


@dataclass(frozen=True)
class FileName:
    """What a file's name says. `instance_id` and `generation` belong to seeds."""

    kind: VolumeKind
    volume_id: UUID | None = None
    sha256: str | None = None
    instance_id: UUID | None = None
    generation: int | None = None


def read_name(name: str) -> FileName:
    """What a file in the pool is; `foreign` when the name is none of ours."""
    if match := VOLUME.fullmatch(name):
        return FileName("volume", volume_id=UUID(match["uuid"]))
    if match := IMAGE.fullmatch(name):
        return FileName("image", sha256=match["sha256"])
    if match := SEED.fullmatch(name):
        return FileName(
            "seed", instance_id=UUID(match["uuid"]), generation=int(match["generation"])
        )
    return FileName("foreign")
