"""What happens to real guests and nodes beside the control plane: seen within seconds, and put right.

How long it took is in the table at the end of the run: from the moment it had happened until the API told the truth.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any
from uuid import uuid4

import libvirt
import pytest

from lab.processes import start_ticks
from tests.support import fault_report, lab_inspection
from tests.support.fault_report import FaultRow
from tests.support.lab_cloud import LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.sampled("accident"), pytest.mark.timeout(900)]

SOON_S = 20.0
LATER_S = 60.0
POOL = "awan"
STRAY_DOMAIN = """
<domain type='qemu'>
  <name>by-hand</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
</domain>"""
STRAY_FILE = """
<volume><name>{name}</name><capacity unit='MiB'>1</capacity><target><format type='raw'/></target></volume>"""

Note = Callable[[str, float, str], None]


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """Adds what happened, the seconds until it was right, and how it ended to the table of the run."""
    add = fault_report.reporter(request)
    return lambda fault, seconds, outcome: add(
        FaultRow("reconcile", fault, "-", "-", "-", "-", f"{seconds:.1f}", outcome)
    )


def running(cloud: LabCloud) -> tuple[str, str]:
    """Uuid and address of a guest that can be logged in to."""
    shown = cloud.create_instance()
    cloud.wait_ready(shown["uuid"])
    cloud.ssh_when_up(shown["ip_address"], "true")
    return shown["uuid"], shown["ip_address"]


def status(cloud: LabCloud, uuid: str) -> str:
    """As its owner sees it."""
    return str(cloud.show(uuid)["status"])


def domain_state(cloud: LabCloud, node: str, uuid: str) -> str:
    """libvirt's word for the domain."""
    return lab_inspection.virsh(cloud.lab, node, "domstate", uuid).strip()


