"""What only the real engine has: rows of OVN, broken connections, and other writers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from awan.engines.fabric.ovn import OvnFabric, tenants_group
from awan.errors import EngineRejected, EngineUnavailable

SWITCH = "public-contract"
GROUP = tenants_group(SWITCH)


@pytest.fixture
def network(ovn_fabric, make_network_spec):
    ovn_fabric.ensure_public_network(make_network_spec())
    return ovn_fabric


def rows(central, table: str, *columns: str) -> list[dict[str, object]]:
    """The rows of a northbound table, as plain values."""
    text = central.nbctl("--format=json", f"--columns={','.join(columns)}", "list", table)
    answer = json.loads(text)
    return [dict(zip(answer["headings"], row, strict=True)) for row in answer["data"]]


def test_network_rows(network, ovn_central) -> None:
    localnet = f"{SWITCH}-localnet"
    assert ovn_central.nbctl("lsp-get-type", localnet) == "localnet"
    assert ovn_central.nbctl("lsp-get-options", localnet) == "network_name=public"
    assert ovn_central.nbctl("get", "Logical_Switch_Port", localnet, "tag") == "[]"
    options = {
        str(row["cidr"]): dict(row["options"][1])
        for row in rows(ovn_central, "DHCP_Options", "cidr", "options")
    }
    assert options["198.18.200.0/24"]["router"] == "198.18.200.1"
    assert options["198.18.200.0/24"]["dns_server"] == "198.18.200.1"
    assert options["198.18.200.0/24"]["mtu"] == "1500"
    assert options["2001:db8:200:1::/64"]["dns_server"] == "2001:db8:200:1::1"
    assert len(ovn_central.nbctl("acl-list", GROUP).splitlines()) == 5


def test_network_is_corrected(network, ovn_central, make_network_spec) -> None:
    before = ovn_central.nb_cfg()
    network.ensure_public_network(make_network_spec())
    assert ovn_central.nb_cfg() == before  # nothing differed, nothing was written
    ovn_central.nbctl("acl-del", GROUP)
    ovn_central.nbctl("lsp-set-options", f"{SWITCH}-localnet", "network_name=elsewhere")
    network.ensure_public_network(make_network_spec(vlan=42, mtu=1400))
    assert len(ovn_central.nbctl("acl-list", GROUP).splitlines()) == 5
    assert ovn_central.nbctl("lsp-get-options", f"{SWITCH}-localnet") == "network_name=public"
    assert ovn_central.nbctl("get", "Logical_Switch_Port", f"{SWITCH}-localnet", "tag") == "42"
    assert 'mtu="1400"' in ovn_central.nbctl("list", "DHCP_Options")
    network.ensure_public_network(make_network_spec(ipv6_cidr=None, ipv6_gateway=None))
    assert len(rows(ovn_central, "DHCP_Options", "cidr")) == 1


def test_acl_of_foreign_hand_is_removed(network, ovn_central, make_network_spec) -> None:
    ovn_central.nbctl("--type=port-group", "acl-add", GROUP, "from-lport", "32767", "ip", "allow")
    network.ensure_public_network(make_network_spec())
    left = ovn_central.nbctl("acl-list", GROUP)
    assert "32767" not in left
    assert len(left.splitlines()) == 5


def test_networks_made_at_once_are_one(ovn_central, make_network_spec) -> None:
    """OVN does not refuse a second switch of the same name."""
    engines = [OvnFabric(ovn_central.nb, ovn_central.sb) for _ in range(4)]
    try:
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(
                pool.map(lambda engine: engine.ensure_public_network(make_network_spec()), engines)
            )
    finally:
        for engine in engines:
            engine.close()
    assert len(rows(ovn_central, "Logical_Switch", "name")) == 1
    assert len(rows(ovn_central, "DHCP_Options", "cidr")) == 2


def test_port_rows(network, ovn_central, make_port_spec) -> None:
    spec = make_port_spec(20)
    before = ovn_central.nb_cfg()
    network.ensure_port(spec)
    assert ovn_central.nb_cfg() == before + 1
    port = ovn_central.nbctl("list", "Logical_Switch_Port", str(spec.port_id))
    for value in (spec.instance_id, spec.account_id, spec.operation_id):
        assert str(value) in port
    assert "host-20" in port
    members = ovn_central.nbctl("get", "Port_Group", GROUP, "ports")
    assert ovn_central.nbctl("get", "Logical_Switch_Port", str(spec.port_id), "_uuid") in members
    dhcp = ovn_central.nbctl(
        "--columns=dhcpv4_options,dhcpv6_options", "list", "Logical_Switch_Port", str(spec.port_id)
    )
    assert "[]" not in dhcp
    network.ensure_port(spec)
    assert ovn_central.nb_cfg() == before + 1
    network.ensure_port_absent(spec.port_id)
    assert ovn_central.nb_cfg() == before + 2
    assert ovn_central.nbctl("get", "Port_Group", GROUP, "ports") == "[]"


def test_tampered_port_is_corrected(network, ovn_central, make_port_spec) -> None:
    spec = make_port_spec(21)
    network.ensure_port(spec)
    name = str(spec.port_id)
    ovn_central.nbctl("set", "Port_Group", GROUP, "ports=[]")
    ovn_central.nbctl("lsp-set-port-security", name)
    ovn_central.nbctl("clear", "Logical_Switch_Port", name, "dhcpv4_options")
    ovn_central.nbctl("set", "Logical_Switch_Port", name, "options:requested-chassis=node-1")
    network.ensure_port(spec)
    port = network.find_port(spec.port_id)
    assert port.port_security == (spec.security_line,)
    assert ovn_central.nbctl("get", "Port_Group", GROUP, "ports") != "[]"
    assert ovn_central.nbctl("get", "Logical_Switch_Port", name, "dhcpv4_options") != "[]"
    # Where a port may be bound is another verb's business.
    assert (
        ovn_central.nbctl("get", "Logical_Switch_Port", name, "options:requested-chassis")
        == "node-1"
    )


def test_port_moves_to_its_switch(network, ovn_central, make_network_spec, make_port_spec) -> None:
    network.ensure_public_network(make_network_spec("public-other"))
    spec = make_port_spec(30)
    network.ensure_port(spec)
    network.ensure_port(replace(spec, switch="public-other"))
    (port,) = network.list_ports()
    assert port.switch == "public-other"
    assert ovn_central.nbctl("get", "Port_Group", tenants_group("public-other"), "ports") != "[]"
    assert ovn_central.nbctl("get", "Port_Group", GROUP, "ports") == "[]"


def test_foreign_port_has_no_ids(network, ovn_central) -> None:
    ovn_central.nbctl("lsp-add", SWITCH, "stray")
    (port,) = network.list_ports()
    assert (port.name, port.port_id, port.instance_id) == ("stray", None, None)


def test_port_is_never_naked(network, ovn_central, make_port_spec) -> None:
    """No transaction leaves a tenant port without port security or outside the tenants' group."""
    specs = [make_port_spec(300 + n) for n in range(250)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(network.ensure_port, specs))
        list(pool.map(network.ensure_port, [replace(spec, hostname="renamed") for spec in specs]))
        list(pool.map(lambda spec: network.ensure_port_absent(spec.port_id), specs[::2]))
    names = {str(spec.port_id) for spec in specs}
    ports: dict[str, dict[str, Any]] = {}
    members: set[str] = set()
    versions = 0
    for transaction in ovn_central.nb_transactions():
        for change in transaction.get("Port_Group", {}).values():
            # A set's change is written as the difference: members that enter or leave.
            members ^= set(uuids(change.get("ports", ["set", []])))
        for uuid, change in transaction.get("Logical_Switch_Port", {}).items():
            if change is None:
                ports.pop(uuid, None)
            elif change.get("name") in names or uuid in ports:
                ports.setdefault(uuid, {}).update(change)
                versions += 1
        for uuid, row in ports.items():
            assert row.get("port_security", ["set", []]) != ["set", []]
            assert uuid in members
    assert versions >= 2 * len(specs)
    assert len(ports) == len(specs) - len(specs[::2])


