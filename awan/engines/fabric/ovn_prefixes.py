"""Routed IPv6 prefixes on OVN.

| concept           | OVN                                                                            |
| ----------------- | ------------------------------------------------------------------------------ |
| router            | Logical_Router with one port on the public switch, where packets come and go    |
| prefix            | Logical_Router_Static_Route to the instance's own address                       |
| "survives a node" | Gateway_Chassis rows of the port, by priority                                   |

The router answers for its address on the node that carries it. Its Ethernet address is the same on every node; the new
node announces it when the router moves. Source: ovn-nb(5) of OVN 23.03.
"""

from __future__ import annotations

from typing import Any

from awan.engines.fabric.ovn_private import (
    edit_chassis,
    edit_parts,
    edit_peer,
    parts,
    remove_router,
    router_mac,
)
from awan.engines.fabric.ovn_rows import NETWORK_KEY, ROLE_KEY
from awan.engines.fabric.ovsdb import ENGINE, Database, Row, Tables, find_row, set_columns
from awan.engines.fabric.prefixes import PrefixRouterFacts, PrefixRouterSpec
from awan.errors import EngineRejected

ROLE = "prefixes"
ROUTES = ("static_routes", "Logical_Router_Static_Route")


class OvnPrefixRouters:
    """`PrefixRouters` on the two databases of `OvnFabric`."""

    def __init__(self, nb: Database, sb: Database) -> None:
        self._nb = nb
        self._sb = sb

    def ensure_prefix_router(self, spec: PrefixRouterSpec) -> bool:
        """See `PrefixRouters`."""
        call = f"ensure_prefix_router {spec.name}"

        def edit(tables: Tables, txn: Any) -> None:
            # Every change of ours raises nb_cfg: if another one came first, look again.
            next(iter(tables["NB_Global"].rows.values())).verify("nb_cfg")
            switch = find_row(tables, "Logical_Switch", "name", spec.public_switch)
            if switch is None:
                raise EngineRejected(ENGINE, call, f"there is no network {spec.public_switch}")
            _edit_router(tables, txn, spec)
            edit_peer(tables, txn, switch, port_name(spec.name), spec.name)

        return self._nb.change(call, edit)

    def ensure_prefix_router_absent(self, name: str) -> bool:
        """See `PrefixRouters`."""
        return self._nb.change(
            f"ensure_prefix_router_absent {name}",
            lambda tables, _txn: remove_router(tables, name, [port_name(name)]),
        )

    def wait_prefix_router_carried(self, name: str, *, timeout_s: float) -> bool:
        """See `PrefixRouters`."""

        def is_carried(tables: Tables) -> bool:
            return _carrier(tables, name) is not None

        call = f"wait_prefix_router_carried {name}"
        return self._sb.wait_for(call, is_carried, timeout_s=timeout_s)

    def list_prefix_routers(self) -> list[PrefixRouterFacts]:
        """See `PrefixRouters`."""
        call = "list_prefix_routers"
        found = self._nb.read(call, _read_routers)
        carriers = self._sb.read(
            call, lambda tables: {name: _carrier(tables, name) for name in found}
        )
        return [
            PrefixRouterFacts(name, *found[name], active_chassis=carriers[name])
            for name in sorted(found)
        ]


def port_name(router: str) -> str:
    """The router's port on the public switch."""
    return f"{router}-outer"


def _edit_router(tables: Tables, txn: Any, spec: PrefixRouterSpec) -> None:
    ids = {NETWORK_KEY: spec.name, ROLE_KEY: ROLE}
    router = find_row(tables, "Logical_Router", "name", spec.name)
    if router is None:
        router = txn.insert(tables["Logical_Router"])
        router.name = spec.name
    set_columns(router, external_ids=ids)
    name = port_name(spec.name)
    port = find_row(tables, "Logical_Router_Port", "name", name)
    if port is None:
        port = txn.insert(tables["Logical_Router_Port"])
        port.name = name
        router.addvalue("ports", port)
    address = f"{spec.address}/{spec.on_link.prefixlen}"
    set_columns(port, mac=router_mac(name), networks=[address], external_ids=ids)
    edit_chassis(tables, txn, port, name, spec.chassis)
    _edit_routes(tables, txn, router, spec)
    edit_parts(tables, txn, router, "policies", "Logical_Router_Policy", [])
    edit_parts(tables, txn, router, "nat", "NAT", [])


def _edit_routes(tables: Tables, txn: Any, router: Row, spec: PrefixRouterSpec) -> None:
    """The router has these routes and no others. A location may have thousands: each is looked for by its key."""
    found = parts(tables, router, *ROUTES)
    present = {(row.ip_prefix, row.nexthop, *row.output_port): row for row in found}
    wanted = {(str(it.prefix), str(it.next_hop), port_name(spec.name)): it for it in spec.routes}
    if wanted.keys() == present.keys() and len(found) == len(present):
        return
    rows = []
    for key in wanted:
        row = present.get(key)
        if row is None:
            row = txn.insert(tables[ROUTES[1]])
            row.ip_prefix, row.nexthop, row.output_port = key[0], key[1], [key[2]]
        rows.append(row)
    router.static_routes = rows


def _read_routers(tables: Tables) -> dict[str, tuple[str | None, tuple[tuple[str, str], ...]]]:
    return {
        row.name: (
            _address(tables, row.name),
            tuple(sorted((it.ip_prefix, it.nexthop) for it in parts(tables, row, *ROUTES))),
        )
        for row in tables["Logical_Router"].rows.values()
        if row.external_ids.get(ROLE_KEY) == ROLE
    }


def _address(tables: Tables, router: str) -> str | None:
    port: Row | None = find_row(tables, "Logical_Router_Port", "name", port_name(router))
    peer = find_row(tables, "Logical_Switch_Port", "name", f"{port_name(router)}-peer")
    if port is None or peer is None or not port.networks:
        return None
    return str(port.networks[0]).partition("/")[0]


def _carrier(tables: Tables, router: str) -> str | None:
    binding = find_row(tables, "Port_Binding", "logical_port", f"cr-{port_name(router)}")
    return str(binding.chassis[0].name) if binding is not None and binding.chassis else None
