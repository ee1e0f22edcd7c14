"""What every hypervisor engine does, simulated or real."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from awan.engines.hypervisor import (
    UNEXPLAINED,
    AgentAnswer,
    ConsoleEndpoint,
    DiskSpec,
    DomainCounters,
    DomainSpec,
    GuestSign,
    NicSpec,
    Power,
    StopOutcome,
    card_device,
)
from awan.engines.hypervisor.pixmap import PNG_SIGNATURE
from awan.engines.rfb import open_node
from awan.engines.seed import hash_password
from awan.errors import EngineRejected, EngineUnavailable
from awan.kit.clock import now
from tests.engines.hypervisor_contract.rigs import Events, Rig, open_screen, restart

HASH = hash_password("Brave-Donkey-8")
BlankSpec = Callable[..., DomainSpec]
Listen = Callable[[UUID], Events]


def power_of(rig: Rig, instance_id: UUID) -> Power | None:
    facts = rig.hypervisor.find_domain(rig.node, instance_id)
    return facts.power if facts is not None else None


def start(rig: Rig, spec: DomainSpec) -> None:
    rig.hypervisor.ensure_defined(rig.node, spec)
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)


def test_probe_finds_the_nodes_facts(rig: Rig) -> None:
    facts = rig.hypervisor.probe(rig.node)
    assert len(facts.cpu_threads) >= 1
    assert sorted(set(facts.cpu_threads)) == list(facts.cpu_threads)
    assert facts.memory_mib > 1024
    assert facts.pool_capacity_gib >= facts.pool_available_gib > 0
    assert facts.libvirt_version.count(".") == 2
    assert facts.qemu_version.count(".") == 2
    known = replace(rig.node, node_id=uuid4(), host_uuid=facts.host_uuid)
    assert rig.hypervisor.probe(known).host_uuid == facts.host_uuid


def test_probe_refuses_another_host(rig: Rig) -> None:
    with pytest.raises(EngineRejected):
        rig.hypervisor.probe(replace(rig.node, node_id=uuid4(), host_uuid=uuid4()))


def test_an_unknown_domain(rig: Rig) -> None:
    unknown = uuid4()
    hypervisor, node = rig.hypervisor, rig.node
    assert hypervisor.find_domain(node, unknown) is None
    assert hypervisor.ensure_stopped(node, unknown, grace_s=5) == StopOutcome.ALREADY_STOPPED
    assert hypervisor.guest_sign(node, unknown) == GuestSign.NONE
    assert hypervisor.set_password(node, unknown, "awan", HASH) == AgentAnswer.SILENT
    assert hypervisor.set_hostname(node, unknown, "web-2") == AgentAnswer.SILENT
    hypervisor.ensure_absent(node, unknown)
    for refused in (
        lambda: hypervisor.ensure_running(node, unknown),
        lambda: hypervisor.ensure_media(node, unknown, 1, None),
        lambda: hypervisor.ensure_nics(node, unknown, ()),
        lambda: hypervisor.reset(node, unknown),
        lambda: hypervisor.screenshot(node, unknown),
        lambda: hypervisor.read_serial_log(node, unknown, bytes_max=1024),
    ):
        with pytest.raises(EngineRejected):
            refused()


def test_defining_leaves_the_power_alone(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    for _ in range(2):
        rig.hypervisor.ensure_defined(rig.node, spec)
        facts = rig.hypervisor.find_domain(rig.node, spec.instance_id)
        assert facts is not None
        assert facts.power == Power.STOPPED
        assert facts.domain_uuid == facts.instance_id == spec.instance_id
        assert facts.name == f"awan-{spec.instance_id}"
        assert facts.operation_id == spec.operation_id
        assert facts.disk_paths == tuple(disk.path for disk in spec.disks)
        assert facts.port_ids == (spec.nics[0].port_id,)


def test_a_changed_definition_takes_effect_at_restart(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    start(rig, spec)
    changed = replace(spec, operation_id=uuid4(), vcpus=2, memory_mib=256)
    rig.hypervisor.ensure_defined(rig.node, changed)
    running = rig.hypervisor.find_domain(rig.node, spec.instance_id)
    assert running is not None
    assert (running.power, running.operation_id) == (Power.RUNNING, spec.operation_id)
    outcome = restart(rig, spec.instance_id, grace_s=5, force=True)
    assert outcome == StopOutcome.FORCED
    restarted = rig.hypervisor.find_domain(rig.node, spec.instance_id)
    assert restarted is not None
    assert (restarted.power, restarted.operation_id) == (Power.RUNNING, changed.operation_id)


def test_start_and_forced_stop_are_idempotent(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    start(rig, spec)
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    assert power_of(rig, spec.instance_id) == Power.RUNNING

    def stop() -> StopOutcome:
        return rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=60, force=True)

    assert stop() == StopOutcome.FORCED
    assert stop() == StopOutcome.ALREADY_STOPPED
    assert power_of(rig, spec.instance_id) == Power.STOPPED


def test_restart_of_a_stopped_domain_starts_it(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    rig.hypervisor.ensure_defined(rig.node, spec)
    outcome = restart(rig, spec.instance_id, grace_s=5)
    assert outcome == StopOutcome.ALREADY_STOPPED
    assert power_of(rig, spec.instance_id) == Power.RUNNING


def test_a_missing_disk_is_a_refusal(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    rig.volumes.delete(rig.node, spec.instance_id)
    rig.hypervisor.ensure_defined(rig.node, spec)
    with pytest.raises(EngineRejected):
        rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    assert power_of(rig, spec.instance_id) != Power.RUNNING
    rig.hypervisor.ensure_absent(rig.node, spec.instance_id)
    assert power_of(rig, spec.instance_id) is None


def test_a_deaf_guest_is_cut_off_after_the_grace(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    start(rig, spec)
    rig.deafen(spec.instance_id)
    began = time.monotonic()
    outcome = rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=1.0)
    assert outcome == StopOutcome.FORCED
    assert 1.0 <= time.monotonic() - began < 10.0
    assert power_of(rig, spec.instance_id) == Power.STOPPED


def test_the_wait_for_a_deaf_guest_can_be_given_up(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    start(rig, spec)
    rig.deafen(spec.instance_id)
    began = time.monotonic()
    outcome = rig.hypervisor.ensure_stopped(
        rig.node, spec.instance_id, grace_s=60, gives_up=lambda: time.monotonic() - began > 1.0
    )
    assert outcome == StopOutcome.GIVEN_UP
    assert time.monotonic() - began < 20.0
    assert power_of(rig, spec.instance_id) == Power.RUNNING
    # Who wants the power cut, and who finds it cut, has nothing to give up.
    forced = rig.hypervisor.ensure_stopped(
        rig.node, spec.instance_id, grace_s=60, force=True, gives_up=lambda: True
    )
    assert forced == StopOutcome.FORCED
    again = rig.hypervisor.ensure_stopped(
        rig.node, spec.instance_id, grace_s=60, gives_up=lambda: True
    )
    assert again == StopOutcome.ALREADY_STOPPED


def threads_of(rig: Rig, spec: DomainSpec) -> tuple[int, ...]:
    facts = rig.hypervisor.find_domain(rig.node, spec.instance_id)
    assert facts is not None
    return facts.threads


def test_shared_domains_leave_the_threads_of_dedicated_ones(
    rig: Rig, blank_spec: BlankSpec
) -> None:
    threads = rig.hypervisor.probe(rig.node).cpu_threads
    if len(threads) < 2:
        pytest.skip("the node has one thread")
    rest, last = threads[:-1], threads[-1:]
    running, defined = blank_spec(), blank_spec()
    start(rig, running)
    rig.hypervisor.ensure_defined(rig.node, defined)
    assert threads_of(rig, running) == ()
    dedicated = blank_spec(dedicated=True, threads=last)
    start(rig, dedicated)
    for _ in range(2):
        rig.hypervisor.ensure_shared_threads(rig.node, rest)
        assert threads_of(rig, dedicated) == last
        assert threads_of(rig, running) == threads_of(rig, defined) == rest
    restart(rig, running.instance_id, grace_s=0, force=True)
    rig.hypervisor.ensure_running(rig.node, defined.instance_id)
    later = blank_spec(threads=rest)
    start(rig, later)
    for spec in (running, defined, later):
        assert threads_of(rig, spec) == rest
    rig.hypervisor.ensure_absent(rig.node, dedicated.instance_id)
    rig.hypervisor.ensure_shared_threads(rig.node, threads)
    for spec in (running, defined, later):
        assert threads_of(rig, spec) == threads
    # A definition that is written again says where it runs by itself.
    rig.hypervisor.ensure_defined(rig.node, replace(later, threads=rest))
    restart(rig, later.instance_id, grace_s=0, force=True)
    assert threads_of(rig, later) == rest


@pytest.mark.parametrize("state", ["defined", "running", "stopped", "crashed"])
def test_absent_from_every_state(rig: Rig, blank_spec: BlankSpec, state: str) -> None:
    spec = blank_spec()
    rig.hypervisor.ensure_defined(rig.node, spec)
    if state != "defined":
        rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    if state == "stopped":
        rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=0, force=True)
    if state == "crashed":
        rig.crash(spec.instance_id)
    for _ in range(2):
        rig.hypervisor.ensure_absent(rig.node, spec.instance_id)
        assert power_of(rig, spec.instance_id) is None


def test_events_of_start_stop_and_removal(rig: Rig, blank_spec: BlankSpec, listen: Listen) -> None:
    spec = blank_spec()
    rig.hypervisor.ensure_defined(rig.node, spec)
    events = listen(spec.instance_id)
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    assert events.next()[0] == Power.RUNNING
    rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=0, force=True)
    assert events.next() == (Power.STOPPED, "destroyed")
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    assert events.next()[0] == Power.RUNNING
    rig.hypervisor.ensure_absent(rig.node, spec.instance_id)
    assert events.next() == (Power.STOPPED, "destroyed")
    assert events.is_quiet()


def test_a_cancelled_listener_hears_nothing(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    rig.hypervisor.ensure_defined(rig.node, spec)
    events = Events(spec.instance_id)
    subscription = rig.hypervisor.subscribe(rig.node, events.put)
    subscription.cancel()
    subscription.cancel()
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    assert events.is_quiet()


def test_a_crash_is_announced_and_the_domain_starts_again(
    rig: Rig, blank_spec: BlankSpec, listen: Listen
) -> None:
    spec = blank_spec()
    start(rig, spec)
    events = listen(spec.instance_id)
    rig.crash(spec.instance_id)
    assert events.next_after_start() == (Power.CRASHED, "failed")
    assert power_of(rig, spec.instance_id) == Power.CRASHED
    outcome = rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=5)
    assert outcome == StopOutcome.ALREADY_STOPPED
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    assert power_of(rig, spec.instance_id) == Power.RUNNING


def test_a_paused_domain(rig: Rig, blank_spec: BlankSpec, listen: Listen) -> None:
    spec = blank_spec()
    start(rig, spec)
    events = listen(spec.instance_id)
    rig.pause(spec.instance_id)
    assert events.next_after_start() == (Power.PAUSED, "paused")
    found = rig.hypervisor.find_domain(rig.node, spec.instance_id)
    assert found is not None
    assert (found.power, found.detail) == (Power.PAUSED, "paused")
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    assert power_of(rig, spec.instance_id) == Power.RUNNING
    rig.pause(spec.instance_id)
    stopped = rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=0.5)
    assert stopped == StopOutcome.FORCED


def test_why_a_domain_is_off(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()

    def detail() -> str:
        found = rig.hypervisor.find_domain(rig.node, spec.instance_id)
        assert found is not None
        listed = rig.hypervisor.list_domains(rig.node, timeout_s=20)
        assert [it for it in listed if it.domain_uuid == spec.instance_id] == [found]
        return found.detail

    rig.hypervisor.ensure_defined(rig.node, spec)
    assert detail() == UNEXPLAINED
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    assert detail() == ""
    rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=0, force=True)
    assert detail() == "destroyed"
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    rig.crash(spec.instance_id)
    until_off = time.monotonic() + 20
    while power_of(rig, spec.instance_id) == Power.RUNNING:
        assert time.monotonic() < until_off
    assert power_of(rig, spec.instance_id) == Power.CRASHED
    assert detail() in ("crashed", "failed")


def test_a_definition_that_was_removed_is_put_back(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()

    def found() -> tuple[Power, bool] | None:
        facts = rig.hypervisor.find_domain(rig.node, spec.instance_id)
        listed = {it.domain_uuid: it for it in rig.hypervisor.list_domains(rig.node)}
        assert listed.get(spec.instance_id) == facts
        return None if facts is None else (facts.power, facts.is_persistent)

    start(rig, spec)
    assert found() == (Power.RUNNING, True)
    rig.undefine(spec.instance_id)
    assert found() == (Power.RUNNING, False)
    rig.hypervisor.ensure_defined(rig.node, spec)
    assert found() == (Power.RUNNING, True)
    rig.undefine(spec.instance_id)
    rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=0, force=True)
    assert found() is None
    rig.hypervisor.ensure_defined(rig.node, spec)
    assert found() == (Power.STOPPED, True)
    rig.undefine(spec.instance_id)
    assert found() is None


def test_media_changes_live_and_for_the_next_start(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    start(rig, spec)
    root = spec.disks[0].path
    other = rig.volumes.ensure_seed(rig.node, spec.instance_id, 2, b"\1" * 65536).path

    def change(path: str | None) -> None:
        for _ in range(2):
            rig.hypervisor.ensure_media(rig.node, spec.instance_id, 1, path)

    def paths() -> tuple[str, ...]:
        facts = rig.hypervisor.find_domain(rig.node, spec.instance_id)
        assert facts is not None
        return facts.disk_paths

    change(other)
    assert paths() == (root, other)
    restart(rig, spec.instance_id, grace_s=0, force=True)
    assert paths() == (root, other)
    change(None)
    assert paths() == (root,)
    rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=0, force=True)
    assert paths() == (root,)
    change(other)
    assert paths() == (root, other)
    for target in (0, 7):
        with pytest.raises(EngineRejected):
            rig.hypervisor.ensure_media(rig.node, spec.instance_id, target, other)


def ports_of(rig: Rig, instance_id: UUID) -> set[UUID]:
    facts = rig.hypervisor.find_domain(rig.node, instance_id)
    assert facts is not None
    return set(facts.port_ids)


def make_nics(number: int) -> tuple[NicSpec, ...]:
    return tuple(
        NicSpec(uuid4(), f"52:54:00:00:01:{index:02x}", mtu=1442) for index in range(number)
    )


def test_cards_of_a_domain_that_is_off(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    rig.hypervisor.ensure_defined(rig.node, spec)
    added = make_nics(9)
    for wanted in ((*spec.nics, *added), added[3:], (*added[3:], *spec.nics), spec.nics, ()):
        for _ in range(2):
            rig.hypervisor.ensure_nics(rig.node, spec.instance_id, wanted)
        assert ports_of(rig, spec.instance_id) == {nic.port_id for nic in wanted}
    assert power_of(rig, spec.instance_id) == Power.STOPPED
    for refused in ((added[0], added[0]), (replace(added[0], mac="52:54:00:00:00:01\n"),)):
        with pytest.raises(EngineRejected):
            rig.hypervisor.ensure_nics(rig.node, spec.instance_id, refused)
    assert ports_of(rig, spec.instance_id) == set()


def test_cards_of_a_guest_that_does_not_let_go(rig: Rig, blank_spec: BlankSpec) -> None:
    """What it lacks comes at once; what it holds is gone with its next start."""
    spec = blank_spec()
    start(rig, spec)
    rig.clutch_nics(spec.instance_id)
    first, second = make_nics(2)
    (own,) = spec.nics
    for _ in range(2):
        rig.hypervisor.ensure_nics(rig.node, spec.instance_id, (own, first))
    assert ports_of(rig, spec.instance_id) == {own.port_id, first.port_id}
    assert {card.device for card in counters_of(rig, spec.instance_id).cards} == {
        card_device(own.port_id),
        card_device(first.port_id),
    }
    with pytest.raises(EngineUnavailable, match="does not let go"):
        rig.hypervisor.ensure_nics(rig.node, spec.instance_id, (own, second))
    assert ports_of(rig, spec.instance_id) == {own.port_id, first.port_id, second.port_id}
    restart(rig, spec.instance_id, grace_s=0, force=True)
    assert ports_of(rig, spec.instance_id) == {own.port_id, second.port_id}
    rig.hypervisor.ensure_nics(rig.node, spec.instance_id, (own, second))


def test_the_screen_opens_for_the_latest_password_only(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    start(rig, spec)

    def unlock(password: str, valid_s: float = 60) -> ConsoleEndpoint:
        return rig.hypervisor.unlock_console(
            rig.node, spec.instance_id, password=password, valid_s=valid_s
        )

    def unlocked_s() -> float:
        """For how long the screen opens from now on; negative when it does not."""
        (facts,) = rig.hypervisor.list_domains(rig.node)
        assert facts == rig.hypervisor.find_domain(rig.node, spec.instance_id)
        if facts.unlocked_until is None:
            return -1.0
        return (facts.unlocked_until - now()).total_seconds()

    assert unlocked_s() < 0
    endpoint = unlock("first-01")
    assert 30 < unlocked_s() < 62
    assert not endpoint.requires_tls
    width, height = open_screen(endpoint, "first-01")
    assert width >= 320
    assert height >= 200
    assert unlock("second-2") == endpoint
    open_screen(endpoint, "second-2")
    for wrong in ("first-01", "second-3", ""):
        with pytest.raises(EngineRejected):
            open_screen(endpoint, wrong)
    for _ in range(2):
        rig.hypervisor.lock_console(rig.node, spec.instance_id)
        assert unlocked_s() < 0
        with pytest.raises(EngineRejected):
            open_screen(endpoint, "second-2")
    unlock("third-03", valid_s=1)
    # The validity ends at a whole second, and the machine may be slow.
    time.sleep(3)
    with pytest.raises(EngineRejected):
        open_screen(endpoint, "third-03")
    unlock("fourth-4")
    restart(rig, spec.instance_id, grace_s=0, force=True)
    with pytest.raises((EngineRejected, EngineUnavailable)):
        open_screen(endpoint, "fourth-4")


def test_an_open_screen_outlives_its_password_but_not_its_domain(
    rig: Rig, blank_spec: BlankSpec
) -> None:
    spec = blank_spec()
    start(rig, spec)
    endpoint = rig.hypervisor.unlock_console(
        rig.node, spec.instance_id, password="once-123", valid_s=60
    )

    async def watch() -> None:
        stream = await open_node(endpoint, "once-123", None)
        await asyncio.to_thread(rig.hypervisor.lock_console, rig.node, spec.instance_id)
        await stream.write(b"\1")
        (length,) = struct.unpack(">20xI", await stream.read_exactly(24))
        await stream.read_exactly(length)
        await asyncio.to_thread(rig.hypervisor.ensure_absent, rig.node, spec.instance_id)
        async with asyncio.timeout(20):
            assert await stream.reader.read() == b""
        await stream.close()

    asyncio.run(watch())


def test_no_console_without_a_running_domain(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()

    def unlock(password: str = "once-123") -> None:
        rig.hypervisor.unlock_console(rig.node, spec.instance_id, password=password, valid_s=60)

    for prepare in (
        lambda: None,
        lambda: rig.hypervisor.ensure_defined(rig.node, spec),
    ):
        prepare()
        with pytest.raises(EngineRejected):
            unlock()
        rig.hypervisor.lock_console(rig.node, spec.instance_id)
    start(rig, spec)
    for impossible in ("", "nine-char", "sp ace", "ä", "\n"):
        with pytest.raises(EngineRejected):
            unlock(impossible)


def test_all_domains_are_listed(rig: Rig, blank_spec: BlankSpec) -> None:
    specs = [blank_spec() for _ in range(3)]
    for spec in specs:
        rig.hypervisor.ensure_defined(rig.node, spec)
    rig.hypervisor.ensure_running(rig.node, specs[0].instance_id)
    found = {facts.instance_id: facts for facts in rig.hypervisor.list_domains(rig.node)}
    assert set(found) == {spec.instance_id for spec in specs}
    assert [found[spec.instance_id].power for spec in specs] == [
        Power.RUNNING,
        Power.STOPPED,
        Power.STOPPED,
    ]


def counters_of(rig: Rig, instance_id: UUID) -> DomainCounters:
    (found,) = [
        counters
        for counters in rig.hypervisor.read_counters(rig.node).domains
        if counters.domain_uuid == instance_id
    ]
    return found


def test_counters_of_all_running_domains(rig: Rig, blank_spec: BlankSpec) -> None:
    """One read has every domain that runs and no other; within a run no counter falls; a new run is told apart."""
    assert rig.hypervisor.read_counters(rig.node).domains == ()
    specs = [blank_spec() for _ in range(3)]
    for spec in specs:
        rig.hypervisor.ensure_defined(rig.node, spec)
    for spec in specs[:2]:
        rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    began = now()
    first = rig.hypervisor.read_counters(rig.node)
    assert began - timedelta(seconds=5) <= first.read_at <= now() + timedelta(seconds=5)
    assert {counters.domain_uuid for counters in first.domains} == {
        spec.instance_id for spec in specs[:2]
    }
    before = counters_of(rig, specs[0].instance_id)
    time.sleep(0.5)
    after = counters_of(rig, specs[0].instance_id)
    assert before.run_id == after.run_id
    assert after.cpu_time_ns > before.cpu_time_ns > 0
    assert after.net_in_bytes >= before.net_in_bytes >= 0
    assert after.net_out_bytes >= before.net_out_bytes >= 0
    assert [card.device for card in after.cards] == [card_device(specs[0].nics[0].port_id)]
    assert before.disks is not None
    assert after.disks is not None
    assert after.disks.read_bytes >= before.disks.read_bytes >= 0
    assert after.disks.written_bytes >= before.disks.written_bytes >= 0
    assert after.disks.used_bytes > 0
    restart(rig, specs[0].instance_id, grace_s=0, force=True)
    assert counters_of(rig, specs[0].instance_id).run_id != after.run_id
    rig.hypervisor.ensure_stopped(rig.node, specs[0].instance_id, grace_s=0, force=True)
    rig.hypervisor.ensure_absent(rig.node, specs[1].instance_id)
    assert rig.hypervisor.read_counters(rig.node).domains == ()


def test_the_same_change_from_many_threads(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    rig.hypervisor.ensure_defined(rig.node, spec)

    def all_at_once(act: Callable[[], object]) -> None:
        errors: list[BaseException] = []

        def run() -> None:
            try:
                act()
            except BaseException as err:  # noqa: BLE001  asserted below
                errors.append(err)

        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []

    all_at_once(lambda: rig.hypervisor.ensure_running(rig.node, spec.instance_id))
    assert power_of(rig, spec.instance_id) == Power.RUNNING
    all_at_once(lambda: rig.hypervisor.ensure_absent(rig.node, spec.instance_id))
    assert power_of(rig, spec.instance_id) is None


def test_a_domain_that_is_off(rig: Rig, blank_spec: BlankSpec) -> None:
    spec = blank_spec()
    hypervisor, node, uuid = rig.hypervisor, rig.node, spec.instance_id
    hypervisor.ensure_defined(node, spec)
    assert hypervisor.set_password(node, uuid, "awan", HASH) == AgentAnswer.SILENT
    assert hypervisor.set_hostname(node, uuid, "web-2") == AgentAnswer.SILENT
    for refused in (
        lambda: hypervisor.reset(node, uuid),
        lambda: hypervisor.screenshot(node, uuid),
    ):
        with pytest.raises(EngineRejected):
            refused()
    assert power_of(rig, uuid) == Power.STOPPED


def test_a_machine_without_a_system(rig: Rig, blank_spec: BlankSpec) -> None:
    """It has a screen and a reset button; nobody in it answers."""
    spec = blank_spec()
    start(rig, spec)
    hypervisor, node, uuid = rig.hypervisor, rig.node, spec.instance_id
    rig.silence(uuid)
    assert hypervisor.set_password(node, uuid, "awan", HASH) == AgentAnswer.SILENT
    assert hypervisor.set_hostname(node, uuid, "web-2") == AgentAnswer.SILENT
    width, height = struct.unpack(">II", check_png(hypervisor.screenshot(node, uuid))[:8])
    assert 32 <= width <= 4096
    assert 32 <= height <= 4096
    hypervisor.reset(node, uuid)
    assert power_of(rig, uuid) == Power.RUNNING
    check_png(hypervisor.screenshot(node, uuid))


def check_png(picture: bytes) -> bytes:
    """The header of a picture whose checksums are right and that has as many bytes as its pixels need."""
    assert picture.startswith(PNG_SIGNATURE)
    chunks, rest = {}, picture[len(PNG_SIGNATURE) :]
    while rest:
        (length,) = struct.unpack(">I", rest[:4])
        kind, content = rest[4:8], rest[8 : 8 + length]
        assert struct.unpack(">I", rest[8 + length : 12 + length])[0] == zlib.crc32(kind + content)
        chunks[kind] = chunks.get(kind, b"") + content
        rest = rest[12 + length :]
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    assert len(zlib.decompress(chunks[b"IDAT"])) == height * (1 + 3 * width)
    assert chunks[b"IEND"] == b""
    return chunks[b"IHDR"]


@pytest.mark.timeout(600)
def test_what_is_set_inside_a_guest(rig: Rig, boot_guest: Callable[..., DomainSpec]) -> None:
    spec = boot_guest()
    hypervisor, node, uuid = rig.hypervisor, rig.node, spec.instance_id
    for name in ("web-2", "web-3.example.com"):
        assert hypervisor.set_hostname(node, uuid, name) == AgentAnswer.DONE
        assert rig.hostname_in_guest(uuid) == name.partition(".")[0]
    for _ in range(2):
        assert hypervisor.set_password(node, uuid, "awan", HASH) == AgentAnswer.DONE
    assert rig.has_password(uuid, "awan", HASH)
    rig.make_disobedient(uuid)
    assert hypervisor.set_password(node, uuid, "awan", HASH) == AgentAnswer.REFUSED
    hypervisor.reset(node, uuid)
    assert power_of(rig, uuid) == Power.RUNNING
    # The agent of the system that was reset answers no more, the one of the new boot after a while.
    deadline = time.monotonic() + 240
    while hypervisor.set_hostname(node, uuid, "web-4") == AgentAnswer.SILENT:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.timeout(300)
def test_a_booted_guest(rig: Rig, boot_guest: Callable[..., DomainSpec], listen: Listen) -> None:
    """The agent's sign, a graceful stop within the grace, a stop from inside the guest."""
    spec = boot_guest()
    events = listen(spec.instance_id)
    assert rig.hypervisor.guest_sign(rig.node, spec.instance_id) == GuestSign.AGENT
    check_memory_in_use(rig, spec)
    check_cards_come_and_go(rig, spec)
    check_serial_log(rig, spec)
    began = time.monotonic()
    outcome = restart(rig, spec.instance_id, grace_s=60)
    assert outcome == StopOutcome.GRACEFUL
    assert time.monotonic() - began < 40
    assert events.next() == (Power.STOPPED, "shutdown")
    assert events.next()[0] == Power.RUNNING
    assert rig.hypervisor.guest_sign(rig.node, spec.instance_id) == GuestSign.NONE
    # What was printed before the restart is still there.
    log = rig.hypervisor.read_serial_log(rig.node, spec.instance_id, bytes_max=256 * 1024)
    assert b"login:" in log
    deadline = time.monotonic() + 90
    while rig.hypervisor.guest_sign(rig.node, spec.instance_id) != GuestSign.AGENT:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(ports_of(rig, spec.instance_id)) == 3
    rig.shut_down_from_inside(spec.instance_id)
    assert events.next() == (Power.STOPPED, "shutdown")
    assert power_of(rig, spec.instance_id) == Power.STOPPED


