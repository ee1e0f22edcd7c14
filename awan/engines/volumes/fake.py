"""Volumes that exist only as rows in the schema `sim`: same names, same refusals, no files."""

from __future__ import annotations

import hashlib
from typing import LiteralString
from uuid import UUID

from awan.engines.hypervisor import BackingSpec, NodeEndpoint
from awan.engines.sim import SimStore
from awan.engines.volumes import ImageSource, VolumeFacts, VolumeFormat, VolumeHandle
from awan.engines.volumes.names import name_image, name_seed, name_volume, read_name
from awan.errors import EngineRejected

ENGINE = "volumes"
POOL_PATH = "/var/lib/libvirt/images/awan"
GIB = 1 << 30
# What an empty qcow2 takes for its tables.
EMPTY_QCOW2_BYTES = 200704

POOL_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.pool (
        location text NOT NULL,
        node_id  uuid NOT NULL,
        PRIMARY KEY (location, node_id)
    )"""
VOLUME_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.volume (
        location         text   NOT NULL,
        node_id          uuid   NOT NULL,
        name             text   NOT NULL,
        capacity_bytes   bigint NOT NULL,
        allocation_bytes bigint NOT NULL,
        backing          text,
        sha256           text,
        PRIMARY KEY (location, node_id, name)
    )"""


