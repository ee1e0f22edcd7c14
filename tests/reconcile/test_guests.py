"""What guests do by themselves, and what is taken from them: seen, noted, put right; never beside an operation."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from awan.engines.hypervisor import PAUSED_IO_ERROR, DomainEvent, Power
from awan.engines.registry import sim_store
from awan.events import Event
from awan.instances.models import Instance
from awan.instances.recover import Reason
from awan.instances.rules import CRASHED_AGAIN, PAUSED, PAUSED_BY_DISK
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.ledger.models import UsageSpan
from awan.operations import Operation
from awan.reconcile import run_audit
from awan.reconcile.locations import check_location
from awan.reconcile.nodes import NodeWatch
from awan.reconcile.power import Verdict
from awan.reconcile.repairs import act, find_known
from awan.settings import get_settings
from tests.support.guests import create_settled
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.watched_guests import Guest, find_guest

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture
def guest(cloud: SimulatedCloud, worker: InProcessWorker) -> Guest:
    """An instance that runs, its first boot over."""
    return find_guest(cloud, create_settled(cloud))


def announce(watch: NodeWatch, guest: Guest, power: Power, detail: str) -> None:
    """The watch hears of the guest from its node."""
    watch.handle([DomainEvent(guest.node.node_id, guest.id, power, detail, now())])


def crash(watch: NodeWatch, guest: Guest) -> None:
    """The guest's QEMU dies, and the watch hears of it."""
    guest.crash()
    announce(watch, guest, Power.CRASHED, "failed")


def operations(guest: Guest) -> list[str]:
    """Kinds of the operations on the instance beside its creation."""
    with transaction() as session:
        kinds = session.scalars(
            select(Operation.kind)
            .where(Operation.resource_id == guest.id, Operation.kind != "instance.create")
            .order_by(Operation.created_at)
        )
        return list(kinds)


def is_green() -> None:
    """The audit finds nothing."""
    assert run_audit() == []


def test_a_guest_that_shuts_itself_down_is_stopped(guest: Guest) -> None:
    watch = guest.watch()
    watch.look()
    guest.shut_down()
    announce(watch, guest, Power.STOPPED, "shutdown")
    shown = guest.show()
    assert (shown["status"], shown["status_reason"]) == ("Stopped", None)
    assert guest.count("instance.powered_off") == 1
    # It stays off, also when its node is reset.
    guest.hypervisor.lose_power(guest.node)
    guest.watch().look()
    assert operations(guest) == []
    assert guest.power() == "stopped"
    is_green()
    answer = guest.cloud.customer.http.post(f"/instances/{guest.uuid}/start")
    assert answer.status_code == 202, answer.text


def test_a_lost_event_is_made_up_for_by_the_timer(guest: Guest) -> None:
    guest.shut_down()
    guest.watch().look()
    assert guest.show()["status"] == "Stopped"
    is_green()


def test_a_stopped_guest_is_billed_as_before(guest: Guest, cloud: SimulatedCloud) -> None:
    def open_spans() -> int:
        with transaction() as session:
            query = select(func.count()).where(
                UsageSpan.resource_id == guest.id, UsageSpan.closed_at.is_(None)
            )
            return session.scalar(query) or 0

    before = open_spans()
    assert before > 0
    guest.shut_down()
    guest.watch().look()
    assert guest.show()["status"] == "Stopped"
    assert open_spans() == before


def test_a_guest_that_was_started_by_hand_runs(guest: Guest) -> None:
    guest.shut_down()
    watch = guest.watch()
    watch.look()
    guest.hypervisor.ensure_running(guest.node, guest.id)
    announce(watch, guest, Power.RUNNING, "started")
    assert guest.show()["status"] == "Running"
    assert guest.count("instance.powered_on") == 1
    is_green()


def test_a_crash_is_restarted_once_and_the_second_is_not(guest: Guest) -> None:
    watch = guest.watch()
    crash(watch, guest)
    assert guest.show()["status"] == "Starting"
    wait_until_idle()
    assert (guest.show()["status"], guest.power()) == ("Running", "running")
    is_green()
    crash(watch, guest)
    wait_until_idle()
    shown = guest.show()
    assert (shown["status"], shown["status_reason"]) == ("Stopped", CRASHED_AGAIN)
    assert operations(guest) == ["instance.recover"]
    assert guest.count("instance.crashed") == 2
    watch.look()
    guest.watch().look()
    assert operations(guest) == ["instance.recover"]
    is_green()
    # Its owner may start it, which makes the reason go away.
    begun = guest.cloud.customer.http.post(f"/instances/{guest.uuid}/start").json()
    assert guest.cloud.wait(begun["operation"]["uuid"])["status"] == "succeeded"
    assert guest.show()["status_reason"] is None


