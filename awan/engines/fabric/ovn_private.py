"""Private networks on OVN.

| concept           | OVN                                                                               |
| ----------------- | --------------------------------------------------------------------------------- |
| private network   | Logical_Switch without localnet port; nodes carry it in Geneve                     |
| addresses         | two DHCP_Options rows: `dhcpv4` with a default route, `dhcpv4_local` without       |
| gateway           | Logical_Router with a port on either switch, NAT of type snat, one default route   |
| "survives a node" | Gateway_Chassis rows of the outer port, by priority; the nodes watch each other    |

Everything is known by `awan:network` = the private switch. Source: ovn-nb(5) of OVN 23.03.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from awan.engines.fabric.ovn_rows import (
    NETWORK_KEY,
    ROLE_KEY,
    as_set,
    edit_dhcp,
    edit_tenants,
    server_mac,
    tenants_group,
)
from awan.engines.fabric.ovsdb import (
    ENGINE,
    Database,
    Row,
    Tables,
    find_row,
    referenced,
    set_columns,
)
from awan.engines.fabric.private import (
    PRIVATE_LEASE_S,
    GatewaySpec,
    PrivateNetworkFacts,
    PrivateNetworkSpec,
    gateway_policies,
)
from awan.errors import EngineRejected

NORTHBOUND = {
    "Logical_Router": [
        *("name", "ports", "static_routes", "policies", "nat", "options", "external_ids"),
    ],
    "Logical_Router_Port": ["name", "mac", "networks", "gateway_chassis", "external_ids"],
    "Gateway_Chassis": ["name", "chassis_name", "priority"],
    "Logical_Router_Static_Route": ["ip_prefix", "nexthop", "output_port"],
    "Logical_Router_Policy": ["priority", "match", "action"],
    "NAT": ["type", "external_ip", "logical_ip"],
}
INDEXES = {"Logical_Router": "name", "Logical_Router_Port": "name"}

ROLE = "private"
ROUTED, LOCAL = "dhcpv4", "dhcpv4_local"
DEFAULT_ROUTE = "0.0.0.0/0"


class OvnPrivateNetworks:
    """`PrivateNetworks` on the two databases of `OvnFabric`."""

    def __init__(self, nb: Database, sb: Database) -> None:
        self._nb = nb
        self._sb = sb

    def ensure_private_network(self, spec: PrivateNetworkSpec) -> bool:
        """See `PrivateNetworks`."""

        def edit(tables: Tables, txn: Any) -> None:
            # Every change of ours raises nb_cfg: if another one came first, look again.
            next(iter(tables["NB_Global"].rows.values())).verify("nb_cfg")
            switch = find_row(tables, "Logical_Switch", "name", spec.switch)
            if switch is None:
                switch = txn.insert(tables["Logical_Switch"])
                switch.name = spec.switch
            set_columns(switch, external_ids={NETWORK_KEY: spec.switch, ROLE_KEY: ROLE})
            for role in (ROUTED, LOCAL):
                wanted = str(spec.cidr), private_dhcp_options(spec, is_routed=role == ROUTED)
                edit_dhcp(tables, txn, spec.switch, role, wanted)
            edit_tenants(tables, txn, spec.switch)

        return self._nb.change(f"ensure_private_network {spec.switch}", edit)

    def ensure_private_network_absent(self, switch: str) -> None:
        """See `PrivateNetworks`. Ports and rules go with the rows that hold them."""

        def edit(tables: Tables, _txn: Any) -> None:
            row = find_row(tables, "Logical_Switch", "name", switch)
            _remove_gateway(tables, switch, dying=row)
            resolver = RouterNames.of_resolver(switch)
            remove_router(tables, resolver.router, [resolver.inner, resolver.outer], dying=row)
            if row is not None:
                row.delete()
            group = find_row(tables, "Port_Group", "name", tenants_group(switch))
            if group is not None:
                group.delete()
            for options in list(tables["DHCP_Options"].rows.values()):
                if options.external_ids.get(NETWORK_KEY) == switch:
                    options.delete()

        self._nb.change(f"ensure_private_network_absent {switch}", edit)

    def ensure_gateway(self, spec: GatewaySpec) -> bool:
        """See `PrivateNetworks`."""
        call = f"ensure_gateway {spec.network.switch}"

        def edit(tables: Tables, txn: Any) -> None:
            next(iter(tables["NB_Global"].rows.values())).verify("nb_cfg")
            inner = find_row(tables, "Logical_Switch", "name", spec.network.switch)
            outer = find_row(tables, "Logical_Switch", "name", spec.public_switch)
            if inner is None or outer is None:
                missing = spec.network.switch if inner is None else spec.public_switch
                raise EngineRejected(ENGINE, call, f"there is no network {missing}")
            _edit_router(tables, txn, spec)
            names = RouterNames.of(spec.network.switch)
            for side, switch in ((names.inner, inner), (names.outer, outer)):
                edit_peer(tables, txn, switch, side, spec.network.switch)

        return self._nb.change(call, edit)

    def ensure_gateway_absent(self, switch: str) -> bool:
        """See `PrivateNetworks`."""
        return self._nb.change(
            f"ensure_gateway_absent {switch}", lambda tables, _txn: _remove_gateway(tables, switch)
        )

    def wait_gateway_carried(self, switch: str, *, timeout_s: float) -> bool:
        """See `PrivateNetworks`. The first gateway of a pair of nodes waits for them to see each other: 2 s."""
        port = f"cr-{RouterNames.of(switch).outer}"

        def is_carried(tables: Tables) -> bool:
            binding = find_row(tables, "Port_Binding", "logical_port", port)
            return binding is not None and bool(binding.chassis)

        call = f"wait_gateway_carried {switch}"
        return self._sb.wait_for(call, is_carried, timeout_s=timeout_s)

    def list_private_networks(self) -> list[PrivateNetworkFacts]:
        """See `PrivateNetworks`."""

        def look(tables: Tables) -> dict[str, tuple[str | None, str | None]]:
            return {
                row.name: (
                    _outer_ip(tables, RouterNames.of(row.name)),
                    _outer_ip(tables, RouterNames.of_resolver(row.name)),
                )
                for row in tables["Logical_Switch"].rows.values()
                if row.external_ids.get(ROLE_KEY) == ROLE
            }

        found = self._nb.read("list_private_networks", look)

        def look_chassis(tables: Tables) -> dict[str, tuple[str | None, str | None]]:
            return {
                switch: (
                    _carrier(tables, RouterNames.of(switch)),
                    _carrier(tables, RouterNames.of_resolver(switch)),
                )
                for switch in found
            }

        carriers = self._sb.read("list_private_networks", look_chassis)
        return [
            PrivateNetworkFacts(
                switch,
                public_ip=found[switch][0],
                active_chassis=carriers[switch][0],
                service_ip=found[switch][1],
                resolver_chassis=carriers[switch][1],
            )
            for switch in sorted(found)
        ]


@dataclass(frozen=True)
class RouterNames:
    """The names of a router and of its ports, on the private and on the other side."""

    router: str
    inner: str
    outer: str

    @classmethod
    def of(cls, switch: str) -> RouterNames:
        """Those of the gateway of a private switch."""
        return cls._of(f"gateway-{switch}")

    @classmethod
    def of_resolver(cls, switch: str) -> RouterNames:
        """Those of its way to the resolver."""
        return cls._of(f"resolver-{switch}")

    @classmethod
    def _of(cls, router: str) -> RouterNames:
        return cls(router, f"{router}-inner", f"{router}-outer")


def router_mac(port: str) -> str:
    """The Ethernet address of a router's port: derived, locally administered, unicast."""
    digest = hashlib.sha256(f"router port {port}".encode()).digest()
    return ":".join(f"{octet:02x}" for octet in (0x0E, *digest[:5]))


