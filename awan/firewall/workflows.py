"""Bringing firewalls, and groups that they share, to the fabric, beside whatever else is done to their instances.

firewall.apply          push (the whole of it, as it is wanted now) -> confirm (the nodes of its ports have it)
firewall_group.apply    the same, for all firewalls that have the group at once

The partition is the firewall, or the group, so a change of it never waits behind a stop or a start. A change that finds
one of these still queued begins none of its own: that one will read it too. A firewall that comes to have a group, or
has it no more, is pushed itself, with its groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

import structlog
from sqlalchemy import ColumnElement, Update, bindparam, func, select, update
from sqlalchemy.orm import Session, class_mapper
from sqlalchemy.sql.dml import ReturningUpdate

from awan.catalogue import engines
from awan.engines.fabric import APPLY_TIMEOUT_S, Fabric
from awan.engines.fabric.firewall import FirewallGroupSpec, FirewallSpec
from awan.errors import EngineUnavailable
from awan.events import record
from awan.firewall.models import Firewall, FirewallGroup
from awan.firewall.spec import read_group_spec, read_spec
from awan.kit.database import execute_directly, transaction
from awan.operations import Failure, Plan, Step, Target, register

Row = TypeVar("Row", bound=Firewall | FirewallGroup)
Spec = TypeVar("Spec", bound=FirewallSpec | FirewallGroupSpec)

PUSH_ROUNDS_MAX = 10

log = structlog.get_logger(__name__)


def _key(model: type[Row]) -> ColumnElement[Any]:
    return class_mapper(model).primary_key[0]


# Every creation, start and edit sends these; built once, because building them takes longer than sending them.
_PUSHED = select(Firewall.pushed_revision).where(Firewall.firewall_id == bindparam("firewall"))
_NOTE_PUSHED: dict[type, ReturningUpdate[UUID]] = {
    model: update(model)
    .where(_key(model) == bindparam("row"), model.deleted_at.is_(None))
    .values(pushed_revision=func.greatest(model.pushed_revision, bindparam("revision")))
    .returning(_key(model))
    for model in (Firewall, FirewallGroup)
}
_NOTE_APPLIED: dict[type, Update] = {
    model: update(model)
    .where(
        _key(model) == bindparam("row"),
        model.applied_revision < func.least(bindparam("revision"), model.pushed_revision),
    )
    .values(applied_revision=func.least(bindparam("revision"), model.pushed_revision))
    for model in (Firewall, FirewallGroup)
}


@dataclass(frozen=True)
class _Pushed(Generic[Row, Spec]):
    """What is brought to the fabric as a whole, and the steps of that. `tells`: the event's resource, and more data."""

    name: str
    model: type[Row]
    read: Callable[[Session, UUID], Spec | None]
    ensure: Callable[[Fabric, Spec], Spec]
    ensure_absent: Callable[[Fabric, UUID], object]
    wait_applied: Callable[[Fabric, UUID], bool]
    tells: Callable[[Row], tuple[UUID, dict[str, object]]]

    def push(self, target: Target) -> None:
        """The fabric has it as it is wanted now; nothing of it when it is gone by now."""
        with transaction() as session:
            spec = self.read(session, target.subject_id)
            location_id = session.get_one(self.model, target.subject_id).location_id
            fabric = engines(session, location_id).fabric
        if spec is not None:
            spec = self.ensure(fabric, spec)
            with transaction() as session:
                if note_pushed(session, self.model, target.subject_id, spec.revision):
                    return
        # It went while this was under way: whoever removed it may have been faster.
        self.ensure_absent(fabric, target.subject_id)

    def confirm(self, target: Target) -> None:
        """The nodes of its ports have confirmed it. One that does not answer leaves it pending.

        The watch over the location asks again until it does.
        """
        with transaction() as session:
            row = session.get_one(self.model, target.subject_id)
            if row.deleted_at is not None:
                return
            pushed = row.pushed_revision
            fabric = engines(session, row.location_id).fabric
        if not self.wait_applied(fabric, target.subject_id):
            log.warning(
                "firewall is pending",
                kind=self.name,
                subject=str(target.subject_id),
                revision=pushed,
            )
            return
        with transaction() as session:
            note_applied(session, self.model, target.subject_id, pushed)

    def remove_if_gone(self, target: Target) -> None:
        """The fabric has nothing of what is gone, whatever a late step has pushed."""
        with transaction() as session:
            row = session.get_one(self.model, target.subject_id)
            if row.deleted_at is None:
                return
            fabric = engines(session, row.location_id).fabric
        self.ensure_absent(fabric, target.subject_id)

    def tell(self, session: Session, target: Target) -> None:
        """The owner is told how far the change has come."""
        row = session.get_one(self.model, target.subject_id)
        if row.deleted_at is not None:
            return
        resource_id, more = self.tells(row)
        is_applied = row.applied_revision >= row.wanted_revision
        record(
            session,
            kind=f"{self.name}.{'applied' if is_applied else 'pending'}",
            actor=f"operation:{target.operation_id}",
            account_id=row.account_id,
            resource_id=resource_id,
            operation_id=target.operation_id,
            data={**more, "revision": row.applied_revision},
        )

    def tell_failure(self, session: Session, target: Target, failure: Failure) -> None:
        """What is wanted stays wanted, and pending; the watch over the location tries again."""
        self.tell(session, target)

    def plan(self) -> Plan:
        """Push and confirm."""
        return Plan(
            workflow=f"{self.name}.apply.v1",
            kind=f"{self.name}.apply",
            steps=(
                Step("push", self.push, percent=10, cancellable=False),
                Step("confirm", self.confirm, percent=60, cancellable=False),
            ),
            succeed=self.tell,
            fail=self.tell_failure,
            overtaken=self.remove_if_gone,
            deadline_s=180,
        )


