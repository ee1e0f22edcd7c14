"""Volumes as qcow2 files in a directory pool of each node, through libvirt's pool and stream calls.

- Nothing of ours runs on the node: files are made, filled, grown and removed by libvirtd.
- An image is uploaded under its final name (libvirt cannot rename), read back, hashed, and only then
  marked as complete by an empty file `<name>.complete`. Without its mark it is uploaded again.
- Images are root's and 0444; the hypervisor keeps libvirt from changing that. Volumes and seeds are
  0600 and become QEMU's for as long as a domain that has them runs. The pool's directory can be
  passed through, but not listed.
- Deleting is unlinking, and that is enough: a new qcow2 reads zeroes wherever the guest has not
  written (or its template's bytes), and a file system gives a new file no old block unwritten.
- libvirtd keeps a list of the pool's files, which its own calls keep right. Reading the directory
  anew (refresh) opens every file, so only `list_volumes` does that, and whoever meets a file
  that is not in the list. After each upload libvirtd does it by itself in a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import libvirt
from lxml import etree

from awan.engines.hypervisor import BackingSpec, NodeEndpoint
from awan.engines.libvirt_nodes import ENGINE, Connection, LibvirtNodes, has_code
from awan.engines.volumes import ImageSource, VolumeFacts, VolumeFormat, VolumeHandle
from awan.engines.volumes.names import name_image, name_seed, name_volume, read_name
from awan.engines.volumes.qemu_img import QCOW2_MAGIC
from awan.errors import EngineRejected, EngineUnavailable

CALL_TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 900.0
LIST_TIMEOUT_S = 120.0
# What a stream's message may carry with every libvirt since streams exist.
STREAM_CHUNK_BYTES = 262120
GIB = 1 << 30
MARK_SUFFIX = ".complete"
# A qcow2 whose creation was cut off is not larger than its empty tables.
TORN_MAX_BYTES = 1 << 20
# The first cluster of a qcow2, which holds the name of the layer below.
HEAD_BYTES = 65536

POOL_MODE = "0711"
IMAGE_MODE = "0444"
PRIVATE_MODE = "0600"

T = TypeVar("T")
Pool = Any
Volume = Any
"""`libvirt.virStoragePool` and `virStorageVol`; the package has no type information."""


class LocalVolumes:
    """The contract `Volumes` on directory pools. Thread-safe; keeps nothing but its settings."""

    def __init__(self, nodes: LibvirtNodes, *, pool_name: str, pool_path: str) -> None:
        self._nodes = nodes
        self._pool_name = pool_name
        self._pool_path = pool_path

    # Pool

    def ensure_pool(self, node: NodeEndpoint) -> None:
        def ensure(conn: Connection) -> None:
            try:
                pool = conn.storagePoolLookupByName(self._pool_name)
            except libvirt.libvirtError as err:
                if not has_code(err, libvirt.VIR_ERR_NO_STORAGE_POOL):
                    raise
                pool = conn.storagePoolDefineXML(_render_pool(self._pool_name, self._pool_path), 0)
            found = etree.fromstring(pool.XMLDesc(0))
            path = found.findtext("target/path")
            if found.get("type") != "dir" or path != self._pool_path:
                raise EngineRejected(
                    ENGINE,
                    f"ensure pool {self._pool_name} on {node.name}",
                    f"it exists as {found.get('type')} at {path}, not as dir at {self._pool_path}",
                )
            if not pool.isActive():
                pool.build(0)
                _tolerate(lambda: pool.create(0), libvirt.VIR_ERR_OPERATION_INVALID)
            if not pool.autostart():
                pool.setAutostart(1)

        self._call(node, "ensure pool", ensure, key=f"pool {self._pool_name}")

    # Images

    def ensure_image(self, node: NodeEndpoint, image: ImageSource) -> VolumeHandle:
        name = name_image(image.sha256)
        if image.format != "qcow2":
            raise EngineRejected(ENGINE, f"upload {name}", "images are stored as qcow2 only")

        def ensure(conn: Connection) -> None:
            pool = self._pool(conn)
            if _is_complete(pool, name):
                return
            # A file without its mark may be another worker's, in the middle of its upload. It is
            # filled again, not removed: both write the same bytes at the same places.
            volume = _find(pool, name)
            was_there = volume is not None
            if volume is None:
                xml = _render_volume(name, "raw", image.size_bytes, mode=IMAGE_MODE)
                volume = self._create_or_find(pool, name, xml)
            with image.path.open("rb") as file:
                _upload(conn, volume, iter(lambda: file.read(STREAM_CHUNK_BYTES), b""))
            sha256 = _hash(conn, volume)
            if sha256 != image.sha256:
                _remove(volume)
                refusal = EngineUnavailable if was_there else EngineRejected
                raise refusal(
                    ENGINE, f"upload {name} to {node.name}", f"what arrived has sha256 {sha256}"
                )
            mark = name + MARK_SUFFIX
            self._create_or_find(pool, mark, _render_volume(mark, "raw", 0, mode=IMAGE_MODE))

        self._call(node, "upload image", ensure, key=f"image {name}", timeout_s=UPLOAD_TIMEOUT_S)
        return self._handle(name, "qcow2")

    def delete_image(self, node: NodeEndpoint, sha256: str) -> None:
        name = name_image(sha256)
        path = self._path(name)

        def delete(conn: Connection) -> None:
            pool = self._pool(conn)
            for volume in pool.listAllVolumes(0):
                if read_name(volume.name()).kind == "volume" and _read_backing(volume) == path:
                    raise EngineRejected(
                        ENGINE, f"delete {name} on {node.name}", f"{volume.name()} is based on it"
                    )
            # The mark goes first: an image that is half gone must not look complete.
            for file in (name + MARK_SUFFIX, name):
                if (volume := _find(pool, file)) is not None:
                    _remove(volume)

        self._call(node, "delete image", delete, key=f"image {name}", timeout_s=LIST_TIMEOUT_S)

    # Volumes

    def create_from_image(
        self, node: NodeEndpoint, volume_id: UUID, image: ImageSource, size_gib: int
    ) -> VolumeHandle:
        if size_gib * GIB < image.virtual_size_bytes:
            raise EngineRejected(
                ENGINE,
                f"create {name_volume(volume_id)}",
                f"{size_gib} GiB is less than the image's {image.virtual_size_bytes} bytes",
            )
        return self._create_volume(node, volume_id, size_gib, image=name_image(image.sha256))

    def create_blank(self, node: NodeEndpoint, volume_id: UUID, size_gib: int) -> VolumeHandle:
        return self._create_volume(node, volume_id, size_gib, image=None)

    def _create_volume(
        self, node: NodeEndpoint, volume_id: UUID, size_gib: int, *, image: str | None
    ) -> VolumeHandle:
        name = name_volume(volume_id)
        backing = self._path(image) if image is not None else None
        xml = _render_volume(name, "qcow2", size_gib * GIB, mode=PRIVATE_MODE, backing=backing)

        def create(conn: Connection) -> None:
            pool = self._pool(conn)
            if image is not None and not _is_complete(pool, image):
                raise EngineRejected(
                    ENGINE, f"create {name} on {node.name}", f"{image} is not on the node"
                )
            try:
                self._create(pool, xml)
            except libvirt.libvirtError as err:
                if not has_code(err, libvirt.VIR_ERR_STORAGE_VOL_EXIST):
                    raise
                volume = pool.storageVolLookupByName(name)
                if _is_torn(volume):
                    _remove(volume)
                    self._create(pool, xml)
                    return
                found = _read_backing(volume)
                if found != backing:
                    raise EngineRejected(
                        ENGINE,
                        f"create {name} on {node.name}",
                        f"it exists, based on {found or 'nothing'}",
                    ) from err

        self._call(node, "create volume", create, key=f"volume {name}")
        return self._handle(name, "qcow2", backing)

    def find(self, node: NodeEndpoint, volume_id: UUID) -> VolumeFacts | None:
        name = name_volume(volume_id)

        def find(conn: Connection) -> VolumeFacts | None:
            volume = _find(self._pool(conn), name)
            return None if volume is None else self._read_facts(volume)

        return self._call(node, "find volume", find, key=f"volume {name}")

    def find_over_image(
        self, node: NodeEndpoint, volume_id: UUID, sha256: str
    ) -> VolumeHandle | None:
        name, image = name_volume(volume_id), name_image(sha256)
        backing = self._path(image)

        def is_whole(conn: Connection) -> bool:
            pool = self._pool(conn)
            volume = _find(pool, name)
            if volume is None or not _is_complete(pool, image):
                return False
            # libvirtd's own idea of the file is as old as its last reading of the directory.
            head = _read_head(conn, volume)
            return head is not None and _backing_in(head) == os.fsencode(backing)

        if not self._call(node, "find volume", is_whole, key=f"volume {name}"):
            return None
        return self._handle(name, "qcow2", backing)

    def resize(self, node: NodeEndpoint, volume_id: UUID, size_gib: int) -> None:
        name = name_volume(volume_id)

        def resize(conn: Connection) -> None:
            volume = self._pool(conn).storageVolLookupByName(name)
            _, capacity_bytes, _ = volume.info()
            if size_gib * GIB < capacity_bytes:
                raise EngineRejected(
                    ENGINE,
                    f"resize {name} on {node.name}",
                    f"it has {capacity_bytes} bytes and cannot shrink to {size_gib} GiB",
                )
            if size_gib * GIB > capacity_bytes:
                volume.resize(size_gib * GIB, 0)

        self._call(node, "resize volume", resize, key=f"volume {name}")

    def delete(self, node: NodeEndpoint, volume_id: UUID) -> None:
        name = name_volume(volume_id)
        self._call(
            node, "delete volume", lambda conn: self._delete(conn, name), key=f"volume {name}"
        )

    # Seeds

    def ensure_seed(
        self, node: NodeEndpoint, instance_id: UUID, generation: int, iso: bytes
    ) -> VolumeHandle:
        name = name_seed(instance_id, generation)

        def ensure(conn: Connection) -> None:
            pool = self._pool(conn)
            try:
                volume = self._create(
                    pool, _render_volume(name, "raw", len(iso), mode=PRIVATE_MODE)
                )
            except libvirt.libvirtError as err:
                if not has_code(err, libvirt.VIR_ERR_STORAGE_VOL_EXIST):
                    raise
                volume = pool.storageVolLookupByName(name)
                if _hash(conn, volume) == hashlib.sha256(iso).hexdigest():
                    return
                _remove(volume)
                volume = self._create(
                    pool, _render_volume(name, "raw", len(iso), mode=PRIVATE_MODE)
                )
            _upload(conn, volume, iter([iso]))

        self._call(node, "upload seed", ensure, key=f"seeds {instance_id}")
        return self._handle(name, "raw")

    def delete_seeds(
        self, node: NodeEndpoint, instance_id: UUID, *, keep: int | None = None
    ) -> None:
        def delete(conn: Connection) -> None:
            pool = self._pool(conn)
            for file in pool.listVolumes():
                seed = read_name(file)
                if seed.instance_id == instance_id and seed.generation != keep:
                    self._delete(conn, file)

        self._call(node, "delete seeds", delete, key=f"seeds {instance_id}")

    # Audit

    def list_volumes(self, node: NodeEndpoint) -> list[VolumeFacts]:
        def read(conn: Connection) -> list[VolumeFacts]:
            pool = self._pool(conn)
            # Refused while a file is made or filled; the list is right then without files that
            # came past libvirt.
            _tolerate(lambda: pool.refresh(0), libvirt.VIR_ERR_INTERNAL_ERROR)
            volumes = {volume.name(): volume for volume in pool.listAllVolumes(0)}
            facts = []
            for name, volume in volumes.items():
                if name.removesuffix(MARK_SUFFIX) in volumes and name.endswith(MARK_SUFFIX):
                    continue
                try:
                    facts.append(self._read_facts(volume))
                except libvirt.libvirtError as err:
                    if not has_code(err, libvirt.VIR_ERR_NO_STORAGE_VOL):
                        raise
            return sorted(facts, key=lambda fact: fact.name)

        return self._call(node, "list volumes", read, timeout_s=LIST_TIMEOUT_S)

    # Shared steps

    def _call(
        self,
        node: NodeEndpoint,
        name: str,
        fn: Callable[[Connection], T],
        *,
        key: str | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> T:
        """Runs `fn` on the node. What the state of the pool or a file refuses may pass: the pool is
        starting, another process makes or fills the file.
        """

        def run(conn: Connection) -> T:
            try:
                return fn(conn)
            except libvirt.libvirtError as err:
                if has_code(err, libvirt.VIR_ERR_OPERATION_INVALID):
                    raise EngineUnavailable(ENGINE, f"{name} on {node.name}", str(err)) from err
                raise

        return self._nodes.call(node, name, run, timeout_s=timeout_s, key=key)

    def _pool(self, conn: Connection) -> Pool:
        return conn.storagePoolLookupByName(self._pool_name)

    def _path(self, name: str) -> str:
        return str(Path(self._pool_path) / name)

    def _handle(
        self, name: str, volume_format: VolumeFormat, backing: str | None = None
    ) -> VolumeHandle:
        layers = (BackingSpec(backing, "qcow2"),) if backing is not None else ()
        return VolumeHandle(name, self._path(name), volume_format, layers)

    def _create(self, pool: Pool, xml: str) -> Volume:
        """Makes the file. When it lies there unknown to libvirtd, reads the directory anew first.

        Raises libvirtError VIR_ERR_STORAGE_VOL_EXIST when it exists.
        """
        try:
            return pool.createXML(xml, 0)
        except libvirt.libvirtError as err:
            if not has_code(err, libvirt.VIR_ERR_OPERATION_INVALID):
                raise
            pool.refresh(0)
            return pool.createXML(xml, 0)

    def _create_or_find(self, pool: Pool, name: str, xml: str) -> Volume:
        try:
            return self._create(pool, xml)
        except libvirt.libvirtError as err:
            if not has_code(err, libvirt.VIR_ERR_STORAGE_VOL_EXIST):
                raise
            return pool.storageVolLookupByName(name)

    def _delete(self, conn: Connection, name: str) -> None:
        volume = _find(self._pool(conn), name)
        if volume is not None:
            _remove(volume)

    def _read_facts(self, volume: Volume) -> VolumeFacts:
        _, capacity_bytes, allocation_bytes = volume.info()
        name = volume.name()
        file = read_name(name)
        return VolumeFacts(
            name=name,
            path=self._path(name),
            kind=file.kind,
            volume_id=file.volume_id,
            sha256=file.sha256,
            capacity_bytes=capacity_bytes,
            allocation_bytes=allocation_bytes,
        )


def _render_pool(name: str, path: str) -> str:
    pool = etree.Element("pool", type="dir")
    _add_text(pool, "name", name)
    target = etree.SubElement(pool, "target")
    _add_text(target, "path", path)
    _add_permissions(target, POOL_MODE)
    return etree.tostring(pool, encoding="unicode")


def _render_volume(
    name: str,
    volume_format: VolumeFormat,
    capacity_bytes: int,
    *,
    mode: str,
    backing: str | None = None,
) -> str:
    """The volume's definition; formats of the file and of what is below are explicit."""
    volume = etree.Element("volume")
    _add_text(volume, "name", name)
    _add_text(volume, "capacity", str(capacity_bytes)).set("unit", "bytes")
    _add_text(volume, "allocation", "0").set("unit", "bytes")
    target = etree.SubElement(volume, "target")
    etree.SubElement(target, "format", type=volume_format)
    if volume_format == "qcow2":
        _add_text(target, "compat", "1.1")
    _add_permissions(target, mode)
    if backing is not None:
        store = etree.SubElement(volume, "backingStore")
        _add_text(store, "path", backing)
        etree.SubElement(store, "format", type="qcow2")
    return etree.tostring(volume, encoding="unicode")