def test_a_crash_long_after_the_last_is_restarted(guest: Guest) -> None:
    watch = guest.watch()
    crash(watch, guest)
    wait_until_idle()
    with transaction() as session:
        long_ago = now() - timedelta(seconds=get_settings().crash_window_s + 1)
        session.execute(
            update(Instance).where(Instance.instance_id == guest.id).values(crashed_at=long_ago)
        )
    crash(watch, guest)
    wait_until_idle()
    assert guest.show()["status"] == "Running"
    assert operations(guest) == ["instance.recover"] * 2


def test_a_crash_that_nobody_announced_is_counted_at_the_second_look(guest: Guest) -> None:
    watch = guest.watch()
    guest.crash()
    watch.look()
    assert guest.show()["status"] == "Running"
    watch.look()
    assert guest.count("instance.crashed") == 1
    wait_until_idle()
    assert guest.show()["status"] == "Running"
    is_green()


def test_a_node_that_was_reset_brings_its_guests_back(cloud: SimulatedCloud, guest: Guest) -> None:
    address = guest.show()["ip_address"]
    (port,) = [port for port in guest.fabric.list_ports() if port.port_id == guest.port_id]
    for _ in range(3):  # also several times: it is not the guest's fault
        guest.hypervisor.lose_power(guest.node)
        guest.watch().look()
        wait_until_idle()
        shown = guest.show()
        assert (shown["status"], shown["ip_address"]) == ("Running", address)
        assert guest.power() == "running"
    assert guest.fabric.find_port(guest.port_id) == port
    assert guest.count("instance.lost_power") == 3
    assert guest.count("instance.crashed") == 0
    is_green()


def test_the_network_is_ready_before_the_guest_sends(guest: Guest) -> None:
    guest.hypervisor.lose_power(guest.node)
    faults = sim_store().faults
    faults.clear()
    guest.watch().look()
    wait_until_idle()
    verbs = [call.verb for call in faults.calls]
    last_look = len(verbs) - 1 - verbs[::-1].index("ensure_running")
    assert verbs.index("ensure_port") < verbs.index("wait_applied") < last_look


def test_a_definition_that_was_removed_is_put_back(guest: Guest) -> None:
    guest.undefine()
    assert [finding.kind for finding in run_audit()] == ["domain.undefined"]
    guest.watch().look()
    wait_until_idle()
    assert operations(guest) == ["instance.repair"]
    facts = guest.hypervisor.find_domain(guest.node, guest.id)
    assert facts is not None
    assert (facts.power, facts.is_persistent) == (Power.RUNNING, True)
    assert guest.show()["status"] == "Running"
    is_green()


def test_a_stopped_domain_that_was_removed_is_put_back_and_stays_off(guest: Guest) -> None:
    guest.shut_down()
    guest.watch().look()
    guest.undefine()
    assert guest.power() is None
    guest.watch().look()
    wait_until_idle()
    assert operations(guest) == ["instance.repair"]
    assert (guest.power(), guest.show()["status"]) == ("stopped", "Stopped")
    is_green()


def test_a_running_domain_that_vanished_comes_back(guest: Guest) -> None:
    guest.hypervisor.ensure_absent(guest.node, guest.id)
    guest.watch().look()
    wait_until_idle()
    assert operations(guest) == ["instance.recover"]
    assert (guest.power(), guest.show()["status"]) == ("running", "Running")
    is_green()


def test_a_missing_disk_is_never_made_anew(guest: Guest) -> None:
    guest.hypervisor.ensure_absent(guest.node, guest.id)
    sim_store().execute("DELETE FROM sim.volume WHERE name LIKE 'vol-%%'")
    guest.watch().look()
    wait_until_idle()
    shown = guest.show()
    assert shown["status"] == "Stopped"
    assert "disk of the instance is missing" in shown["status_reason"]
    assert sim_store().fetch_all("SELECT FROM sim.volume WHERE name LIKE 'vol-%%'") == []
    # It is tried again, but not at once.
    guest.watch().look()
    assert operations(guest) == ["instance.recover"]
    with transaction() as session:
        session.execute(
            update(Operation)
            .where(Operation.kind == "instance.recover")
            .values(finished_at=now() - timedelta(seconds=get_settings().repair_retry_s))
        )
    guest.watch().look()
    wait_until_idle()
    assert operations(guest) == ["instance.recover"] * 2


