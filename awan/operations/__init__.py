"""Operations: the one mechanism for everything that takes time.

A room describes a change as a `Plan` (ordered steps with their undos) and registers it; its service calls `begin` in
the transaction of the request. A worker then carries the plan out, survives its own death, and undoes what was
done when a step fails.
"""

from awan.operations.durable import waiting_workflow
from awan.operations.models import Operation
from awan.operations.plans import Failure, Plan, Step, Target, register
from awan.operations.service import (
    ControlPlane,
    begin,
    enqueue_prompt,
    enqueue_wait,
    is_cancel_requested,
    request_cancel,
    summary,
)
from awan.operations.waits import durable_step, pause
from awan.operations.watch import wait_for_end, wait_for_success

__all__ = [
    "ControlPlane",
    "Failure",
    "Operation",
    "Plan",
    "Step",
    "Target",
    "begin",
    "durable_step",
    "enqueue_prompt",
    "enqueue_wait",
    "is_cancel_requested",
    "pause",
    "register",
    "request_cancel",
    "summary",
    "wait_for_end",
    "wait_for_success",
    "waiting_workflow",
]