def private_dhcp_options(spec: PrivateNetworkSpec, *, is_routed: bool) -> dict[str, str]:
    """Options of the DHCPv4 answers; only a routed member is told of a router and of the nameservers outside.

    The router is told also while there is no gateway: once there is one, no guest has to ask again. Every member is
    told of the resolver and of the way there. Clients that take routes do not look at the router's option any more
    (RFC 3442), so the default route is among them too.
    """
    options = {
        "server_id": str(spec.gateway_ip),
        "server_mac": server_mac(spec.switch),
        "lease_time": str(PRIVATE_LEASE_S),
        "mtu": str(spec.mtu),
    }
    servers: list[IPv4Address] = []
    if spec.names is not None:
        servers.append(spec.names.resolver)
        options["domain_search_list"] = f'"{spec.names.domain}"'
        routes = [f"{spec.names.resolver}/32,{spec.names.router}"]
        if is_routed:
            routes.append(f"{DEFAULT_ROUTE},{spec.gateway_ip}")
        options["classless_static_route"] = f"{{{', '.join(routes)}}}"
    if is_routed:
        options["router"] = str(spec.gateway_ip)
        servers += [server for server in spec.dns_servers if server not in servers]
    if servers:
        options["dns_server"] = as_set(servers)
    return options


def _edit_router(tables: Tables, txn: Any, spec: GatewaySpec) -> None:
    names, network = RouterNames.of(spec.network.switch), spec.network
    ids = {NETWORK_KEY: network.switch, ROLE_KEY: "gateway"}
    inner = f"{network.gateway_ip}/{network.cidr.prefixlen}"
    outer = f"{spec.public_ip}/{spec.public_cidr.prefixlen}"
    router = edit_router(tables, txn, names, (inner, outer), ids, spec.chassis)
    edit_parts(
        tables,
        txn,
        router,
        "static_routes",
        "Logical_Router_Static_Route",
        [
            {
                "ip_prefix": DEFAULT_ROUTE,
                "nexthop": str(spec.next_hop),
                "output_port": [names.outer],
            }
        ],
    )
    nat = {
        "type": "snat",
        "external_ip": str(spec.public_ip),
        "logical_ip": str(network.cidr),
    }
    edit_parts(tables, txn, router, "nat", "NAT", [nat])
    edit_parts(
        tables,
        txn,
        router,
        "policies",
        "Logical_Router_Policy",
        [
            {"priority": priority, "match": match, "action": action}
            for priority, (match, action) in gateway_policies(network.cidr, names.outer).items()
        ],
    )


