"""Reads the counters of all nodes: one bulk call a node at most every `metrics_interval_s`, by one worker at a time.

Every worker runs the collector. A node that is due is claimed with one statement, for a limited time; what was read is
stored only while the claim still holds, together with what other nodes have told meanwhile (`rounds.py`). So two
workers share the nodes, a dead one's are taken by others, and one that was frozen and wakes up stores nothing twice.
All state is in the database: any worker can do any round.

A node that does not answer is asked less and less often, and holds one of the threads for no longer than its deadline.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import structlog
from sqlalchemy import text

from awan.engines.hypervisor import COUNTERS_TIMEOUT_S
from awan.errors import EngineError, NotFound, Unavailable
from awan.fleet.service import node_with_engines
from awan.kit.database import single_statements, transaction
from awan.kit.ids import new_id
from awan.metrics import history
from awan.metrics.rounds import Claim, Round, RoundStore
from awan.settings import get_settings

POLL_S = 1.0
"""How often a worker looks for nodes that are due."""
NODES_AT_ONCE = 32
CLAIM_S = 2 * COUNTERS_TIMEOUT_S + 7.0
"""After how long a node is taken from a worker that died or froze: longer than a round should take. A round that takes
longer all the same stores nothing if the node has been taken meanwhile."""
SILENT_INTERVAL_MAX_S = 60.0

log = structlog.get_logger(__name__)

# A node is due when its time has come and nobody is at it, or has been at it for too long. Of two workers that ask at
# once the second waits for the first one's row and then finds it claimed. Rows are locked in the order of `rounds.py`.
_CLAIM = text(
    """
    INSERT INTO metric_node AS mine (node_id, claim_id, worker_id, claimed_until, due_at)
    SELECT due.node_id, :claim_id, :worker_id, now() + make_interval(secs => :claim_s),
        now() + make_interval(secs => :interval_s)
    FROM (
        SELECT node.node_id
        FROM node LEFT JOIN metric_node AS known USING (node_id)
        WHERE node.state IN ('active', 'cordoned')
            AND coalesce(known.due_at <= now(), true)
            AND coalesce(known.claim_id IS NULL OR known.claimed_until <= now(), true)
        ORDER BY known.due_at NULLS FIRST
        LIMIT :most
    ) AS due
    ORDER BY due.node_id
    ON CONFLICT (node_id) DO UPDATE SET claim_id = excluded.claim_id, worker_id = excluded.worker_id,
        claimed_until = excluded.claimed_until, due_at = excluded.due_at
    WHERE mine.due_at <= now() AND (mine.claim_id IS NULL OR mine.claimed_until <= now())
    RETURNING node_id
    """
)
_FAIL_ROUND = text(
    """
    UPDATE metric_node SET claim_id = NULL, failures = failures + 1, error = :error,
        due_at = now() + make_interval(secs => least(:most_s, :interval_s * 2 ^ least(failures, 10)))
    WHERE node_id = :node_id AND claim_id = :claim_id
    RETURNING failures
    """
)


rounds = RoundStore()
"""Where all rounds of this process are stored."""


def claim_due(most: int = NODES_AT_ONCE) -> list[Claim]:
    """Takes at most so many nodes that are due; they are due again after `metrics_interval_s`."""
    claim_id, settings = new_id(), get_settings()
    with single_statements() as session:
        node_ids = session.scalars(
            _CLAIM,
            {
                "claim_id": claim_id,
                "worker_id": settings.worker_id,
                "claim_s": CLAIM_S,
                "interval_s": settings.metrics_interval_s,
                "most": most,
            },
        ).all()
    return [Claim(node_id, claim_id) for node_id in node_ids]


def collect(claim: Claim) -> bool:
    """One round on a claimed node; whether anything was stored. A node that does not answer is noted."""
    return rounds.carry_out(partial(_read, claim))


def _read(claim: Claim) -> Round | None:
    began_s = time.monotonic()
    try:
        with single_statements() as session:
            node = node_with_engines(session, claim.node_id)
        read = node.engines.hypervisor.read_counters(node.endpoint)
    except EngineError as err:
        _note_failure(claim, err)
        return None
    except NotFound:
        return None  # removed meanwhile
    return Round(claim, read, began_s)


def _note_failure(claim: Claim, err: EngineError) -> None:
    settings = get_settings()
    with transaction() as session:
        failures = session.scalar(
            _FAIL_ROUND,
            {
                **claim._asdict(),
                "error": str(err),
                "interval_s": settings.metrics_interval_s,
                "most_s": max(SILENT_INTERVAL_MAX_S, settings.metrics_interval_s),
            },
        )
    if failures == 1:
        log.warning("metrics.node_silent", node=str(claim.node_id), error=str(err))


class Collector:
    """The rounds of one worker process. `tick` never waits for a node."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NODES_AT_ONCE, thread_name_prefix="metrics")
        self._free = NODES_AT_ONCE
        self._lock = threading.Lock()
        self._has_room = False

    def tick(self) -> None:
        """Begins a round on every node that is due, as far as threads are free."""
        if not self._has_room:
            # The first minutes must not wait for the periodic task that keeps the partitions.
            history.make_partitions()
            self._has_room = True
        with self._lock:
            free = self._free
        claims = claim_due(free) if free else []
        with self._lock:
            self._free -= len(claims)
        for claim in claims:
            self._pool.submit(collect, claim).add_done_callback(self._on_end)

    def _on_end(self, round_: Future[bool]) -> None:
        with self._lock:
            self._free += 1
        # A claim that was not given back runs out by itself.
        match round_.exception():
            case None:
                pass
            case Unavailable() as err:
                log.warning("metrics.round_waits_for_database", error=str(err))
            case err:
                log.error("metrics.round_failed", exc_info=err)


_collector_lock = threading.Lock()
_collector: Collector | None = None


def tick() -> None:
    """`Collector.tick` of this process."""
    global _collector
    with _collector_lock:
        if _collector is None:
            _collector = Collector()
    _collector.tick()