def uuids(datum: list[Any]) -> list[str]:
    """The members of a set of references in OVSDB's notation, in which a set of one is its element."""
    return [datum[1]] if datum[0] == "uuid" else [item[1] for item in datum[1]]


def test_chassis_that_is_behind(network, ovn_central, make_port_spec) -> None:
    ovn_central.add_chassis("node-1")
    network.ensure_port(make_port_spec(22))
    assert not network.wait_applied("node-1", timeout_s=0.2)
    (chassis,) = network.list_chassis()
    assert not chassis.is_alive
    assert not network.wait_applied("unknown", timeout_s=0.1)


def test_wait_is_woken_by_the_event(network, ovn_central, make_port_spec) -> None:
    ovn_central.add_chassis("node-1")
    network.ensure_port(make_port_spec(23))
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(network.wait_applied, "node-1", timeout_s=60)
        time.sleep(0.3)
        assert not waiting.done()
        ovn_central.confirm("node-1", ovn_central.nb_cfg())
        started = time.monotonic()
        assert waiting.result()
        assert time.monotonic() - started < 20


def test_port_up_on_the_right_chassis(network, ovn_central, make_port_spec) -> None:
    spec = make_port_spec(24)
    for name in ("node-1", "node-2"):
        ovn_central.add_chassis(name)
        ovn_central.confirm(name, 1_000_000)
    network.ensure_port(spec)
    ovn_central.nbctl("--wait=sb", "sync")
    ovn_central.sbctl("lsp-bind", str(spec.port_id), "node-2")
    binding = ovn_central.sbctl(
        "--bare", "--columns=_uuid", "find", "Port_Binding", f"logical_port={spec.port_id}"
    )
    ovn_central.sbctl("set", "Port_Binding", binding, "up=false")
    assert not network.wait_port_up(spec.port_id, "node-2", timeout_s=0.2)
    ovn_central.sbctl("set", "Port_Binding", binding, "up=true")
    assert network.wait_port_up(spec.port_id, "node-2", timeout_s=5)
    assert not network.wait_port_up(spec.port_id, "node-1", timeout_s=0.2)
    port = network.find_port(spec.port_id)
    assert (port.is_up, port.chassis) == (True, "node-2")


