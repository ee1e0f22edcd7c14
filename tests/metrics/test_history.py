"""Roll-ups are exact and can be repeated; partitions are made ahead and dropped whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import text

from awan.kit.clock import now
from awan.kit.database import get_engine, transaction
from awan.metrics import history
from awan.metrics.history import KEEPINGS
from awan.metrics.rules import floor
from awan.settings import Settings
from tests.metrics.conftest import drop_partitions

# The begin of a week of points, so that all steps begin here.
BEGAN = floor(datetime(2026, 11, 24, tzinfo=UTC), 604_800)
DAY = timedelta(days=1)


@pytest.fixture
def empty(settings: Settings) -> Iterator[None]:
    """No partitions before and after."""
    drop_partitions()
    yield
    drop_partitions()


def names() -> set[str]:
    with get_engine().connect() as connection:
        return set(
            connection.scalars(
                text("SELECT relname FROM pg_class WHERE relname ~ '^metric_(card_)?point_[0-9]+_[0-9]+$'"
                     " AND relkind = 'r'")
            )
        )  # fmt: skip


def add_minutes(instance_id: UUID, values: dict[int, dict[str, float]]) -> None:
    """Minutes by their number after BEGAN; what is not given is measured for a minute and zero."""
    with transaction() as session:
        for number, given in values.items():
            columns = {"measured_s": 60.0, "vcpu_s": 60.0, **given}
            session.execute(
                text(
                    f"INSERT INTO metric_point (step_s, instance_id, starts_at, {', '.join(columns)})"
                    f" VALUES (60, :id, :at, {', '.join(f':{name}' for name in columns)})"
                ),
                {"id": instance_id, "at": BEGAN + number * timedelta(minutes=1), **columns},
            )


def points(step_s: int) -> list[Any]:
    with transaction() as session:
        return list(
            session.execute(
                text("SELECT * FROM metric_point WHERE step_s = :step ORDER BY starts_at"),
                {"step": step_s},
            ).mappings()
        )


def test_sums_are_added_and_peaks_are_highest_minutes(empty: None) -> None:
    history.make_partitions(BEGAN + timedelta(minutes=5))
    instance_id = uuid4()
    add_minutes(
        instance_id,
        {
            0: {"cpu_s": 6.0, "net_in_bytes": 600.0},
            1: {"cpu_s": 54.0, "net_in_bytes": 0.0},
            # A half measured minute weighs half as much, and its average counts as a peak all the same.
            2: {"cpu_s": 15.0, "measured_s": 30.0, "vcpu_s": 30.0, "net_in_bytes": 3000.0},
            31: {"cpu_s": 60.0},
        },
    )
    history.roll_up(BEGAN + timedelta(minutes=35))
    first, second = points(1_800)
    assert first["starts_at"] == BEGAN
    assert (first["measured_s"], first["cpu_s"], first["net_in_bytes"]) == (150.0, 75.0, 3600.0)
    assert (first["cpu_peak"], first["net_in_peak"]) == (0.9, 100.0)
    assert (first["disk_measured_s"], first["disk_read_peak"]) == (0.0, None)
    assert (second["starts_at"], second["cpu_peak"]) == (BEGAN + timedelta(minutes=30), 1.0)
    for keeping in KEEPINGS[2:]:
        (point,) = points(keeping.step_s)
        assert point["starts_at"] == BEGAN
        assert (point["measured_s"], point["cpu_s"]) == (210.0, 135.0)
        assert (point["cpu_peak"], point["net_in_peak"]) == (1.0, 100.0)


def test_rolling_up_again_changes_nothing_and_takes_late_minutes_in(empty: None) -> None:
    history.make_partitions(BEGAN + timedelta(minutes=5))
    instance_id = uuid4()
    add_minutes(instance_id, {28: {"net_in_bytes": 100.0}})
    moment = BEGAN + timedelta(minutes=31)
    history.roll_up(moment)
    before = points(1_800)
    history.roll_up(moment)
    assert points(1_800) == before
    add_minutes(instance_id, {29: {"net_in_bytes": 50.0}})
    history.roll_up(moment + timedelta(minutes=2))
    assert [point["net_in_bytes"] for point in points(1_800)] == [150.0]
    assert [point["net_in_bytes"] for point in points(604_800)] == [150.0]


def test_after_an_outage_everything_kept_is_rolled_up(empty: None) -> None:
    history.make_partitions(BEGAN + timedelta(minutes=5))
    instance_id = uuid4()
    history.roll_up(BEGAN + timedelta(minutes=1))
    add_minutes(instance_id, {number: {"net_in_bytes": 1.0} for number in range(0, 600, 10)})
    history.roll_up(BEGAN + timedelta(hours=11))
    assert sum(point["net_in_bytes"] for point in points(1_800)) == 60.0
    assert [point["net_in_bytes"] for point in points(604_800)] == [60.0]


def test_partitions_are_made_ahead(empty: None) -> None:
    made = history.make_partitions()
    assert set(made) == names()
    assert history.make_partitions() == []
    for keeping in (*KEEPINGS, history.CARD_KEEPING):
        begins = sorted(
            int(name.rpartition("_")[2]) for name in made if name.startswith(f"{keeping.table}_")
        )
        last = floor(now(), keeping.width_s) + keeping.ahead * timedelta(seconds=keeping.width_s)
        assert begins[-1] == int(last.timestamp())
        assert {b - a for a, b in itertools.pairwise(begins)} == {keeping.width_s}
        # The next run comes long before the room ends.
        assert keeping.ahead * keeping.width_s > 2 * history.KEEP_INTERVAL_S


def test_partitions_fit_the_steps() -> None:
    """A step lies in one partition, its source is kept until it is over, and its chart is kept whole."""
    from awan.metrics.rules import PERIODS

    by_step = {keeping.step_s: keeping for keeping in KEEPINGS}
    assert set(by_step) == {period.step_s for period in PERIODS.values()}
    for keeping in KEEPINGS:
        assert keeping.width_s % keeping.step_s == 0
        if keeping.source_s is not None:
            assert keeping.step_s % keeping.source_s == 0
            assert by_step[keeping.source_s].keep_s >= 2 * keeping.step_s + history.LATE_S
    for period in PERIODS.values():
        assert by_step[period.step_s].keep_s >= period.points * period.step_s


def test_old_partitions_are_dropped_whole(empty: None) -> None:
    history.make_partitions(BEGAN)
    before = names()
    assert history.drop_old(BEGAN) == []
    minutes = {name for name in before if name.startswith("metric_point_60_")}
    dropped = set(history.drop_old(BEGAN + timedelta(hours=6)))
    # Four hours are kept: what ends at or before hour two goes, LATE_S before BEGAN included.
    assert dropped == {
        f"metric_point_60_{int(BEGAN.timestamp()) + hour * 3600}" for hour in (-1, 0, 1)
    }
    assert names() == before - dropped
    later = set(history.drop_old(BEGAN + 3 * DAY))
    assert later > minutes - dropped
    assert {name.rsplit("_", 1)[0] for name in later} == {
        "metric_point_60",
        "metric_point_1800",
        "metric_card_point_1800",
    }
    history.drop_old(BEGAN + 700 * DAY)
    assert names() == set()


def test_a_reader_is_not_kept_waiting_by_a_drop(empty: None, settings: Settings) -> None:
    """While somebody reads for long, the drop gives up soon and is done the next time."""
    history.make_partitions(BEGAN)
    with psycopg.connect(settings.database_url) as reader:
        reader.execute("SELECT count(*) FROM metric_point")
        assert history.drop_old(BEGAN + timedelta(hours=6)) == []
    assert len(history.drop_old(BEGAN + timedelta(hours=6))) == 3


def test_dropping_deletes_no_rows(empty: None) -> None:
    history.make_partitions(BEGAN)
    add_minutes(uuid4(), {number: {} for number in range(50)})
    history.drop_old(BEGAN + timedelta(hours=6))
    assert points(60) == []
