"""Steps of waiting workflows: checkpointed, patient with engines and database, ended at once when the worker stops."""

from __future__ import annotations

import threading
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


class WorkerStopping(BaseException):
    """Ends the thread of a wait whose worker stops. No `Exception`: the wait has not failed, recovery has it."""


class _Waits:
    """The steps of waiting workflows that are running in this process."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._running = 0

    def __enter__(self) -> None:
        with self._changed:
            if self._stopping.is_set():
                raise WorkerStopping
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise WorkerStopping

    def stop(self, timeout_s: float) -> bool:
        self._stopping.set()
        with self._changed:
            return self._changed.wait_for(lambda: self._running == 0, timeout_s)

    def resume(self) -> None:
        self._stopping = threading.Event()


_waits = _Waits()


def pause(seconds: float) -> None:
    """Sleeps within a step of a waiting workflow. Raises: WorkerStopping as soon as the worker stops."""
    _waits.pause(seconds)


def stop_waiting(timeout_s: float) -> bool:
    """Ends all waits of this process at their next pause; False when some have not reached it after `timeout_s`."""
    return _waits.stop(timeout_s)


def begin_waiting() -> None:
    """Waits may run in this process (again)."""
    _waits.resume()


def durable_step(name: str, run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Runs `run` as one checkpointed step of a waiting workflow and returns its (JSON-able) result.

    `EngineUnavailable` and `Unavailable` are retried for an hour; whatever is raised then ends the workflow.
    """

    def patiently() -> R:
        with _waits:
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
        pause(delay_s)
        delay_s = min(RETRY_MAX_S, delay_s * 2)
