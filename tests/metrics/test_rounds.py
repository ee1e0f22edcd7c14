"""Rounds that are stored together: in one transaction, to the number, and none at the cost of another."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DataError

from awan.kit.database import get_engine, transaction
from awan.metrics import collector, rounds
from awan.metrics.collector import claim_due, collect
from awan.metrics.rounds import Claim
from tests.metrics.conftest import Meter, make_meter
from tests.support.held_call import held
from tests.support.in_process_worker import InProcessWorker
from tests.support.lock_waits import wait_for_waiters
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.statements import recorded

Rounds = dict[UUID, Future[bool]]


def rows(statement: str, **parameters: Any) -> list[Any]:
    with transaction() as session:
        return list(session.execute(text(statement), parameters))


@pytest.fixture
def meters(cloud: SimulatedCloud, worker: InProcessWorker, partitions: None) -> list[Meter]:
    """An instance on each of four nodes, all measured from the same moment on."""
    for name in ("n3", "n4"):
        node = {
            "location_id": cloud.location_id,
            "name": name,
            "libvirt_uri": f"fake://{name}/",
            "tier_ids": [cloud.tier_id],
        }
        assert cloud.admin.post("/admin/nodes", json=node).status_code == 201
    made = [make_meter(cloud) for _ in range(4)]
    assert len({meter.node.node_id for meter in made}) == 4
    for meter in made:
        meter.began_at = made[0].began_at
    return made


def claim_all() -> dict[UUID, Claim]:
    """The right to a round on every node."""
    with transaction() as session:
        session.execute(text("UPDATE metric_node SET due_at = now()"))
    return {claim.node_id: claim for claim in claim_due()}


def set_all(meters: Iterable[Meter], after_s: float, **counters: int) -> None:
    """All guests' counters stand at these values at that moment."""
    for meter in meters:
        meter.fake.set_counters(meter.node, meter.uuid, **counters)
        meter.fake.set_clock(meter.node, meter.began_at + timedelta(seconds=after_s))


def collect_together(first: Claim, others: Iterable[Claim]) -> Rounds:
    """The first round is stored alone, and only when all others have come to wait for its end."""
    others = list(others)
    with ThreadPoolExecutor(1 + len(others)) as pool, get_engine().connect() as holder:
        lock = text("SELECT 1 FROM metric_node WHERE node_id = :node FOR UPDATE")
        holder.execute(lock, {"node": first.node_id})
        begun = {first.node_id: pool.submit(collect, first)}
        wait_for_waiters(holder)
        begun |= {claim.node_id: pool.submit(collect, claim) for claim in others}
        until_waiting(len(others))
        holder.rollback()
    return begun


def until_waiting(count: int) -> None:
    """Returns when so many rounds wait to be stored. Raises: AssertionError."""
    deadline = time.monotonic() + 20
    while collector.rounds.waiting < count:
        assert time.monotonic() < deadline, "they do not come"
        time.sleep(0.01)


def split(meters: list[Meter]) -> tuple[Claim, list[Claim]]:
    """Claims of the first one's node, and of the others'."""
    claims = claim_all()
    return claims.pop(meters[0].node.node_id), list(claims.values())


def test_rounds_that_gather_are_one_transaction(meters: list[Meter]) -> None:
    set_all(meters, 0, net_in_bytes=0)
    assert all(collect(claim) for claim in claim_all().values())
    for number, meter in enumerate(meters, 1):
        set_all([meter], 60, net_in_bytes=600 * number)
    first, others = split(meters)
    with recorded() as sent:
        begun = collect_together(first, others)
    assert [round_.result() for round_ in begun.values()] == [True] * 4
    for begin in ("SELECT node_id, claim_id", "INSERT INTO metric_reading", "UPDATE metric_node"):
        assert len([one for one in sent if one.startswith(begin)]) == 2, begin
    written = rows("SELECT node_id, xmin::text, domains, claim_id, failures FROM metric_node")
    assert {tuple(row[2:]) for row in written} == {(1, None, 0)}
    transactions = {row[0]: row[1] for row in written}
    alone = transactions.pop(first.node_id)
    assert len(set(transactions.values()) - {alone}) == 1
    for number, meter in enumerate(meters, 1):
        assert meter.chart()[0]["netin"] == 10.0 * number
    kept = rows("SELECT instance_id, node_id FROM metric_reading")
    assert sorted(kept) == sorted((meter.uuid, meter.node.node_id) for meter in meters)