def _add_permissions(target: Any, mode: str) -> None:
    permissions = etree.SubElement(target, "permissions")
    for tag, text in (("mode", mode), ("owner", "0"), ("group", "0")):
        _add_text(permissions, tag, text)


def _add_text(parent: Any, tag: str, text: str) -> Any:
    child = etree.SubElement(parent, tag)
    child.text = text
    return child


def _find(pool: Pool, name: str) -> Volume | None:
    try:
        return pool.storageVolLookupByName(name)
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_STORAGE_VOL):
            return None
        raise


def _is_complete(pool: Pool, image: str) -> bool:
    """Is the image on the node, uploaded to its end and verified?"""
    return _find(pool, image + MARK_SUFFIX) is not None and _find(pool, image) is not None


def _tolerate(action: Callable[[], object], *codes: int) -> None:
    try:
        action()
    except libvirt.libvirtError as err:
        if not has_code(err, *codes):
            raise


def _remove(volume: Volume) -> None:
    """Removes the file; safe when it is gone meanwhile. Refused while it is being made."""
    _tolerate(lambda: volume.delete(0), libvirt.VIR_ERR_NO_STORAGE_VOL)


def _read_backing(volume: Volume) -> str | None:
    """The path of the layer below, as libvirtd last read it; None also when the volume is gone."""
    try:
        xml = volume.XMLDesc(0)
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_STORAGE_VOL):
            return None
        raise
    path: str | None = etree.fromstring(xml).findtext("backingStore/path")
    return path


