"""What every volumes engine promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest

from awan.engines.hypervisor import BackingSpec
from awan.engines.volumes import ImageSource, VolumeFacts
from awan.errors import EngineRejected
from tests.engines.volumes_contract.sites import Site

MakeImage = Callable[[str], ImageSource]
GIB = 1 << 30


@pytest.fixture(scope="session")
def image(make_image: MakeImage) -> ImageSource:
    return make_image("first")


@pytest.fixture(scope="session")
def other_image(make_image: MakeImage) -> ImageSource:
    return make_image("second")


def names(site: Site) -> list[str]:
    return [fact.name for fact in site.volumes.list_volumes(site.node)]


def found(site: Site, volume_id: UUID) -> VolumeFacts:
    facts = site.volumes.find(site.node, volume_id)
    assert facts is not None
    return facts


def test_without_a_pool_everything_is_rejected(bare_site: Site, image: ImageSource) -> None:
    volumes, node = bare_site.volumes, bare_site.node
    for call in (
        lambda: volumes.ensure_image(node, image),
        lambda: volumes.delete_image(node, image.sha256),
        lambda: volumes.create_from_image(node, uuid4(), image, 1),
        lambda: volumes.create_blank(node, uuid4(), 1),
        lambda: volumes.find(node, uuid4()),
        lambda: volumes.find_over_image(node, uuid4(), image.sha256),
        lambda: volumes.resize(node, uuid4(), 1),
        lambda: volumes.delete(node, uuid4()),
        lambda: volumes.ensure_seed(node, uuid4(), 1, bytes(2048)),
        lambda: volumes.delete_seeds(node, uuid4()),
        lambda: volumes.list_volumes(node),
    ):
        with pytest.raises(EngineRejected):
            call()


def test_a_new_pool_is_empty_and_is_kept_when_ensured_again(site: Site) -> None:
    assert names(site) == []
    site.volumes.create_blank(site.node, uuid4(), 1)
    site.volumes.ensure_pool(site.node)
    assert len(names(site)) == 1


def test_image_is_there_once_however_often_it_is_ensured(site: Site, image: ImageSource) -> None:
    first = site.volumes.ensure_image(site.node, image)
    assert first == site.volumes.ensure_image(site.node, image)
    assert first.name == f"image-{image.sha256}.qcow2"
    assert first.path == f"{site.pool_path}/{first.name}"
    assert (first.format, first.backing) == ("qcow2", ())
    (facts,) = site.volumes.list_volumes(site.node)
    assert (facts.name, facts.kind, facts.sha256) == (first.name, "image", image.sha256)
    assert (facts.path, facts.volume_id) == (first.path, None)
    assert facts.capacity_bytes == image.virtual_size_bytes
    assert facts.allocation_bytes > 0


def test_raw_images_are_rejected(site: Site, image: ImageSource) -> None:
    with pytest.raises(EngineRejected):
        site.volumes.ensure_image(site.node, dataclasses.replace(image, format="raw"))


def test_volume_from_image_is_over_it_and_has_its_size(site: Site, image: ImageSource) -> None:
    base = site.volumes.ensure_image(site.node, image)
    volume_id = uuid4()
    handle = site.volumes.create_from_image(site.node, volume_id, image, 3)
    assert handle.name == f"vol-{volume_id}.qcow2"
    assert handle.path == f"{site.pool_path}/{handle.name}"
    assert handle.format == "qcow2"
    assert handle.backing == (BackingSpec(base.path, "qcow2"),)
    facts = found(site, volume_id)
    assert (facts.kind, facts.volume_id, facts.sha256) == ("volume", volume_id, None)
    assert (facts.name, facts.path) == (handle.name, handle.path)
    assert facts.capacity_bytes == 3 * GIB
    assert facts.allocation_bytes < GIB


def test_creating_again_gives_the_same_and_changes_nothing(site: Site, image: ImageSource) -> None:
    site.volumes.ensure_image(site.node, image)
    volume_id, blank_id = uuid4(), uuid4()
    first = site.volumes.create_from_image(site.node, volume_id, image, 1)
    site.volumes.resize(site.node, volume_id, 2)
    assert site.volumes.create_from_image(site.node, volume_id, image, 1) == first
    assert found(site, volume_id).capacity_bytes == 2 * GIB
    blank = site.volumes.create_blank(site.node, blank_id, 1)
    assert blank.backing == ()
    assert site.volumes.create_blank(site.node, blank_id, 1) == blank


def test_creating_over_something_else_is_rejected(
    site: Site, image: ImageSource, other_image: ImageSource
) -> None:
    site.volumes.ensure_image(site.node, image)
    site.volumes.ensure_image(site.node, other_image)
    volume_id = uuid4()
    site.volumes.create_from_image(site.node, volume_id, image, 1)
    with pytest.raises(EngineRejected):
        site.volumes.create_from_image(site.node, volume_id, other_image, 1)
    with pytest.raises(EngineRejected):
        site.volumes.create_blank(site.node, volume_id, 1)


def test_volume_needs_its_image_on_the_node_and_room_for_it(site: Site, image: ImageSource) -> None:
    with pytest.raises(EngineRejected):
        site.volumes.create_from_image(site.node, uuid4(), image, 1)
    site.volumes.ensure_image(site.node, image)
    big = dataclasses.replace(image, virtual_size_bytes=GIB + 1)
    with pytest.raises(EngineRejected):
        site.volumes.create_from_image(site.node, uuid4(), big, 1)
    assert len(names(site)) == 1


def test_find_of_an_absent_volume_gives_none(site: Site) -> None:
    assert site.volumes.find(site.node, uuid4()) is None


def test_find_over_image_gives_what_was_made_over_it_and_makes_nothing(
    site: Site, image: ImageSource, other_image: ImageSource
) -> None:
    site.volumes.ensure_image(site.node, image)
    site.volumes.ensure_image(site.node, other_image)
    volume_id, blank_id, absent_id, foreign_id = uuid4(), uuid4(), uuid4(), uuid4()
    made = site.volumes.create_from_image(site.node, volume_id, image, 1)
    site.volumes.create_blank(site.node, blank_id, 1)
    site.plant_foreign(f"vol-{foreign_id}.qcow2")
    before = names(site)
    assert site.volumes.find_over_image(site.node, volume_id, image.sha256) == made
    site.volumes.resize(site.node, volume_id, 2)
    assert site.volumes.find_over_image(site.node, volume_id, image.sha256) == made
    assert site.volumes.find_over_image(site.node, volume_id, other_image.sha256) is None
    for other_id in (blank_id, absent_id, foreign_id):
        assert site.volumes.find_over_image(site.node, other_id, image.sha256) is None
    assert names(site) == before


def test_resize_grows_and_never_shrinks(site: Site) -> None:
    volume_id = uuid4()
    site.volumes.create_blank(site.node, volume_id, 2)
    site.volumes.resize(site.node, volume_id, 3)
    site.volumes.resize(site.node, volume_id, 3)
    assert found(site, volume_id).capacity_bytes == 3 * GIB
    with pytest.raises(EngineRejected):
        site.volumes.resize(site.node, volume_id, 2)
    assert found(site, volume_id).capacity_bytes == 3 * GIB
    with pytest.raises(EngineRejected):
        site.volumes.resize(site.node, uuid4(), 3)


def test_delete_removes_exactly_that_volume(site: Site) -> None:
    gone, kept = uuid4(), uuid4()
    site.volumes.create_blank(site.node, gone, 1)
    site.volumes.create_blank(site.node, kept, 1)
    site.volumes.delete(site.node, gone)
    site.volumes.delete(site.node, gone)
    site.volumes.delete(site.node, uuid4())
    assert site.volumes.find(site.node, gone) is None
    assert names(site) == [f"vol-{kept}.qcow2"]
    site.volumes.create_blank(site.node, gone, 1)
    assert site.volumes.find(site.node, gone) is not None


def test_image_in_use_cannot_be_deleted(site: Site, image: ImageSource) -> None:
    site.volumes.ensure_image(site.node, image)
    volume_id = uuid4()
    site.volumes.create_from_image(site.node, volume_id, image, 1)
    with pytest.raises(EngineRejected):
        site.volumes.delete_image(site.node, image.sha256)
    site.volumes.create_from_image(site.node, uuid4(), image, 1)
    for fact in site.volumes.list_volumes(site.node):
        if fact.volume_id is not None:
            site.volumes.delete(site.node, fact.volume_id)
    site.volumes.delete_image(site.node, image.sha256)
    site.volumes.delete_image(site.node, image.sha256)
    assert names(site) == []
    with pytest.raises(EngineRejected):
        site.volumes.create_from_image(site.node, volume_id, image, 1)
    site.volumes.ensure_image(site.node, image)
    site.volumes.create_from_image(site.node, volume_id, image, 1)


def test_seeds_are_kept_by_generation(site: Site) -> None:
    instance_id, other_id = uuid4(), uuid4()
    handle = site.volumes.ensure_seed(site.node, instance_id, 1, b"a" * 4096)
    assert handle == site.volumes.ensure_seed(site.node, instance_id, 1, b"a" * 4096)
    assert handle.name == f"seed-{instance_id}-1.iso"
    assert handle.path == f"{site.pool_path}/{handle.name}"
    assert (handle.format, handle.backing) == ("raw", ())
    site.volumes.ensure_seed(site.node, instance_id, 1, b"b" * 6144)
    (facts,) = site.volumes.list_volumes(site.node)
    assert (facts.kind, facts.volume_id, facts.sha256) == ("seed", None, None)
    assert facts.capacity_bytes == 6144
    site.volumes.ensure_seed(site.node, instance_id, 2, b"c" * 4096)
    site.volumes.ensure_seed(site.node, other_id, 1, b"d" * 4096)
    site.volumes.delete_seeds(site.node, instance_id, keep=2)
    assert names(site) == sorted([f"seed-{instance_id}-2.iso", f"seed-{other_id}-1.iso"])
    site.volumes.delete_seeds(site.node, instance_id)
    site.volumes.delete_seeds(site.node, instance_id)
    site.volumes.delete_seeds(site.node, uuid4())
    assert names(site) == [f"seed-{other_id}-1.iso"]


def test_foreign_files_are_listed_as_such(site: Site, image: ImageSource) -> None:
    strange = [
        "someone.img",
        f"vol-{uuid4()}.qcow2.bak",
        "vol-no-uuid.qcow2",
        f"image-{'0' * 64}.qcow2.complete",
    ]
    for name in strange:
        site.plant_foreign(name)
    site.volumes.create_blank(site.node, uuid4(), 1)
    facts = site.volumes.list_volumes(site.node)
    assert [fact.name for fact in facts] == sorted(fact.name for fact in facts)
    assert sorted(fact.name for fact in facts if fact.kind == "foreign") == sorted(strange)
    assert len(facts) == len(strange) + 1


def test_nodes_do_not_share_volumes(site: Site) -> None:
    volume_id = uuid4()
    site.volumes.create_blank(site.node, volume_id, 1)
    assert site.volumes.find(site.other_node, volume_id) is None
    assert site.volumes.list_volumes(site.other_node) == []
    site.volumes.delete(site.other_node, volume_id)
    assert site.volumes.find(site.node, volume_id) is not None


def test_many_at_once(site: Site, image: ImageSource) -> None:
    site.volumes.ensure_image(site.node, image)
    ids = [uuid4() for _ in range(12)]

    def create(volume_id: UUID) -> None:
        site.volumes.create_from_image(site.node, volume_id, image, 1)
        site.volumes.ensure_seed(site.node, volume_id, 1, volume_id.bytes * 128)

    def remove(volume_id: UUID) -> None:
        site.volumes.delete_seeds(site.node, volume_id)
        site.volumes.delete(site.node, volume_id)

    with ThreadPoolExecutor(6) as executor:
        list(executor.map(create, ids))
        assert len(names(site)) == 25
        list(executor.map(remove, ids))
    assert names(site) == [f"image-{image.sha256}.qcow2"]
