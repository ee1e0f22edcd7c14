"""The XML of a domain: reviewed as text, valid, and closed to hostile text."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from awan.engines.hypervisor import BackingSpec, DiskSpec, DomainSpec, NicSpec
from awan.engines.hypervisor.domain_xml import (
    TITLE_LENGTH_MAX,
    HostTraits,
    build_domain,
    build_media,
    disk_name,
    drop_cpu_shares,
    parse_cpuset,
    read_identity,
    read_media_path,
)
from awan.errors import EngineRejected

GOLDEN = Path(__file__).parent / "golden"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
POOL = "/var/lib/libvirt/images/awan"
TCG = HostTraits(False, "/usr/bin/qemu-system-x86_64", "br-int", nic_offloads=False)
KVM = replace(TCG, kvm=True, nic_offloads=True)

SPEC = DomainSpec(
    instance_id=UUID("11111111-1111-4111-8111-111111111111"),
    operation_id=UUID("22222222-2222-4222-8222-222222222222"),
    account_id=UUID("33333333-3333-4333-8333-333333333333"),
    title="web-1",
    vcpus=2,
    vcpus_max=8,
    memory_mib=2048,
    memory_max_mib=16384,
    dedicated=False,
    cpu_shares=2048,
    disks=(
        DiskSpec(
            f"{POOL}/vol-1.qcow2",
            "qcow2",
            0,
            "root",
            backing=(
                BackingSpec(f"{POOL}/image-2.qcow2", "qcow2"),
                BackingSpec(f"{POOL}/image-1.raw", "raw"),
            ),
        ),
        DiskSpec(f"{POOL}/seed-1.iso", "raw", 1, "seed", device="cdrom"),
        DiskSpec(f"{POOL}/vol-2.raw", "raw", 27, "data-1"),
    ),
    nics=(
        NicSpec(UUID("44444444-4444-4444-8444-444444444444"), "52:54:00:00:00:01"),
        NicSpec(UUID("55555555-5555-4555-8555-555555555555"), "52:54:00:00:00:02", 1442),
    ),
)
DEDICATED = replace(SPEC, dedicated=True, threads=(4, 5), memory_max_mib=2048, vcpus_max=2)
CONFINED = replace(SPEC, threads=(0, 1, 3))
CASES = {
    "shared-tcg": (SPEC, TCG),
    "confined-tcg": (CONFINED, TCG),
    "dedicated-kvm": (DEDICATED, KVM),
}


def build(spec: DomainSpec = SPEC, host: HostTraits = TCG) -> str:
    return build_domain(spec, host, "12345678")


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """Reviewed as text; written anew with AWAN_WRITE_GOLDEN=1."""
    path = GOLDEN / f"{name}.xml"
    text = build(*CASES[name])
    if os.environ.get("AWAN_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_libvirts_schema_accepts_it(name: str) -> None:
    if not SCHEMA.exists():
        pytest.skip("libvirt's schemas are not installed")
    schema = etree.RelaxNG(etree.parse(SCHEMA))
    schema.assertValid(etree.fromstring(build(*CASES[name])))


def test_what_is_written_is_read_back() -> None:
    identity = read_identity(build(DEDICATED, KVM))
    assert identity.instance_id == SPEC.instance_id
    assert identity.operation_id == SPEC.operation_id
    assert identity.disk_paths == tuple(disk.path for disk in SPEC.disks)
    assert identity.port_ids == tuple(nic.port_id for nic in SPEC.nics)
    assert (identity.threads, identity.is_dedicated) == ((4, 5), True)
    confined = read_identity(build(CONFINED))
    assert (confined.threads, confined.is_dedicated) == ((0, 1, 3), False)
    assert read_identity(build()).threads == ()
    assert read_media_path(build(), 1) == f"{POOL}/seed-1.iso"


def test_foreign_domains_have_no_identity() -> None:
    foreign = "<domain><name>x</name><metadata/><devices><disk/><interface/></devices></domain>"
    identity = read_identity(foreign)
    assert (identity.instance_id, identity.disk_paths, identity.port_ids) == (None, (), ())
    forged = build().replace(str(SPEC.instance_id), "not-a-uuid")
    assert read_identity(forged).instance_id is None


def test_external_entities_are_not_read() -> None:
    text = (
        '<!DOCTYPE d [<!ENTITY e SYSTEM "file:///etc/hostname">]><domain><name>&e;</name></domain>'
    )
    assert read_identity(text).instance_id is None


def test_empty_media() -> None:
    assert etree.fromstring(build_media(1, None)).find("source") is None
    with pytest.raises(EngineRejected):
        read_media_path(build(), 0)


def test_disk_names() -> None:
    assert [disk_name(n) for n in (0, 1, 25, 26, 27, 51, 52)] == [
        *("sda", "sdb", "sdz", "sdaa", "sdab", "sdaz", "sdba")
    ]


def test_cpu_shares_can_be_left_out() -> None:
    without = drop_cpu_shares(build(DEDICATED, KVM))
    assert without is not None
    assert etree.fromstring(without).find("cputune/vcpupin") is not None
    assert drop_cpu_shares(without) is None
    plain = drop_cpu_shares(build())
    assert plain is not None
    assert etree.fromstring(plain).find("cputune") is None


def shape(xml: str) -> list[object]:
    """The tree without texts: tags, attribute names, and their order."""

    def walk(element: etree._Element) -> list[object]:
        return [element.tag, sorted(element.attrib), [walk(child) for child in element]]

    return walk(etree.fromstring(xml))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0-3,^2,8", {0, 1, 3, 8}), ("5", {5}), ("", set()), ("^1,0-2", {0, 2}), ("x,1", {1})],
)
def test_cpusets_are_read(text: str, numbers: set[int]) -> None:
    assert parse_cpuset(text) == numbers


@given(title=st.text(max_size=300))
def test_no_title_changes_the_structure(title: str) -> None:
    xml = build(replace(SPEC, title=title))
    assert shape(xml) == shape(build())
    written = etree.fromstring(xml).findtext("title") or ""
    assert "\n" not in written
    assert len(written) <= TITLE_LENGTH_MAX


@pytest.mark.parametrize(
    "title",
    [
        "</title><devices><hostdev mode='subsystem'/></devices><title>",
        "]]><!-- --><![CDATA[<hostdev/>]]>",
        "a\n<hostdev/>\r\x00\x1b\ud800",
        "&lt;hostdev/&gt; &e; $(reboot) `id` %s {0}",
        "متجر 🛒 " + "x" * 1000,
    ],
)
def test_hostile_titles(title: str) -> None:
    xml = build(replace(SPEC, title=title))
    assert shape(xml) == shape(build())
    assert etree.fromstring(xml).find(".//hostdev") is None


@given(text=st.text(min_size=1, max_size=60))
def test_texts_elsewhere_are_refused_or_kept_whole(text: str) -> None:
    """Paths, serials and MAC addresses: the element tree stays, or nothing is built."""
    changes: list[Callable[[], DomainSpec]] = [
        lambda: replace(SPEC, disks=(replace(SPEC.disks[0], path=text), *SPEC.disks[1:])),
        lambda: replace(SPEC, disks=(replace(SPEC.disks[0], path=f"/{text}"), *SPEC.disks[1:])),
        lambda: replace(SPEC, disks=(replace(SPEC.disks[0], serial=text), *SPEC.disks[1:])),
        lambda: replace(SPEC, nics=(replace(SPEC.nics[0], mac=text), SPEC.nics[1])),
    ]
    for change in changes:
        try:
            xml = build(change())
        except EngineRejected:
            continue
        assert shape(xml) == shape(build())