class FakeVolumes:
    """The contract `Volumes` on `SimStore`. `location` is the store's unless given."""

    def __init__(self, store: SimStore, *, location: str | None = None) -> None:
        self._store = store
        self._location = store.location if location is None else location
        store.ensure_table(POOL_DDL)
        store.ensure_table(VOLUME_DDL)

    def ensure_pool(self, node: NodeEndpoint) -> None:
        with self._store.call(ENGINE, "ensure_pool", node.name):
            self._store.execute(
                "INSERT INTO sim.pool (location, node_id) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                [self._location, node.node_id],
            )

    def ensure_image(self, node: NodeEndpoint, image: ImageSource) -> VolumeHandle:
        name = name_image(image.sha256)
        with self._store.call(ENGINE, "ensure_image", name):
            self._require_pool(node, f"upload {name}")
            if image.format != "qcow2":
                raise EngineRejected(ENGINE, f"upload {name}", "images are stored as qcow2 only")
            self._put(node, name, image.virtual_size_bytes, image.size_bytes)
            return self._handle(name, "qcow2")

    def delete_image(self, node: NodeEndpoint, sha256: str) -> None:
        name = name_image(sha256)
        with self._store.call(ENGINE, "delete_image", name):
            self._require_pool(node, f"delete {name}")
            user = self._store.find_one(
                "SELECT name FROM sim.volume WHERE location = %s AND node_id = %s AND backing = %s",
                [self._location, node.node_id, name],
            )
            if user is not None:
                raise EngineRejected(
                    ENGINE, f"delete {name} on {node.name}", f"{user['name']} is based on it"
                )
            self._remove(node, name)

    def create_from_image(
        self, node: NodeEndpoint, volume_id: UUID, image: ImageSource, size_gib: int
    ) -> VolumeHandle:
        name, base = name_volume(volume_id), name_image(image.sha256)
        with self._store.call(ENGINE, "create_from_image", name):
            self._require_pool(node, f"create {name}")
            if size_gib * GIB < image.virtual_size_bytes:
                raise EngineRejected(
                    ENGINE, f"create {name}", f"{size_gib} GiB is less than the image has"
                )
            if self._find(node, base) is None:
                raise EngineRejected(ENGINE, f"create {name}", f"{base} is not on the node")
            return self._create(node, name, size_gib, base)

    def create_blank(self, node: NodeEndpoint, volume_id: UUID, size_gib: int) -> VolumeHandle:
        name = name_volume(volume_id)
        with self._store.call(ENGINE, "create_blank", name):
            self._require_pool(node, f"create {name}")
            return self._create(node, name, size_gib, None)

    def find(self, node: NodeEndpoint, volume_id: UUID) -> VolumeFacts | None:
        name = name_volume(volume_id)
        with self._store.call(ENGINE, "find", name):
            self._require_pool(node, f"find {name}")
            return self._find(node, name)

    def find_over_image(
        self, node: NodeEndpoint, volume_id: UUID, sha256: str
    ) -> VolumeHandle | None:
        name, base = name_volume(volume_id), name_image(sha256)
        with self._store.call(ENGINE, "find_over_image", name):
            self._require_pool(node, f"find {name}")
            if self._find(node, base) is None:
                return None
            row = self._store.find_one(
                "SELECT backing FROM sim.volume WHERE location = %s AND node_id = %s AND name = %s"
                " AND allocation_bytes > 0",
                [self._location, node.node_id, name],
            )
            if row is None or row["backing"] != base:
                return None
            return self._handle(name, "qcow2", base)

    def resize(self, node: NodeEndpoint, volume_id: UUID, size_gib: int) -> None:
        name = name_volume(volume_id)
        with self._store.call(ENGINE, "resize", name):
            self._require_pool(node, f"resize {name}")
            changed = self._store.execute(
                "UPDATE sim.volume SET capacity_bytes = %s"
                " WHERE location = %s AND node_id = %s AND name = %s AND capacity_bytes <= %s",
                [size_gib * GIB, self._location, node.node_id, name, size_gib * GIB],
            )
            if not changed:
                raise EngineRejected(
                    ENGINE, f"resize {name} on {node.name}", "it is absent, or would shrink"
                )

    def delete(self, node: NodeEndpoint, volume_id: UUID) -> None:
        name = name_volume(volume_id)
        with self._store.call(ENGINE, "delete", name):
            self._require_pool(node, f"delete {name}")
            self._remove(node, name)

    def ensure_seed(
        self, node: NodeEndpoint, instance_id: UUID, generation: int, iso: bytes
    ) -> VolumeHandle:
        name = name_seed(instance_id, generation)
        with self._store.call(ENGINE, "ensure_seed", name):
            self._require_pool(node, f"upload {name}")
            self._put(node, name, len(iso), len(iso), hashlib.sha256(iso).hexdigest())
            return self._handle(name, "raw")

    def delete_seeds(
        self, node: NodeEndpoint, instance_id: UUID, *, keep: int | None = None
    ) -> None:
        with self._store.call(ENGINE, "delete_seeds", str(instance_id)):
            self._require_pool(node, f"delete seeds of {instance_id}")
            kept = name_seed(instance_id, keep) if keep is not None else ""
            self._store.execute(
                "DELETE FROM sim.volume WHERE location = %s AND node_id = %s"
                " AND starts_with(name, %s) AND name <> %s",
                [self._location, node.node_id, f"seed-{instance_id}-", kept],
            )

    def list_volumes(self, node: NodeEndpoint) -> list[VolumeFacts]:
        with self._store.call(ENGINE, "list_volumes", node.name):
            self._require_pool(node, "list volumes")
            rows = self._store.fetch_all(
                "SELECT name, capacity_bytes, allocation_bytes FROM sim.volume"
                ' WHERE location = %s AND node_id = %s ORDER BY name COLLATE "C"',
                [self._location, node.node_id],
            )
            return [
                _facts(row["name"], row["capacity_bytes"], row["allocation_bytes"]) for row in rows
            ]

    def _require_pool(self, node: NodeEndpoint, call: str) -> None:
        pool = self._store.find_one(
            "SELECT 1 FROM sim.pool WHERE location = %s AND node_id = %s",
            [self._location, node.node_id],
        )
        if pool is None:
            raise EngineRejected(ENGINE, f"{call} on {node.name}", "the node has no pool")

    def _find(self, node: NodeEndpoint, name: str) -> VolumeFacts | None:
        row = self._store.find_one(
            "SELECT name, capacity_bytes, allocation_bytes FROM sim.volume"
            " WHERE location = %s AND node_id = %s AND name = %s",
            [self._location, node.node_id, name],
        )
        if row is None:
            return None
        return _facts(row["name"], row["capacity_bytes"], row["allocation_bytes"])

    def _create(
        self, node: NodeEndpoint, name: str, size_gib: int, base: str | None
    ) -> VolumeHandle:
        # What takes no room is a file whose creation was cut off before its header was written.
        self._store.execute(
            "DELETE FROM sim.volume"
            " WHERE location = %s AND node_id = %s AND name = %s AND allocation_bytes = 0",
            [self._location, node.node_id, name],
        )
        self._store.execute(
            "INSERT INTO sim.volume"
            " (location, node_id, name, capacity_bytes, allocation_bytes, backing)"
            " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            [self._location, node.node_id, name, size_gib * GIB, EMPTY_QCOW2_BYTES, base],
        )
        row = self._store.find_one(
            "SELECT backing FROM sim.volume WHERE location = %s AND node_id = %s AND name = %s",
            [self._location, node.node_id, name],
        )
        found = row["backing"] if row is not None else base
        if found != base:
            raise EngineRejected(
                ENGINE, f"create {name} on {node.name}", f"it exists, based on {found or 'nothing'}"
            )
        return self._handle(name, "qcow2", base)

    def _put(
        self,
        node: NodeEndpoint,
        name: str,
        capacity_bytes: int,
        allocation_bytes: int,
        sha256: str | None = None,
    ) -> None:
        self._store.execute(
            "INSERT INTO sim.volume"
            " (location, node_id, name, capacity_bytes, allocation_bytes, sha256)"
            " VALUES (%s, %s, %s, %s, %s, %s)"
            " ON CONFLICT (location, node_id, name) DO UPDATE"
            " SET capacity_bytes = excluded.capacity_bytes,"
            " allocation_bytes = excluded.allocation_bytes, sha256 = excluded.sha256",
            [self._location, node.node_id, name, capacity_bytes, allocation_bytes, sha256],
        )

    def _remove(self, node: NodeEndpoint, name: str) -> None:
        self._store.execute(
            "DELETE FROM sim.volume WHERE location = %s AND node_id = %s AND name = %s",
            [self._location, node.node_id, name],
        )

    def _handle(
        self, name: str, volume_format: VolumeFormat, base: str | None = None
    ) -> VolumeHandle:
        layers = (BackingSpec(f"{POOL_PATH}/{base}", "qcow2"),) if base is not None else ()
        return VolumeHandle(name, f"{POOL_PATH}/{name}", volume_format, layers)


def _facts(name: str, capacity_bytes: int, allocation_bytes: int) -> VolumeFacts:
    file = read_name(name)
    return VolumeFacts(
        name=name,
        path=f"{POOL_PATH}/{name}",
        kind=file.kind,
        volume_id=file.volume_id,
        sha256=file.sha256,
        capacity_bytes=capacity_bytes,
        allocation_bytes=allocation_bytes,
    )