def _read_head(conn: Connection, volume: Volume) -> bytes | None:
    """The first cluster of the file; None when the file has vanished past libvirtd."""
    try:
        volume.info()
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_NO_STORAGE_VOL):
            return None
        raise
    head = bytearray()
    stream = conn.newStream(0)
    try:
        volume.download(stream, 0, HEAD_BYTES, 0)
        while chunk := stream.recv(STREAM_CHUNK_BYTES):
            if not isinstance(chunk, bytes):
                raise EngineUnavailable(ENGINE, "download", "the stream gives no data")
            head += chunk
        stream.finish()
    except BaseException:
        _abort(stream)
        raise
    return bytes(head)


def _backing_in(head: bytes) -> bytes | None:
    """The name of the layer below, as a qcow2 header has it; None when this is no such header."""
    if len(head) < 20 or not head.startswith(QCOW2_MAGIC):
        return None
    offset, length = struct.unpack_from(">QI", head, 8)
    return head[offset : offset + length]


def _is_torn(volume: Volume) -> bool:
    """Was the file's creation cut off? Such a file has no qcow2 header, so no guest has used it."""
    _, _, allocation_bytes = volume.info()
    found = etree.fromstring(volume.XMLDesc(0)).find("target/format")
    is_qcow2 = found is not None and found.get("type") == "qcow2"
    return not is_qcow2 and allocation_bytes < TORN_MAX_BYTES


