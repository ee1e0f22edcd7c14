"""kill -9 of the worker with 50 operations in flight, over simulated nodes whose calls take their time."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.report import Row, publish, spread
from benchmarks.simulated_cloud import REMOVE, ManyNodes, many_nodes

TITLE = "Recovery after kill -9 of the worker"
NODES = 10
ROUNDS = 5
CREATES, EACH_CHANGE = 26, 6
CHANGES = ("start", "stop", "restart", "delete")
IN_FLIGHT = CREATES + EACH_CHANGE * len(CHANGES)
# Calls last so long until the kill, so that no operation ends before; afterwards they last so long.
HELD_S, LATENCY_S = 20.0, 0.2
RESUME_MAX_S = 60.0
LOOK_S = 0.01


def run(*, record: bool) -> None:
    """Each round: begin 50 operations, wait until the worker is at all of them, kill it, look until all have ended."""
    with many_nodes(NODES, 18073, AWAN_WORKFLOW_CONCURRENCY="64") as cloud:
        rounds = [_round(cloud) for _ in range(ROUNDS)]
        findings = cloud.audit()
    for words in [*(wrong for it in rounds for wrong in it.wrong), *findings]:
        print(words)
    rows = [
        Row(
            f"kill → first of {IN_FLIGHT} operations resumed", spread([it.first_s for it in rounds])
        ),
        Row(
            f"kill → all {IN_FLIGHT} operations resumed",
            spread([it.all_s for it in rounds]),
            "≤ 10 s",
        ),
        Row(
            f"kill → all ended (a call of an engine takes {LATENCY_S:.1f} s)",
            spread([it.ended_s for it in rounds]),
        ),
        Row(
            "operations that ended otherwise than they should, or twice",
            str(sum(len(it.wrong) for it in rounds)),
            "0",
        ),
        Row("findings of the audit afterwards", str(len(findings)), "0"),
    ]
    publish(TITLE, "python -m benchmarks recovery", rows, record=record)


@dataclass(frozen=True)
class Change:
    """One operation: the instance and what is done to it."""

    instance: str
    verb: str


# What the engines hold of an instance: its domains' power, its ports, its disks.
HELD = (
    "SELECT power FROM sim.domain WHERE uuid = %s",
    "SELECT 1 FROM sim.fabric_port WHERE instance_id = %s",
    "SELECT 1 FROM sim.volume JOIN volume ON name = 'vol-' || volume_id || '.qcow2'"
    " WHERE instance_id = %s",
)
ALL_THERE, NOTHING = (["running"], [1], [1]), ([], [], [])
WANTED = {
    "create": ALL_THERE,
    "start": ALL_THERE,
    "restart": ALL_THERE,
    "stop": (["stopped"], [1], [1]),
    "delete": NOTHING,
}


@dataclass(frozen=True)
class _Round:
    """One kill. Seconds since it."""

    first_s: float
    all_s: float
    ended_s: float
    wrong: list[str]


def _round(cloud: ManyNodes) -> _Round:
    cloud.set_latency(0.0)
    time.sleep(1.5)  # until everybody has read it
    with cloud.client() as http:
        present = _prepare(cloud, http)
        cloud.set_latency(HELD_S)
        time.sleep(1.5)
        operations = _begin(cloud, http, present)
    with cloud.connect() as connection:
        before = _wait_until_all_run(connection, operations)
        os.kill(cloud.plane.statuses()["worker"].pid, signal.SIGKILL)
        killed = time.monotonic()
        cloud.set_latency(LATENCY_S)
        first_s = all_s = None
        while all_s is None:
            now_s = time.monotonic() - killed
            resumed = {
                uuid
                for uuid, (number, has_ended) in _executions(connection, operations).items()
                if has_ended or number > before[uuid]
            }
            if resumed and first_s is None:
                first_s = now_s
            if len(resumed) == len(operations):
                all_s = now_s
            if now_s > RESUME_MAX_S:
                raise TimeoutError(f"{len(operations) - len(resumed)} operations were not resumed")
            time.sleep(LOOK_S)
        cloud.wait_until_idle()
        ended_s = time.monotonic() - killed
        wrong = _judge(connection, operations)
    assert first_s is not None
    return _Round(first_s, all_s, ended_s, wrong)


def _prepare(cloud: ManyNodes, http: httpx.Client) -> list[str]:
    """Instances of nobody's but this round: those to be started are stopped, the others run."""
    for row in http.get("/instances?limit=100").json()["data"]["data"]:
        http.request("DELETE", f"/instances/{row['uuid']}", json=REMOVE).raise_for_status()
    uuids = []
    for _ in range(EACH_CHANGE * len(CHANGES)):
        answer = http.post("/instances", json=cloud.order())
        answer.raise_for_status()
        uuids.append(str(answer.json()["data"]["uuid"]))
    cloud.wait_until_idle()
    for uuid in uuids[:EACH_CHANGE]:
        http.post(f"/instances/{uuid}/stop", json={"force": True}).raise_for_status()
    cloud.wait_until_idle()
    return uuids


