"""From counters to use, and from use to points. Pure.

Counters only say something in pairs: two readings of one run of an instance, not further apart than `GAP_MAX_S`, none
of them fallen. Everything else (a restart, a card that was unplugged, a wrapped counter, a node that was away) is time
that was not measured, never zero and never a jump.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from awan.engines.hypervisor import CardCounters, DiskCounters, DomainCounters

MINUTE_S = 60
CARD_STEP_S = 1_800
"""The one step in which the traffic of cards is kept: that of the day's chart."""
GAP_MAX_S = 120.0
"""Longest time between two readings that still counts as measured.

Source: the heartbeat of Proxmox VE's RRD files, PVE/RRD.pm."""
LATE_MAX_S = 3600
"""A minute that is over is stored no later than this after it began.

That is far less than minutes are kept, so its partition is still there; what is older is on no chart of minutes."""
BYTES_PER_MIB = 1024**2
BYTES_PER_GIB = 1024**3
NS_PER_S = 1_000_000_000


class Sums(NamedTuple):
    """What was used while it was measured; the columns of `SumColumns`, in the same order."""

    measured_s: float = 0.0
    cpu_s: float = 0.0
    vcpu_s: float = 0.0
    memory_limit_bs: float = 0.0
    storage_limit_bs: float = 0.0
    net_in_bytes: float = 0.0
    net_out_bytes: float = 0.0
    disk_measured_s: float = 0.0
    disk_read_bytes: float = 0.0
    disk_written_bytes: float = 0.0
    disk_used_bs: float = 0.0
    memory_measured_s: float = 0.0
    memory_used_bs: float = 0.0

    def plus(self, other: Sums, share: float = 1.0) -> Sums:
        """These and a share of the others."""
        return Sums(*(mine + share * theirs for mine, theirs in zip(self, other, strict=True)))


NOTHING = Sums()


@dataclass(frozen=True)
class Limits:
    """What the instance may use. Memory and storage in bytes."""

    vcpus: int
    memory_bytes: int
    storage_bytes: int


@dataclass(frozen=True)
class Reading:
    """The newest counters of an instance, and the sums of the minute that began at `minute_at`.

    `disks` are as they were at `disks_read_at`.
    """

    node_id: UUID
    run_id: int
    read_at: datetime
    cpu_time_ns: int
    net_in_bytes: int
    net_out_bytes: int
    disks: DiskCounters | None
    disks_read_at: datetime | None
    memory_used_bytes: int | None
    minute_at: datetime
    minute: Sums


@dataclass(frozen=True)
class Step:
    """How a period is shown: so many points of so many seconds, the last one still going on."""

    step_s: int
    points: int


PERIODS = {
    "hour": Step(60, 60),
    "day": Step(1_800, 70),
    "week": Step(10_800, 70),
    "month": Step(43_200, 70),
    "year": Step(604_800, 70),
}
"""Source: frames and steps of Proxmox VE's RRD data."""


def advance(
    earlier: Reading | None,
    counters: DomainCounters,
    *,
    node_id: UUID,
    read_at: datetime,
    limits: Limits,
) -> tuple[Reading, dict[datetime, Sums]]:
    """The reading after these counters, and the sums of minutes that are over (or parts of them, to be added).

    `read_at` is aware UTC. A reading that is not newer than the earlier one changes nothing.
    """
    if earlier is not None and read_at <= earlier.read_at:
        return earlier, {}
    minutes: dict[datetime, Sums] = {}
    disks, disks_read_at = counters.disks, read_at if counters.disks is not None else None
    if earlier is not None:
        minutes[earlier.minute_at] = earlier.minute
        if (earlier.node_id, earlier.run_id) == (node_id, counters.run_id):
            for since, used in _uses(earlier, counters, read_at, limits):
                _spread(minutes, since, read_at, used)
            if disks is None:
                disks, disks_read_at = earlier.disks, earlier.disks_read_at
    minute_at = floor(read_at, MINUTE_S)
    reading = Reading(
        node_id=node_id,
        run_id=counters.run_id,
        read_at=read_at,
        cpu_time_ns=counters.cpu_time_ns,
        net_in_bytes=counters.net_in_bytes,
        net_out_bytes=counters.net_out_bytes,
        disks=disks,
        disks_read_at=disks_read_at,
        memory_used_bytes=counters.memory_used_bytes,
        minute_at=minute_at,
        minute=minutes.pop(minute_at, NOTHING),
    )
    return reading, {minute: sums for minute, sums in minutes.items() if sums != NOTHING}


