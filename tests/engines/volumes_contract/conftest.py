"""The volumes engines under one contract: the fake, and the real one on a node of the lab."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import libvirt
import pytest

from awan.engines.hypervisor import NodeEndpoint
from awan.engines.libvirt_nodes import LibvirtNodes
from awan.engines.sim import SimStore
from awan.engines.volumes import ImageSource
from awan.engines.volumes.fake import FakeVolumes
from awan.engines.volumes.local import LocalVolumes
from awan.engines.volumes.qemu_img import check_image
from lab import Lab
from tests.engines.volumes_contract.sites import LocalSite, Site

MIB = 1 << 20


@pytest.fixture
def local_site(lab_slot: Lab) -> Iterator[LocalSite]:
    """The real engine with a pool of its own on two nodes, removed afterwards."""
    first, second = (
        NodeEndpoint(uuid4(), node.name, node.libvirt_uri, UUID(node.host_uuid))
        for node in lab_slot.info.nodes
    )
    pool_name = f"contract-{uuid4().hex[:8]}"
    pool_path = f"/var/lib/libvirt/images/{pool_name}"
    nodes = LibvirtNodes()
    conn, other_conn = libvirt.open(first.uri), libvirt.open(second.uri)

    def plant_foreign(name: str) -> None:
        conn.storagePoolLookupByName(pool_name).createXML(
            f"<volume><name>{name}</name><capacity>4096</capacity></volume>"
        )

    volumes = LocalVolumes(nodes, pool_name=pool_name, pool_path=pool_path)
    yield LocalSite(volumes, first, second, pool_path, plant_foreign, conn, pool_name)
    nodes.close()
    for opened in (conn, other_conn):
        with suppress(libvirt.libvirtError):
            remove_pool(opened.storagePoolLookupByName(pool_name))
        opened.close()


def remove_pool(pool: Any) -> None:
    """Removes the pool with all its files."""
    for volume in pool.listAllVolumes():
        volume.delete()
    pool.destroy()
    pool.delete()
    pool.undefine()


@pytest.fixture
def fake_site(database_server: Any) -> Iterator[Site]:
    """The fake on a database of its own."""
    store = SimStore(database_server.create(f"sim_{uuid4().hex[:8]}"))
    first, second = (NodeEndpoint(uuid4(), f"fake-{i}", "fake://") for i in (1, 2))

    def plant_foreign(name: str) -> None:
        store.execute(
            "INSERT INTO sim.volume (location, node_id, name, capacity_bytes, allocation_bytes)"
            " VALUES ('contract', %s, %s, 4096, 4096)",
            [first.node_id, name],
        )

    yield Site(
        FakeVolumes(store, location="contract"),
        first,
        second,
        "/var/lib/libvirt/images/awan",
        plant_foreign,
    )
    store.close()


@pytest.fixture(params=["fake", pytest.param("local", marks=pytest.mark.lab)])
def bare_site(request: pytest.FixtureRequest) -> Site:
    """Each engine in turn, its nodes without a pool."""
    site: Site = request.getfixturevalue(f"{request.param}_site")
    return site


@pytest.fixture
def site(bare_site: Site) -> Site:
    """Each engine in turn, with a pool on both nodes."""
    bare_site.volumes.ensure_pool(bare_site.node)
    bare_site.volumes.ensure_pool(bare_site.other_node)
    return bare_site


@pytest.fixture(scope="session")
def make_image(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ImageSource]:
    """`make_image(text)`: a checked qcow2 image of 64 MiB whose disk begins with the text."""

    def make(text: str) -> ImageSource:
        folder = tmp_path_factory.mktemp("image")
        raw, path = folder / "disk.raw", folder / "disk.qcow2"
        raw.write_bytes(text.encode().ljust(MIB, b"."))
        with raw.open("r+b") as file:
            file.truncate(64 * MIB)
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)]
        subprocess.run(command, check=True)
        return source_of(path)

    return make


def source_of(path: Path) -> ImageSource:
    """The image as the control plane knows it after its check."""
    facts = check_image(path, "qcow2", max_virtual_bytes=1 << 40, max_file_bytes=1 << 34)
    return ImageSource(path, facts.sha256, "qcow2", facts.size_bytes, facts.virtual_size_bytes)
