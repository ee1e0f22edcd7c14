"""Wire shapes of metrics."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Consolidation(StrEnum):
    """How a step sums up what is in it: by its average, or by its highest minute."""

    AVERAGE = "AVERAGE"
    MAX = "MAX"


class RrdQuery(BaseModel):
    """Which chart."""

    model_config = ConfigDict(extra="forbid")

    periode: Literal["hour", "day", "week", "month", "year"] = Field(
        description="Defines interval RRD data: steps of 60 s, 30 min, 3 h, 12 h or 7 days."
    )
    cf: Consolidation = Field(
        Consolidation.AVERAGE, description="Average of each step, or its highest minute."
    )


class RrdPoint(BaseModel):
    """What was used within one step. Null: not measured (the instance was off, or its node did not answer)."""

    time: int = Field(description="Beginning of the step, seconds since 1970.")
    cpu: float | None = Field(None, description="Part of all vCPUs that was busy, 0 to 1.")
    maxcpu: float | None = Field(None, description="vCPUs.")
    mem: int | None = Field(None, description="Memory in use, bytes.")
    maxmem: int | None = Field(None, description="Memory, bytes.")
    disk: int | None = Field(None, description="Storage that the disks occupy, bytes.")
    maxdisk: int | None = Field(None, description="Storage, bytes.")
    netin: float | None = Field(None, description="Received, bytes a second.")
    netout: float | None = Field(None, description="Sent, bytes a second.")
    diskread: float | None = Field(None, description="Read from disks, bytes a second.")
    diskwrite: float | None = Field(None, description="Written to disks, bytes a second.")


class RrdData(BaseModel):
    """A chart's points, oldest first. `resolution` is the length of a step in seconds."""

    periode: str
    resolution: int
    points: list[RrdPoint]