@dataclass(frozen=True)
class CardReading:
    """The newest counters of a card, and the sums of its step of `CARD_STEP_S` that began at `step_at`."""

    node_id: UUID
    run_id: int
    read_at: datetime
    in_bytes: int
    out_bytes: int
    step_at: datetime
    step: Sums


def advance_card(
    earlier: CardReading | None,
    card: CardCounters,
    *,
    node_id: UUID,
    run_id: int,
    read_at: datetime,
) -> tuple[CardReading, dict[datetime, Sums]]:
    """As `advance`, of one card in steps of `CARD_STEP_S`."""
    if earlier is not None and read_at <= earlier.read_at:
        return earlier, {}
    steps: dict[datetime, Sums] = {}
    if earlier is not None:
        steps[earlier.step_at] = earlier.step
        duration_s = _measured_s(earlier.read_at, read_at)
        received, sent = card.in_bytes - earlier.in_bytes, card.out_bytes - earlier.out_bytes
        is_same_run = (earlier.node_id, earlier.run_id) == (node_id, run_id)
        if is_same_run and duration_s > 0 and min(received, sent) >= 0:
            used = Sums(measured_s=duration_s, net_in_bytes=received, net_out_bytes=sent)
            _spread(steps, earlier.read_at, read_at, used, CARD_STEP_S)
    step_at = floor(read_at, CARD_STEP_S)
    step = steps.pop(step_at, NOTHING)
    reading = CardReading(node_id, run_id, read_at, card.in_bytes, card.out_bytes, step_at, step)
    return reading, {start: sums for start, sums in steps.items() if sums != NOTHING}


def _uses(
    earlier: Reading, counters: DomainCounters, read_at: datetime, limits: Limits
) -> Iterator[tuple[datetime, Sums]]:
    """What was used up to `read_at`, each with since when."""
    duration_s = _measured_s(earlier.read_at, read_at)
    cpu_ns = counters.cpu_time_ns - earlier.cpu_time_ns
    net_in = counters.net_in_bytes - earlier.net_in_bytes
    net_out = counters.net_out_bytes - earlier.net_out_bytes
    if duration_s > 0 and min(cpu_ns, net_in, net_out) >= 0:
        used_bytes = counters.memory_used_bytes
        yield (
            earlier.read_at,
            Sums(
                measured_s=duration_s,
                cpu_s=cpu_ns / NS_PER_S,
                vcpu_s=limits.vcpus * duration_s,
                memory_limit_bs=limits.memory_bytes * duration_s,
                storage_limit_bs=limits.storage_bytes * duration_s,
                net_in_bytes=net_in,
                net_out_bytes=net_out,
                memory_measured_s=duration_s if used_bytes is not None else 0.0,
                memory_used_bs=used_bytes * duration_s if used_bytes is not None else 0.0,
            ),
        )
    before, after, since = earlier.disks, counters.disks, earlier.disks_read_at
    if before is None or after is None or since is None:
        return
    duration_s = _measured_s(since, read_at)
    read = after.read_bytes - before.read_bytes
    written = after.written_bytes - before.written_bytes
    if duration_s > 0 and min(read, written) >= 0:
        yield (
            since,
            Sums(
                disk_measured_s=duration_s,
                disk_read_bytes=read,
                disk_written_bytes=written,
                disk_used_bs=after.used_bytes * duration_s,
            ),
        )


def _measured_s(since: datetime, until: datetime) -> float:
    """The seconds between two readings; 0 when they are too far apart to count."""
    duration_s = (until - since).total_seconds()
    return duration_s if 0 < duration_s <= GAP_MAX_S else 0.0


def _spread(
    steps: dict[datetime, Sums],
    since: datetime,
    until: datetime,
    used: Sums,
    step_s: int = MINUTE_S,
) -> None:
    """Adds what was used to the steps that [since, until) touches, to each by its share of the time."""
    whole_s = (until - since).total_seconds()
    begins = since
    while begins < until:
        step = floor(begins, step_s)
        ends = min(step + timedelta(seconds=step_s), until)
        share = (ends - begins).total_seconds() / whole_s
        steps[step] = steps.get(step, NOTHING).plus(used, share)
        begins = ends


def floor(moment: datetime, step_s: int) -> datetime:
    """The beginning of the step that holds the moment; steps are counted from 1970, UTC."""
    seconds = math.floor(moment.timestamp() / step_s) * step_s
    return datetime.fromtimestamp(seconds, UTC)


def frame(period: Step, moment: datetime) -> list[datetime]:
    """The beginnings of the period's steps, oldest first; the last one holds the moment."""
    last = floor(moment, period.step_s)
    step = timedelta(seconds=period.step_s)
    return [last - number * step for number in reversed(range(period.points))]