def test_what_could_not_be_brought_back_yet_can_be_left_off(guest: Guest) -> None:
    http, path = guest.cloud.customer.http, f"/instances/{guest.uuid}"
    sim_store().execute("UPDATE sim.volume SET name = 'x' || name WHERE name LIKE 'vol-%%'")
    guest.hypervisor.lose_power(guest.node)
    guest.watch().look()
    wait_until_idle()
    sim_store().execute("UPDATE sim.volume SET name = substr(name, 2) WHERE name LIKE 'xvol-%%'")
    assert guest.show()["status"] == "Stopped"
    stopped = http.post(f"{path}/stop")
    assert stopped.status_code == 202, stopped.text
    assert guest.cloud.wait(stopped.json()["operation"]["uuid"])["status"] == "succeeded"
    with transaction() as session:
        session.execute(
            update(Operation)
            .where(Operation.kind == "instance.recover")
            .values(finished_at=now() - timedelta(hours=2))
        )
    guest.watch().look()
    wait_until_idle()
    assert operations(guest) == ["instance.recover", "instance.stop"]
    assert (guest.power(), guest.show()["status"]) == ("stopped", "Stopped")
    again = http.post(f"{path}/stop")
    assert (again.status_code, again.json()["message"]) == (
        409,
        "The instance is already stopped.",
    )
    started = http.post(f"{path}/start").json()
    assert guest.cloud.wait(started["operation"]["uuid"])["status"] == "succeeded"
    is_green()


@pytest.mark.parametrize(
    "harm",
    [
        "DELETE FROM sim.fabric_port",
        "UPDATE sim.fabric_port SET dhcp_families = '{}'",
        "UPDATE sim.fabric_port SET dhcp_families = '{4}'",
        "UPDATE sim.fabric_port SET is_confined = false",
        "UPDATE sim.fabric_port SET security_line = ''",
        "UPDATE sim.fabric_port SET address_line = '52:00:00:00:00:01 192.0.2.1'",
        "DELETE FROM sim.fabric_network",
        "DELETE FROM sim.volume WHERE name LIKE 'seed-%%'",
    ],
)
def test_what_is_missing_on_the_fabric_is_put_back(
    cloud: SimulatedCloud, guest: Guest, harm: str
) -> None:
    before = fabric_state()
    sim_store().execute(harm)  # type: ignore[arg-type]
    check_location(cloud.location_id)
    wait_until_idle()
    assert fabric_state() == before
    assert guest.show()["status"] == "Running"
    is_green()
    done = operations(guest)
    check_location(cloud.location_id)
    assert operations(guest) == done, "what is right is left alone"
    if "network" in harm:
        assert cloud_events("network.repaired") == 1
    else:
        assert done == ["instance.repair"]


def fabric_state() -> list[object]:
    """Networks, ports and files."""
    store = sim_store()
    return [
        store.fetch_all("SELECT * FROM sim.fabric_network ORDER BY switch"),
        store.fetch_all("SELECT * FROM sim.fabric_port ORDER BY name"),
        store.fetch_all("SELECT name FROM sim.volume ORDER BY name"),
    ]


def cloud_events(kind: str) -> int:
    """How many events of this kind there are, whoever they belong to."""
    with transaction() as session:
        return session.scalar(select(func.count()).where(Event.kind == kind)) or 0


def test_nothing_is_done_beside_an_operation(guest: Guest, worker: InProcessWorker) -> None:
    worker.stop()
    begun = guest.cloud.customer.http.post(f"/instances/{guest.uuid}/restart").json()
    guest.crash()
    guest.fabric.forget_dhcp(guest.port_id)
    watch = guest.watch()
    announce(watch, guest, Power.CRASHED, "failed")
    watch.look()
    watch.look()
    check_location(guest.cloud.location_id)
    assert operations(guest) == ["instance.restart"]
    assert guest.count("instance.crashed") == 0
    worker.start()
    assert guest.cloud.wait(begun["operation"]["uuid"])["kind"] == "instance.restart"


def test_an_operation_waits_for_a_repair(guest: Guest, worker: InProcessWorker) -> None:
    worker.stop()
    crash(guest.watch(), guest)
    refused = guest.cloud.customer.http.post(f"/instances/{guest.uuid}/stop")
    assert refused.status_code == 409
    assert "instance.recover" in refused.json()["message"]
    # A deletion is always possible: the repair is undone, and nothing is left.
    answer = guest.cloud.customer.http.request(
        "DELETE", f"/instances/{guest.uuid}", json={"remove_ip": True, "remove_block_storage": True}
    )
    assert answer.status_code == 202, answer.text
    worker.start()
    assert guest.cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    assert guest.power() is None
    is_green()


