"""What libvirt tells of a domain, read as counters. The answers are those of libvirt 9.0 on a real node."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest

from awan.engines.hypervisor import CardCounters, DiskCounters, DomainCounters
from awan.engines.hypervisor.libvirt_counters import read_domain_counters

DOMAIN = uuid4()
STATS: dict[str, Any] = {
    "cpu.time": 424578875, "cpu.user": 200000000, "cpu.system": 210000000,
    "balloon.current": 196608, "balloon.maximum": 196608, "balloon.unused": 100000, "balloon.available": 180000,
    "balloon.usable": 120000, "balloon.rss": 53428,
    "net.count": 2, "net.0.name": "tap0a1b2c3d4e5f", "net.0.rx.bytes": 100, "net.0.tx.bytes": 7,
    "net.1.name": "tap5f4e3d2c1b0a", "net.1.rx.bytes": 50, "net.1.tx.bytes": 3,
    "block.count": 3, "block.0.name": "sda", "block.0.path": "/pool/a", "block.0.rd.bytes": 512,
    "block.0.wr.bytes": 1024, "block.0.allocation": 0, "block.0.capacity": 1073741824, "block.0.physical": 200704,
    "block.1.name": "sdb",
    "block.2.name": "sdc", "block.2.path": "/pool/c", "block.2.rd.bytes": 1, "block.2.wr.bytes": 2,
    "block.2.physical": 3,
}  # fmt: skip


class Domain:
    """What of a `libvirt.virDomain` is read beside its statistics."""

    def __init__(self, run_id: int = 7) -> None:
        self._run_id = run_id

    def UUID(self) -> bytes:  # noqa: N802 libvirt's name
        return DOMAIN.bytes

    def ID(self) -> int:  # noqa: N802 libvirt's name
        return self._run_id


def read(**changes: Any) -> DomainCounters:
    stats = {name: value for name, value in {**STATS, **changes}.items() if value is not None}
    found = read_domain_counters(Domain(), stats)
    assert found is not None
    return found


def test_disks_are_added_up_and_cards_told_apart() -> None:
    """An empty CD drive has no counters and hides nobody else's."""
    assert read() == DomainCounters(
        domain_uuid=UUID(str(DOMAIN)),
        run_id=7,
        cpu_time_ns=424578875,
        cards=(
            CardCounters("tap0a1b2c3d4e5f", 100, 7),
            CardCounters("tap5f4e3d2c1b0a", 50, 3),
        ),
        disks=DiskCounters(513, 1026, 200707),
        memory_used_bytes=60000 * 1024,
    )
    assert (read().net_in_bytes, read().net_out_bytes) == (150, 10)


@pytest.mark.parametrize("missing", ["block.count", "block.0.rd.bytes", "block.2.physical"])
def test_a_disk_that_is_not_told_of_hides_all(missing: str) -> None:
    """A sum without it would seem to fall."""
    assert read(**{missing: None}).disks is None


def test_memory_in_use_is_what_the_guest_could_not_give_up() -> None:
    assert read(**{"balloon.usable": None}).memory_used_bytes == 80000 * 1024
    for silent in ({"balloon.available": None}, {"balloon.usable": None, "balloon.unused": None}):
        assert read(**silent).memory_used_bytes is None
    assert read(**{"balloon.usable": 190000}).memory_used_bytes == 0


def test_a_card_without_counters_yet_counts_nothing() -> None:
    assert read(**{"net.1.rx.bytes": None, "net.1.tx.bytes": None}).net_in_bytes == 100
    assert read(**{"net.count": None}).net_in_bytes == 0


def test_domains_that_have_ended_are_left_out() -> None:
    assert read_domain_counters(Domain(-1), STATS) is None
    assert read_domain_counters(Domain(), {"net.count": 0}) is None
