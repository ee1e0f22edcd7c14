"""The switch of a node lives through short connections, a thousand of them (`deploy/userspace-tracking`)."""

from __future__ import annotations

import socket
import struct
import time
from uuid import uuid4

import pytest

from awan.engines.fabric.firewall import FirewallSpec, RuleAction
from tests.engines.fabric_contract.conftest import Location, Tenant
from tests.engines.fabric_contract.test_firewall_packets import add_guarded

pytestmark = pytest.mark.lab

PORT, TIMEOUT_S = 8080, 10.0
# Without the script nearly every such run loses a switch.
CONNECTIONS = 2_000
RST_ON_CLOSE = struct.pack("ii", 1, 0)
LOG = "/var/log/openvswitch/ovs-vswitchd.log"


def falls(tenant: Tenant) -> int:
    """How often the switch of the tenant's node has been started again."""
    return tenant.run_on_node("cat", LOG).count("crashes: pid")


def test_a_switch_lives_through_short_connections(location: Location) -> None:
    server = location.add_tenant(1, 94)
    spec = FirewallSpec(uuid4(), uuid4(), 1, policy=RuleAction.DROP)
    client = add_guarded(location, 2, 95, spec)
    client.attach()
    assert location.fabric.wait_port_up(client.spec.port_id, client.node, timeout_s=15)
    tenants = (server, client)
    for tenant in tenants:
        tenant.configure()
    assert client.ping(server.spec.ipv4)
    before = [falls(tenant) for tenant in tenants]
    address = (str(server.spec.ipv4), PORT)

    def listen() -> socket.socket:
        sock = socket.create_server(address, backlog=128)
        sock.settimeout(TIMEOUT_S)
        return sock

    try:
        with server.open_inside(listen) as listener:
            for _ in range(CONNECTIONS):
                with client.open_inside(socket.socket) as sock:
                    sock.settimeout(TIMEOUT_S)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
                    sock.connect(address)
                listener.accept()[0].close()
        assert [falls(tenant) for tenant in tenants] == before
    finally:
        location.fabric.ensure_firewall_absent(spec.firewall_id)


def test_ovn_translates_no_tracked_connection_to_itself(location: Location) -> None:
    """Also after the switch was started again, which says anew what it can do."""
    tenant = location.add_tenant(2, 96)
    dump = "ovs-ofctl dump-flows br-int | grep 'ct(commit'"

    def settled() -> bool:
        said = tenant.run_on_node(
            "ovs-vsctl", "--bare", "--columns=capabilities", "list", "Datapath"
        )
        flows = tenant.run_on_node("sh", "-c", dump)
        return "ct_zero_snat=false" in said and "nat(src" not in flows

    for again in (False, True):
        if again:
            said = "capabilities:ct_zero_snat=true"
            row = tenant.run_on_node("ovs-vsctl", "get", "Open_vSwitch", ".", "datapaths:netdev")
            tenant.run_on_node("ovs-vsctl", "set", "Datapath", row.strip(), said)
        deadline = time.monotonic() + 20
        while not settled():
            assert time.monotonic() < deadline, "OVN still translates"
            time.sleep(0.2)
