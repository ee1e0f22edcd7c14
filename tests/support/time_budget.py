"""A run that may last so many minutes and no longer: what has not begun by then is left out, and counted.

Whatever machine runs the suites, a run has its end. What is drawn by chance anyway comes last, so it goes first.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

LEFT_OUT = "left out: the run's time was over"
LONG_S = 1200
"""A test with a time-out like this is a story with a real guest."""
LONG_TAKES_S = 360


class TimeBudget:
    """The plugin of a run that ends. `ends_at`: seconds since the epoch, the same in all test processes."""

    def __init__(self, ends_at: float) -> None:
        self.ends_at = ends_at

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """With xdist: the controller's clock counts."""
        node.workerinput["ends_at"] = self.ends_at

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """After the shuffle: what matters most first, what is a sample of many last."""
        items.sort(key=_turn)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Before any fixture."""
        if time.time() + (LONG_TAKES_S if _is_long(item) else 0) > self.ends_at:
            pytest.skip(LEFT_OUT)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """How many were left out."""
        skipped = terminalreporter.stats.get("skipped", [])
        number = sum(LEFT_OUT in str(report.longrepr) for report in skipped)
        if number:
            terminalreporter.write_line(
                f"{number} tests were left out, because the time of the run was over (--minutes)"
            )


def register(config: pytest.Config) -> None:
    """Adds the plugin to a run that was given its minutes."""
    minutes = config.getoption("minutes")
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None and "ends_at" in workerinput:
        config.pluginmanager.register(TimeBudget(workerinput["ends_at"]))
    elif workerinput is None and minutes is not None:
        config.pluginmanager.register(TimeBudget(time.time() + 60 * minutes))


def _turn(item: pytest.Item) -> int:
    """The main job, then what may last long and would not end in time if it began late, the rest, and samples."""
    if "test_main_job" in item.nodeid:
        return 0
    if item.get_closest_marker("sampled"):
        return 3
    return 1 if _is_long(item) else 2


def _is_long(item: pytest.Item) -> bool:
    timeout = item.get_closest_marker("timeout")
    return timeout is not None and bool(timeout.args) and timeout.args[0] >= LONG_S
