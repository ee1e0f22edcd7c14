"""The lab location itself: what the suites above it take for granted of its nodes and router."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import libvirt
import pytest

from lab import Lab, LabInfo
from lab.hypervisor import cpu_offers_kvm

pytestmark = pytest.mark.lab


def test_every_process_runs_and_a_second_up_is_quick(lab_info: LabInfo) -> None:
    lab = Lab(lab_info.slot)
    started = time.monotonic()
    assert lab.up() == lab_info
    assert time.monotonic() - started < 1
    assert lab.status().is_up


def test_a_switch_that_crashes_comes_back(lab_info: LabInfo) -> None:
    """All traffic of a node goes through it, also that of its management."""
    lab, node = Lab(lab_info.slot), lab_info.nodes[0].name
    show = ["cat", "/run/openvswitch/ovs-vswitchd.pid"]
    crashed = lab.node_exec(node, show).stdout.strip()
    lab.node_exec(node, ["kill", "-ABRT", crashed])
    deadline = time.monotonic() + 20
    while lab.node_exec(node, show, check=False).stdout.strip() in ("", crashed):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # It waits until the switch has carried it out.
    lab.node_exec(node, ["ovs-vsctl", "--timeout=20", "set", "open", ".", "external_ids:seen=yes"])
    libvirt.open(lab_info.nodes[0].libvirt_uri).close()
    assert lab.status().is_up
    assert lab.up() == lab_info


def test_nodes_are_two_hosts_to_libvirt(lab_info: LabInfo) -> None:
    seen = []
    for node in lab_info.nodes:
        connection = libvirt.open(node.libvirt_uri)
        try:
            assert connection.getHostname() == node.name
            assert f"<uuid>{node.host_uuid}</uuid>" in connection.getCapabilities()
            seen.append(node.host_uuid)
        finally:
            connection.close()
    assert len(set(seen)) == len(lab_info.nodes) == 2


def test_chassis_carry_the_nodes_identity(lab_info: LabInfo) -> None:
    listed = subprocess.run(
        ["ovn-sbctl", f"--db={lab_info.ovn_sb}", "--bare", "--columns=name", "list", "chassis"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert sorted(listed.stdout.split()) == sorted(node.system_id for node in lab_info.nodes)


def test_qemu_is_confined(lab_info: LabInfo) -> None:
    lab = Lab(lab_info.slot)
    for node in lab_info.nodes:
        settings = lab.node_exec(node.name, ["cat", "/etc/libvirt/qemu.conf"]).stdout.splitlines()
        assert 'user = "libvirt-qemu"' in settings
        assert "seccomp_sandbox = 1" in settings
        assert f'vnc_listen = "{node.mgmt_ip}"' in settings


@pytest.mark.skipif(cpu_offers_kvm(), reason="the CPU offers KVM: /dev/kvm is left alone")
def test_unusable_kvm_is_covered(lab_info: LabInfo) -> None:
    if not Path("/dev/kvm").exists():
        pytest.skip("there is no /dev/kvm to cover")
    for node in lab_info.nodes:
        stat = ["stat", "--format=%F %U %a", "/dev/kvm"]
        seen = Lab(lab_info.slot).node_exec(node.name, stat).stdout.strip()
        assert seen == "regular empty file root 600"


def test_a_nodes_disks_are_on_that_node_only(lab_info: LabInfo) -> None:
    lab = Lab(lab_info.slot)
    here, there = (node.name for node in lab_info.nodes)
    marker = f"/var/lib/libvirt/marker-{time.time_ns()}"
    lab.node_exec(here, ["touch", marker])
    try:
        assert not Path(marker).exists()
        assert lab.node_exec(there, ["test", "-e", marker], check=False).returncode == 1
        hidden = ["ls", "/var/lib/awan", str(Path(__file__).resolve().parents[2])]
        assert "lab" not in lab.node_exec(here, hidden).stdout.split()
    finally:
        lab.node_exec(here, ["rm", marker])


def test_host_reaches_the_gateways_and_the_router_knows_no_way_out(lab_info: LabInfo) -> None:
    for gateway in (lab_info.public_v4_gateway, lab_info.public_v6_gateway):
        subprocess.run(["ping", "-c", "1", "-W", "2", gateway], check=True, capture_output=True)
    lab = Lab(lab_info.slot)
    for family in ("-4", "-6"):
        assert "default" not in lab.router_exec(["ip", family, "route"]).stdout
