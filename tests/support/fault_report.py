"""The table of faults at the end of a run, and the seed that repeats their moments.

Rows travel with the tests' reports, so that they also arrive from the processes of xdist.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import pytest

SEED_VARIABLE = "AWAN_FAULTS_SEED"
ROW = "fault_row"
# Set before test processes are started, so that all of them have the same one.
SEED = int(os.environ.setdefault(SEED_VARIABLE, str(random.SystemRandom().randrange(1, 1 << 31))))


@dataclass(frozen=True)
class FaultRow:
    """One fault and what came of it. Times in seconds from the fault; `moment` from the accepted request."""

    operation: str
    fault: str
    moment: str
    step: str
    restarted: str
    resumed: str
    ended: str
    outcome: str


def reporter(request: pytest.FixtureRequest) -> Callable[[FaultRow], None]:
    """Adds a row to the table of the run."""
    properties = request.node.user_properties
    return lambda row: properties.append((ROW, list(astuple(row))))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of all faults."""
    reports = [
        report
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.stats.get(outcome, [])
        if getattr(report, "when", None) == "call"
    ]
    rows = [value for report in reports for name, value in report.user_properties if name == ROW]
    if not rows:
        return
    table = [["n", *(field.name for field in fields(FaultRow))]]
    table += [[str(number), *row] for number, row in enumerate(rows, 1)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    terminalreporter.section(f"faults, {SEED_VARIABLE}={SEED}")
    for cells in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        terminalreporter.line(line.rstrip())
