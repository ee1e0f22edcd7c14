"""Measured use: the newest counters of each instance, and points of five lengths, each in partitions by time.

A point keeps sums and how long was measured, never averages: sums of sums stay exact, and what was not measured is
known. `_bs` is bytes times seconds: divided by the seconds measured it is an average.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import Double, ForeignKey, Integer
from sqlalchemy.orm import Mapped, mapped_column

from awan.kit.database import Base


class SumColumns:
    """What was used while it was measured. Processor, network and limits share `measured_s`.

    Disks and memory are told by the instance's QEMU and guest, which may be silent on their own.
    """

    measured_s: Mapped[float] = mapped_column(Double, server_default="0")
    cpu_s: Mapped[float] = mapped_column(Double, server_default="0")
    vcpu_s: Mapped[float] = mapped_column(Double, server_default="0")
    memory_limit_bs: Mapped[float] = mapped_column(Double, server_default="0")
    storage_limit_bs: Mapped[float] = mapped_column(Double, server_default="0")
    net_in_bytes: Mapped[float] = mapped_column(Double, server_default="0")
    net_out_bytes: Mapped[float] = mapped_column(Double, server_default="0")
    disk_measured_s: Mapped[float] = mapped_column(Double, server_default="0")
    disk_read_bytes: Mapped[float] = mapped_column(Double, server_default="0")
    disk_written_bytes: Mapped[float] = mapped_column(Double, server_default="0")
    disk_used_bs: Mapped[float] = mapped_column(Double, server_default="0")
    memory_measured_s: Mapped[float] = mapped_column(Double, server_default="0")
    memory_used_bs: Mapped[float] = mapped_column(Double, server_default="0")


class MetricPoint(SumColumns, Base):
    """The use of an instance within [starts_at, starts_at + step_s).

    Partitioned twice, see `awan.metrics.history`: by length, then by time. The `_peak` columns are the highest average
    of a minute within a longer step; a minute has none. No foreign key: points are dropped by the partition, and those
    of a deleted instance leave with their time.
    """

    __tablename__ = "metric_point"
    __table_args__ = {"postgresql_partition_by": "LIST (step_s)"}  # noqa: RUF012 SQLAlchemy's own form

    step_s: Mapped[int] = mapped_column(Integer, primary_key=True)
    instance_id: Mapped[UUID] = mapped_column(primary_key=True)
    starts_at: Mapped[datetime] = mapped_column(primary_key=True)
    cpu_peak: Mapped[float | None] = mapped_column(Double)
    vcpus_peak: Mapped[float | None] = mapped_column(Double)
    memory_limit_peak: Mapped[float | None] = mapped_column(Double)
    storage_limit_peak: Mapped[float | None] = mapped_column(Double)
    net_in_peak: Mapped[float | None] = mapped_column(Double)
    net_out_peak: Mapped[float | None] = mapped_column(Double)
    disk_read_peak: Mapped[float | None] = mapped_column(Double)
    disk_written_peak: Mapped[float | None] = mapped_column(Double)
    disk_used_peak: Mapped[float | None] = mapped_column(Double)
    memory_used_peak: Mapped[float | None] = mapped_column(Double)


class MetricReading(SumColumns, Base):
    """The newest counters of a running instance, and the sums of the minute that is going on.

    Written at each round, and no column of an index changes with it: PostgreSQL updates such rows in their place as
    long as the page has room, which the fill factor keeps. `disks_read_at` is older than `read_at` while QEMU is
    silent.
    No foreign keys: their checks would wait for whoever has locked the instance or its node.
    """

    __tablename__ = "metric_reading"
    __table_args__ = {"postgresql_with": {"fillfactor": 60}}  # noqa: RUF012 SQLAlchemy's own form

    instance_id: Mapped[UUID] = mapped_column(primary_key=True)
    node_id: Mapped[UUID]
    run_id: Mapped[int]
    read_at: Mapped[datetime]
    cpu_time_ns: Mapped[int]
    net_in_total_bytes: Mapped[int]
    net_out_total_bytes: Mapped[int]
    disks_read_at: Mapped[datetime | None]
    disk_read_total_bytes: Mapped[int | None]
    disk_written_total_bytes: Mapped[int | None]
    disk_used_bytes: Mapped[int | None]
    memory_used_bytes: Mapped[int | None]
    minute_at: Mapped[datetime]


class CardSumColumns:
    """What a card received and sent while it was measured."""

    measured_s: Mapped[float] = mapped_column(Double, server_default="0")
    net_in_bytes: Mapped[float] = mapped_column(Double, server_default="0")
    net_out_bytes: Mapped[float] = mapped_column(Double, server_default="0")


class MetricCardPoint(CardSumColumns, Base):
    """The traffic of a private network card within [starts_at, starts_at + step_s). Partitioned as `MetricPoint`."""

    __tablename__ = "metric_card_point"
    __table_args__ = {"postgresql_partition_by": "LIST (step_s)"}  # noqa: RUF012 SQLAlchemy's own form

    step_s: Mapped[int] = mapped_column(Integer, primary_key=True)
    nic_id: Mapped[UUID] = mapped_column(primary_key=True)
    starts_at: Mapped[datetime] = mapped_column(primary_key=True)


class MetricCardReading(CardSumColumns, Base):
    """The newest counters of a private network card, and the sums of its step that is going on since `step_at`.

    Written as `MetricReading` is.
    """

    __tablename__ = "metric_card_reading"
    __table_args__ = {"postgresql_with": {"fillfactor": 60}}  # noqa: RUF012 SQLAlchemy's own form

    nic_id: Mapped[UUID] = mapped_column(primary_key=True)
    node_id: Mapped[UUID]
    run_id: Mapped[int]
    read_at: Mapped[datetime]
    in_total_bytes: Mapped[int]
    out_total_bytes: Mapped[int]
    step_at: Mapped[datetime]


class MetricNode(Base):
    """Who reads a node's counters, when next, and how the last round went.

    A worker takes a node by writing its own `claim_id`, for as long as `claimed_until`; it stores what it read only
    while the claim is still its own.
    """

    __tablename__ = "metric_node"

    node_id: Mapped[UUID] = mapped_column(ForeignKey("node.node_id"), primary_key=True)
    claim_id: Mapped[UUID | None]
    worker_id: Mapped[str]
    claimed_until: Mapped[datetime]
    due_at: Mapped[datetime]
    collected_at: Mapped[datetime | None]
    took_s: Mapped[float | None] = mapped_column(Double)
    domains: Mapped[int] = mapped_column(server_default="0")
    failures: Mapped[int] = mapped_column(server_default="0")
    error: Mapped[str | None]


class MetricRollup(Base):
    """Up to when the points of a length contain all shorter ones."""

    __tablename__ = "metric_rollup"

    step_s: Mapped[int] = mapped_column(Integer, primary_key=True)
    rolled_to: Mapped[datetime]