def test_change_of_another_connection_is_seen_at_once(network, ovn_central, make_port_spec) -> None:
    """A second worker's engine answers from what the first one has just committed."""
    other = OvnFabric(ovn_central.nb, ovn_central.sb)
    try:
        assert other.list_ports() == []
        for n in range(50):
            spec = make_port_spec(700 + n)
            network.ensure_port(spec)
            assert other.find_port(spec.port_id) is not None
            other.ensure_port_absent(spec.port_id)
            assert network.find_port(spec.port_id) is None
    finally:
        other.close()


def test_refusal_of_the_server(network, ovn_central, make_port_spec) -> None:
    """A second port of the same name; the server's words come with the error, and the connection goes on."""

    def use_name_again(tables, txn) -> None:
        (switch,) = tables["Logical_Switch"].rows.values()
        port = txn.insert(tables["Logical_Switch_Port"])
        port.name = f"{SWITCH}-localnet"
        switch.addvalue("ports", port)

    with pytest.raises(EngineRejected) as raised:
        network._nb.change("use_name_again", use_name_again)
    assert "constraint violation" in str(raised.value)
    network.ensure_port(make_port_spec(25))
    assert len(network.list_ports()) == 1


def test_server_that_is_away(ovn_central, make_network_spec, make_port_spec) -> None:
    engine = OvnFabric(f"unix:{ovn_central.folder}/nowhere.sock", ovn_central.sb, timeout_s=1)
    started = time.monotonic()
    with pytest.raises(EngineUnavailable):
        engine.list_ports()
    assert time.monotonic() - started < 10
    engine.close()


def test_server_that_restarts(network, ovn_central, make_port_spec) -> None:
    first, second = make_port_spec(26), make_port_spec(27)
    network.ensure_port(first)
    ovn_central.stop_server("nb")
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(network.ensure_port, second)
        time.sleep(0.5)
        ovn_central.start_server("nb")
        waiting.result()
    assert {port.port_id for port in network.list_ports()} == {first.port_id, second.port_id}


def test_server_that_is_frozen(ovn_central, make_network_spec, make_port_spec) -> None:
    engine = OvnFabric(ovn_central.nb, ovn_central.sb, timeout_s=1)
    engine.ensure_public_network(make_network_spec())
    spec = make_port_spec(28)
    server = ovn_central.processes["nb"].pid
    os.kill(server, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(EngineUnavailable):
            engine.ensure_port(spec)
        with pytest.raises(EngineUnavailable):
            engine.list_ports()
        assert time.monotonic() - started < 15
    finally:
        os.kill(server, signal.SIGCONT)
    deadline = time.monotonic() + 15
    while True:
        try:
            engine.ensure_port_absent(spec.port_id)
            break
        except EngineUnavailable:
            assert time.monotonic() < deadline
    assert engine.list_ports() == []
    engine.close()


def test_close_and_use_again(network, make_port_spec) -> None:
    before = threading.active_count()
    network.close()
    assert threading.active_count() <= before - 1
    network.ensure_port(make_port_spec(29))
    assert len(network.list_ports()) == 1


def test_what_was_taken_from_a_port_is_seen_and_put_back(
    network, make_network_spec, make_port_spec
) -> None:
    spec = make_port_spec(30)
    network.ensure_port(spec)
    whole = network.find_port(spec.port_id)

    def forget_dhcp(tables, txn) -> None:
        for row in list(tables["DHCP_Options"].rows.values()):
            row.delete()

    def leave_group(tables, txn) -> None:
        (group,) = tables["Port_Group"].rows.values()
        group.ports = []

    def forget_rules(tables, txn) -> None:
        (group,) = tables["Port_Group"].rows.values()
        group.acls = []

    assert network._nb.change("forget_dhcp", forget_dhcp)
    assert network.find_port(spec.port_id).dhcp_families == ()
    assert network._nb.change("leave_group", leave_group)
    assert not network.list_ports()[0].is_confined
    assert network._nb.change("forget_rules", forget_rules)
    assert network.ensure_public_network(make_network_spec(switch=SWITCH))
    network.ensure_port(spec)
    assert network.find_port(spec.port_id) == whole
    assert network.list_ports() == [whole]
    assert not network.ensure_public_network(make_network_spec(switch=SWITCH))
