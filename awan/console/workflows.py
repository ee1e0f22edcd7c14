"""Durable work on consoles.

console.open   unlock -> (the relay connects) -> lock

The screen has a password for as long as this lasts, and the relay's connection outlives it. Openings of one instance
run one after the other, so that none takes away another's password.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.catalogue import engines
from awan.console.models import Console, ConsoleState
from awan.console.rules import node_password
from awan.engines.hypervisor import Hypervisor, NodeEndpoint
from awan.errors import Conflict
from awan.fleet import Node, endpoint
from awan.instances.models import Instance
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.notifications import Channel
from awan.operations import Failure, Plan, Step, Target, register

# Wakes the relay.
changes = Channel("awan_console")
"""NOTIFY channel: the uuid of a console that a worker has done something about."""
UNLOCK_TIMEOUT_S = 8.0
CONNECT_TIMEOUT_S = 10.0
"""Until the relay must be through to the node, from the unlocking."""
PASSWORD_VALID_S = 60.0
"""Far longer than it is needed, because a node's clock may differ from ours: locking ends it earlier."""
POLL_S = 0.05


@dataclass(frozen=True)
class Situation:
    """What the steps need of the rows."""

    instance_id: UUID
    state: str
    node: NodeEndpoint
    hypervisor: Hypervisor


def read_situation(console_id: UUID) -> Situation | None:
    """The console, its instance's node and the engine; None when the instance is on no node any more."""
    with transaction() as session:
        console = session.get_one(Console, console_id)
        instance = session.get_one(Instance, console.instance_id)
        if instance.node_id is None:
            return None
        return Situation(
            instance.instance_id,
            console.state,
            endpoint(session.get_one(Node, instance.node_id)),
            engines(session, instance.location_id).hypervisor,
        )


def unlock(target: Target) -> None:
    """The screen opens for this console's password, and the relay knows where it is."""
    it = read_situation(target.subject_id)
    if it is None:
        raise Conflict("The instance does not exist any more.")
    if it.state != ConsoleState.OPENING:
        return
    found = it.hypervisor.unlock_console(
        it.node,
        it.instance_id,
        password=node_password(target.subject_id),
        valid_s=PASSWORD_VALID_S,
    )
    with transaction() as session:
        console = session.get_one(Console, target.subject_id, with_for_update=True)
        if console.state == ConsoleState.OPENING:
            console.state = ConsoleState.READY
            console.host, console.port = found.host, found.port
            console.requires_tls = found.requires_tls
        changes.notify(session, target.subject_id)


def await_relay(target: Target) -> None:
    """The relay is through, has given up, or has had its time."""
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while time.monotonic() < deadline:
        with transaction() as session:
            console = session.get_one(Console, target.subject_id)
            if console.state != ConsoleState.READY:
                return
        time.sleep(POLL_S)


def lock(target: Target) -> None:
    """No password opens the screen."""
    it = read_situation(target.subject_id)
    if it is not None:
        it.hypervisor.lock_console(it.node, it.instance_id)


def lock_late(target: Target) -> None:
    """A late unlocking opens nothing. Where another console is just being opened, that one's own lock follows."""
    with transaction() as session:
        console = session.get_one(Console, target.subject_id)
        opening = select(Console.console_id).where(
            Console.instance_id == console.instance_id,
            Console.state.in_([ConsoleState.OPENING, ConsoleState.READY]),
        )
        if session.scalars(opening.limit(1)).first() is not None:
            return
    lock(target)


def mark_locked(session: Session, target: Target) -> None:
    """A console that nobody came for is over."""
    console = session.get_one(Console, target.subject_id, with_for_update=True)
    if console.state == ConsoleState.READY:
        _close(session, console, "nobody came for it")


def mark_failed(session: Session, target: Target, failure: Failure) -> None:
    """A console that could not be unlocked is over; one that is open already stays."""
    console = session.get_one(Console, target.subject_id, with_for_update=True)
    if console.state in (ConsoleState.OPENING, ConsoleState.READY):
        _close(session, console, failure.message)


def _close(session: Session, console: Console, reason: str) -> None:
    console.state, console.closed_at, console.closed_reason = ConsoleState.CLOSED, now(), reason
    changes.notify(session, console.console_id)


OPEN = register(
    Plan(
        workflow="console.open.v1",
        kind="console.open",
        steps=(
            Step("unlock", unlock, lock, percent=10, timeout_s=UNLOCK_TIMEOUT_S),
            Step("connect", await_relay, percent=50),
            Step("lock", lock, percent=80),
        ),
        succeed=mark_locked,
        fail=mark_failed,
        overtaken=lock_late,
        deadline_s=120,
    )
)
