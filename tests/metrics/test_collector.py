"""What the collector stores, to the number, and who may store it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from awan.engines.registry import sim_store
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.metrics import collector, history
from awan.metrics.collector import Claim, Collector, claim_due, collect
from tests.metrics.conftest import NULLS, Meter, collect_all, make_meter
from tests.support.simulated_cloud import SimulatedCloud

GIB = 1024**3
STEADY = {
    "disk_read_bytes": 0,
    "disk_written_bytes": 0,
    "disk_used_bytes": 5 * GIB,
    "memory_used_bytes": GIB // 4,
}


def rows(statement: str, **parameters: Any) -> list[Any]:
    with transaction() as session:
        return list(session.execute(text(statement), parameters))


def test_values_are_right_to_the_number(meter: Meter) -> None:
    meter.read(0, cpu_time_ns=0, net_in_bytes=0, net_out_bytes=0, **STEADY)
    for after_s in (10, 20, 30, 40, 50, 60):
        meter.read(
            after_s,
            cpu_time_ns=after_s * 250_000_000,
            net_in_bytes=after_s * 1000,
            net_out_bytes=after_s * 500,
            disk_read_bytes=after_s * 4096,
            disk_written_bytes=after_s * 8192,
            memory_used_bytes=GIB // 2,
        )
    shown = meter.chart()
    assert shown[0] == {
        "cpu": 0.25,
        "maxcpu": 1.0,
        "mem": GIB // 2,
        "maxmem": GIB,
        "disk": 5 * GIB,
        "maxdisk": 20 * GIB,
        "netin": 1000.0,
        "netout": 500.0,
        "diskread": 4096.0,
        "diskwrite": 8192.0,
    }
    assert len(shown) == 60
    assert all(point == NULLS for start, point in shown.items() if start != 0)


def test_the_minute_that_goes_on_is_shown(meter: Meter) -> None:
    meter.read(0, net_in_bytes=0, **STEADY)
    meter.read(15, net_in_bytes=300)
    assert meter.chart()[0]["netin"] == 20.0
    meter.read(75, net_in_bytes=1500)
    shown = meter.chart()
    assert (shown[0]["netin"], shown[60]["netin"]) == (20.0, 20.0)


def test_gaps_are_null_and_never_zero(meter: Meter) -> None:
    meter.read(0, net_in_bytes=0, **STEADY)
    meter.read(60, net_in_bytes=600)
    meter.read(300, net_in_bytes=999_999)
    meter.read(360, net_in_bytes=999_999)
    shown = meter.chart()
    assert shown[0]["netin"] == 10.0
    assert [shown[start] for start in (60, 120, 180, 240)] == [NULLS] * 4
    assert shown[300]["netin"] == 0.0


def test_a_restart_is_neither_negative_nor_a_jump(meter: Meter) -> None:
    meter.read(0, cpu_time_ns=10**12, net_in_bytes=10**12, **STEADY)
    meter.read(30, cpu_time_ns=10**12 + 3 * 10**9, net_in_bytes=10**12 + 3000)
    http = meter.cloud.customer.http
    answer = http.post(f"/instances/{meter.uuid}/restart", json={"force": True})
    meter.cloud.wait(answer.json()["operation"]["uuid"])
    meter.read(40, cpu_time_ns=2 * 10**12, net_in_bytes=2 * 10**12, **STEADY)
    meter.read(60, cpu_time_ns=2 * 10**12 + 2 * 10**9, net_in_bytes=2 * 10**12 + 2000)
    assert (meter.chart()[0]["cpu"], meter.chart()[0]["netin"]) == (0.1, 100.0)


def test_a_counter_that_falls_is_neither_negative_nor_a_jump(meter: Meter) -> None:
    meter.read(0, net_in_bytes=2**63 - 1, **STEADY)
    meter.read(30, net_in_bytes=5)
    meter.read(60, net_in_bytes=3005)
    assert meter.chart()[0]["netin"] == 100.0


def test_a_stopped_instance_is_null(meter: Meter) -> None:
    meter.read(0, net_in_bytes=0, **STEADY)
    meter.read(30, net_in_bytes=300)
    http = meter.cloud.customer.http
    answer = http.post(f"/instances/{meter.uuid}/stop", json={"force": True})
    meter.cloud.wait(answer.json()["operation"]["uuid"])
    for after_s in (60, 120):
        meter.read(after_s)
    shown = meter.chart()
    assert shown[0]["netin"] == 10.0
    assert shown[60] == shown[120] == NULLS
    assert rows("SELECT 1 FROM metric_reading") == []


def test_a_silent_qemu_hides_disks_and_memory_only(meter: Meter) -> None:
    meter.read(0, net_in_bytes=0, **STEADY)
    meter.fake.set_qemu_answers(meter.node, meter.uuid, False)
    for after_s in (60, 120, 180, 240):
        meter.read(after_s, net_in_bytes=after_s)
    shown = meter.chart()[60]
    assert shown["netin"] == 1.0
    assert shown["maxmem"] == GIB
    hidden = ("mem", "disk", "diskread", "diskwrite")
    assert {name: shown[name] for name in hidden} == dict.fromkeys(hidden)


def test_two_workers_do_not_double(meter: Meter) -> None:
    meter.read(0, net_in_bytes=0, **STEADY)
    for number in range(1, 13):
        meter.fake.set_counters(meter.node, meter.uuid, net_in_bytes=number * 1000)
        meter.fake.set_clock(meter.node, meter.began_at + timedelta(seconds=10 * number))
        with transaction() as session:
            session.execute(text("UPDATE metric_node SET due_at = now()"))
        barrier = threading.Barrier(4)

        def one_worker(barrier: threading.Barrier = barrier) -> list[Claim]:
            barrier.wait()
            claims = claim_due()
            for claim in claims:
                collect(claim)
            return claims

        with ThreadPoolExecutor(4) as pool:
            claimed = [
                claim for found in pool.map(lambda _: one_worker(), range(4)) for claim in found
            ]
        assert sorted(claim.node_id for claim in claimed) == sorted(
            {claim.node_id for claim in claimed}
        )
        assert len(claimed) == 2
    shown = meter.chart()
    assert (shown[0]["netin"], shown[60]["netin"]) == (100.0, 100.0)
    assert rows("SELECT sum(net_in_bytes)::float8 FROM metric_point")[0][0] == 12000.0


def test_a_node_is_read_once_in_its_interval(meter: Meter) -> None:
    assert len(claim_due()) == 2
    assert claim_due() == []
    late = rows("SELECT extract(epoch FROM min(due_at) - now())::float8 FROM metric_node")[0][0]
    assert 8 < late <= 10


def test_a_frozen_worker_stores_nothing_when_it_wakes(meter: Meter) -> None:
    meter.read(0, net_in_bytes=0, **STEADY)
    with transaction() as session:
        session.execute(text("UPDATE metric_node SET due_at = now()"))
    frozen = next(claim for claim in claim_due() if claim.node_id == meter.node.node_id)
    with transaction() as session:
        session.execute(text("UPDATE metric_node SET due_at = now(), claimed_until = now()"))
    meter.fake.set_counters(meter.node, meter.uuid, net_in_bytes=6000)
    meter.fake.set_clock(meter.node, meter.began_at + timedelta(seconds=60))
    other = next(claim for claim in claim_due() if claim.node_id == meter.node.node_id)
    assert other.claim_id != frozen.claim_id
    assert collect(frozen) is False
    assert collect(other) is True
    assert collect(frozen) is False
    assert meter.chart()[0]["netin"] == 100.0


def test_a_silent_node_keeps_nobody_waiting(cloud: SimulatedCloud, meter: Meter) -> None:
    """It is noted and asked less often; the other one's instances are measured; its own show a gap."""
    other = make_meter(cloud)
    assert other.node.node_id != meter.node.node_id
    other.began_at = meter.began_at
    meter.fake.set_node_available(meter.node, False)
    other.read(0, net_in_bytes=0, **STEADY)
    other.read(60, net_in_bytes=600)
    assert other.chart()[0]["netin"] == 10.0
    assert meter.chart()[0] == NULLS
    failures, error, wait_s = rows(
        "SELECT failures, error, extract(epoch FROM due_at - now())::float8 FROM metric_node"
        " WHERE node_id = :node",
        node=meter.node.node_id,
    )[0]
    assert (failures, "does not answer" in error) == (2, True)
    assert 15 < wait_s <= 20
    meter.fake.set_node_available(meter.node, True)
    collect_all()
    assert rows("SELECT max(failures) FROM metric_node")[0][0] == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_a_minute_from_before_a_long_silence_is_left_out(meter: Meter, stopped: bool) -> None:
    """Its partition was dropped meanwhile: that must not keep the rounds after it from being stored."""
    silence_s = 6 * 3600
    history.make_partitions(meter.began_at - timedelta(seconds=silence_s))
    meter.read(-silence_s, net_in_bytes=0, **STEADY)
    meter.read(30 - silence_s, net_in_bytes=300)
    if stopped:
        http = meter.cloud.customer.http
        answer = http.post(f"/instances/{meter.uuid}/stop", json={"force": True})
        meter.cloud.wait(answer.json()["operation"]["uuid"])
    assert history.drop_old() != []
    meter.read(0, **({} if stopped else {"net_in_bytes": 9000}))
    if stopped:
        assert rows("SELECT 1 FROM metric_reading") == []
    else:
        meter.read(60, net_in_bytes=9600)
        assert meter.chart()[0]["netin"] == 10.0
    assert all(point == NULLS for start, point in meter.chart().items() if start != 0)


