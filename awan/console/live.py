"""The consoles that this process relays, and the one task that watches over all of them.

The watch hears of changes from the database and looks again every `RECHECK_S` in any case, with one query
for all consoles. It lives while there are consoles. One registry per event loop: everything here runs in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID
from weakref import WeakKeyDictionary

import structlog
from fastapi.concurrency import run_in_threadpool

from awan import events
from awan.console import service
from awan.console.models import Console, ConsoleState
from awan.console.workflows import CONNECT_TIMEOUT_S, UNLOCK_TIMEOUT_S, changes
from awan.engines.hypervisor import ConsoleEndpoint
from awan.errors import Unavailable
from awan.fleet import Node
from awan.fleet.rules import ClientCertificate, client_certificate
from awan.instances.models import Instance
from awan.kit.database import transaction
from awan.settings import get_settings

RECHECK_S = 2.0
READY_TIMEOUT_S = UNLOCK_TIMEOUT_S + CONNECT_TIMEOUT_S
NOT_READY = "The instance's screen cannot be reached at the moment."

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Screen:
    """Where a screen is served, and with what its node is spoken to (None: in the clear)."""

    endpoint: ConsoleEndpoint
    certificate: ClientCertificate | None


@dataclass(frozen=True)
class LiveConsole:
    """One console of this process. `closing` gets the reason when it must end."""

    console_id: UUID
    account_id: UUID
    closing: asyncio.Future[str]
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class LiveConsoles:
    """All consoles of one event loop."""

    def __init__(self) -> None:
        self._places = 0
        self._consoles: dict[UUID, LiveConsole] = {}
        self._watch: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._consoles)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Room for one console. Raises: Unavailable when this process has as many as it may."""
        if self._places >= get_settings().console_per_process_max:
            raise Unavailable("Too many consoles are open on this server. Please try again.")
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1

    @contextmanager
    def entered(self, console: Console) -> Iterator[LiveConsole]:
        """Inside, the console is watched over."""
        loop = asyncio.get_running_loop()
        live = LiveConsole(console.console_id, console.account_id, loop.create_future())
        self._consoles[console.console_id] = live
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_over(), name="console-watch")
        try:
            with (
                changes.woken_by(console.console_id, _setter(loop, live.woken)),
                events.changes.woken_by(console.account_id, _setter(loop, self._news)),
            ):
                yield live
        finally:
            del self._consoles[console.console_id]
            live.closing.cancel()
            if not self._consoles and self._watch is not None:
                self._watch.cancel()
                self._watch = None

    async def wait_until_ready(self, live: LiveConsole) -> Screen:
        """Where the screen is, once a worker has unlocked it.

        Raises: Unavailable when it could not, or there was none for `READY_TIMEOUT_S`.
        """
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while True:
                    live.woken.clear()
                    screen = await run_in_threadpool(_find_screen, live.console_id)
                    if screen is not None:
                        return screen
                    await _wait(live.woken, RECHECK_S)
        except TimeoutError:
            raise Unavailable(NOT_READY) from None

    async def _watch_over(self) -> None:
        while True:
            self._news.clear()
            try:
                await self._refresh()
            except Unavailable as err:
                # An open console outlives an outage of the database; who may not have it any more is seen after.
                log.warning("console.watch_interrupted", error=str(err))
            await _wait(self._news, RECHECK_S)

    async def _refresh(self) -> None:
        for console_id, reason in (await run_in_threadpool(_refresh, list(self._consoles))).items():
            live = self._consoles.get(console_id)
            if live is not None and not live.closing.done():
                live.closing.set_result(reason)
                live.woken.set()


_registries: WeakKeyDictionary[asyncio.AbstractEventLoop, LiveConsoles] = WeakKeyDictionary()


def live_consoles() -> LiveConsoles:
    """The registry of the running event loop."""
    return _registries.setdefault(asyncio.get_running_loop(), LiveConsoles())


def _setter(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> Callable[[], None]:
    """Sets the event from any thread."""

    def wake() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(event.set)

    return wake


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return


def _find_screen(console_id: UUID) -> Screen | None:
    """Where the screen is, or None while it is not unlocked. Raises: Unavailable when it will not be."""
    with transaction() as session:
        console = session.get_one(Console, console_id)
        if console.state == ConsoleState.OPENING:
            return None
        instance = session.get_one(Instance, console.instance_id)
        if console.state != ConsoleState.READY or instance.node_id is None:
            raise Unavailable(NOT_READY)
        node = session.get_one(Node, instance.node_id)
        assert console.host is not None
        assert console.port is not None
        endpoint = ConsoleEndpoint(console.host, console.port, console.requires_tls)
        return Screen(endpoint, client_certificate(node.libvirt_uri))


def _refresh(console_ids: Collection[UUID]) -> dict[UUID, str]:
    with transaction() as session:
        return service.refresh(session, console_ids)
