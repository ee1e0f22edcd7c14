"""The traffic of private network cards: stored with each round, shown as that of their network.

Only private cards are kept one by one: there the sum over an instance's cards says nothing about a network. A card is
known in a round by the name of its device on the node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.orm import Session

from awan.engines.hypervisor import NodeCounters, card_device
from awan.metrics.arrays import arrays_of, unnest
from awan.metrics.rules import (
    CARD_STEP_S,
    LATE_MAX_S,
    NOTHING,
    PERIODS,
    CardReading,
    Sums,
    advance_card,
    frame,
)

DAY_S = 86_400
SILENT_S = 600
"""After so long without a round a reading cannot be gone on from, and what it has measured is stored."""

_SUMS = ("measured_s", "net_in_bytes", "net_out_bytes")
_POINT_COLUMNS = {
    "nic_id": "uuid",
    "starts_at": "timestamptz",
    **dict.fromkeys(_SUMS, "double precision"),
}
_READING_COLUMNS = {
    "nic_id": "uuid",
    "node_id": "uuid",
    "run_id": "bigint",
    "read_at": "timestamptz",
    "in_total_bytes": "bigint",
    "out_total_bytes": "bigint",
    "step_at": "timestamptz",
    **dict.fromkeys(_SUMS, "double precision"),
}
_CHANGING = [name for name in _READING_COLUMNS if name not in ("nic_id", "node_id")]

# Names and types of columns are constants of this file.
_CARDS = text(
    f"""
    SELECT nic.nic_id, nic.instance_id, instance.node_id, nic.deleted_at IS NOT NULL AS is_gone,
        reading.node_id AS reading_node_id, {", ".join(f"reading.{name}" for name in _CHANGING)}
    FROM instance JOIN nic USING (instance_id) LEFT JOIN metric_card_reading AS reading USING (nic_id)
    WHERE instance.node_id = ANY (:node_ids) AND instance.deleted_at IS NULL AND nic.role = 'private'
        AND (nic.deleted_at IS NULL OR reading.nic_id IS NOT NULL)
    """  # noqa: S608
)
_STORE_READINGS = text(
    f"""
    INSERT INTO metric_card_reading ({", ".join(_READING_COLUMNS)})
    SELECT * FROM {unnest(_READING_COLUMNS)}
    ON CONFLICT (nic_id) DO UPDATE SET node_id = excluded.node_id,
        {", ".join(f"{name} = excluded.{name}" for name in _CHANGING)}
    """  # noqa: S608
)
# A step can be stored in parts: what was measured in each is added up.
_ADD = f"""
    ON CONFLICT (step_s, nic_id, starts_at) DO UPDATE SET
        {", ".join(f"{name} = metric_card_point.{name} + excluded.{name}" for name in _SUMS)}
    """
_ADD_POINTS = text(
    f"""
    INSERT INTO metric_card_point (step_s, {", ".join(_POINT_COLUMNS)})
    SELECT {CARD_STEP_S}, * FROM {unnest(_POINT_COLUMNS)}
    {_ADD}
    """  # noqa: S608
)


def _end_readings(chosen: str) -> str:
    """Readings that end: what each has measured becomes a point, unless it is older than its `oldest`.

    `chosen` is a query that gives `nic_id` and `oldest`: a silence ends at another moment on each node.
    """
    return f"""
    WITH chosen AS ({chosen}),
    ended AS (
        DELETE FROM metric_card_reading AS reading USING chosen WHERE reading.nic_id = chosen.nic_id
        RETURNING reading.*, chosen.oldest
    )
    INSERT INTO metric_card_point (step_s, {", ".join(_POINT_COLUMNS)})
    SELECT {CARD_STEP_S}, nic_id, step_at, {", ".join(_SUMS)} FROM ended
    WHERE measured_s > 0 AND step_at >= oldest
    {_ADD}
    """  # noqa: S608


_ENDED_COLUMNS = {"nic_id": "uuid", "oldest": "timestamptz"}
_END_READINGS = text(
    _end_readings(f"SELECT * FROM {unnest(_ENDED_COLUMNS)} AS it (nic_id, oldest)")  # noqa: S608
)
# What a round is storing at this moment is silent no more.
_END_SILENT = text(
    _end_readings(
        "SELECT nic_id, CAST(:oldest AS timestamptz) AS oldest FROM metric_card_reading"
        " WHERE read_at < now() - make_interval(secs => :silent_s) FOR UPDATE SKIP LOCKED"
    )
)
_OLDEST = timedelta(seconds=LATE_MAX_S + CARD_STEP_S)
# A card that has left its network was part of it: its traffic stays.
_MEMBERS = "SELECT nic_id FROM nic WHERE network_id = :network_id"
_TRAFFIC = text(
    f"""
    SELECT starts_at, sum(net_in_bytes / measured_s) AS netin, sum(net_out_bytes / measured_s) AS netout
    FROM (
        SELECT nic_id, starts_at, sum(measured_s) AS measured_s, sum(net_in_bytes) AS net_in_bytes,
            sum(net_out_bytes) AS net_out_bytes
        FROM (
            SELECT nic_id, starts_at, {", ".join(_SUMS)} FROM metric_card_point
            WHERE step_s = {CARD_STEP_S} AND nic_id = ANY (ARRAY({_MEMBERS}))
                AND starts_at >= :starts_at AND starts_at <= :ends_at
            UNION ALL
            SELECT nic_id, step_at, {", ".join(_SUMS)} FROM metric_card_reading
            WHERE nic_id = ANY (ARRAY({_MEMBERS}))
        ) AS part
        GROUP BY nic_id, starts_at
    ) AS card
    WHERE measured_s > 0
    GROUP BY starts_at
    """  # noqa: S608
)


class TrafficPoint(NamedTuple):
    """Bytes a second of all cards of a network together; None where nothing was measured."""

    starts_at: datetime
    netin: float | None
    netout: float | None


def store_card_counters(session: Session, reads: Mapping[UUID, NodeCounters]) -> None:
    """Takes the counters of rounds in, as `store_counters` does for instances.

    A card that is not in its node's round any more ends: it was unplugged, or its instance is not running.
    """
    rows = session.execute(_CARDS, {"node_ids": list(reads)}).mappings().all()
    if not rows:
        return
    domains = {
        node_id: {found.domain_uuid: found for found in read.domains}
        for node_id, read in reads.items()
    }
    readings: list[tuple[UUID, CardReading]] = []
    points: list[tuple[UUID, datetime, Sums]] = []
    ended: list[tuple[UUID, datetime]] = []
    for row in rows:
        nic_id, node_id, earlier = row["nic_id"], row["node_id"], _reading_of(row)
        read_at = reads[node_id].read_at
        # After a long silence the partition of the step before it may be gone.
        oldest = read_at - _OLDEST
        domain = domains[node_id].get(row["instance_id"])
        cards = domain.cards if domain is not None else ()
        device = card_device(nic_id)
        card = next((card for card in cards if card.device == device), None)
        if domain is not None and card is not None and not row["is_gone"]:
            reading, over = advance_card(
                earlier, card, node_id=node_id, run_id=domain.run_id, read_at=read_at
            )
            readings.append((nic_id, reading))
            points += [(nic_id, start, sums) for start, sums in over.items() if start >= oldest]
        elif earlier is not None and earlier.node_id == node_id and earlier.read_at < read_at:
            ended.append((nic_id, oldest))
    if readings:
        session.execute(_STORE_READINGS, _reading_arrays(readings))
    if points:
        session.execute(_ADD_POINTS, _point_arrays(points))
    if ended:
        session.execute(_END_READINGS, arrays_of(_ENDED_COLUMNS, ended))


def end_silent_cards(session: Session, moment: datetime) -> None:
    """Ends the readings of cards that no round will go on with: of instances that are gone, and of silent nodes."""
    session.execute(_END_SILENT, {"silent_s": SILENT_S, "oldest": moment - _OLDEST})


def network_traffic(session: Session, network_id: int, moment: datetime) -> list[TrafficPoint]:
    """What the cards of a private network received and sent in the day that ends at `moment`, oldest first.

    Each card counts with its rate while it was measured; the step that is going on tells of what was measured so far.
    """
    starts = frame(PERIODS["day"], moment)[-(DAY_S // CARD_STEP_S) :]
    rows = session.execute(
        _TRAFFIC, {"network_id": network_id, "starts_at": starts[0], "ends_at": starts[-1]}
    )
    found = {row.starts_at: (row.netin, row.netout) for row in rows}
    return [TrafficPoint(start, *found.get(start, (None, None))) for start in starts]


def _reading_of(row: RowMapping) -> CardReading | None:
    if row["read_at"] is None:
        return None
    return CardReading(
        node_id=row["reading_node_id"],
        run_id=row["run_id"],
        read_at=row["read_at"],
        in_bytes=row["in_total_bytes"],
        out_bytes=row["out_total_bytes"],
        step_at=row["step_at"],
        step=NOTHING._replace(**{name: row[name] for name in _SUMS}),
    )


def _reading_arrays(readings: Iterable[tuple[UUID, CardReading]]) -> dict[str, str]:
    rows = [
        (
            nic_id,
            reading.node_id,
            reading.run_id,
            reading.read_at,
            reading.in_bytes,
            reading.out_bytes,
            reading.step_at,
            *_card_sums(reading.step),
        )
        for nic_id, reading in readings
    ]
    return arrays_of(_READING_COLUMNS, rows)


def _point_arrays(points: Iterable[tuple[UUID, datetime, Sums]]) -> dict[str, str]:
    rows = [(nic_id, start, *_card_sums(sums)) for nic_id, start, sums in points]
    return arrays_of(_POINT_COLUMNS, rows)


def _card_sums(sums: Sums) -> tuple[float, float, float]:
    return sums.measured_s, sums.net_in_bytes, sums.net_out_bytes