def _begin(cloud: ManyNodes, http: httpx.Client, present: list[str]) -> dict[str, Change]:
    """Operation -> what it is to do."""
    begun: dict[str, Change] = {}
    for _ in range(CREATES):
        answer = http.post("/instances", json=cloud.order())
        answer.raise_for_status()
        made = answer.json()
        begun[str(made["operation"]["uuid"])] = Change(str(made["data"]["uuid"]), "create")
    for number, uuid in enumerate(present):
        verb = CHANGES[number // EACH_CHANGE]
        if verb == "delete":
            answer = http.request("DELETE", f"/instances/{uuid}", json=REMOVE)
        else:
            body = {} if verb == "start" else {"force": True}
            answer = http.post(f"/instances/{uuid}/{verb}", json=body)
        answer.raise_for_status()
        begun[str(answer.json()["operation"]["uuid"])] = Change(uuid, verb)
    return begun


def _executions(connection: Any, operations: dict[str, Change]) -> dict[str, tuple[int, bool]]:
    """Operation -> how often a worker has begun it, and whether it has ended."""
    rows = connection.execute(
        "SELECT operation_id::text, execution, finished_at IS NOT NULL FROM operation"
        " WHERE operation_id = ANY(%s::uuid[])",
        [list(operations)],
    ).fetchall()
    return {uuid: (number, has_ended) for uuid, number, has_ended in rows}


def _wait_until_all_run(connection: Any, operations: dict[str, Change]) -> dict[str, int]:
    """How often each was begun, once each was; none has ended. Raises: TimeoutError."""
    deadline = time.monotonic() + HELD_S
    while time.monotonic() < deadline:
        found = _executions(connection, operations)
        if all(number > 0 and not has_ended for number, has_ended in found.values()):
            return {uuid: number for uuid, (number, _) in found.items()}
        time.sleep(LOOK_S)
    raise TimeoutError("the operations were never in flight all at once")


def _judge(connection: Any, operations: dict[str, Change]) -> list[str]:
    """What is not as it must be once all have ended: one end each, and its one effect on the engines."""
    wrong = []
    for uuid, change in operations.items():
        (status,) = connection.execute(
            "SELECT status FROM operation WHERE operation_id = %s", [uuid]
        ).fetchone()
        ends = connection.execute(
            "SELECT kind FROM event WHERE operation_id = %s AND kind LIKE 'operation.%%'"
            " ORDER BY event_id",
            [uuid],
        ).fetchall()
        held = [
            [row[0] for row in connection.execute(query, [change.instance]).fetchall()]
            for query in HELD
        ]
        found = (status, [kind for (kind,) in ends], *held)
        if found != (
            "succeeded",
            ["operation.queued", "operation.succeeded"],
            *WANTED[change.verb],
        ):
            wrong.append(f"{change.verb} {uuid}: {found}")
    return wrong