def edit_router(
    tables: Tables,
    txn: Any,
    names: RouterNames,
    addresses: tuple[str, str],
    ids: dict[str, str],
    chassis: tuple[str, ...],
) -> Row:
    """The router with its inner and its outer port, which have these addresses; `chassis` may carry it."""
    router = find_row(tables, "Logical_Router", "name", names.router)
    if router is None:
        router = txn.insert(tables["Logical_Router"])
        router.name = names.router
    set_columns(router, external_ids=ids)
    for name, address in zip((names.inner, names.outer), addresses, strict=True):
        port = find_row(tables, "Logical_Router_Port", "name", name)
        if port is None:
            port = txn.insert(tables["Logical_Router_Port"])
            port.name = name
            router.addvalue("ports", port)
        set_columns(port, mac=router_mac(name), networks=[address], external_ids=ids)
        if name == names.outer:
            edit_chassis(tables, txn, port, name, chassis)
    return router


def edit_parts(
    tables: Tables, txn: Any, owner: Row, column: str, table: str, wanted: list[dict[str, Any]]
) -> None:
    """The owner's column refers to exactly these rows. Rows that no column refers to are dropped by the database."""
    present = parts(tables, owner, column, table)
    kept = [next((row for row in present if _is_as(row, values)), None) for values in wanted]
    if None not in kept and len(kept) == len(present):
        return
    rows = []
    for row, values in zip(kept, wanted, strict=True):
        if row is None:
            row = txn.insert(tables[table])
            set_columns(row, **values)
        rows.append(row)
    setattr(owner, column, rows)