def _upload(conn: Connection, volume: Volume, chunks: Iterator[bytes]) -> None:
    """Fills the file from its start. Returns when libvirtd has written and closed it."""
    stream = conn.newStream(0)
    try:
        volume.upload(stream, 0, 0, 0)
        for chunk in chunks:
            sent = 0
            while sent < len(chunk):
                count = stream.send(chunk[sent : sent + STREAM_CHUNK_BYTES])
                if count < 0:
                    raise EngineUnavailable(ENGINE, "upload", "the stream does not take data")
                sent += count
        stream.finish()
    except BaseException:
        _abort(stream)
        raise


def _hash(conn: Connection, volume: Volume) -> str:
    """The sha256 of the whole file, in hex, read back from the node."""
    digest = hashlib.sha256()
    stream = conn.newStream(0)
    try:
        volume.download(stream, 0, 0, 0)
        while chunk := stream.recv(STREAM_CHUNK_BYTES):
            if not isinstance(chunk, bytes):
                raise EngineUnavailable(ENGINE, "download", "the stream gives no data")
            digest.update(chunk)
        stream.finish()
    except BaseException:
        _abort(stream)
        raise
    return digest.hexdigest()


def _abort(stream: Any) -> None:
    # A stream that failed by itself refuses to be aborted.
    with contextlib.suppress(libvirt.libvirtError):
        stream.abort()
