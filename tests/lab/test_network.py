"""What guests reach and what they do not: each other, the gateway, the management network, the control plane."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_interface

import pytest

from lab.layout import NAMESERVER_PORT
from tests.support import lab_inspection
from tests.support.console_viewer import ask, open_viewer
from tests.support.lab_cloud import LabCloud

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200)]

VNC_PORTS = range(5900, 6000)
LIBVIRT_PORTS, NORTHBOUND_PORT, SOUTHBOUND_PORT = (16509, 16514), 6641, 6642
OTHER_PORTS = (22, 5432, 6081, 8080)
CAPTURE_S = 25


def ping(cloud: LabCloud, source: str, target: str, count: int = 3) -> bool:
    """Whether a guest gets answers from an address."""
    command = f"ping -c {count} -i 0.3 -W 5 {target}"
    return cloud.ssh(source, command).returncode == 0


@pytest.mark.sampled("story")
def test_guests_of_two_customers(cloud: LabCloud) -> None:
    stranger = cloud.customer("Another customer")
    created = [
        cloud.create_instance(hostname="one"),
        cloud.create_instance(hostname="two"),
        cloud.create_instance(stranger, hostname="three"),
    ]
    one, two, three = (row["ip_address"] for row in created)
    two_six = created[1]["public_network"]["ipv6_address"]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(cloud.ssh_when_up, (one, two, three)))

    nodes = [lab_inspection.node_of(cloud.lab, row["uuid"]) for row in created[:2]]
    assert len(set(nodes)) == 2, "a customer's instances are kept apart"
    for target in (two, two_six, cloud.info.public_v4_gateway, cloud.info.public_v6_gateway):
        assert ping(cloud, one, target), target

    check_a_closed_firewall(cloud, created[1]["uuid"], guarded=two, peer=one)
    check_nobody_can_borrow_an_address(cloud, liar=three, victim=one, listener=two)
    viewers = [open_viewer(ask(cloud.client, row["uuid"]))[0] for row in created[:2]]
    with viewers[0], viewers[1]:
        check_management_is_out_of_reach(cloud, guest=one, peer=two)
    cloud.assert_green()


def check_a_closed_firewall(cloud: LabCloud, uuid: str, *, guarded: str, peer: str) -> None:
    """Behind DROP a guest is reached by what its rules name alone, and reaches everybody itself."""
    path = f"/instances/{uuid}/firewall"

    def change(method: str, below: str = "", **body: object) -> None:
        answer = cloud.client.request(method, f"{path}{below}", json=body)
        assert answer.is_success, answer.text
        assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
        assert cloud.client.get(path).json()["data"]["sync_status"] == "applied"

    words = {"description": "", "use_ipset": False, "source_ipset": 0, "action": "ACCEPT"}
    change("POST", "/rules", protocol="tcp", destination_port=22, **words)
    change("PUT", action="DROP")
    assert not ping(cloud, peer, guarded, count=2)
    assert ping(cloud, guarded, peer, count=2)
    assert ping(cloud, guarded, cloud.info.public_v6_gateway, count=2)
    change("POST", "/rules", protocol="icmp", destination_port=0, source=peer, **words)
    assert ping(cloud, peer, guarded, count=2)
    change("PUT", action="ACCEPT")


def check_nobody_can_borrow_an_address(
    cloud: LabCloud, *, liar: str, victim: str, listener: str
) -> None:
    """A guest that gives itself another's address is not heard: neither its packets nor its ARP."""
    liars_mac = cloud.ssh(liar, "cat /sys/class/net/eth0/address").stdout.strip()
    borrow = (
        f"sudo ip address add {victim}/32 dev eth0;"
        f" ping -c 3 -i 0.3 -W 1 -I {victim} {listener} >/dev/null;"
        f" sudo arping -U -c 2 -I eth0 -s {victim} {victim} >/dev/null;"
        f" sudo arping -A -c 2 -I eth0 -s {victim} {victim} >/dev/null;"
        f" sudo ip address del {victim}/32 dev eth0;"
        f" ping -c 3 -i 0.3 -W 2 {listener}"
    )
    with ThreadPoolExecutor(1) as pool:
        capture = f"sudo timeout {CAPTURE_S} tcpdump -l -nne -i eth0 ether src {liars_mac}"
        heard = pool.submit(cloud.ssh, listener, capture)
        spoken = cloud.ssh(liar, f"sleep 4; {borrow}")
        assert spoken.returncode == 0, "after its lie the guest does not reach others by its own"
        lines = heard.result().stdout.splitlines()
    assert any(f"{liar} > {listener}" in line for line in lines), "the capture saw nothing"
    assert not [line for line in lines if victim in line]


def check_management_is_out_of_reach(cloud: LabCloud, *, guest: str, peer: str) -> None:
    """No port of hypervisors, OVN, database or control plane answers to a guest."""
    layout = cloud.lab.layout
    _, api_port = cloud.plane.address
    hosts = [
        *(layout.mgmt_ip, layout.uplink_host_v4, layout.uplink_router_v4, layout.uplink_host_v6),
        *(node.mgmt_ip for node in cloud.info.nodes),
    ]
    screens = {port for _, port in cloud.query("SELECT host, port FROM console WHERE port > 0")}
    assert screens, "a screen is being looked at meanwhile"
    assert screens <= set(VNC_PORTS)
    ports = (
        *(*LIBVIRT_PORTS, NORTHBOUND_PORT, SOUTHBOUND_PORT, api_port),
        *(*OTHER_PORTS, *screens, *VNC_PORTS[:4]),
    )
    targets = [f"{host} {port}" for host in hosts for port in ports]
    script = "\n".join(
        [
            "try() { nc -z -w 3 $1 $2 2>/dev/null && echo reached $1 $2; }",
            f"try {peer} 22",
            *(f"try {target} &" for target in targets),
            "wait",
        ]
    )
    done = cloud.ssh(guest, "bash -s", stdin=script, timeout_s=120)
    assert done.stdout.splitlines() == [f"reached {peer} 22"], done


def test_only_documented_ports_listen(cloud: LabCloud) -> None:
    cloud.create_instance()
    for node in cloud.info.nodes:
        for address, port in listening(cloud.lab.node_exec(node.name, SS).stdout):
            assert address == node.mgmt_ip
            assert port in LIBVIRT_PORTS or port in VNC_PORTS
    ours = [
        (address, port)
        for address, port in listening(
            subprocess.run(SS, capture_output=True, text=True, check=True).stdout
        )
        if address.startswith(f"10.77.{cloud.info.slot}.") or port == cloud.plane.address[1]
    ]
    assert sorted(ours) == [
        (cloud.lab.layout.mgmt_ip, NAMESERVER_PORT),
        (cloud.lab.layout.mgmt_ip, NORTHBOUND_PORT),
        (cloud.lab.layout.mgmt_ip, SOUTHBOUND_PORT),
        cloud.plane.address,
    ]


SS = ["ss", "--listening", "--tcp", "--numeric", "--no-header"]


def listening(output: str) -> list[tuple[str, int]]:
    """Local address and port of each listening TCP socket."""
    found = []
    for line in output.splitlines():
        address, _, port = line.split()[3].rpartition(":")
        address = address.partition("%")[0].strip("[]")
        found.append((address if address == "*" else str(ip_interface(address).ip), int(port)))
    return found
