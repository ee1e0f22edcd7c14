"""Sends what is due. One thread with an event loop calls the receivers, so a hanging one costs a coroutine.

A worker may die at any moment: what it had leased is due again when the lease runs out, and is sent under the same id.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from awan.errors import Unavailable
from awan.kit import outbound
from awan.kit.clock import now
from awan.webhooks import deliveries
from awan.webhooks.deliveries import FAN_OUT_EVENTS, Lease

IN_FLIGHT_MAX = 200
# An outage of the database when an attempt is to be recorded: within the lease it is waited out.
RECORD_TRIES, RECORD_PAUSE_S = 8, 5.0

log = structlog.get_logger(__name__)


class _Sender:
    """The calls under way in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._in_flight = 0
        self._database = ThreadPoolExecutor(max_workers=4, thread_name_prefix="webhook-database")

    @property
    def free(self) -> int:
        """How many more calls may begin."""
        with self._lock:
            return IN_FLIGHT_MAX - self._in_flight

    def begin(self, lease: Lease) -> None:
        """Sends one delivery, in the background."""
        with self._lock:
            self._in_flight += 1
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._loop.run_forever, name="webhook-sender", daemon=True
                ).start()
            asyncio.run_coroutine_threadsafe(self._counted(self._send(lease)), self._loop)

    async def _counted(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.exception("webhook.failed")
        finally:
            with self._lock:
                self._in_flight -= 1

    async def _send(self, lease: Lease) -> None:
        loop = asyncio.get_running_loop()
        message = await loop.run_in_executor(self._database, deliveries.prepare, lease)
        if message is None:
            return
        started_at = now()
        outcome = await outbound.post(message.url, message.body, message.headers)
        for tries_left in reversed(range(RECORD_TRIES)):
            try:
                await loop.run_in_executor(
                    self._database, deliveries.record_attempt, lease, started_at, outcome
                )
                return
            except Unavailable:
                if not tries_left:
                    raise
                await asyncio.sleep(RECORD_PAUSE_S)


_sender = _Sender()


def deliver_due() -> int:
    """Turns new events into deliveries and begins to send what is due; gives the number begun. Does not wait."""
    while deliveries.fan_out() == FAN_OUT_EVENTS:
        continue
    leases = deliveries.claim(_sender.free)
    for lease in leases:
        _sender.begin(lease)
    return len(leases)
