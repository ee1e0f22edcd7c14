"""A toy operation on a toy engine: a house of three parts, each made by an ensure-step and undone by a delete."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from awan.engines.sim import SimStore
from awan.errors import EngineUnavailable
from awan.kit.database import transaction
from awan.operations import Failure, Operation, Plan, Step, Target, begin, register
from awan.operations.models import Operation as OperationRow
from awan.resources.models import Resource
from tests.support.builders import Requester, make_account, make_resource

PARTS_DDL = (
    "CREATE TABLE IF NOT EXISTS sim.house_part"
    " (location text, subject_id uuid, part text, PRIMARY KEY (subject_id, part))"
)


@dataclass
class Site:
    """The toy engine and what tests want to happen in it."""

    store: SimStore
    hooks: dict[str, Callable[[Target], None]] = field(default_factory=dict)
    log: list[tuple[str, UUID]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: str, target: Target) -> None:
        with self.lock:
            self.log.append((what, target.subject_id))
        if what in self.hooks:
            self.hooks[what](target)

    def words(self, subject_id: UUID) -> list[str]:
        """What was done to a subject, in order."""
        return [what for what, subject in self.log if subject == subject_id]

    def parts(self, subject_id: UUID) -> list[str]:
        """What stands of the house now."""
        rows = self.store.fetch_all(
            "SELECT part FROM sim.house_part WHERE subject_id = %s ORDER BY part", [subject_id]
        )
        return [row["part"] for row in rows]


site: Site


def open_site(database_url: str) -> Site:
    """The toy engine of this process."""
    global site
    site = Site(SimStore(database_url))
    site.store.ensure_table(PARTS_DDL)
    return site


def _make(part: str) -> Callable[[Target], None]:
    def run(target: Target) -> None:
        site.note(part, target)
        with site.store.call("builder", f"make_{part}", str(target.subject_id)):
            try:
                site.store.execute(
                    "INSERT INTO sim.house_part (location, subject_id, part) VALUES ('', %s, %s)"
                    " ON CONFLICT DO NOTHING",
                    [target.subject_id, part],
                )
            except psycopg.OperationalError as err:  # a builder who is away comes back
                raise EngineUnavailable("builder", f"make_{part}", str(err)) from err

    return run


def _remove(part: str) -> Callable[[Target], None]:
    def undo(target: Target) -> None:
        site.note(f"undo_{part}", target)
        with site.store.call("builder", f"remove_{part}", str(target.subject_id)):
            site.store.execute(
                "DELETE FROM sim.house_part WHERE subject_id = %s AND part = %s",
                [target.subject_id, part],
            )

    return undo


def _rename(session: Session, target: Target, suffix: str) -> None:
    session.execute(
        update(Resource)
        .where(Resource.resource_id == target.subject_id)
        .values(name=Resource.name + suffix)
    )


def _succeed(session: Session, target: Target) -> None:
    site.note("succeed", target)
    _rename(session, target, "+built")


def _fail(session: Session, target: Target, failure: Failure) -> None:
    site.note("fail", target)
    _rename(session, target, "+cancelled" if failure.cancelled else "+failed")


def _clear(target: Target) -> None:
    """Of a house that was not built in the end nothing stays, whoever comes late."""
    with transaction() as session:
        is_built = session.get_one(Resource, target.subject_id).name.endswith("+built")
    if not is_built:
        site.store.execute("DELETE FROM sim.house_part WHERE subject_id = %s", [target.subject_id])
    site.note("spared" if is_built else "cleared", target)


def _then(session: Session, target: Target) -> None:
    site.note("then", target)


PARTS = ("floor", "walls", "roof")
STEPS = (
    Step("floor", _make("floor"), _remove("floor"), percent=10, timeout_s=3),
    Step("walls", _make("walls"), _remove("walls"), percent=40, timeout_s=3),
    Step("roof", _make("roof"), _remove("roof"), percent=80, timeout_s=3, cancellable=False),
)

BUILD = register(
    Plan(
        workflow="house.build.v1",
        kind="house.build",
        steps=STEPS,
        succeed=_succeed,
        fail=_fail,
        deadline_s=60,
        then=_then,
        overtaken=_clear,
    )
)
BUILD_AT_ONCE = register(
    replace(
        BUILD, workflow="house.build_at_once.v1", kind="house.build_at_once", is_one_checkpoint=True
    )
)


def make_plot(session: Session) -> Resource:
    """A committed resource of a new account."""
    resource = make_resource(session, make_account(session))
    session.commit()
    return resource


def start_build(
    session: Session,
    resource: Resource,
    *,
    plan: Plan = BUILD,
    queue_behind: bool = False,
    operation_id: UUID | None = None,
) -> Operation:
    """Begins the plan on the resource, as a service would. Not committed."""
    locked = session.scalars(
        select(Resource)
        .where(Resource.resource_id == resource.resource_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()
    return begin(
        session,
        caller=Requester(locked.account_id),
        plan=plan,
        resource=locked,
        resource_kind="instance",
        subject_id=locked.resource_id,
        operation_id=operation_id or uuid4(),
        queue_behind=queue_behind,
    )


def begin_build(resource: Resource, plan: Plan = BUILD) -> UUID:
    """Begins the plan in a transaction of its own."""
    with transaction() as session:
        return start_build(session, resource, plan=plan).operation_id


def read_operation(operation_id: UUID) -> OperationRow:
    """The row as committed now."""
    with transaction() as session:
        return session.get_one(OperationRow, operation_id)


def read_resource(resource_id: UUID) -> Resource:
    """The row as committed now."""
    with transaction() as session:
        return session.get_one(Resource, resource_id)
