"""Volumes engine: disks of instances, template images and small seed images in one pool of one node.

Verbs are idempotent. A volume's format is always given, never probed. Names are derived from our uuids, so that a
repeated call finds what an interrupted one left: `vol-<volume uuid>.qcow2`, `image-<sha256>.qcow2`,
`seed-<instance uuid>-<generation>.iso`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from uuid import UUID

from awan.engines.hypervisor import BackingSpec, NodeEndpoint

VolumeFormat = Literal["qcow2", "raw"]
VolumeKind = Literal["volume", "image", "seed", "foreign"]


@dataclass(frozen=True)
class ImageSource:
    """A checked template image on the control plane: content-addressed by `sha256`, format known, sizes in bytes."""

    path: Path
    sha256: str
    format: VolumeFormat
    size_bytes: int
    virtual_size_bytes: int


@dataclass(frozen=True)
class VolumeHandle:
    """Where a volume lies on the node and what is below it: what a domain's disk needs."""

    name: str
    path: str
    format: VolumeFormat
    backing: tuple[BackingSpec, ...] = ()


@dataclass(frozen=True)
class VolumeFacts:
    """A file found in the pool. `capacity_bytes` is the guest's size, `allocation_bytes` what it uses now."""

    name: str
    path: str
    kind: VolumeKind
    volume_id: UUID | None
    sha256: str | None
    capacity_bytes: int
    allocation_bytes: int


class Volumes(Protocol):
    """The contract. One object serves all nodes of a location."""

    def ensure_pool(self, node: NodeEndpoint) -> None:
        """The node's pool exists, is active and starts with the node."""
        ...

    def ensure_image(self, node: NodeEndpoint, image: ImageSource) -> VolumeHandle:
        """The image is complete on the node, read-only; uploaded at most once (an interrupted upload starts again)."""
        ...

    def delete_image(self, node: NodeEndpoint, sha256: str) -> None:
        """The image is gone. Raises EngineRejected while a volume is based on it. Absent: no effect."""
        ...

    def create_from_image(
        self, node: NodeEndpoint, volume_id: UUID, image: ImageSource, size_gib: int
    ) -> VolumeHandle:
        """A qcow2 volume of `size_gib` GiB over the image. Present already: returned as it is.

        Raises EngineRejected when the image is not complete on the node, is larger than the volume, or the volume
        exists over something else.
        """
        ...

    def create_blank(self, node: NodeEndpoint, volume_id: UUID, size_gib: int) -> VolumeHandle:
        """An empty qcow2 volume of `size_gib` GiB that reads as zeroes."""
        ...

    def find(self, node: NodeEndpoint, volume_id: UUID) -> VolumeFacts | None:
        """The volume, or None."""
        ...

    def find_over_image(
        self, node: NodeEndpoint, volume_id: UUID, sha256: str
    ) -> VolumeHandle | None:
        """The volume that `create_from_image` has made over this image. It is looked for and never made.

        None when it or the image is absent, its file is no qcow2 (any more), or it is over something else.
        """
        ...

    def resize(self, node: NodeEndpoint, volume_id: UUID, size_gib: int) -> None:
        """The volume (not in use) has `size_gib` GiB. Raises EngineRejected when it would shrink or is absent."""
        ...

    def delete(self, node: NodeEndpoint, volume_id: UUID) -> None:
        """The volume is gone and its content unreadable for whoever gets the space next. Absent: no effect."""
        ...

    def ensure_seed(
        self, node: NodeEndpoint, instance_id: UUID, generation: int, iso: bytes
    ) -> VolumeHandle:
        """The seed image `seed-<instance>-<generation>.iso` has this content."""
        ...

    def delete_seeds(
        self, node: NodeEndpoint, instance_id: UUID, *, keep: int | None = None
    ) -> None:
        """No seed of the instance is left, except generation `keep`."""
        ...

    def list_volumes(self, node: NodeEndpoint) -> list[VolumeFacts]:
        """Everything in the pool, also foreign files (`kind="foreign"`)."""
        ...