def test_a_look_that_has_grown_old_is_not_acted_on(guest: Guest) -> None:
    with transaction() as session:
        known = find_known(session, guest.node.node_id, guest.id)
    assert known is not None
    for verb in ("stop", "start"):
        begun = guest.cloud.customer.http.post(f"/instances/{guest.uuid}/{verb}").json()
        guest.cloud.wait(begun["operation"]["uuid"])
    for verdict in (Verdict.CRASHED, Verdict.NOTE_STOPPED, Verdict.RECOVER, Verdict.REPAIR):
        assert not act(known, verdict, Reason.OTHER, "seen long ago")
    assert guest.show()["status"] == "Running"


def test_two_watches_make_one_repair(guest: Guest, worker: InProcessWorker) -> None:
    worker.stop()
    first, second = guest.watch(), guest.watch()
    guest.crash()
    for watch in (first, second, first, second):
        announce(watch, guest, Power.CRASHED, "failed")
        watch.look()
    assert operations(guest) == ["instance.recover"]
    assert guest.count("instance.crashed") == 1
    worker.start()
    wait_until_idle()
    assert guest.show()["status"] == "Running"


def test_what_is_being_made_for_the_first_time_is_not_missing(
    cloud: SimulatedCloud, worker: InProcessWorker
) -> None:
    worker.stop()
    answer = cloud.create()
    check_location(cloud.location_id)
    assert cloud_events("network.repaired") == 0
    assert fabric_state()[:2] == [[], []]
    worker.start()
    assert cloud.wait(answer["operation"]["uuid"])["status"] == "succeeded"


def test_a_guest_that_was_paused_by_hand_is_shown_so_and_left_alone(guest: Guest) -> None:
    watch = guest.watch()
    guest.hypervisor.pause(guest.node, guest.id, "paused")
    announce(watch, guest, Power.PAUSED, "paused")
    shown = guest.show()
    assert (shown["status"], shown["status_reason"]) == ("Paused", PAUSED)
    assert guest.cloud.customer.http.get("/instances?statuses=paused").json()["data"]["data"]
    watch.look()
    assert operations(guest) == []
    assert guest.power() == "paused"
    assert guest.count("instance.paused") == 1
    is_green()
    refused = guest.cloud.customer.http.post(f"/instances/{guest.uuid}/reset")
    assert refused.status_code == 409
    # Its owner may let it go on, or have its power cut.
    begun = guest.cloud.customer.http.post(f"/instances/{guest.uuid}/start").json()
    assert guest.cloud.wait(begun["operation"]["uuid"])["status"] == "succeeded"
    assert (guest.power(), guest.show()["status"]) == ("running", "Running")
    guest.hypervisor.pause(guest.node, guest.id, "paused")
    watch.look()
    begun = guest.cloud.customer.http.post(f"/instances/{guest.uuid}/stop").json()
    assert guest.cloud.wait(begun["operation"]["uuid"])["status"] == "succeeded"
    assert guest.show()["status"] == "Stopped"
    is_green()


def test_a_guest_that_somebody_lets_go_on_by_hand(guest: Guest) -> None:
    watch = guest.watch()
    guest.hypervisor.pause(guest.node, guest.id, "paused")
    watch.look()
    guest.hypervisor.ensure_running(guest.node, guest.id)
    announce(watch, guest, Power.RUNNING, "resumed")
    assert (guest.show()["status"], guest.show()["status_reason"]) == ("Running", None)
    assert guest.count("instance.resumed") == 1


def test_a_guest_whose_disk_could_not_be_written_is_tried_once_in_a_while(guest: Guest) -> None:
    watch = guest.watch()
    guest.hypervisor.pause(guest.node, guest.id, PAUSED_IO_ERROR)
    watch.look()
    assert guest.show()["status_reason"] == PAUSED_BY_DISK
    watch.look()
    wait_until_idle()
    assert operations(guest) == ["instance.recover"]
    assert (guest.power(), guest.show()["status"]) == ("running", "Running")
    guest.hypervisor.pause(guest.node, guest.id, PAUSED_IO_ERROR)
    for _ in range(3):
        watch.look()
    assert operations(guest) == ["instance.recover"]
    assert guest.show()["status"] == "Paused"
    with transaction() as session:
        old = now() - timedelta(seconds=get_settings().crash_window_s + 1)
        session.execute(update(Operation).values(created_at=old))
    watch.look()
    wait_until_idle()
    assert operations(guest) == ["instance.recover"] * 2
    assert guest.show()["status"] == "Running"
    is_green()