def test_a_minute_from_before_a_short_silence_is_kept(meter: Meter) -> None:
    meter.read(0, net_in_bytes=0, **STEADY)
    meter.read(30, net_in_bytes=300)
    meter.read(20 * 60, net_in_bytes=9000)
    assert rows("SELECT net_in_bytes FROM metric_point") == [(300.0,)]


def test_foreign_domains_are_left_out(meter: Meter) -> None:
    sim_store().execute(
        "INSERT INTO sim.domain (location, node_id, uuid, power, config, live, started_at)"
        " SELECT location, node_id, gen_random_uuid(), power, config, live, started_at FROM sim.domain"
    )
    meter.read(0, **STEADY)
    assert rows("SELECT instance_id FROM metric_reading") == [(meter.uuid,)]


def test_a_tick_begins_rounds_without_waiting(
    cloud: SimulatedCloud, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker's own loop: two nodes, one of which hangs."""
    hanging, released, done = threading.Event(), threading.Event(), threading.Event()
    real = collector.collect

    def slow(claim: Claim) -> bool:
        if claim.node_id == meter.node.node_id:
            hanging.set()
            assert released.wait(20)
        result = real(claim)
        if claim.node_id != meter.node.node_id:
            done.set()
        return result

    monkeypatch.setattr(collector, "collect", slow)
    loop = Collector()
    loop.tick()
    assert hanging.wait(10)
    assert done.wait(10)
    with transaction() as session:
        session.execute(text("UPDATE metric_node SET due_at = now()"))
    done.clear()
    loop.tick()
    assert done.wait(10)
    released.set()


def test_deleted_instances_and_removed_nodes_are_forgotten(meter: Meter) -> None:
    meter.read(0, **STEADY)
    answer = meter.cloud.customer.http.request(
        "DELETE",
        f"/instances/{meter.uuid}",
        json={"remove_ip": True, "remove_block_storage": True},
    )
    meter.cloud.wait(answer.json()["operation"]["uuid"])
    for node in meter.cloud.node_ids:
        assert meter.cloud.admin.delete(f"/admin/nodes/{node}").status_code == 200
    history.keep()
    assert rows("SELECT 1 FROM metric_reading") == []
    assert rows("SELECT 1 FROM metric_node") == []
    assert claim_due() == []


def test_without_partitions_the_loop_makes_them(meter: Meter) -> None:
    from tests.metrics.conftest import drop_partitions

    drop_partitions()
    meter.began_at = now()
    Collector().tick()
    found = rows("SELECT count(*) FROM pg_inherits WHERE inhparent = 'metric_point'::regclass")
    assert found[0][0] == 5