def push_firewall(fabric: Fabric, spec: FirewallSpec) -> FirewallSpec:
    """Brings a firewall to the fabric, with the groups that it has; gives what was brought in the end.

    A group that is edited meanwhile may not have been anywhere yet, so that its own push found nothing to do: what we
    had read of it is old then, and is brought anew.
    Raises: EngineUnavailable, also when its groups change all the time.
    """
    for _ in range(PUSH_ROUNDS_MAX):
        fabric.ensure_firewall(spec)
        if not spec.groups:
            return spec
        with transaction() as session:
            newest = read_spec(session, spec.firewall_id)
        if newest is None or newest.groups == spec.groups:
            return spec
        spec = newest
    raise EngineUnavailable("fabric", "push a firewall", "its groups change all the time")


def _push_group(fabric: Fabric, spec: FirewallGroupSpec) -> FirewallGroupSpec:
    fabric.ensure_firewall_group(spec)
    return spec


def pushed_revision(session: Session, firewall_id: UUID) -> int:
    """What the fabric was told of a firewall last; what its nodes confirm after this is at least that."""
    return session.scalars(_PUSHED, {"firewall": firewall_id}).one()


def note_pushed(session: Session, model: type[Row], row_id: UUID, revision: int) -> bool:
    """This revision was committed to the fabric; False when it is gone, so that it must not stay there."""
    wanted = {"row": row_id, "revision": revision}
    noted = execute_directly(session, _NOTE_PUSHED[model], wanted)
    return noted.one_or_none() is not None


def note_applied(session: Session, model: type[Row], row_id: UUID, revision: int) -> None:
    """The nodes have confirmed this revision, which was pushed before they were asked."""
    execute_directly(session, _NOTE_APPLIED[model], {"row": row_id, "revision": revision})


APPLY = register(
    _Pushed(
        "firewall",
        Firewall,
        read_spec,
        ensure=push_firewall,
        ensure_absent=lambda fabric, row_id: fabric.ensure_firewall_absent(row_id),
        wait_applied=lambda fabric, row_id: fabric.wait_firewall_applied(
            row_id, timeout_s=APPLY_TIMEOUT_S
        ),
        tells=lambda row: (row.instance_id, {"firewall": str(row.firewall_id)}),
    ).plan()
)
APPLY_GROUP = register(
    _Pushed(
        "firewall_group",
        FirewallGroup,
        read_group_spec,
        ensure=_push_group,
        ensure_absent=lambda fabric, row_id: fabric.ensure_firewall_group_absent(row_id),
        wait_applied=lambda fabric, row_id: fabric.wait_firewall_group_applied(
            row_id, timeout_s=APPLY_TIMEOUT_S
        ),
        tells=lambda row: (row.group_id, {}),
    ).plan()
)
