"""What to do about an instance whose domain is not as the rows have it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from awan.engines.hypervisor import PAUSED_BUSY, PAUSED_IO_ERROR, UNEXPLAINED, DomainFacts, Power
from awan.instances.models import DesiredState, ObservedState


class Verdict(StrEnum):
    """What follows from a look at a node."""

    NOTE_RUNNING = "note_running"
    NOTE_STOPPED = "note_stopped"
    CRASHED = "crashed"
    SUSPECTED = "suspected"
    RECOVER = "recover"
    REPAIR = "repair"
    NOTE_PAUSED = "note_paused"
    RESUME = "resume"


@dataclass(frozen=True)
class Circumstances:
    """How the look came about.

    `is_announced`: the node has told of a crash. `is_suspected`: the look before found the same. `is_after_gap`:
    events may have been missed, so that nobody can tell a guest that crashed from a node that was reset.
    """

    is_announced: bool = False
    is_suspected: bool = False
    is_after_gap: bool = False


def judge(
    desired: str, observed: str, found: DomainFacts | None, given: Circumstances
) -> Verdict | None:
    """The verdict on a settled instance that runs or is stopped; None when all is as it should be.

    A guest that is off although it should run has ended itself, had its power cut on the node, crashed, or went down
    with its node. The first two are what somebody wanted: it stays off. A crash counts, so that a guest that cannot
    run is not started for ever. What went down with its node comes back.

    A paused one is shown as that. Who paused it by hand will let it go on; one whose disk could not be written is
    tried again, for nobody wanted it to stand still.
    """
    should_run = desired == DesiredState.RUNNING
    if found is None:
        return Verdict.RECOVER if should_run else Verdict.REPAIR
    if found.power in (Power.RUNNING, Power.PAUSED):
        if found.power is Power.RUNNING and observed != ObservedState.RUNNING:
            return Verdict.NOTE_RUNNING
        if found.power is Power.PAUSED and found.detail != PAUSED_BUSY:
            if observed != ObservedState.PAUSED:
                return Verdict.NOTE_PAUSED
            if should_run and found.detail == PAUSED_IO_ERROR:
                return Verdict.RESUME
        return None if found.is_persistent else Verdict.REPAIR
    if not should_run:
        return Verdict.NOTE_STOPPED if observed != ObservedState.STOPPED else None
    if found.power is Power.CRASHED:
        return _judge_crash(observed, given)
    return Verdict.RECOVER if found.detail == UNEXPLAINED else Verdict.NOTE_STOPPED


def _judge_crash(observed: str, given: Circumstances) -> Verdict:
    # What is known to be off has been judged before: an attempt to bring it back has failed.
    if given.is_after_gap or observed != ObservedState.RUNNING:
        return Verdict.RECOVER
    if given.is_announced or given.is_suspected:
        return Verdict.CRASHED
    # The announcement, or the news that the connection was lost, may be on its way.
    return Verdict.SUSPECTED