def check_cards_come_and_go(rig: Rig, spec: DomainSpec) -> None:
    """Of a running guest, and they stay as they are when it starts again."""
    first, second = make_nics(2)
    for wanted in ((*spec.nics, first, second), (*spec.nics, second), (*spec.nics, first, second)):
        for _ in range(2):
            rig.hypervisor.ensure_nics(rig.node, spec.instance_id, wanted)
        assert ports_of(rig, spec.instance_id) == {nic.port_id for nic in wanted}


def check_serial_log(rig: Rig, spec: DomainSpec) -> None:
    """The end of what the guest has printed, for as much as is asked for; nobody sees how it is read."""

    def read(bytes_max: int) -> bytes:
        return rig.hypervisor.read_serial_log(rig.node, spec.instance_id, bytes_max=bytes_max)

    assert b"login:" in read(256 * 1024)
    rig.print_from_kernel(spec.instance_id, "out of paper")
    until = time.monotonic() + 10
    while read(14) != b"out of paper\r\n":
        assert time.monotonic() < until, read(1024)
        time.sleep(0.1)
    assert b"] out of paper" in read(40)
    assert len(read(40)) == 40
    assert rig.hypervisor.list_domains(rig.node) == [
        rig.hypervisor.find_domain(rig.node, spec.instance_id)
    ]


