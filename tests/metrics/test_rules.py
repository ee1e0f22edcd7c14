"""Counters to use: what is used is counted once, in its minute, and what is not known is not counted."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awan.engines.hypervisor import CardCounters, DiskCounters, DomainCounters
from awan.metrics.rules import (
    GAP_MAX_S,
    NOTHING,
    NS_PER_S,
    PERIODS,
    Limits,
    Reading,
    Sums,
    advance,
    floor,
    frame,
)

BEGAN = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
NODE, DOMAIN = uuid4(), uuid4()
CARD = "tap0a1b2c3d4e5f"
LIMITS = Limits(vcpus=2, memory_bytes=1024, storage_bytes=4096)


def at(after_s: float) -> datetime:
    return BEGAN + timedelta(seconds=after_s)


def counters(
    cpu_s: float = 0, net: int = 0, disk: int | None = 0, memory: int | None = 100, run: int = 1
) -> DomainCounters:
    return DomainCounters(
        domain_uuid=DOMAIN,
        run_id=run,
        cpu_time_ns=int(cpu_s * NS_PER_S),
        cards=(CardCounters(CARD, net, 2 * net),),
        disks=DiskCounters(3 * disk, 4 * disk, 500) if disk is not None else None,
        memory_used_bytes=memory,
    )


class Measured:
    """An instance that is read again and again."""

    def __init__(self) -> None:
        self.reading: Reading | None = None
        self.minutes: dict[datetime, Sums] = {}

    def read(self, after_s: float, found: DomainCounters, node: UUID = NODE) -> None:
        self.reading, over = advance(
            self.reading, found, node_id=node, read_at=at(after_s), limits=LIMITS
        )
        for minute, sums in over.items():
            self.minutes[minute] = self.minutes.get(minute, NOTHING).plus(sums)

    def total(self) -> Sums:
        """Everything that was counted so far."""
        assert self.reading is not None
        total = self.reading.minute
        for sums in self.minutes.values():
            total = total.plus(sums)
        return total


def test_the_first_reading_says_nothing() -> None:
    measured = Measured()
    measured.read(10, counters(cpu_s=1000, net=10**9))
    assert measured.total() == NOTHING
    assert measured.minutes == {}


def test_a_minute_is_what_its_counters_grew_by() -> None:
    measured = Measured()
    for after_s in range(0, 70, 10):
        measured.read(after_s, counters(cpu_s=after_s / 2, net=100 * after_s, disk=after_s))
    assert measured.minutes == {
        BEGAN: Sums(
            measured_s=60, cpu_s=30, vcpu_s=120, memory_limit_bs=60 * 1024, storage_limit_bs=60 * 4096,
            net_in_bytes=6000, net_out_bytes=12000, disk_measured_s=60, disk_read_bytes=180,
            disk_written_bytes=240, disk_used_bs=60 * 500, memory_measured_s=60, memory_used_bs=6000,
        )
    }  # fmt: skip
    assert measured.total() == measured.minutes[BEGAN]


def test_what_spans_two_minutes_is_split_by_time() -> None:
    measured = Measured()
    measured.read(55, counters())
    measured.read(75, counters(net=1000))
    assert measured.minutes[BEGAN].net_in_bytes == 250
    assert measured.minutes[BEGAN].measured_s == 5
    assert measured.reading is not None
    assert measured.reading.minute.net_in_bytes == 750
    assert measured.reading.minute.measured_s == 15


@pytest.mark.parametrize(
    "fallen",
    [
        counters(cpu_s=1, net=2000, disk=2000),
        counters(cpu_s=2000, net=1, disk=2000),
        counters(cpu_s=2000, net=2**64 % 999, disk=2000),
    ],
)
def test_a_fallen_counter_is_time_not_measured(fallen: DomainCounters) -> None:
    measured = Measured()
    measured.read(0, counters(cpu_s=1000, net=1000, disk=1000))
    measured.read(10, fallen)
    total = measured.total()
    assert (total.measured_s, total.cpu_s, total.net_in_bytes, total.net_out_bytes) == (0, 0, 0, 0)
    # The disks did not fall.
    assert (total.disk_measured_s, total.disk_read_bytes) == (10, 3000)


def test_disks_fall_on_their_own() -> None:
    measured = Measured()
    measured.read(0, counters(net=0, disk=1000))
    measured.read(10, counters(net=50, disk=10))
    total = measured.total()
    assert (total.measured_s, total.net_in_bytes) == (10, 50)
    assert (total.disk_measured_s, total.disk_read_bytes, total.disk_written_bytes) == (0, 0, 0)


def test_counters_of_another_run_or_node_are_not_compared() -> None:
    """Also when they have grown past the old ones: a busy start would else look like idling."""
    for changed in ({"run": 2}, {"node": uuid4()}):
        measured = Measured()
        measured.read(0, counters(cpu_s=1, net=1, disk=1))
        node = changed.pop("node", NODE)
        assert isinstance(node, UUID)
        measured.read(10, counters(cpu_s=9, net=900, disk=900, **changed), node)  # type: ignore[arg-type]
        assert measured.total() == NOTHING
        measured.read(20, counters(cpu_s=10, net=1000, disk=1000, **changed), node)  # type: ignore[arg-type]
        assert (measured.total().cpu_s, measured.total().net_in_bytes) == (1, 100)


def test_a_gap_is_measured_up_to_its_limit() -> None:
    for gap_s, net_in in ((GAP_MAX_S, 1000), (GAP_MAX_S + 1, 0)):
        measured = Measured()
        measured.read(0, counters())
        measured.read(gap_s, counters(net=1000))
        assert measured.total().net_in_bytes == pytest.approx(net_in)


def test_silent_disks_are_made_up_for_later() -> None:
    measured = Measured()
    measured.read(0, counters(net=0, disk=0))
    measured.read(30, counters(net=30, disk=None, memory=None))
    assert measured.total().disk_measured_s == 0
    assert measured.total().memory_measured_s == 0
    measured.read(60, counters(net=60, disk=600))
    total = measured.total()
    assert (total.measured_s, total.net_in_bytes) == (60, 60)
    assert (total.disk_measured_s, total.disk_read_bytes) == (60, 1800)
    assert total.memory_measured_s == 30


def test_an_old_reading_changes_nothing() -> None:
    measured = Measured()
    measured.read(0, counters())
    measured.read(10, counters(net=10))
    before = measured.reading
    for after_s in (10, 5, -100):
        measured.read(after_s, counters(net=99))
        assert measured.reading == before


@given(
    st.lists(
        st.tuples(
            st.floats(0.001, GAP_MAX_S), st.integers(0, 10**12), st.integers(0, 3), st.booleans()
        ),
        max_size=30,
    )
)
def test_nothing_is_lost_and_nothing_is_made(
    rounds: list[tuple[float, int, int, bool]],
) -> None:
    """Whatever the moments: the sums are what the counters grew by within runs, each minute at most a minute long."""
    measured, after_s, net, run, expected = Measured(), 0.0, 0, 1, 0
    measured.read(0, counters())
    for wait_s, grown, restart, has_disks in rounds:
        after_s += wait_s
        if restart == 3:
            run, net = run + 1, grown
        else:
            net += grown
            expected += grown if at(after_s) > measured.reading.read_at else 0  # type: ignore[union-attr]
        measured.read(after_s, counters(net=net, disk=net if has_disks else None, run=run))
    total = measured.total()
    assert total.net_in_bytes == pytest.approx(expected, rel=1e-9)
    assert total.net_out_bytes == pytest.approx(2 * expected, rel=1e-9)
    assert all(value >= 0 for value in total)
    for sums in measured.minutes.values():
        assert all(value >= 0 for value in sums)
        assert sums.measured_s <= 60 + 1e-6
        assert sums.disk_measured_s <= 60 + 1e-6


def test_frames_end_with_the_step_that_goes_on() -> None:
    moment = at(90)
    for name, length_s in (
        ("hour", 60 * 60), ("day", 70 * 1800), ("week", 70 * 10800), ("month", 70 * 43200), ("year", 70 * 604800),
    ):  # fmt: skip
        period = PERIODS[name]
        starts = frame(period, moment)
        assert len(starts) == period.points
        assert period.points * period.step_s == length_s
        assert starts[-1] <= moment < starts[-1] + timedelta(seconds=period.step_s)
        assert {later - earlier for earlier, later in itertools.pairwise(starts)} == {
            timedelta(seconds=period.step_s)
        }
        assert all(start.timestamp() % period.step_s == 0 for start in starts)


def test_floor_is_idempotent() -> None:
    assert floor(at(59.9), 60) == BEGAN == floor(BEGAN, 60)
    assert floor(at(60), 60) == at(60)
