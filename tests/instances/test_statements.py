"""A creation stays cheap: each statement is paid for by the one core that an API or a worker process has."""

from __future__ import annotations

from tests.support.in_process_worker import InProcessWorker
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.statements import recorded


def listed(statements: list[str]) -> str:
    """One a line, for the message of a failure."""
    return "\n".join(f"{number:3} {one[:150]}" for number, one in enumerate(statements, 1))


def test_a_creation_is_accepted(cloud: SimulatedCloud) -> None:
    cloud.create()
    with recorded() as sent:
        cloud.create()
    assert len(sent) <= 28, listed(sent)


def test_a_creation_is_carried_out(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    cloud.create_running()
    with recorded(lambda context: context.get("workflow") == "instance.create.v1") as sent:
        cloud.create_running()
    assert len(sent) <= 38, listed(sent)
