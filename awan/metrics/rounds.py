"""Storing rounds: those that come at about the same time are stored in one transaction.

A transaction costs about the same for one node as for twenty. What comes while one is under way waits for its end,
and the first of these waits a moment for rounds that have begun. A node that hangs costs the others no more than that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.orm import Session

from awan.engines.hypervisor import NodeCounters
from awan.errors import Unavailable
from awan.kit.database import transaction
from awan.metrics.arrays import arrays_of, unnest
from awan.metrics.cards import store_card_counters
from awan.metrics.service import store_counters

GATHER_S = 0.1
"""For so long at most a round waits for others that have begun: those of one `tick` come within it."""

log = structlog.get_logger(__name__)

_CLAIM_COLUMNS = {"node_id": "uuid", "claim_id": "uuid"}
_END_COLUMNS = {
    "node_id": "uuid",
    "read_at": "timestamptz",
    "took_s": "double precision",
    "domains": "bigint",
}
# Names and types of columns are constants of this file. Held in one order by all workers, so that no two that hold
# several nodes wait for each other.
_HOLD_CLAIMS = text(
    f"""
    SELECT node_id, claim_id FROM metric_node
    JOIN {unnest(_CLAIM_COLUMNS)} AS mine (node_id, claim_id) USING (node_id, claim_id)
    ORDER BY node_id FOR UPDATE OF metric_node
    """  # noqa: S608
)
_END_ROUNDS = text(
    f"""
    UPDATE metric_node SET claim_id = NULL, collected_at = ended.read_at, took_s = ended.took_s,
        domains = ended.domains, failures = 0, error = NULL
    FROM {unnest(_END_COLUMNS)} AS ended ({", ".join(_END_COLUMNS)})
    WHERE metric_node.node_id = ended.node_id
    """  # noqa: S608
)


class Claim(NamedTuple):
    """The right to do one round on a node."""

    node_id: UUID
    claim_id: UUID


@dataclass(frozen=True, eq=False)
class Round:
    """What a claimed node has told. `began_s` is of `time.monotonic`; `is_stored` is known once it was tried."""

    claim: Claim
    read: NodeCounters
    began_s: float
    is_stored: Future[bool] = field(default_factory=Future)


class RoundStore:
    """Where the threads of a process bring their rounds."""

    def __init__(self) -> None:
        self._storing = threading.Lock()
        self._changed = threading.Condition()
        self._coming = 0
        self._waiting: list[Round] = []

    @property
    def waiting(self) -> int:
        """How many rounds were read and wait to be stored."""
        return len(self._waiting)

    def carry_out(self, read: Callable[[], Round | None]) -> bool:
        """Reads a round and stores it, with others; returns then. False: there was none, or its claim was lost.

        Raises: what `read` raises; Unavailable when the database cannot be reached; what storing this round alone has
        raised.
        """
        with self._changed:
            self._coming += 1
        round_ = None
        try:
            round_ = read()
        finally:
            with self._changed:
                self._coming -= 1
                if round_ is not None:
                    self._waiting.append(round_)
                self._changed.notify_all()
        if round_ is None:
            return False
        with self._storing:
            if not round_.is_stored.done():
                _settle(self._gather())
        return round_.is_stored.result()

    def _gather(self) -> list[Round]:
        with self._changed:
            self._changed.wait_for(lambda: not self._coming, GATHER_S)
            gathered, self._waiting = self._waiting, []
        return gathered


def _settle(rounds: Sequence[Round]) -> None:
    """Stores rounds together, or each alone when that fails: data of one node must not keep those of others out."""
    try:
        with transaction() as session:
            held = _store_held(session, rounds)
    except BaseException as err:  # noqa: BLE001 each round's own thread raises it
        if len(rounds) == 1 or isinstance(err, Unavailable) or not isinstance(err, Exception):
            for round_ in rounds:
                round_.is_stored.set_exception(err)
            return
        log.warning("metrics.rounds_stored_singly", rounds=len(rounds), error=str(err))
        for round_ in rounds:
            _settle([round_])
        return
    for round_ in rounds:
        if round_ not in held:
            log.warning("metrics.claim_lost", node=str(round_.claim.node_id))
        round_.is_stored.set_result(round_ in held)


def _store_held(session: Session, rounds: Sequence[Round]) -> list[Round]:
    """Takes in the rounds whose claims still hold, and ends them; gives these."""
    claims = arrays_of(_CLAIM_COLUMNS, [round_.claim for round_ in rounds])
    still = {Claim(*row) for row in session.execute(_HOLD_CLAIMS, claims)}
    by_claim = {round_.claim: round_ for round_ in rounds}
    held = [round_ for claim, round_ in by_claim.items() if claim in still]
    if not held:
        return []
    reads = {round_.claim.node_id: round_.read for round_ in held}
    stored = store_counters(session, reads)
    store_card_counters(session, reads)
    ended_s = time.monotonic()
    ends = [
        (
            round_.claim.node_id,
            round_.read.read_at,
            ended_s - round_.began_s,
            stored[round_.claim.node_id],
        )
        for round_ in held
    ]
    session.execute(_END_ROUNDS, arrays_of(_END_COLUMNS, ends))
    return held
