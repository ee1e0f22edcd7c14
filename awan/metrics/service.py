"""Verbs of metrics: storing what was read, and the points of a chart. The caller holds the transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.engines.hypervisor import DiskCounters, NodeCounters
from awan.kit.clock import now
from awan.metrics.arrays import arrays_of, unnest
from awan.metrics.rules import (
    BYTES_PER_GIB,
    BYTES_PER_MIB,
    LATE_MAX_S,
    MINUTE_S,
    NOTHING,
    PERIODS,
    Limits,
    Reading,
    Sums,
    advance,
    frame,
)
from awan.metrics.schemas import Consolidation, RrdData, RrdPoint
from awan.resources import ResourceKind, get_owned

SUM_COLUMNS = Sums._fields
_READING_COLUMNS = {
    "instance_id": "uuid",
    "node_id": "uuid",
    "run_id": "bigint",
    "read_at": "timestamptz",
    "cpu_time_ns": "bigint",
    "net_in_total_bytes": "bigint",
    "net_out_total_bytes": "bigint",
    "disks_read_at": "timestamptz",
    "disk_read_total_bytes": "bigint",
    "disk_written_total_bytes": "bigint",
    "disk_used_bytes": "bigint",
    "memory_used_bytes": "bigint",
    "minute_at": "timestamptz",
    **dict.fromkeys(SUM_COLUMNS, "double precision"),
}
_CHANGING = [name for name in _READING_COLUMNS if name not in ("instance_id", "node_id")]
_POINT_COLUMNS = {
    "instance_id": "uuid",
    "starts_at": "timestamptz",
    **dict.fromkeys(SUM_COLUMNS, "double precision"),
}

# Names and types of columns are constants of this file.
_INSTANCES = text(
    f"""
    SELECT instance.instance_id, instance.node_id, vcpus, memory_mib, storage_gib,
        reading.node_id AS reading_node_id, {", ".join(f"reading.{name}" for name in _CHANGING)}
    FROM instance LEFT JOIN metric_reading AS reading USING (instance_id)
    WHERE instance.node_id = ANY (:node_ids) AND instance.deleted_at IS NULL
    """  # noqa: S608
)
_STORE_READINGS = text(
    f"""
    INSERT INTO metric_reading ({", ".join(_READING_COLUMNS)})
    SELECT * FROM {unnest(_READING_COLUMNS)}
    ON CONFLICT (instance_id) DO UPDATE SET node_id = excluded.node_id,
        {", ".join(f"{name} = excluded.{name}" for name in _CHANGING)}
    """  # noqa: S608
)
_FORGET_READINGS = text("DELETE FROM metric_reading WHERE instance_id = ANY (:instance_ids)")
# A minute can be stored in parts: what was measured in each is added up.
_ADD_MINUTES = text(
    f"""
    INSERT INTO metric_point (step_s, {", ".join(_POINT_COLUMNS)})
    SELECT {MINUTE_S}, * FROM {unnest(_POINT_COLUMNS)}
    ON CONFLICT (step_s, instance_id, starts_at) DO UPDATE SET
        {", ".join(f"{name} = metric_point.{name} + excluded.{name}" for name in SUM_COLUMNS)}
    """  # noqa: S608
)
_POINTS = text(
    """
    SELECT * FROM metric_point
    WHERE step_s = :step_s AND instance_id = :instance_id
        AND starts_at >= :starts_at AND starts_at <= :ends_at
    """
)
_OPEN_MINUTE = text("SELECT * FROM metric_reading WHERE instance_id = :instance_id")


def store_counters(session: Session, reads: Mapping[UUID, NodeCounters]) -> dict[UUID, int]:
    """Takes the counters of rounds in, by node id; gives how many instances of ours were among those of each node.

    Instances of a node that are not running lose their reading: their next run begins with a new one. Domains that no
    row explains are left out. Counters older than the stored ones change nothing, so a round may come twice or late.
    A minute that began more than `LATE_MAX_S` before, with a silence since, is left out.
    """
    rows = session.execute(_INSTANCES, {"node_ids": list(reads)}).mappings().all()
    counters = {
        node_id: {found.domain_uuid: found for found in read.domains}
        for node_id, read in reads.items()
    }
    stored = dict.fromkeys(reads, 0)
    readings: list[tuple[UUID, Reading]] = []
    minutes: list[tuple[UUID, datetime, Sums]] = []
    stopped: list[UUID] = []
    for row in rows:
        instance_id, node_id = row["instance_id"], row["node_id"]
        read_at = reads[node_id].read_at
        # After a long silence the partition of the minute before it may be gone; the round must be stored all the same.
        oldest = read_at - timedelta(seconds=LATE_MAX_S)
        earlier = _reading_of(row)
        found = counters[node_id].get(instance_id)
        if found is not None:
            limits = Limits(
                row["vcpus"],
                row["memory_mib"] * BYTES_PER_MIB,
                row["storage_gib"] * BYTES_PER_GIB,
            )
            reading, over = advance(earlier, found, node_id=node_id, read_at=read_at, limits=limits)
            readings.append((instance_id, reading))
            stored[node_id] += 1
            minutes += [(instance_id, it, sums) for it, sums in over.items() if it >= oldest]
        elif earlier is not None and earlier.node_id == node_id and earlier.read_at < read_at:
            stopped.append(instance_id)
            if earlier.minute != NOTHING and earlier.minute_at >= oldest:
                minutes.append((instance_id, earlier.minute_at, earlier.minute))
    if readings:
        session.execute(_STORE_READINGS, _reading_arrays(readings))
    if stopped:
        session.execute(_FORGET_READINGS, {"instance_ids": stopped})
    if minutes:
        session.execute(_ADD_MINUTES, _point_arrays(minutes))
    return stored


def _reading_of(row: RowMapping) -> Reading | None:
    if row["read_at"] is None:
        return None
    return Reading(
        node_id=row["reading_node_id"],
        run_id=row["run_id"],
        read_at=row["read_at"],
        cpu_time_ns=row["cpu_time_ns"],
        net_in_bytes=row["net_in_total_bytes"],
        net_out_bytes=row["net_out_total_bytes"],
        disks=DiskCounters(
            row["disk_read_total_bytes"], row["disk_written_total_bytes"], row["disk_used_bytes"]
        )
        if row["disks_read_at"] is not None
        else None,
        disks_read_at=row["disks_read_at"],
        memory_used_bytes=row["memory_used_bytes"],
        minute_at=row["minute_at"],
        minute=_sums_of(row),
    )


def _reading_arrays(readings: Iterable[tuple[UUID, Reading]]) -> dict[str, str]:
    rows = [
        (
            instance_id,
            reading.node_id,
            reading.run_id,
            reading.read_at,
            reading.cpu_time_ns,
            reading.net_in_bytes,
            reading.net_out_bytes,
            reading.disks_read_at,
            reading.disks.read_bytes if reading.disks else None,
            reading.disks.written_bytes if reading.disks else None,
            reading.disks.used_bytes if reading.disks else None,
            reading.memory_used_bytes,
            reading.minute_at,
            *reading.minute,
        )
        for instance_id, reading in readings
    ]
    return arrays_of(_READING_COLUMNS, rows)


def _point_arrays(minutes: Iterable[tuple[UUID, datetime, Sums]]) -> dict[str, str]:
    rows = [(instance_id, minute, *sums) for instance_id, minute, sums in minutes]
    return arrays_of(_POINT_COLUMNS, rows)


def chart(
    session: Session,
    caller: Caller,
    instance_id: UUID,
    *,
    periode: str,
    consolidation: Consolidation,
    moment: datetime | None = None,
) -> RrdData:
    """The points of a period that ends now (or at `moment`), oldest first; what was not measured is null.

    The newest step is the one that is going on: it tells of what was measured so far.
    Raises: NotFound for an instance that is absent, deleted or another account's.
    """
    get_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    period = PERIODS[periode]
    starts = frame(period, moment or now())
    rows = session.execute(
        _POINTS,
        {
            "step_s": period.step_s,
            "instance_id": instance_id,
            "starts_at": starts[0],
            "ends_at": starts[-1],
        },
    ).mappings()
    if consolidation is Consolidation.MAX and period.step_s > MINUTE_S:
        found = {row["starts_at"]: _peaks(row) for row in rows}
    else:
        sums = {row["starts_at"]: _sums_of(row) for row in rows}
        if period.step_s == MINUTE_S:
            _add_open_minute(session, instance_id, sums)
        found = {start: _averages(measured) for start, measured in sums.items()}
    return RrdData(
        periode=periode,
        resolution=period.step_s,
        points=[
            RrdPoint.model_validate({"time": int(start.timestamp()), **found.get(start, {})})
            for start in starts
        ],
    )


def _add_open_minute(session: Session, instance_id: UUID, sums: dict[datetime, Sums]) -> None:
    """The minute that is going on is part of the newest reading."""
    newest = session.execute(_OPEN_MINUTE, {"instance_id": instance_id}).mappings().first()
    if newest is not None:
        minute = newest["minute_at"]
        sums[minute] = sums.get(minute, NOTHING).plus(_sums_of(newest))


def _sums_of(row: RowMapping) -> Sums:
    return Sums(*(row[name] for name in SUM_COLUMNS))


def _averages(sums: Sums) -> dict[str, float | int | None]:
    return {
        "cpu": _share(sums.cpu_s, sums.vcpu_s),
        "maxcpu": _rate(sums.vcpu_s, sums.measured_s),
        "mem": _bytes(_rate(sums.memory_used_bs, sums.memory_measured_s)),
        "maxmem": _bytes(_rate(sums.memory_limit_bs, sums.measured_s)),
        "disk": _bytes(_rate(sums.disk_used_bs, sums.disk_measured_s)),
        "maxdisk": _bytes(_rate(sums.storage_limit_bs, sums.measured_s)),
        "netin": _rate(sums.net_in_bytes, sums.measured_s),
        "netout": _rate(sums.net_out_bytes, sums.measured_s),
        "diskread": _rate(sums.disk_read_bytes, sums.disk_measured_s),
        "diskwrite": _rate(sums.disk_written_bytes, sums.disk_measured_s),
    }


def _peaks(row: RowMapping) -> dict[str, float | int | None]:
    return {
        "cpu": _share(row["cpu_peak"], 1.0),
        "maxcpu": row["vcpus_peak"],
        "mem": _bytes(row["memory_used_peak"]),
        "maxmem": _bytes(row["memory_limit_peak"]),
        "disk": _bytes(row["disk_used_peak"]),
        "maxdisk": _bytes(row["storage_limit_peak"]),
        "netin": row["net_in_peak"],
        "netout": row["net_out_peak"],
        "diskread": row["disk_read_peak"],
        "diskwrite": row["disk_written_peak"],
    }


def _rate(total: float, seconds: float) -> float | None:
    return total / seconds if seconds > 0 else None


def _share(part: float | None, whole: float) -> float | None:
    """0 to 1. An emulator's own work can come on top of what its processors do: more than all is shown as all."""
    return min(1.0, part / whole) if part is not None and whole > 0 else None


def _bytes(value: float | None) -> int | None:
    return round(value) if value is not None else None
