"""Steps of waiting workflows: checkpointed, and patient with engines and database."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import structlog
from dbos import DBOS

from awan.errors import EngineUnavailable, Unavailable

PATIENCE_S = 3600.0
RETRY_MAX_S = 15.0

P = ParamSpec("P")
R = TypeVar("R")

log = structlog.get_logger(__name__)


def durable_step(name: str, run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Runs `run` as one checkpointed step of a waiting workflow and returns its (JSON-able) result.

    `EngineUnavailable` and `Unavailable` are retried for an hour; whatever is raised then ends the workflow.
    """

    def patiently() -> R:
        return _patiently(name, lambda: run(*args, **kwargs))

    return DBOS.run_step({"name": name}, patiently)


def _patiently(name: str, run: Callable[[], R]) -> R:
    until, delay_s = time.monotonic() + PATIENCE_S, 0.2
    while True:
        try:
            return run()
        except (EngineUnavailable, Unavailable) as err:
            if time.monotonic() + delay_s > until:
                raise
            log.warning("wait_step.retried", step=name, error=str(err), delay_s=delay_s)
        time.sleep(delay_s)
        delay_s = min(RETRY_MAX_S, delay_s * 2)
