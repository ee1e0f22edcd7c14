"""The watching of nodes and locations in a worker: one thread for each thing this worker has the lease of.

A node's thread sleeps on its events and a timer, a location's on a timer. What fails is logged and looked at again at
the next round; nothing is retried in between.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from uuid import UUID

import structlog

from awan.engines.hypervisor import DomainEvent, Hypervisor, NodeEndpoint, Subscription
from awan.errors import AwanError, Unavailable
from awan.fleet.service import ReachedNode
from awan.kit.database import transaction
from awan.reconcile.leases import LOCATION, NODE, release_leases, take_leases
from awan.reconcile.locations import check_location
from awan.reconcile.nodes import NodeWatch
from awan.settings import get_settings

# Looks of a node that does not answer: often enough to see it come back within seconds.
SILENT_INTERVAL_S = 2.0
BEATS_PER_LEASE = 4

log = structlog.get_logger(__name__)


def run_watches(stopping: threading.Event) -> None:
    """Watches whatever this worker can get the lease of, until told to stop."""
    settings = get_settings()
    watchers: dict[str, Watcher] = {}
    leased_until = time.monotonic()
    while not stopping.is_set():
        asked_at = time.monotonic()
        try:
            with transaction() as session:
                held = take_leases(session, settings.worker_id, settings.worker_lease_s)
            leased_until = asked_at + settings.worker_lease_s
            _adjust(watchers, held)
        except Unavailable as err:
            log.warning("watching waits for the database", error=str(err))
        except Exception:
            log.exception("leases could not be taken")
        if time.monotonic() > leased_until:
            _adjust(watchers, set())
        stopping.wait(settings.worker_lease_s / BEATS_PER_LEASE)
    _adjust(watchers, set())
    with contextlib.suppress(Unavailable), transaction() as session:
        release_leases(session, settings.worker_id)


def _adjust(watchers: dict[str, Watcher], held: set[str]) -> None:
    """A watcher for each thing that is held, and for no other."""
    for subject in watchers.keys() - held:
        watchers.pop(subject).stop()
    for subject in sorted(held - watchers.keys()):
        watchers[subject] = make_watcher(subject)
        watchers[subject].start()


def make_watcher(subject: str) -> Watcher:
    """The watcher of a node or a location."""
    if subject.startswith(NODE):
        return NodeWatcher(NodeWatch(UUID(subject.removeprefix(NODE))))
    return LocationWatcher(int(subject.removeprefix(LOCATION)))


class Watcher:
    """A thread that goes round until it is stopped; a round that fails does not end it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"watch-{name}", daemon=True)

    def start(self) -> None:
        """Begins; the first round is now."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the round that runs, which is not waited for: what it still does it does by its lock or not."""
        self._stopping.set()

    def go_round(self) -> None:
        """One round: sleeps until there is something to do, and does it."""
        raise NotImplementedError

    def end(self) -> None:
        """Lets go of what the rounds have taken."""

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.go_round()
            except AwanError as err:
                log.warning("watch waits", watch=self.name, error=str(err))
                self._stopping.wait(1.0)
            except Exception:
                log.exception("watch failed", watch=self.name)
                self._stopping.wait(1.0)
        self.end()


class NodeWatcher(Watcher):
    """Looks at a node at each of its events and whenever a while has passed."""

    def __init__(self, watch: NodeWatch) -> None:
        super().__init__(f"node {watch.node_id}")
        self._watch = watch
        self._events: queue.SimpleQueue[DomainEvent | None] = queue.SimpleQueue()
        self._subscribed: tuple[NodeEndpoint, Hypervisor, Subscription] | None = None
        self._next_look_at = 0.0

    def stop(self) -> None:
        super().stop()
        self._events.put(None)

    def go_round(self) -> None:
        events = self._wait()
        if self._stopping.is_set():
            return
        if events:
            self._watch.handle(events)
            return
        self._next_look_at = time.monotonic() + get_settings().node_check_interval_s
        self._watch.look(self._listen)
        if self._watch.is_silent:
            self._next_look_at = time.monotonic() + SILENT_INTERVAL_S

    def end(self) -> None:
        if self._subscribed is not None:
            self._subscribed[2].cancel()

    def _wait(self) -> list[DomainEvent]:
        """The events that have come, all of them; none when it is time to look at everything."""
        found: list[DomainEvent | None] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=max(0.0, self._next_look_at - time.monotonic())))
            while True:
                found.append(self._events.get_nowait())
        return [event for event in found if event is not None]

    def _listen(self, node: ReachedNode) -> None:
        """Subscribes to the node where it is now; an address or an engine that was changed is followed."""
        place = node.endpoint, node.engines.hypervisor
        if self._subscribed is not None:
            if self._subscribed[:2] == place:
                return
            self._subscribed[2].cancel()
        subscription = node.engines.hypervisor.subscribe(node.endpoint, self._events.put)
        self._subscribed = (*place, subscription)


class LocationWatcher(Watcher):
    """Looks at a location whenever a while has passed, and at its files whenever a longer one has."""

    def __init__(self, location_id: int) -> None:
        super().__init__(f"location {location_id}")
        self._location_id = location_id
        self._files_at = 0.0

    def go_round(self) -> None:
        settings = get_settings()
        with_files = time.monotonic() >= self._files_at
        if with_files:
            self._files_at = time.monotonic() + settings.reconcile_files_interval_s
        check_location(self._location_id, with_files=with_files)
        self._stopping.wait(settings.reconcile_interval_s)
