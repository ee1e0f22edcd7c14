"""Keeps the points: partitions made ahead and dropped whole, and roll-ups from minutes to weeks in SQL.

Each length of step is a partition of `metric_point`, itself partitioned by time; the traffic of cards is kept likewise
in `metric_card_point`, with one length. Old points go by dropping a table: no rows are deleted and nothing has to be
vacuumed. A partition is called `metric_point_<step>_<begin>`, the begin in seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from awan.kit.clock import now
from awan.kit.database import sqlstate_of, transaction
from awan.metrics.cards import end_silent_cards
from awan.metrics.rules import CARD_STEP_S, MINUTE_S, floor

PARENT, CARD_PARENT = "metric_point", "metric_card_point"
KEEP_INTERVAL_S = 300.0
"""How often `keep` runs, so how old the newest figures of the longer steps are at most."""
LATE_S = 300
"""A minute can be stored this long after it was over: its counters were read after a gap."""
LOCK_TIMEOUT_MS = 500
"""Making and dropping partitions needs the parent alone for a moment; readers must not queue up behind that."""
LOCK_NOT_AVAILABLE = "55P03"
HOUR_S, DAY_S = 3600, 86400

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Keeping:
    """How points of one length are kept: for `keep_s` at least, in partitions of `width_s`, `ahead` of them in advance.

    `source_s` is the length they are rolled up from; its points are kept until these are long over.
    """

    step_s: int
    source_s: int | None
    keep_s: int
    width_s: int
    ahead: int
    parent: str = PARENT

    @property
    def table(self) -> str:
        """The table of this length."""
        return f"{self.parent}_{self.step_s}"


KEEPINGS = (
    Keeping(MINUTE_S, None, 4 * HOUR_S, HOUR_S, 12),
    Keeping(1_800, MINUTE_S, 2 * DAY_S, DAY_S, 2),
    Keeping(10_800, 1_800, 14 * DAY_S, 7 * DAY_S, 1),
    Keeping(43_200, 10_800, 60 * DAY_S, 28 * DAY_S, 1),
    Keeping(604_800, 43_200, 500 * DAY_S, 70 * DAY_S, 1),
)
CARD_KEEPING = Keeping(CARD_STEP_S, None, 2 * DAY_S, DAY_S, 2, CARD_PARENT)

ADDED = (
    "measured_s", "cpu_s", "vcpu_s", "memory_limit_bs", "storage_limit_bs", "net_in_bytes", "net_out_bytes",
    "disk_measured_s", "disk_read_bytes", "disk_written_bytes", "disk_used_bs", "memory_measured_s", "memory_used_bs",
)  # fmt: skip
# What a peak is the highest of, where the shorter step has none of its own: its average.
PEAKS = {
    "cpu_peak": "cpu_s / nullif(vcpu_s, 0)",
    "vcpus_peak": "vcpu_s / nullif(measured_s, 0)",
    "memory_limit_peak": "memory_limit_bs / nullif(measured_s, 0)",
    "storage_limit_peak": "storage_limit_bs / nullif(measured_s, 0)",
    "net_in_peak": "net_in_bytes / nullif(measured_s, 0)",
    "net_out_peak": "net_out_bytes / nullif(measured_s, 0)",
    "disk_read_peak": "disk_read_bytes / nullif(disk_measured_s, 0)",
    "disk_written_peak": "disk_written_bytes / nullif(disk_measured_s, 0)",
    "disk_used_peak": "disk_used_bs / nullif(disk_measured_s, 0)",
    "memory_used_peak": "memory_used_bs / nullif(memory_measured_s, 0)",
}
_COLUMNS = (*ADDED, *PEAKS)
# Names of columns are constants of this file.
_ROLL_UP = text(
    f"""
    INSERT INTO metric_point (step_s, instance_id, starts_at, {", ".join(_COLUMNS)})
    SELECT :step_s, instance_id, date_bin(make_interval(secs => :step_s), starts_at, to_timestamp(0)) AS bucket,
        {", ".join(f"sum({name})" for name in ADDED)},
        {", ".join(f"max(coalesce({name}, {average}))" for name, average in PEAKS.items())}
    FROM metric_point
    WHERE step_s = :source_s AND starts_at >= :begins_at AND starts_at <= :moment
    GROUP BY instance_id, bucket
    ON CONFLICT (step_s, instance_id, starts_at) DO UPDATE SET
        {", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)}
    """  # noqa: S608
)
_ROLLED_TO = text("SELECT rolled_to FROM metric_rollup WHERE step_s = :step_s")
_NOTE_ROLLED = text(
    """
    INSERT INTO metric_rollup (step_s, rolled_to) VALUES (:step_s, :rolled_to)
    ON CONFLICT (step_s) DO UPDATE SET rolled_to = excluded.rolled_to
    """
)
_PARTITIONS = text(
    "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = to_regclass(:parent)"
)
_LOCK = text("SELECT pg_advisory_xact_lock(hashtext('awan.metrics.partitions'))")
_FORGET_DELETED = text(
    """
    DELETE FROM metric_reading USING instance
    WHERE instance.instance_id = metric_reading.instance_id AND instance.deleted_at IS NOT NULL
    """
)
_FORGET_REMOVED = text(
    """
    DELETE FROM metric_node USING node
    WHERE node.node_id = metric_node.node_id AND node.state = 'removed'
    """
)


def keep() -> None:
    """The periodic task: room ahead, roll-ups, and only then the end of what is old."""
    make_partitions()
    roll_up()
    drop_old()
    with transaction() as session:
        session.execute(_FORGET_DELETED)
        end_silent_cards(session, now())
        session.execute(_FORGET_REMOVED)


def make_partitions(
    moment: datetime | None = None, keepings: Sequence[Keeping] = (*KEEPINGS, CARD_KEEPING)
) -> list[str]:
    """Partitions from the present on, as many ahead as `KEEPINGS` says; gives the names of those that were missing.

    Also those for the newest past, whose points may come late, and all that a roll-up may still write to.
    """
    with transaction() as session:
        _begin_change(session)
        made = []
        for keeping in keepings:
            made += _make_missing(session, keeping, moment or now())
    if made:
        log.info("metrics.partitions_made", number=len(made))
    return made


def _make_missing(session: Session, keeping: Keeping, moment: datetime) -> list[str]:
    table = keeping.table
    if not session.scalar(text("SELECT to_regclass(:name)"), {"name": table}):
        session.execute(
            text(
                f"CREATE TABLE {table} PARTITION OF {keeping.parent} FOR VALUES IN ({keeping.step_s})"
                " PARTITION BY RANGE (starts_at)"
            )
        )
    known = set(session.scalars(_PARTITIONS, {"parent": table}))
    width = timedelta(seconds=keeping.width_s)
    begin = floor(moment - timedelta(seconds=LATE_S), keeping.width_s)
    last = floor(moment, keeping.width_s) + keeping.ahead * width
    made = []
    while begin <= last:
        name = f"{table}_{int(begin.timestamp())}"
        if name not in known:
            session.execute(
                text(
                    f"CREATE TABLE {name} PARTITION OF {table}"
                    f" FOR VALUES FROM ('{begin.isoformat()}') TO ('{(begin + width).isoformat()}')"
                )
            )
            made.append(name)
        begin += width
    return made


def roll_up(moment: datetime | None = None) -> None:
    """Sums each length up from the next shorter one, since a while before the last time; safe to repeat.

    The steps that are going on are written too, and again the next time.
    """
    moment = moment or now()
    for keeping in KEEPINGS:
        if keeping.source_s is None:
            continue
        with transaction() as session:
            rolled_to = session.scalar(_ROLLED_TO, {"step_s": keeping.step_s})
            oldest = moment - timedelta(seconds=_source_of(keeping).keep_s)
            session.execute(
                _ROLL_UP,
                {
                    "step_s": keeping.step_s,
                    "source_s": keeping.source_s,
                    "begins_at": floor(rolled_to or oldest, keeping.step_s),
                    "moment": moment,
                },
            )
            session.execute(
                _NOTE_ROLLED,
                {"step_s": keeping.step_s, "rolled_to": moment - timedelta(seconds=LATE_S)},
            )


def _source_of(keeping: Keeping) -> Keeping:
    return next(other for other in KEEPINGS if other.step_s == keeping.source_s)


def drop_old(moment: datetime | None = None) -> list[str]:
    """Drops partitions all of whose points are older than they are kept; gives their names."""
    moment = moment or now()
    dropped = []
    for keeping in (*KEEPINGS, CARD_KEEPING):
        with transaction() as session:
            names = session.scalars(_PARTITIONS, {"parent": keeping.table}).all()
        kept_since = moment - timedelta(seconds=keeping.keep_s)
        for name in names:
            ends_at = datetime.fromtimestamp(int(name.rpartition("_")[2]) + keeping.width_s, UTC)
            if ends_at <= kept_since and _drop(name):
                dropped.append(name)
    if dropped:
        log.info("metrics.partitions_dropped", names=dropped)
    return dropped


def _drop(name: str) -> bool:
    """Whether it could be dropped at once; else the next run tries again."""
    try:
        with transaction() as session:
            _begin_change(session)
            session.execute(text(f"DROP TABLE IF EXISTS {name}"))
    except OperationalError as err:
        if sqlstate_of(err) != LOCK_NOT_AVAILABLE:
            raise
        return False
    return True


def _begin_change(session: Session) -> None:
    session.execute(_LOCK)
    session.execute(text(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}"))
