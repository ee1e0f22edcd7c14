"""The watch over one node: its domains against its instances, and whether it answers at all.

an event    -> that one domain is looked at, at once
a timer     -> all domains of the node are looked at
no answer   -> after a while the node counts as unreachable; its instances' state is then unknown
an answer   -> first the truth about all its instances, then the node counts as reachable again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from uuid import UUID

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.engines.hypervisor import (
    PAUSED_IO_ERROR,
    SEEN_AFTER_RECONNECT,
    UNEXPLAINED,
    DomainEvent,
    DomainFacts,
    Power,
)
from awan.errors import EngineError
from awan.events import record
from awan.fleet import Node, NodeState
from awan.fleet.service import (
    WATCH_ACTOR,
    ReachedNode,
    node_with_engines,
    note_answer,
    note_silence,
    note_usual_answer,
)
from awan.fleet.workflows import FENCE
from awan.instances.models import Instance
from awan.instances.recover import ACTOR, Reason
from awan.instances.rules import SETTLED_STATES
from awan.kit.database import single_statements, transaction
from awan.operations import ControlPlane, Operation, begin
from awan.operations.models import FINAL
from awan.reconcile.power import Circumstances, Verdict, judge
from awan.reconcile.prefix_routers import put_back_prefix_routers
from awan.reconcile.private_networks import put_back_private_networks
from awan.reconcile.repairs import Known, act, find_known, known_on
from awan.settings import get_settings

# A daemon that has just come back tells of guests that died with its node as if they had crashed by themselves.
GAP_S = 15.0

# The engine's word for why a domain is off -> ours.
STOPPED_REASONS = {
    "shutdown": Reason.SHUT_DOWN,
    "destroyed": Reason.POWER_CUT,
    UNEXPLAINED: Reason.POWER_LOST,
}

log = structlog.get_logger(__name__)


class NodeWatch:
    """What one watcher remembers of its node between two looks. Used by one thread."""

    def __init__(self, node_id: UUID, *, gap_s: float = GAP_S) -> None:
        """`gap_s`: for so long after the begin, a silence or a lost connection, nothing counts as a crash."""
        self.node_id = node_id
        self._gap_s = gap_s
        self._announced: set[UUID] = set()
        self._suspected: set[UUID] = set()
        self._silent_since: float | None = None
        self._gap_until = 0.0
        self._fence_id: UUID | None = None
        self._begin_gap()

    @property
    def is_silent(self) -> bool:
        """Whether the last look had no answer."""
        return self._silent_since is not None

    def handle(self, events: Sequence[DomainEvent]) -> None:
        """Looks at the domains that the node has announced changes of; at all of them when it may have missed some."""
        if any(event.detail == SEEN_AFTER_RECONNECT for event in events):
            self._begin_gap()
            self.look()
            return
        for event in events:
            if event.power is Power.CRASHED:
                self._announced.add(event.domain_uuid)
        for domain_uuid in dict.fromkeys(event.domain_uuid for event in events):
            self._look_at(domain_uuid)

    def look(self, listen: Callable[[ReachedNode], None] | None = None) -> None:
        """Compares all domains of the node with its instances. What the engine raises is taken for silence.

        `listen` is told where the node is before it is asked. Raises: NotFound once the node is removed.
        """
        asked_at = time.monotonic()
        try:
            with single_statements() as session:
                node = node_with_engines(session, self.node_id)
                known = known_on(session, self.node_id)
            if listen is not None:
                listen(node)
            # What the database has taken is no silence of the node.
            asked_at = time.monotonic()
            found = node.engines.hypervisor.list_domains(
                node.endpoint, timeout_s=get_settings().node_check_timeout_s
            )
        except EngineError as err:
            self._note_silence(err, asked_at)
            return
        self._silent_since = None
        if node.state == NodeState.LOST:
            self._fence(found)
        domains = {facts.domain_uuid: facts for facts in found}
        suspected: set[UUID] = set()
        for it in known:
            if self._judge(it, domains.get(it.instance_id)) is Verdict.SUSPECTED:
                suspected.add(it.instance_id)
        self._suspected = suspected
        self._announced.clear()
        self._note_answer()

    def _look_at(self, instance_id: UUID) -> None:
        with single_statements() as session:
            known = find_known(session, self.node_id, instance_id)
        if known is None:
            return
        try:
            with single_statements() as session:
                node = node_with_engines(session, self.node_id)
            found = node.engines.hypervisor.find_domain(node.endpoint, instance_id)
        except EngineError as err:
            log.warning(
                "node did not answer after an event", node=str(self.node_id), error=str(err)
            )
            return
        self._judge(known, found)
        self._announced.discard(instance_id)

    def _judge(self, known: Known, found: DomainFacts | None) -> Verdict | None:
        given = Circumstances(
            is_announced=known.instance_id in self._announced,
            is_suspected=known.instance_id in self._suspected,
            is_after_gap=time.monotonic() < self._gap_until,
        )
        verdict = judge(known.desired, known.observed, found, given)
        if verdict is not None and verdict is not Verdict.SUSPECTED:
            act(known, verdict, reason_of(found), _words(found))
        return verdict

    def _fence(self, found: Sequence[DomainFacts]) -> None:
        """What runs on a node that was abandoned and has come back is stopped, by one operation at a time."""
        if not any(it.instance_id and it.power in (Power.RUNNING, Power.PAUSED) for it in found):
            return
        with transaction() as session:
            begun = session.get(Operation, self._fence_id) if self._fence_id else None
            if begun is not None and begun.status not in FINAL:
                return
            self._fence_id = begin(
                session,
                caller=ControlPlane(ACTOR),
                plan=FENCE,
                resource=None,
                resource_kind="node",
                subject_id=self.node_id,
            ).operation_id
        log.error("an abandoned node has come back", node=str(self.node_id), alarm=True)

    def _begin_gap(self) -> None:
        self._gap_until = time.monotonic() + self._gap_s

    def _note_silence(self, err: EngineError, asked_at: float) -> None:
        self._begin_gap()
        if self._silent_since is None:
            self._silent_since = asked_at
            log.warning("node does not answer", node=str(self.node_id), error=str(err))
        silence_s = get_settings().node_silence_s
        # A watcher that was frozen itself has not been told anything either, so its own silence counts as well.
        if time.monotonic() - self._silent_since < silence_s:
            return
        with transaction() as session:
            has_changed = note_silence(session, self.node_id, silence_s, str(err))
            if has_changed:
                _tell_owners(session, self.node_id, "instance.unreachable")
                log.error("node is unreachable", node=str(self.node_id), alarm=True)
            location_id = session.get_one(Node, self.node_id).location_id
        if has_changed:
            # Of two nodes, the one that is left takes no gateway over by itself: it has to be told.
            put_back_private_networks(location_id)
            put_back_prefix_routers(location_id)

    def _note_answer(self) -> None:
        with single_statements() as session:
            if note_usual_answer(session, self.node_id):
                return
        with transaction() as session:
            has_changed = note_answer(session, self.node_id)
            if has_changed:
                _tell_owners(session, self.node_id, "instance.reachable")
                log.warning("node is reachable again", node=str(self.node_id))
            location_id = session.get_one(Node, self.node_id).location_id
        if has_changed:
            put_back_private_networks(location_id)
            put_back_prefix_routers(location_id)


def _tell_owners(session: Session, node_id: UUID, kind: str) -> None:
    """An event for each instance whose shown status changes with the node's health."""
    rows = session.execute(
        select(Instance.instance_id, Instance.account_id).where(
            Instance.node_id == node_id,
            Instance.holds_quota,
            Instance.observed_state.in_(SETTLED_STATES),
        )
    ).all()
    for instance_id, account_id in rows:
        record(
            session,
            kind=kind,
            actor=WATCH_ACTOR,
            account_id=account_id,
            resource_id=instance_id,
        )


def reason_of(found: DomainFacts | None) -> Reason:
    """What the owner is told of a domain that was found like this, or not found."""
    if found is None:
        return Reason.NO_DOMAIN
    if found.power is Power.PAUSED and found.is_persistent:
        return Reason.DISK if found.detail == PAUSED_IO_ERROR else Reason.PAUSED
    if found.power in (Power.RUNNING, Power.PAUSED):
        return Reason.RUNNING if found.is_persistent else Reason.NO_DEFINITION
    if found.power is Power.CRASHED:
        return Reason.CRASHED
    return STOPPED_REASONS.get(found.detail, Reason.OTHER)


def _words(found: DomainFacts | None) -> str:
    if found is None:
        return "no domain"
    return f"{found.power}: {found.detail}" if found.detail else str(found.power)
