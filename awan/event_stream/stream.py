"""One client's stream: a coroutine that sleeps until the account's events change, and reads on from where it stopped.

The database is the only buffer: the next page is read when the client has taken the last one, so a slow client costs
one sleeping coroutine. Nothing is held between two reads, neither a thread nor a connection.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import structlog
from pydantic_core import to_json
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Send

from awan import events
from awan.accounts import Caller, is_key_usable
from awan.errors import RateLimited, Unavailable
from awan.events import Event, Position
from awan.events.schemas import EventView
from awan.kit import stopping
from awan.kit.database import transaction
from awan.kit.http import EVENT_STREAM_TYPE

STREAMS_PER_KEY_MAX = 10
STREAMS_PER_ACCOUNT_MAX = 25
STREAMS_PER_PROCESS_MAX = 1000
PAGE_EVENTS = 100
HEARTBEAT_S = 15.0
# A client that takes nothing for so long is given up.
SEND_MAX_S = 30.0
# How often a sleeping stream looks whether its process ends.
SLEEP_MAX_S = 1.0
# While committed events wait for the end of an older transaction, which nothing announces.
BEHIND_MIN_S, BEHIND_MAX_S = 0.01, 0.25
# An outage of the database is waited out for so long: the client's next attempt would not fare better.
OUTAGE_MAX_S = 60.0
OUTAGE_PAUSE_S = 1.0
RECONNECT_MS = 2000

log = structlog.get_logger(__name__)

# Reads take milliseconds; all streams of the process share a few threads, whatever their number.
_readers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="event-reader")


class EventStream(StreamingResponse):
    """An answer of server-sent events that gives up a client who takes nothing any more."""

    media_type = EVENT_STREAM_TYPE

    async def stream_response(self, send: Send) -> None:
        """Sends head, events and end. Raises: ClientDisconnect after `SEND_MAX_S` without progress."""

        async def bounded(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_MAX_S):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        await super().stream_response(bounded)


class _Slots:
    """How many streams this process serves, per key, per account and in all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: Counter[object] = Counter()

    @contextmanager
    def taken(self, caller: Caller) -> Iterator[None]:
        bounds = {
            caller.key_id: (STREAMS_PER_KEY_MAX, "This key"),
            caller.account_id: (STREAMS_PER_ACCOUNT_MAX, "This account"),
            None: (STREAMS_PER_PROCESS_MAX, "The server"),
        }
        with self._lock:
            for name, (most, who) in bounds.items():
                if self._open[name] >= most:
                    raise RateLimited(
                        f"{who} has {most} event streams open already.", retry_after_s=30
                    )
            self._open.update(bounds.keys())
        try:
            yield
        finally:
            with self._lock:
                self._open.subtract(bounds.keys())
                for name in bounds:
                    if not self._open[name]:
                        del self._open[name]


_slots = _Slots()


def slot(caller: Caller) -> AbstractContextManager[None]:
    """Counts a stream while the block runs. Raises: RateLimited when there are too many."""
    return _slots.taken(caller)


@dataclass(frozen=True)
class _Page:
    """What one read found; `is_allowed`: whether the key may still be used."""

    is_allowed: bool
    events: list[Event]
    is_behind: bool
    position: Position


def _read(caller: Caller, after: Position | None) -> _Page:
    """The next events after the position, or (None) the position to begin at."""
    with transaction() as session:
        is_allowed = is_key_usable(session, caller.key_id)
        if after is None or not is_allowed:
            return _Page(is_allowed, [], False, after or events.present_position(session))
        found = events.follow(session, caller.account_id, after, PAGE_EVENTS)
    last = found.events[-1] if found.events else None
    position = Position(last.xid, last.event_id) if last else after
    return _Page(True, list(found.events), found.is_behind, position)


async def stream(
    caller: Caller, after: Position | None, wait_s: float | None
) -> AsyncIterator[str]:
    """The lines of the stream: events in order, each once, and heartbeats; see `StreamQuery` for begin and end.

    It ends when the key cannot be used any more, when the process ends, and in a long outage of the database.
    """
    loop, woken = asyncio.get_running_loop(), asyncio.Event()
    ends_at = None if wait_s is None else time.monotonic() + wait_s

    def wake() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(woken.set)

    with events.changes.woken_by(caller.account_id, wake):
        reader = _Reader(caller, after)
        # The id alone is no event, but a client that loses this stream comes back with it.
        yield f"retry: {RECONNECT_MS}\nid: {await reader.begin()}\n\n"
        heartbeat_at = time.monotonic() + HEARTBEAT_S
        behind_s = BEHIND_MIN_S
        while not stopping.is_begun():
            woken.clear()
            page = await reader.read()
            if not page.is_allowed:
                return
            if page.events:
                yield "".join(map(_lines, page.events))
                heartbeat_at = time.monotonic() + HEARTBEAT_S
            if len(page.events) == PAGE_EVENTS:
                continue
            moment = time.monotonic()
            if ends_at is not None and moment >= ends_at:
                return
            if moment >= heartbeat_at:
                yield ": heartbeat\n\n"
                heartbeat_at = moment + HEARTBEAT_S
            behind_s = min(BEHIND_MAX_S, behind_s * 2) if page.is_behind else BEHIND_MIN_S
            until = [moment + behind_s if page.is_behind else heartbeat_at]
            if ends_at is not None:
                until.append(ends_at)
            await _sleep(woken, min(until))


async def _sleep(woken: asyncio.Event, until: float) -> None:
    """Returns when woken, at `until` (of the monotonic clock), or when the process ends."""
    while not stopping.is_begun() and (left_s := until - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(min(left_s, SLEEP_MAX_S)):
                await woken.wait()
            return
        except TimeoutError:
            continue


class _Reader:
    """Reads page after page, and waits through outages of the database."""

    def __init__(self, caller: Caller, after: Position | None) -> None:
        self._caller = caller
        self._after = after

    async def begin(self) -> Position:
        """Where the first page begins."""
        return self._after or (await self.read()).position

    async def read(self) -> _Page:
        """The next page. Raises: Unavailable when the database has been away for `OUTAGE_MAX_S`."""
        loop = asyncio.get_running_loop()
        gives_up_at = time.monotonic() + OUTAGE_MAX_S
        while True:
            try:
                page = await loop.run_in_executor(_readers, _read, self._caller, self._after)
            except (Unavailable, DBAPIError, PoolTimeoutError) as err:
                if time.monotonic() > gives_up_at or stopping.is_begun():
                    raise Unavailable("The database is not available at the moment.") from err
                log.warning("event stream waits for the database", error=str(err))
                await asyncio.sleep(OUTAGE_PAUSE_S)
            else:
                self._after = page.position
                return page


def _lines(event: Event) -> str:
    """One event as the stream has it. JSON holds no line break, so one `data` line is enough."""
    view = EventView.of(event)
    return f"id: {view.position}\nevent: {view.kind}\ndata: {to_json(view).decode()}\n\n"