def test_a_lost_claim_is_left_out(meters: list[Meter]) -> None:
    set_all(meters, 0, net_in_bytes=0)
    assert all(collect(claim) for claim in claim_all().values())
    set_all(meters, 60, net_in_bytes=600)
    first, others = split(meters)
    lost = meters[2].node.node_id
    with transaction() as session:
        taken = text("UPDATE metric_node SET claim_id = gen_random_uuid() WHERE node_id = :node")
        session.execute(taken, {"node": lost})
    begun = collect_together(first, others)
    assert {node for node, round_ in begun.items() if not round_.result()} == {lost}
    assert [meter.chart()[0]["netin"] for meter in meters] == [10.0, 10.0, None, 10.0]
    claimed = rows("SELECT node_id FROM metric_node WHERE claim_id IS NOT NULL")
    assert claimed == [(lost,)]


def test_a_round_comes_twice_and_is_stored_once(meters: list[Meter]) -> None:
    set_all(meters, 0, net_in_bytes=0)
    first, others = split(meters)
    twice = others[0]
    with ThreadPoolExecutor(1) as pool, held("read_counters") as call:
        late = pool.submit(collect, twice)
        assert call.entered.wait(20)
        begun = collect_together(first, others)
        call.let_go.set()
        assert late.result() is False
    assert all(round_.result() for round_ in begun.values())


def test_data_of_one_node_do_not_keep_out_those_of_others(meters: list[Meter]) -> None:
    set_all(meters, 0, net_in_bytes=0)
    assert all(collect(claim) for claim in claim_all().values())
    set_all(meters, 60, net_in_bytes=600)
    bad = meters[1]
    bad.fake.set_counters(bad.node, bad.uuid, net_in_bytes=2**63)
    first, others = split(meters)
    begun = collect_together(first, others)
    with pytest.raises(DataError):
        begun.pop(bad.node.node_id).result()
    assert [round_.result() for round_ in begun.values()] == [True] * 3
    assert [meter.chart()[0]["netin"] for meter in meters] == [10.0, None, 10.0, 10.0]


def test_a_round_waits_for_those_that_have_begun(
    meters: list[Meter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "GATHER_S", 60.0)
    set_all(meters, 0, net_in_bytes=0)
    first, others = split(meters)
    with ThreadPoolExecutor(2) as pool, held("read_counters") as call:
        slow = pool.submit(collect, first)
        assert call.entered.wait(20)
        quick = pool.submit(collect, others[0])
        until_waiting(1)
        assert not quick.done()
        call.let_go.set()
        assert (slow.result(), quick.result()) == (True, True)
    written = rows("SELECT DISTINCT xmin::text FROM metric_node WHERE collected_at IS NOT NULL")
    assert len(written) == 1


def test_a_node_that_hangs_delays_nobody(meters: list[Meter]) -> None:
    set_all(meters, 0, net_in_bytes=0)
    first, others = split(meters)
    with ThreadPoolExecutor(1) as pool, held("read_counters") as call:
        hanging = pool.submit(collect, first)
        assert call.entered.wait(20)
        assert all(collect(claim) for claim in others)
        assert not call.left.is_set()
        call.let_go.set()
        assert hanging.result() is True


def test_those_due_longest_are_claimed_in_the_order_in_which_rounds_are_stored(
    meters: list[Meter],
) -> None:
    """Else a worker that takes nodes and one that still stores rounds of theirs could wait for each other."""
    set_all(meters, 0, net_in_bytes=0)
    assert all(collect(claim) for claim in claim_all().values())
    nodes = sorted(meter.node.node_id for meter in meters)
    with transaction() as session:
        for age_s, node in enumerate(nodes, 1):
            session.execute(
                text(
                    "UPDATE metric_node SET due_at = now() - make_interval(secs => :age_s) WHERE node_id = :node"
                ),
                {"age_s": age_s, "node": node},
            )
    assert [claim.node_id for claim in claim_due(3)] == nodes[1:]
    assert [claim.node_id for claim in claim_due(3)] == nodes[:1]


def test_a_removed_node_is_skipped_whatever_its_location_has(
    cloud: SimulatedCloud, worker: InProcessWorker, partitions: None
) -> None:
    claims = claim_all()
    for node in cloud.node_ids:
        assert cloud.admin.delete(f"/admin/nodes/{node}").status_code == 200
    with transaction() as session:
        session.execute(text("DELETE FROM location_engine WHERE kind = 'volumes'"))
    assert [collect(claim) for claim in claims.values()] == [False, False]