def parts(tables: Tables, owner: Row, column: str, table: str) -> list[Row]:
    """The rows of a table that the owner's column refers to."""
    if owner._data is None:
        return []  # it is only being made
    rows = tables[table].rows
    return [rows[uuid] for uuid in referenced(owner, column) if uuid in rows]


def _is_as(row: Row, values: dict[str, Any]) -> bool:
    return all(getattr(row, name) == value for name, value in values.items())


def edit_chassis(tables: Tables, txn: Any, port: Row, name: str, chassis: tuple[str, ...]) -> None:
    """The first chassis has the highest priority. Rows are unique by name, so they are changed and not made anew."""
    present = {
        row.chassis_name: row for row in parts(tables, port, "gateway_chassis", "Gateway_Chassis")
    }
    rows = []
    for number, system_id in enumerate(chassis):
        row = present.get(system_id)
        if row is None:
            row = txn.insert(tables["Gateway_Chassis"])
            row.name = f"{name}_{system_id}"
            row.chassis_name = system_id
        set_columns(row, priority=(len(chassis) - number) * 10)
        rows.append(row)
    if present.keys() != set(chassis):
        port.gateway_chassis = rows


def edit_peer(
    tables: Tables,
    txn: Any,
    switch: Row,
    router_port: str,
    network: str,
    *,
    answers_for: IPv4Address | None = None,
) -> None:
    """The switch's end of the link to the router. A gateway that moves to another public switch takes it along.

    `answers_for`: who asks by ARP for this address is told of the router's.
    """
    proxy = {} if answers_for is None else {"arp_proxy": str(answers_for)}
    name = f"{router_port}-peer"
    port = find_row(tables, "Logical_Switch_Port", "name", name)
    if port is None:
        port = txn.insert(tables["Logical_Switch_Port"])
        port.name = name
        homes: list[Row] = []
    else:
        homes = _homes(tables, port)
    set_columns(
        port,
        type="router",
        addresses=["router"],
        # The provider's switches learn from the node's announcement where the address is now.
        options={"router-port": router_port, "nat-addresses": "router", **proxy},
        external_ids={NETWORK_KEY: network, ROLE_KEY: "router"},
    )
    for other in homes:
        if other != switch:
            other.delvalue("ports", port)
    if switch not in homes:
        switch.addvalue("ports", port)


def _homes(tables: Tables, port: Row) -> list[Row]:
    # One that is only being made has no ports yet.
    rows = (row for row in tables["Logical_Switch"].rows.values() if row._data is not None)
    return [row for row in rows if port.uuid in referenced(row, "ports")]


def _remove_gateway(tables: Tables, switch: str, *, dying: Row | None = None) -> None:
    names = RouterNames.of(switch)
    remove_router(tables, names.router, [names.inner, names.outer], dying=dying)


def remove_router(
    tables: Tables, name: str, router_ports: list[str], *, dying: Row | None = None
) -> None:
    """Takes a router and its links away. A switch that is `dying` loses its ports by itself."""
    for router_port in router_ports:
        peer = find_row(tables, "Logical_Switch_Port", "name", f"{router_port}-peer")
        if peer is not None:
            for home in _homes(tables, peer):
                if home != dying:
                    home.delvalue("ports", peer)
            peer.delete()
    router = find_row(tables, "Logical_Router", "name", name)
    if router is not None:
        router.delete()


def _outer_ip(tables: Tables, names: RouterNames) -> str | None:
    """The address of a router on its outer side, or None when it is not whole."""
    router = find_row(tables, "Logical_Router", "name", names.router)
    outer = find_row(tables, "Logical_Router_Port", "name", names.outer)
    if router is None or outer is None or not outer.networks:
        return None
    return str(outer.networks[0]).partition("/")[0]


def _carrier(tables: Tables, names: RouterNames) -> str | None:
    """The chassis that carries a router now."""
    binding = find_row(tables, "Port_Binding", "logical_port", f"cr-{names.outer}")
    return str(binding.chassis[0].name) if binding is not None and binding.chassis else None
