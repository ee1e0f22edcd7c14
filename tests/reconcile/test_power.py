"""The verdict on every combination of what is wanted, what was seen and what is found."""

from __future__ import annotations

from uuid import uuid4

import pytest

from awan.engines.hypervisor import PAUSED_BUSY, PAUSED_IO_ERROR, UNEXPLAINED, DomainFacts, Power
from awan.instances.models import DesiredState, ObservedState
from awan.reconcile.power import Circumstances, Verdict, judge

RUNNING, STOPPED = DesiredState.RUNNING, DesiredState.STOPPED
ANNOUNCED = Circumstances(is_announced=True)
SUSPECTED = Circumstances(is_suspected=True)
AFTER_GAP = Circumstances(is_after_gap=True, is_announced=True)
PLAIN = Circumstances()


def facts(power: Power, detail: str = "", *, is_persistent: bool = True) -> DomainFacts:
    """A domain in this power."""
    uuid = uuid4()
    return DomainFacts(
        uuid, f"awan-{uuid}", power, uuid, None, detail=detail, is_persistent=is_persistent
    )


ON, PAUSED = facts(Power.RUNNING), facts(Power.PAUSED, "paused")
STUCK, BUSY = facts(Power.PAUSED, PAUSED_IO_ERROR), facts(Power.PAUSED, PAUSED_BUSY)
TRANSIENT = facts(Power.RUNNING, is_persistent=False)
SHUT_DOWN, CUT = facts(Power.STOPPED, "shutdown"), facts(Power.STOPPED, "destroyed")
LOST, DEAD = facts(Power.STOPPED, UNEXPLAINED), facts(Power.CRASHED, "crashed")


@pytest.mark.parametrize(
    ("desired", "observed", "found", "given", "verdict"),
    [
        (RUNNING, "running", ON, PLAIN, None),
        (RUNNING, "running", PAUSED, PLAIN, Verdict.NOTE_PAUSED),
        (RUNNING, "running", STUCK, PLAIN, Verdict.NOTE_PAUSED),
        (STOPPED, "stopped", PAUSED, PLAIN, Verdict.NOTE_PAUSED),
        (RUNNING, "running", BUSY, PLAIN, None),
        # Whoever paused it by hand lets it go on; nobody wanted it to stand still for its disk.
        (RUNNING, "paused", PAUSED, PLAIN, None),
        (RUNNING, "paused", STUCK, PLAIN, Verdict.RESUME),
        (STOPPED, "paused", STUCK, PLAIN, None),
        (RUNNING, "paused", ON, PLAIN, Verdict.NOTE_RUNNING),
        (RUNNING, "paused", CUT, PLAIN, Verdict.NOTE_STOPPED),
        (STOPPED, "paused", CUT, PLAIN, Verdict.NOTE_STOPPED),
        (RUNNING, "paused", DEAD, ANNOUNCED, Verdict.RECOVER),
        (RUNNING, "running", TRANSIENT, PLAIN, Verdict.REPAIR),
        (RUNNING, "running", None, PLAIN, Verdict.RECOVER),
        (RUNNING, "running", SHUT_DOWN, PLAIN, Verdict.NOTE_STOPPED),
        (RUNNING, "running", SHUT_DOWN, AFTER_GAP, Verdict.NOTE_STOPPED),
        (RUNNING, "running", CUT, PLAIN, Verdict.NOTE_STOPPED),
        (RUNNING, "running", LOST, PLAIN, Verdict.RECOVER),
        (RUNNING, "running", DEAD, ANNOUNCED, Verdict.CRASHED),
        (RUNNING, "running", DEAD, PLAIN, Verdict.SUSPECTED),
        (RUNNING, "running", DEAD, SUSPECTED, Verdict.CRASHED),
        (RUNNING, "running", DEAD, AFTER_GAP, Verdict.RECOVER),
        # What was judged before, and could not be brought back.
        (RUNNING, "stopped", DEAD, PLAIN, Verdict.RECOVER),
        (RUNNING, "stopped", LOST, PLAIN, Verdict.RECOVER),
        (RUNNING, "stopped", ON, PLAIN, Verdict.NOTE_RUNNING),
        (STOPPED, "stopped", ON, PLAIN, Verdict.NOTE_RUNNING),
        (STOPPED, "stopped", None, PLAIN, Verdict.REPAIR),
        (STOPPED, "stopped", SHUT_DOWN, PLAIN, None),
        (STOPPED, "stopped", LOST, AFTER_GAP, None),
        (STOPPED, "stopped", DEAD, ANNOUNCED, None),
        (STOPPED, "running", SHUT_DOWN, PLAIN, Verdict.NOTE_STOPPED),
        (STOPPED, "running", LOST, PLAIN, Verdict.NOTE_STOPPED),
    ],
)
def test_verdicts(
    desired: str,
    observed: str,
    found: DomainFacts | None,
    given: Circumstances,
    verdict: Verdict | None,
) -> None:
    assert judge(desired, ObservedState(observed), found, given) == verdict
