"""What all logical switches of ours have in common: how their rows are known, DHCP options, the rules for tenants."""

from __future__ import annotations

import hashlib
import re
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from awan.engines.fabric.ovsdb import ENGINE, Row, Tables, find_row, set_columns
from awan.errors import EngineRejected

ACL_PRIORITY = 32000
TRACKING_PRIORITY = 1

# Keys in external_ids by which rows are known as ours.
NETWORK_KEY = "awan:network"
ROLE_KEY = "awan:role"
INSTANCE_KEY = "awan:instance"
ACCOUNT_KEY = "awan:account"
OPERATION_KEY = "awan:operation"


def tenants_group(switch: str) -> str:
    """Name of the port group of all tenant ports of a public switch; as `@name` it is usable in matches."""
    return "tenants_" + re.sub(r"[^A-Za-z0-9_]", "_", switch)


def server_mac(switch: str) -> str:
    """The Ethernet address that DHCP answers of this switch come from: derived, locally administered, unicast."""
    digest = hashlib.sha256(f"dhcp server of {switch}".encode()).digest()
    return ":".join(f"{octet:02x}" for octet in (0x0A, *digest[:5]))


def tenant_acls(switch: str) -> dict[str, str]:
    """What no tenant port may send, as name -> match.

    ARP, neighbour discovery and plain IP need no rule: without a match OVN lets a packet through, and forged
    addresses are already dropped by port security, which says nothing about the following.
    """
    group = f"inport == @{tenants_group(switch)}"
    return {
        # Clients also accept an answer from another source port, so both ends are named.
        "rogue_dhcp": f"{group} && udp && (udp.src == {{67, 547}} || udp.dst == {{68, 546}})",
        "rogue_redirect": f"{group} && icmp6.type == 137",
        "rarp": f"{group} && eth.type == 0x8035",
        # Spanning tree, LACP and their like speak to the provider's switches.
        "link_control": f"{group} && eth.dst == 01:80:c2:00:00:00/ff:ff:ff:ff:ff:f0",
    }


def tracking_acl(switch: str) -> tuple[str, str]:
    """Name and match of the row, last of all, that has every flow of a tenant tracked from its first packet.

    So a reply is known as one also when a firewall is closed while the flow goes on, and to a firewall that has no
    accepting rule at all.
    """
    return "track", f"inport == @{tenants_group(switch)} && ip"


def edit_dhcp(
    tables: Tables,
    txn: Any,
    switch: str,
    role: str,
    wanted: tuple[str, dict[str, str]] | None,
) -> None:
    """The switch's DHCP options of this role are `wanted` (CIDR, options), or absent."""
    row = find_dhcp(tables, switch, role)
    if wanted is None:
        if row is not None:
            row.delete()
        return
    cidr, options = wanted
    if row is None:
        row = txn.insert(tables["DHCP_Options"])
    set_columns(row, cidr=cidr, options=options, external_ids={NETWORK_KEY: switch, ROLE_KEY: role})


def edit_tenants(tables: Tables, txn: Any, switch: str, *, is_tracked: bool = False) -> None:
    """The tenants' port group with exactly our ACLs; `is_tracked` where ports are behind firewalls.

    What they drop is dropped in the stage after load balancing: rules that a customer's firewall puts into the usual
    stage cannot permit it.
    """
    name = tenants_group(switch)
    group = find_row(tables, "Port_Group", "name", name)
    if group is None:
        group = txn.insert(tables["Port_Group"])
        group.name = name
        present: dict[str, Row] = {}
    else:
        owner = group.external_ids.get(NETWORK_KEY, switch)
        if owner != switch:
            raise EngineRejected(
                ENGINE, f"ensure network {switch}", f"port group {name} belongs to {owner}"
            )
        present = {row.external_ids.get(ROLE_KEY, ""): row for row in group.acls}
    set_columns(group, external_ids={NETWORK_KEY: switch, ROLE_KEY: "tenants"})
    acls = []
    for role, match in tenant_acls(switch).items():
        acl = present.get(role)
        if acl is None:
            acl = txn.insert(tables["ACL"])
        set_columns(
            acl,
            name=[role],
            priority=ACL_PRIORITY,
            direction="from-lport",
            match=match,
            action="drop",
            options={"apply-after-lb": "true"},
            external_ids={NETWORK_KEY: switch, ROLE_KEY: role},
        )
        acls.append(acl)
    if is_tracked:
        acls.append(_edit_tracking(tables, txn, switch, present))
    if {acl.uuid for acl in acls} != {acl.uuid for acl in present.values()}:
        group.acls = acls


def _edit_tracking(tables: Tables, txn: Any, switch: str, present: dict[str, Row]) -> Row:
    role, match = tracking_acl(switch)
    acl = present.get(role)
    if acl is None:
        acl = txn.insert(tables["ACL"])
    set_columns(
        acl,
        name=[role],
        priority=TRACKING_PRIORITY,
        direction="from-lport",
        match=match,
        action="allow-related",
        options={},
        external_ids={NETWORK_KEY: switch, ROLE_KEY: role},
    )
    return acl


def find_dhcp(tables: Tables, switch: str, role: str) -> Row | None:
    for row in tables["DHCP_Options"].rows.values():
        ids = row.external_ids
        if ids.get(NETWORK_KEY) == switch and ids.get(ROLE_KEY) == role:
            return row
    return None


def dhcp_of(
    tables: Tables, switch: str, role: str, address: IPv4Address | IPv6Address | None
) -> list[Row]:
    """The reference from a port with this address to its DHCP options."""
    row = None if address is None else find_dhcp(tables, switch, role)
    return [] if row is None else [row]


def as_set(values: list[IPv4Address] | list[IPv6Address]) -> str:
    """A value of one or more addresses in OVN's syntax."""
    joined = ", ".join(str(value) for value in values)
    return joined if len(values) == 1 else f"{{{joined}}}"


def edit_localnet(
    tables: Tables, txn: Any, switch: Row, name: str, physical_network: str, vlan: int | None
) -> None:
    """The port that joins a switch, called `name`, to a provider network."""
    row_name = f"{name}-localnet"
    port = find_row(tables, "Logical_Switch_Port", "name", row_name)
    if port is None:
        port = txn.insert(tables["Logical_Switch_Port"])
        port.name = row_name
        switch.addvalue("ports", port)
    set_columns(
        port,
        type="localnet",
        tag=[] if vlan is None else [vlan],
        addresses=["unknown"],
        options={"network_name": physical_network},
        external_ids={NETWORK_KEY: name, ROLE_KEY: "localnet"},
    )
