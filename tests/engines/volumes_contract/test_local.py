"""What the local engine promises beyond the contract: files on a real node."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from lxml import etree

from awan.engines.libvirt_nodes import LibvirtNodes
from awan.engines.volumes import ImageSource
from awan.engines.volumes.local import LocalVolumes
from awan.errors import EngineError, EngineRejected, EngineUnavailable
from lab import Lab
from tests.engines.volumes_contract.sites import LocalSite

pytestmark = pytest.mark.lab
MakeImage = Callable[[str], ImageSource]
MARKER = b"THE-FORMER-TENANT'S-SECRET."
MIB = 1 << 20


@pytest.fixture
def site(local_site: LocalSite) -> LocalSite:
    local_site.volumes.ensure_pool(local_site.node)
    return local_site


@pytest.fixture(scope="module")
def image(make_image: MakeImage) -> ImageSource:
    return make_image("local")


def volume_of(site: LocalSite, name: str) -> Any:
    return site.conn.storagePoolLookupByName(site.pool_name).storageVolLookupByName(name)


def xml_of(site: LocalSite, name: str) -> Any:
    return etree.fromstring(volume_of(site, name).XMLDesc(0))


def read_file(site: LocalSite, name: str) -> bytes:
    content = bytearray()
    stream = site.conn.newStream(0)
    volume_of(site, name).download(stream, 0, 0, 0)
    while chunk := stream.recv(262120):
        content += chunk
    stream.finish()
    return bytes(content)


def write_file(site: LocalSite, name: str, content: bytes) -> None:
    stream = site.conn.newStream(0)
    volume_of(site, name).upload(stream, 0, 0, 0)
    for start in range(0, len(content), 262120):
        stream.send(content[start : start + 262120])
    stream.finish()


def leave_partial_upload(site: LocalSite, image: ImageSource) -> str:
    """What a worker leaves that was killed while it uploaded the image."""
    name = f"image-{image.sha256}.qcow2"
    site.plant_foreign(name)
    write_file(site, name, image.path.read_bytes()[: image.size_bytes // 2])
    return name


def test_uploaded_image_is_byte_for_byte_the_same(site: LocalSite, image: ImageSource) -> None:
    handle = site.volumes.ensure_image(site.node, image)
    assert hashlib.sha256(read_file(site, handle.name)).hexdigest() == image.sha256


def test_interrupted_upload_is_detected_and_done_again(site: LocalSite, image: ImageSource) -> None:
    name = leave_partial_upload(site, image)
    with pytest.raises(EngineRejected):
        site.volumes.create_from_image(site.node, uuid4(), image, 1)
    site.volumes.ensure_image(site.node, image)
    assert hashlib.sha256(read_file(site, name)).hexdigest() == image.sha256
    site.volumes.create_from_image(site.node, uuid4(), image, 1)


def test_partial_image_can_be_deleted(site: LocalSite, image: ImageSource) -> None:
    leave_partial_upload(site, image)
    site.volumes.delete_image(site.node, image.sha256)
    assert site.volumes.list_volumes(site.node) == []


def test_image_that_arrives_damaged_is_rejected_and_removed(
    site: LocalSite, image: ImageSource, tmp_path: Path
) -> None:
    content = bytearray(image.path.read_bytes())
    content[-1] ^= 1
    damaged = tmp_path / "damaged.qcow2"
    damaged.write_bytes(content)
    with pytest.raises(EngineRejected, match="sha256"):
        site.volumes.ensure_image(site.node, dataclasses.replace(image, path=damaged))
    assert site.volumes.list_volumes(site.node) == []


def test_several_processes_upload_the_same_image_at_once(
    site: LocalSite, image: ImageSource
) -> None:
    """One may be told to come again while another makes the file; nobody gets half an image."""

    def ensure(_: int) -> None:
        nodes = LibvirtNodes()
        volumes = LocalVolumes(nodes, pool_name=site.pool_name, pool_path=site.pool_path)
        try:
            for attempt in range(50):
                try:
                    volumes.ensure_image(site.node, image)
                    break
                except EngineUnavailable:
                    assert attempt < 49
                    time.sleep(0.2)
            volumes.create_from_image(site.node, uuid4(), image, 1)
        finally:
            nodes.close()

    with ThreadPoolExecutor(3) as executor:
        list(executor.map(ensure, range(3)))
    name = site.volumes.ensure_image(site.node, image).name
    assert hashlib.sha256(read_file(site, name)).hexdigest() == image.sha256


def test_owners_modes_and_formats_are_explicit(site: LocalSite, image: ImageSource) -> None:
    base = site.volumes.ensure_image(site.node, image)
    volume = site.volumes.create_from_image(site.node, uuid4(), image, 1)
    seed = site.volumes.ensure_seed(site.node, uuid4(), 1, bytes(4096))
    for handle, mode in ((base, "0444"), (volume, "0600"), (seed, "0600")):
        permissions = xml_of(site, handle.name).find("target/permissions")
        assert permissions.findtext("mode") == mode
        assert (permissions.findtext("owner"), permissions.findtext("group")) == ("0", "0")
    xml = xml_of(site, volume.name)
    assert xml.find("target/format").get("type") == "qcow2"
    assert xml.findtext("backingStore/path") == base.path
    assert xml.find("backingStore/format").get("type") == "qcow2"
    header = read_file(site, volume.name)
    assert b"qcow2" in header[:1024], "the backing format is not in the file's header"
    pool = etree.fromstring(site.conn.storagePoolLookupByName(site.pool_name).XMLDesc(0))
    assert pool.findtext("target/permissions/mode") == "0711"


def test_seed_on_the_node_has_the_given_content(site: LocalSite) -> None:
    instance_id = uuid4()
    for content in (b"a" * 4096, b"b" * 4096, b"c" * 2048, b"d" * 8192):
        name = site.volumes.ensure_seed(site.node, instance_id, 1, content).name
        assert read_file(site, name) == content


def test_seed_whose_upload_was_cut_off_is_completed(site: LocalSite) -> None:
    instance_id = uuid4()
    name = f"seed-{instance_id}-1.iso"
    site.plant_foreign(name)
    site.volumes.ensure_seed(site.node, instance_id, 1, b"s" * 4096)
    assert read_file(site, name) == b"s" * 4096


def test_volume_whose_creation_was_cut_off_is_made_again(
    site: LocalSite, image: ImageSource
) -> None:
    site.volumes.ensure_image(site.node, image)
    volume_id = uuid4()
    site.plant_foreign(f"vol-{volume_id}.qcow2")
    handle = site.volumes.create_from_image(site.node, volume_id, image, 1)
    assert xml_of(site, handle.name).findtext("backingStore/path") == handle.backing[0].path


def test_new_volumes_show_nothing_of_deleted_ones(
    site: LocalSite, image: ImageSource, tmp_path: Path
) -> None:
    site.volumes.ensure_image(site.node, image)
    for round_number in range(3):
        old_id = uuid4()
        old = site.volumes.create_blank(site.node, old_id, 1)
        write_file(site, old.name, MARKER * (32 * MIB // len(MARKER)))
        assert MARKER in read_file(site, old.name)
        site.volumes.delete(site.node, old_id)
        blank = site.volumes.create_blank(site.node, uuid4(), 1)
        over = site.volumes.create_from_image(site.node, uuid4(), image, 1)
        seed = site.volumes.ensure_seed(site.node, uuid4(), 1, bytes(4 * MIB))
        site.plant_foreign(f"round-{round_number}.img")
        for name in (blank.name, over.name, seed.name, f"round-{round_number}.img"):
            assert MARKER not in read_file(site, name)
        local = tmp_path / "blank.qcow2"
        local.write_bytes(read_file(site, blank.name))
        raw = tmp_path / "blank.raw"
        command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(local), str(raw)]
        subprocess.run(command, check=True)
        assert raw.stat().st_size == 1 << 30
        with raw.open("rb") as file:
            while chunk := file.read(8 * MIB):
                assert chunk.count(0) == len(chunk), "a blank volume does not read as zeroes"


def test_pool_of_another_kind_is_not_taken_over(site: LocalSite) -> None:
    nodes = LibvirtNodes()
    elsewhere = LocalVolumes(nodes, pool_name=site.pool_name, pool_path=f"{site.pool_path}-x")
    try:
        with pytest.raises(EngineRejected):
            elsewhere.ensure_pool(site.node)
    finally:
        nodes.close()


def test_stopped_pool_is_started_again(site: LocalSite) -> None:
    volume_id = uuid4()
    site.volumes.create_blank(site.node, volume_id, 1)
    pool = site.conn.storagePoolLookupByName(site.pool_name)
    pool.destroy()
    pool.setAutostart(0)
    with pytest.raises(EngineError):
        site.volumes.find(site.node, volume_id)
    site.volumes.ensure_pool(site.node)
    assert pool.isActive()
    assert pool.autostart()
    assert site.volumes.find(site.node, volume_id) is not None


def test_a_disk_whose_header_is_gone_is_not_found_whole(
    site: LocalSite, image: ImageSource, lab_slot: Lab
) -> None:
    site.volumes.ensure_image(site.node, image)
    volume_id = uuid4()
    made = site.volumes.create_from_image(site.node, volume_id, image, 1)
    assert site.volumes.find_over_image(site.node, volume_id, image.sha256) == made
    # Past libvirtd, which goes on listing it as a qcow2.
    write_file(site, made.name, bytes(4096))
    assert site.volumes.find_over_image(site.node, volume_id, image.sha256) is None
    file = lab_slot.node_path(site.node.name, made.path)
    file.unlink()
    assert site.volumes.find_over_image(site.node, volume_id, image.sha256) is None
    assert not file.exists()
