"""Comparisons that simulated engines cannot bring about, and what is left alone while it changes."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID, uuid4

from awan.engines.hypervisor import DomainFacts, Power
from awan.engines.volumes import VolumeFacts
from awan.engines.volumes.names import name_image, name_seed, name_volume, read_name
from awan.reconcile import FindingKind
from awan.reconcile.rules import (
    GIB,
    ExpectedInstance,
    ExpectedLocation,
    ExpectedNode,
    ExpectedVolume,
    Unsettled,
    compare_domains,
    compare_files,
)

NODE = ExpectedNode(uuid4(), "n1")


def make_instance(**changes: object) -> ExpectedInstance:
    """A running instance with one disk and a scrubbed seed."""
    made = ExpectedInstance(
        instance_id=uuid4(),
        name="web-1",
        node_id=NODE.node_id,
        power=Power.RUNNING,
        volumes=(ExpectedVolume(uuid4(), 20),),
        port_ids=frozenset(),
        seed_generations=(2,),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def make_location(*instances: ExpectedInstance, **unsettled: set[object]) -> ExpectedLocation:
    """A location with one node."""
    return ExpectedLocation(
        "jkt1",
        {NODE.node_id: NODE},
        instances,
        unsettled=Unsettled(**unsettled),  # type: ignore[arg-type]
    )


def domain_of(instance: ExpectedInstance, seed: int = 2) -> DomainFacts:
    """The domain as it should be."""
    disks = [name_volume(it.volume_id) for it in instance.volumes]
    disks.append(name_seed(instance.instance_id, seed))
    return DomainFacts(
        domain_uuid=instance.instance_id,
        name=f"awan-{instance.instance_id}",
        power=Power.RUNNING,
        instance_id=instance.instance_id,
        operation_id=None,
        disk_paths=tuple(f"/pool/{name}" for name in disks),
    )


def file(name: str, capacity_bytes: int = 20 * GIB) -> VolumeFacts:
    """A file in the pool."""
    read = read_name(name)
    return VolumeFacts(
        name, f"/pool/{name}", read.kind, read.volume_id, read.sha256, capacity_bytes, 1
    )


def test_a_domain_without_our_metadata_is_a_stray_under_whatever_uuid() -> None:
    instance = make_instance()
    foreign = DomainFacts(uuid4(), "by-hand", Power.STOPPED, None, None)
    disguised = replace(domain_of(instance), instance_id=None)
    found = list(compare_domains(make_location(instance), NODE, [foreign, disguised]))
    assert [it.kind for it in found] == [FindingKind.DOMAIN_STRAY] * 2
    assert all("does not carry our metadata" in it.sentence for it in found)


def test_a_foreign_domain_is_never_settled_away() -> None:
    instance_id = uuid4()
    foreign = DomainFacts(uuid4(), "by-hand", Power.RUNNING, None, None)
    ours = DomainFacts(instance_id, "awan", Power.RUNNING, instance_id, None)
    where = make_location(instance_ids={instance_id})
    assert [it.subject for it in compare_domains(where, NODE, [ours, foreign])] == [
        str(foreign.domain_uuid)
    ]


def test_a_crash_of_an_instance_that_is_known_as_stopped_is_no_finding() -> None:
    instance = make_instance(power=Power.STOPPED)
    crashed = replace(domain_of(instance), power=Power.CRASHED)
    assert list(compare_domains(make_location(instance), NODE, [crashed])) == []


def test_either_seed_will_do_while_the_first_boot_is_waited_for_but_one_must_be_there() -> None:
    instance = make_instance(seed_generations=(1, 2))
    where = make_location(instance)
    disk = file(name_volume(instance.volumes[0].volume_id))
    seeds = [file(name_seed(instance.instance_id, number), 1) for number in (1, 2)]
    assert list(compare_domains(where, NODE, [domain_of(instance, seed=1)])) == []
    for present in ([seeds[0]], [seeds[1]], seeds):
        assert list(compare_files(where, NODE, [disk, *present])) == []
    assert [it.kind for it in compare_files(where, NODE, [disk])] == [FindingKind.FILE_MISSING]


def test_files_of_what_is_being_made_or_removed_are_no_strays() -> None:
    instance_id, volume_id, sha256 = uuid4(), uuid4(), "ab" * 32
    where = make_location(
        instance_ids={instance_id}, volume_ids={volume_id}, image_sha256s={sha256}
    )
    files = [name_volume(volume_id), name_seed(instance_id, 7), name_image(sha256), "notes.txt"]
    found = list(compare_files(where, NODE, [file(name) for name in files]))
    assert [it.subject for it in found] == ["notes.txt"]


def test_a_domain_on_the_wrong_node_says_where_it_belongs() -> None:
    other = ExpectedNode(UUID(int=1), "n2")
    instance = make_instance()
    where = replace(make_location(instance), nodes={NODE.node_id: NODE, other.node_id: other})
    (found,) = compare_domains(where, other, [domain_of(instance)])
    assert found.kind is FindingKind.DOMAIN_STRAY
    assert "belongs on n1" in found.sentence
