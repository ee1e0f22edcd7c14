"""What a room writes down about a change: its steps, their undos, and what the rows say at the end.

    CREATE = register(Plan(
        workflow="instance.create.v1",
        kind="instance.create",
        steps=(
            Step("volume", make_volume, undo_make_volume, percent=40),
            Step("domain", define_domain, undo_define_domain, percent=70),
        ),
        succeed=mark_running,
        fail=mark_failed,
        deadline_s=300,
    ))

Rules for steps and undos:
- They get ids only and read what they need in transactions of their own (`kit.database.transaction`). What no one else
  changes while the operation runs may be kept in `target.kept` for the steps after, until one is tried again or undone.
- *Ensure*: running one twice, also after a death in its middle, is the same as once.
- An undo is also called for the step that failed: it must do nothing when nothing was done.
- `EngineUnavailable` is retried within `timeout_s`; anything else that is raised ends the plan and unwinds it.
  `Refused` gives the customer its own sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session


@dataclass(frozen=True)
class Target:
    """All that a step is told: which operation it belongs to and what it works on."""

    operation_id: UUID
    subject_id: UUID
    kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Step:
    """One ensure-step.

    `percent` is shown when the step begins. `timeout_s` bounds the retries of `EngineUnavailable`, of the step and of
    its undo alike; a single call is bounded by its engine. With `cancellable` false a requested cancellation no
    longer stops the plan before this step: the point of no return has been passed.
    """

    name: str
    run: Callable[[Target], None]
    undo: Callable[[Target], None] | None = None
    percent: int = 0
    timeout_s: float = 60.0
    cancellable: bool = True


@dataclass(frozen=True)
class Failure:
    """Why a plan was unwound: `message` is the customer's sentence, `detail` the operator's words.

    `left_over`: an undo could not be finished, so engines may still hold what the plan made. The room must then
    keep what stands for it (rows, addresses, room, quota) until a later change has removed it.
    """

    type: str
    message: str
    detail: str
    cancelled: bool
    left_over: bool = False


@dataclass(frozen=True)
class Plan:
    """A durable change.

    `workflow` is the versioned name that running work is found by after a restart: never reuse one for other steps.
    `succeed`, `fail` and `then` run in the one transaction that also ends the operation, so they happen exactly once;
    `then` (after `succeed`) may enqueue a waiting workflow. `deadline_s` counts from `begin`; passing it alarms.

    With `is_one_checkpoint` a worker that takes over runs all steps again from the first (and shows them so), else from
    the one that was begun last. It saves a checkpoint for each step, where running them again does nothing twice.

    `overtaken` is called after a step whose worker was frozen in it (with one checkpoint: or after it) while another
    one took over and ended the operation, and perhaps later ones. It removes what the late step may have made of a
    thing that is gone, and sees to it that a living thing is as its rows say. It may run beside later operations.
    """

    workflow: str
    kind: str
    steps: tuple[Step, ...]
    succeed: Callable[[Session, Target], None]
    fail: Callable[[Session, Target, Failure], None]
    deadline_s: float
    then: Callable[[Session, Target], None] | None = None
    overtaken: Callable[[Target], None] | None = None
    is_one_checkpoint: bool = False

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"{self.workflow}: a plan has at least one step, each with its own name"
            )


_registered: dict[str, Plan] = {}


def register(plan: Plan) -> Plan:
    """Makes the plan known to the workers of this process; call it once, where the plan is defined."""
    from awan.operations.runner import make_workflow

    if plan.workflow in _registered:
        raise ValueError(f"{plan.workflow} is registered already")
    _registered[plan.workflow] = plan
    make_workflow(plan)
    return plan


def is_registered(plan: Plan) -> bool:
    """Whether workers know this very plan."""
    return _registered.get(plan.workflow) is plan


def registered_plans() -> list[Plan]:
    """All plans known to this process, by name."""
    return [plan for _, plan in sorted(_registered.items())]