def check_memory_in_use(rig: Rig, spec: DomainSpec) -> None:
    """The guest tells it within a few seconds of its start; less than it has, more than nothing."""
    deadline = time.monotonic() + 60
    while (used := counters_of(rig, spec.instance_id).memory_used_bytes) is None:
        assert time.monotonic() < deadline, "the guest does not tell its memory"
        time.sleep(0.5)
    assert 2 * 1024**2 < used < spec.memory_mib * 1024**2


HOSTILE: list[dict[str, object]] = [
    {"vcpus": 0},
    {"vcpus": 5},
    {"dedicated": True},
    {"dedicated": True, "threads": (0, 1)},
    {"threads": (0, 0)},
    {"threads": (-1,)},
    {"memory_mib": 2048},
    {"memory_mib": 0},
    {"nics": (NicSpec(uuid4(), "52:54:00:00:00:01'/><hostdev/>"),)},
    {"nics": (NicSpec(uuid4(), "52:54:00:00:00:01\n"),)},
    {"disks": (DiskSpec("/pool/a\nb", "qcow2", 0, "root"),)},
    {"disks": (DiskSpec("json:{}", "qcow2", 0, "root"),)},
    {"disks": (DiskSpec("/pool/a", "qcow2", 0, "root,id=x"),)},
    {"disks": (DiskSpec("/pool/a", "qcow2", 0, "a"), DiskSpec("/pool/b", "qcow2", 0, "b"))},
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_impossible_definitions_are_refused(rig: Rig, blank_spec: BlankSpec, number: int) -> None:
    spec = replace(blank_spec(), **HOSTILE[number])  # type: ignore[arg-type]
    with pytest.raises(EngineRejected):
        rig.hypervisor.ensure_defined(rig.node, spec)
    assert power_of(rig, spec.instance_id) is None


def test_hostile_titles_are_harmless(rig: Rig, blank_spec: BlankSpec) -> None:
    hostile = '</title><devices><hostdev/></devices>\n\x00\ud800$(reboot)"' + "x" * 5000
    spec = blank_spec(title=hostile)
    start(rig, spec)
    facts = rig.hypervisor.find_domain(rig.node, spec.instance_id)
    assert facts is not None
    assert facts.disk_paths == tuple(disk.path for disk in spec.disks)