def northbound(cloud: LabCloud, *arguments: str) -> str:
    """Runs ovn-nbctl on the lab's fabric."""
    command = ["ovn-nbctl", f"--db={cloud.info.ovn_nb}", "--timeout=20", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kinds(cloud: LabCloud, uuid: str) -> list[str]:
    """Kinds of the instance's events, the first at the front."""
    query = "SELECT kind FROM event WHERE resource_id = %s ORDER BY event_id"
    return [kind for (kind,) in cloud.query(query, uuid)]


def settled(cloud: LabCloud, uuid: str, kind: str, timeout_s: float = 300.0) -> dict[str, Any]:
    """The newest operation of this kind, ended."""

    def ended() -> dict[str, Any] | None:
        rows = cloud.query(
            "SELECT operation_id FROM operation WHERE resource_id = %s AND kind = %s"
            " AND finished_at IS NOT NULL ORDER BY created_at DESC LIMIT 1",
            uuid,
            kind,
        )
        return cloud.operation(str(rows[0][0])) if rows else None

    found = until(ended, timeout_s, f"no {kind} of {uuid} has ended")
    assert found["status"] == "succeeded", found
    return found


def seconds_until(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """How long it took."""
    began = time.monotonic()
    until(condition, timeout_s, what)
    return time.monotonic() - began


def test_poweroff_in_the_guest(cloud: LabCloud, note: Note) -> None:
    uuid, address = running(cloud)
    node = lab_inspection.node_of(cloud.lab, uuid)
    cloud.ssh(address, "sudo poweroff")
    until(lambda: domain_state(cloud, node, uuid) == "shut off", 90, "the guest does not end")
    took_s = seconds_until(lambda: status(cloud, uuid) == "Stopped", SOON_S, "it is not Stopped")
    note("poweroff in the guest", took_s, "Stopped")
    assert cloud.show(uuid)["status_reason"] is None
    assert "instance.powered_off" in kinds(cloud, uuid)
    cloud.assert_green()
    cloud.change(uuid, "start")
    cloud.ssh_when_up(address, "true")


def test_a_crash_is_restarted_once(cloud: LabCloud, note: Note) -> None:
    uuid, address = running(cloud)
    first = lab_inspection.qemu_pid(uuid)
    os.kill(first, signal.SIGKILL)
    took_s = seconds_until(lambda: "instance.crashed" in kinds(cloud, uuid), SOON_S, "not seen")
    note("kill -9 of its QEMU", took_s, "crash seen")
    took_s += seconds_until(lambda: status(cloud, uuid) == "Running", LATER_S, "not restarted")
    note("kill -9 of its QEMU", took_s, "Running")
    settled(cloud, uuid, "instance.recover")
    cloud.ssh_when_up(address, "true")
    cloud.assert_green()

    second = lab_inspection.qemu_pid(uuid)
    assert second != first
    os.kill(second, signal.SIGKILL)
    took_s = seconds_until(lambda: status(cloud, uuid) == "Stopped", SOON_S, "it is not Stopped")
    note("kill -9 of its QEMU again", took_s, "Stopped")
    assert "crashed again" in cloud.show(uuid)["status_reason"]
    assert not start_ticks(second)
    time.sleep(3)
    assert status(cloud, uuid) == "Stopped"
    cloud.assert_green()


def test_a_node_is_reset(cloud: LabCloud, note: Note) -> None:
    uuid, address = running(cloud)
    stopped = cloud.create_instance()["uuid"]
    cloud.wait_ready(stopped)
    cloud.change(stopped, "stop", force=True)
    node = lab_inspection.node_of(cloud.lab, uuid)
    (port,) = [name for name in lab_inspection.ports(cloud.lab) if name == port_of(cloud, uuid)]
    security = northbound(cloud, "lsp-get-port-security", port)
    cloud.lab.kill_node_processes(node)
    cloud.lab.up()
    took_s = seconds_until(
        lambda: "instance.recover" in kinds(cloud, uuid), LATER_S, "the reset was not seen"
    )
    ended = settled(cloud, uuid, "instance.recover")
    note("reset of its node", took_s, "recovery begun")
    shown = cloud.show(uuid)
    assert (shown["status"], shown["ip_address"]) == ("Running", address)
    assert status(cloud, stopped) == "Stopped"
    assert northbound(cloud, "lsp-get-port-security", port) == security
    assert_network_came_first(cloud, ended["uuid"])
    assert "instance.crashed" not in kinds(cloud, uuid)
    cloud.ssh_when_up(address, "true")
    cloud.assert_green(settle_s=60)


def port_of(cloud: LabCloud, uuid: str) -> str:
    """Name of the instance's port."""
    ((nic_id,),) = cloud.query("SELECT nic_id FROM nic WHERE instance_id = %s", uuid)
    return str(nic_id)


def assert_network_came_first(cloud: LabCloud, operation: str) -> None:
    """The node had confirmed all ports and their protection before the guest was started."""
    rows = cloud.query(
        "SELECT function_name FROM dbos.operation_outputs WHERE workflow_uuid = %s"
        " ORDER BY function_id",
        operation,
    )
    steps = [name for (name,) in rows]
    assert steps.index("port") < steps.index("network") < steps.index("power")


def test_a_port_that_was_deleted_comes_back(cloud: LabCloud, note: Note) -> None:
    uuid, address = running(cloud)
    port = port_of(cloud, uuid)
    northbound(cloud, "lsp-del", port)
    took_s = seconds_until(lambda: port in lab_inspection.ports(cloud.lab), LATER_S, "not back")
    note("its port deleted", took_s, "put back")
    settled(cloud, uuid, "instance.repair")
    assert cloud.ssh_when_up(address, "hostname", timeout_s=60)
    assert status(cloud, uuid) == "Running"
    cloud.assert_green()
    check_a_card_that_was_taken_away(cloud, note, uuid, address)


def check_a_card_that_was_taken_away(cloud: LabCloud, note: Note, uuid: str, address: str) -> None:
    """Somebody unplugs the guest's card on its node: it is plugged in again, and the guest has its address."""
    ((mac,),) = cloud.query("SELECT mac FROM nic WHERE instance_id = %s", uuid)
    node, pid = lab_inspection.node_of(cloud.lab, uuid), lab_inspection.qemu_pid(uuid)

    def is_plugged() -> bool:
        return all(
            mac in lab_inspection.virsh(cloud.lab, node, "domiflist", uuid, *which)
            for which in ((), ("--inactive",))
        )

    detach = ("detach-interface", uuid, "bridge", "--mac", mac, "--live", "--config")
    lab_inspection.virsh(cloud.lab, node, *detach)
    until(lambda: kinds(cloud, uuid).count("instance.repair") == 2, LATER_S, "it was not seen")
    took_s = seconds_until(is_plugged, LATER_S, "the card is not back")
    note("its card unplugged", took_s, "put back")
    until(lambda: status(cloud, uuid) == "Running", LATER_S, "it does not run")
    assert cloud.ssh_when_up(address, "hostname", timeout_s=90)
    assert lab_inspection.qemu_pid(uuid) == pid, "the guest was not started anew"
    cloud.assert_green()


def test_dhcp_and_rules_that_were_deleted_come_back(cloud: LabCloud, note: Note) -> None:
    uuid, address = running(cloud)
    port = port_of(cloud, uuid)
    for row in northbound(cloud, "--bare", "--columns=_uuid", "list", "DHCP_Options").split():
        northbound(cloud, "destroy", "DHCP_Options", row)
    port_row = northbound(cloud, "get", "Logical_Switch_Port", port, "_uuid").strip()
    (group,) = northbound(
        cloud,
        "--bare",
        "--columns=name",
        "find",
        "Port_Group",
        "external_ids:awan\\:role=tenants",
        f"ports{{>=}}{port_row}",
    ).split()
    northbound(cloud, "clear", "Port_Group", group, "acls")

    def is_back() -> bool:
        row = northbound(cloud, "get", "Logical_Switch_Port", port, "dhcpv4_options").strip()
        return row != "[]" and "udp.src" in northbound(cloud, "acl-list", group)

    took_s = seconds_until(is_back, LATER_S, "DHCP and rules are not back")
    note("DHCP options and rules deleted", took_s, "put back")
    settled(cloud, uuid, "instance.repair")
    assert cloud.query("SELECT data FROM event WHERE kind = 'network.repaired'")
    cloud.change(uuid, "restart", force=True)
    cloud.ssh_when_up(address, "true")
    cloud.assert_green()


@contextmanager
def libvirt_of(cloud: LabCloud, node: str) -> Iterator[libvirt.virConnect]:
    """A connection to a node, past the control plane."""
    with closing(libvirt.open(lab_inspection.node_uri(cloud.lab, node))) as connection:
        yield connection


def test_a_definition_that_was_removed_comes_back(cloud: LabCloud, note: Note) -> None:
    uuid, address = running(cloud)
    node = lab_inspection.node_of(cloud.lab, uuid)
    pid = lab_inspection.qemu_pid(uuid)

    def is_defined() -> bool:
        return (
            "yes" in lab_inspection.virsh(cloud.lab, node, "dominfo", uuid).split("Persistent:")[1]
        )

    with libvirt_of(cloud, node) as connection:
        connection.lookupByUUIDString(uuid).undefine()
    took_s = seconds_until(is_defined, LATER_S, "the definition is not back")
    note("its definition removed", took_s, "put back")
    settled(cloud, uuid, "instance.repair")
    assert lab_inspection.qemu_pid(uuid) == pid, "the guest was not disturbed"
    cloud.assert_green()

    cloud.change(uuid, "stop", force=True)
    with libvirt_of(cloud, node) as connection:
        connection.lookupByUUIDString(uuid).undefine()
    took_s = seconds_until(
        lambda: uuid in lab_inspection.domains_on(cloud.lab, node), LATER_S, "the domain is gone"
    )
    note("its domain removed while stopped", took_s, "put back")
    settled(cloud, uuid, "instance.repair")
    cloud.assert_green()
    cloud.change(uuid, "start")
    cloud.ssh_when_up(address, "true")


def test_strays_are_reported_and_kept(cloud: LabCloud, note: Note) -> None:
    node = cloud.info.nodes[0].name
    uuid, file = str(uuid4()), f"vol-{uuid4()}.qcow2"
    cloud.delete_instance(cloud.create_instance()["uuid"])
    switch = northbound(cloud, "--bare", "--columns=name", "list", "Logical_Switch").split()[0]

    def quarantined() -> set[tuple[str, str]]:
        rows = cloud.admin.get("/admin/quarantine").json()["data"]
        return {(row["kind"], row["subject"]) for row in rows}

    with libvirt_of(cloud, node) as connection:
        domain = connection.defineXML(STRAY_DOMAIN.format(uuid=uuid))
        volume = connection.storagePoolLookupByName(POOL).createXML(STRAY_FILE.format(name=file), 0)
        northbound(cloud, "lsp-add", switch, "left-over")
        northbound(cloud, "lsp-set-port-security", "left-over", "52:00:00:00:00:01")
        wanted = {("domain", uuid), ("file", file), ("port", "left-over")}
        try:
            took_s = seconds_until(lambda: quarantined() >= wanted, LATER_S, "not reported")
            note("stray domain, port and file", took_s, "quarantined")
            time.sleep(12)
            assert domain.name() == "by-hand"
            assert volume.name() == file
            assert "left-over" in lab_inspection.ports(cloud.lab)
        finally:
            domain.undefine()
            volume.delete()
            northbound(cloud, "lsp-del", "left-over")
    until(lambda: not quarantined() & wanted, LATER_S, "they are still in quarantine")
    cloud.assert_green()


def test_a_node_is_cut_off(cloud: LabCloud, note: Note) -> None:
    uuid, address = running(cloud)
    name = lab_inspection.node_of(cloud.lab, uuid)
    link = next(node.host_link for node in cloud.lab.layout.nodes if node.name == name)
    subprocess.run(["ip", "link", "set", link, "nomaster"], check=True)
    try:
        took_s = seconds_until(lambda: status(cloud, uuid) == "Unknown", 90, "it is not Unknown")
        note("management of its node cut", took_s, "Unknown")
        node = cloud.node_of(uuid)
        assert (node["health"], node["state"]) == ("unreachable", "active")
        assert cloud.ssh_when_up(address, "hostname", timeout_s=30), "the guest runs all the same"
        refused = cloud.client.post(f"/instances/{uuid}/stop", json={})
        assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
        other = cloud.create_instance()["uuid"]
        assert cloud.node_of(other)["name"] != name
        cloud.ssh(address, "sudo poweroff")
    finally:
        cloud.lab.up()
    took_s = seconds_until(lambda: status(cloud, uuid) != "Unknown", LATER_S, "still Unknown")
    note("management of its node back", took_s, status(cloud, uuid))
    until(lambda: status(cloud, uuid) == "Stopped", SOON_S, "the truth is not told")
    assert cloud.node_of(uuid)["health"] == "reachable"
    cloud.assert_green(settle_s=60)


def test_an_abandoned_node_comes_back(cloud: LabCloud, note: Note) -> None:
    """Its guest ran on all the time, with an address that another one has by then."""
    uuid, address = running(cloud)
    node, own = cloud.node_of(uuid), cloud.show(uuid)["public_network"]["uuid"]
    name, path = node["name"], f"/admin/nodes/{node['uuid']}"
    link = next(it.host_link for it in cloud.lab.layout.nodes if it.name == name)
    subprocess.run(["ip", "link", "set", link, "nomaster"], check=True)
    try:
        until(lambda: status(cloud, uuid) == "Unknown", 90, "it is not Unknown")
        assert cloud.ssh_when_up(address, "hostname", timeout_s=30), "the guest runs all the same"
        given_up = cloud.admin.post(f"{path}/abandon", json={"confirm": name})
        assert given_up.json()["data"]["state"] == "lost", given_up.text
        took_s = seconds_until(lambda: cloud.is_gone(uuid), LATER_S, "it is not deleted")
        note("its node abandoned", took_s, "deleted")
        heir = cloud.create_instance(public_network=own, hostname="heir")["uuid"]
        assert cloud.node_of(heir)["name"] != name
    finally:
        cloud.lab.up()
    try:
        took_s = seconds_until(
            lambda: domain_state(cloud, name, uuid) == "shut off", LATER_S, "it still runs"
        )
        note("its abandoned node back", took_s, "fenced")
        cloud.wait_ready(heir)
        assert cloud.ssh_when_up(address, "hostname").strip() == "heir"
        until(lambda: uuid in quarantined_on(cloud, node["uuid"]), LATER_S, "not in quarantine")
        assert domain_state(cloud, name, uuid) == "shut off"
        assert cloud.admin.post(f"{path}/probe").status_code == 409
    finally:
        install_anew(cloud, node)
    until(lambda: not quarantined_on(cloud, node["uuid"]), LATER_S, "strays are left")
    cloud.assert_green(settle_s=60)


def quarantined_on(cloud: LabCloud, node_uuid: str) -> set[str]:
    """What no row explains on a node."""
    rows = cloud.admin.get("/admin/quarantine").json()["data"]
    return {row["subject"] for row in rows if row["node_uuid"] == node_uuid}


def install_anew(cloud: LabCloud, node: dict[str, Any]) -> None:
    """The node serves again, for the next tests: no host is ever added again under an identity that was given up."""
    strays = quarantined_on(cloud, node["uuid"])
    with libvirt_of(cloud, node["name"]) as connection:
        for domain in connection.listAllDomains():
            if domain.UUIDString() in strays:
                domain.undefine()
        pool = connection.storagePoolLookupByName(POOL)
        pool.refresh()
        for volume in pool.listAllVolumes():
            if volume.name() in strays:
                volume.delete()
    with cloud.connect() as connection:
        connection.execute(
            "UPDATE node SET state = 'active', abandoned_at = NULL WHERE node_id = %s",
            [node["uuid"]],
        )
        connection.execute(
            "INSERT INTO node_tier (node_id, tier_id) VALUES (%s, %s)",
            [node["uuid"], cloud.tier_id],
        )
