"""What every hypervisor engine does, simulated or real."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from awan.engines.hypervisor import (
    DiskSpec,
    DomainSpec,
    GuestSign,
    NicSpec,
    Power,
    StopOutcome,
)
from awan.errors import EngineRejected
from tests.engines.hypervisor_contract.rigs import Events, Rig, restart

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
    hypervisor.ensure_absent(node, unknown)
    for refused in (
        lambda: hypervisor.ensure_running(node, unknown),
        lambda: hypervisor.ensure_media(node, unknown, 1, None),
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
    assert events.next() == (Power.CRASHED, "failed")
    assert power_of(rig, spec.instance_id) == Power.CRASHED
    outcome = rig.hypervisor.ensure_stopped(rig.node, spec.instance_id, grace_s=5)
    assert outcome == StopOutcome.ALREADY_STOPPED
    rig.hypervisor.ensure_running(rig.node, spec.instance_id)
    assert power_of(rig, spec.instance_id) == Power.RUNNING


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


@pytest.mark.timeout(300)
def test_a_booted_guest(rig: Rig, boot_guest: Callable[..., DomainSpec], listen: Listen) -> None:
    """The agent's sign, a graceful stop within the grace, a stop from inside the guest."""
    spec = boot_guest()
    events = listen(spec.instance_id)
    assert rig.hypervisor.guest_sign(rig.node, spec.instance_id) == GuestSign.AGENT
    began = time.monotonic()
    outcome = restart(rig, spec.instance_id, grace_s=60)
    assert outcome == StopOutcome.GRACEFUL
    assert time.monotonic() - began < 40
    assert events.next() == (Power.STOPPED, "shutdown")
    assert events.next()[0] == Power.RUNNING
    assert rig.hypervisor.guest_sign(rig.node, spec.instance_id) == GuestSign.NONE
    deadline = time.monotonic() + 90
    while rig.hypervisor.guest_sign(rig.node, spec.instance_id) != GuestSign.AGENT:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    rig.shut_down_from_inside(spec.instance_id)
    assert events.next() == (Power.STOPPED, "shutdown")
    assert power_of(rig, spec.instance_id) == Power.STOPPED


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
