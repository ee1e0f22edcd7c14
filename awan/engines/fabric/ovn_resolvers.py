"""Ways from private networks to the resolver, on OVN.

| concept           | OVN                                                                              |
| ----------------- | -------------------------------------------------------------------------------- |
| services network  | Logical_Switch `services` with a localnet port                                    |
| way to a resolver | Logical_Router `resolver-<switch>` with a port on either switch, NAT of type snat |
| "nothing else"    | Logical_Router_Policy rows: what is not a question to the resolver is dropped     |
| "survives a node" | Gateway_Chassis rows of the outer port, by priority                               |

Everything but the services network is known by `awan:network` = the private switch. Source: ovn-nb(5) of OVN 23.03.
"""

from __future__ import annotations

from typing import Any

from awan.engines.fabric.ovn_private import (
    RouterNames,
    edit_chassis,
    edit_parts,
    edit_peer,
    remove_router,
    router_mac,
)
from awan.engines.fabric.ovn_rows import NETWORK_KEY, ROLE_KEY
from awan.engines.fabric.ovsdb import ENGINE, Database, Row, Tables, find_row, set_columns
from awan.engines.fabric.resolvers import (
    SERVICES_SWITCH,
    ResolverSpec,
    ServicesSpec,
    resolver_policies,
)
from awan.errors import EngineRejected

ROLE = "resolver"


class OvnResolvers:
    """`Resolvers` on the northbound database of `OvnFabric`."""

    def __init__(self, nb: Database) -> None:
        self._nb = nb

    def ensure_resolver(self, spec: ResolverSpec) -> bool:
        """See `Resolvers`."""
        call = f"ensure_resolver {spec.switch}"

        def edit(tables: Tables, txn: Any) -> None:
            # Every change of ours raises nb_cfg: if another one came first, look again.
            next(iter(tables["NB_Global"].rows.values())).verify("nb_cfg")
            inner = find_row(tables, "Logical_Switch", "name", spec.switch)
            if inner is None:
                raise EngineRejected(ENGINE, call, f"there is no network {spec.switch}")
            outer = _edit_services(tables, txn, spec.services)
            _edit_router(tables, txn, spec)
            names = RouterNames.of_resolver(spec.switch)
            # systemd-networkd gives itself a route to each nameserver besides, as if it were a neighbour.
            edit_peer(tables, txn, inner, names.inner, spec.switch, answers_for=spec.resolver)
            edit_peer(tables, txn, outer, names.outer, spec.switch)

        return self._nb.change(call, edit)

    def ensure_resolver_absent(self, switch: str) -> bool:
        """See `Resolvers`."""
        names = RouterNames.of_resolver(switch)
        return self._nb.change(
            f"ensure_resolver_absent {switch}",
            lambda tables, _txn: remove_router(tables, names.router, [names.inner, names.outer]),
        )


def _edit_services(tables: Tables, txn: Any, spec: ServicesSpec) -> Row:
    """The switch of the services network, which has no ports of tenants."""
    switch = find_row(tables, "Logical_Switch", "name", SERVICES_SWITCH)
    if switch is None:
        switch = txn.insert(tables["Logical_Switch"])
        switch.name = SERVICES_SWITCH
    ids = {NETWORK_KEY: SERVICES_SWITCH, ROLE_KEY: "services"}
    set_columns(switch, external_ids=ids)
    name = f"{SERVICES_SWITCH}-localnet"
    port = find_row(tables, "Logical_Switch_Port", "name", name)
    if port is None:
        port = txn.insert(tables["Logical_Switch_Port"])
        port.name = name
        switch.addvalue("ports", port)
    set_columns(
        port,
        type="localnet",
        tag=[] if spec.vlan is None else [spec.vlan],
        addresses=["unknown"],
        options={"network_name": spec.physical_network},
        external_ids={NETWORK_KEY: SERVICES_SWITCH, ROLE_KEY: "localnet"},
    )
    return switch


def _edit_router(tables: Tables, txn: Any, spec: ResolverSpec) -> None:
    names = RouterNames.of_resolver(spec.switch)
    ids = {NETWORK_KEY: spec.switch, ROLE_KEY: ROLE}
    router = find_row(tables, "Logical_Router", "name", names.router)
    if router is None:
        router = txn.insert(tables["Logical_Router"])
        router.name = names.router
    # Otherwise every router of the services network would hold a flow for every other one.
    set_columns(router, external_ids=ids, options={"dynamic_neigh_routers": "true"})
    sides = (
        (names.inner, f"{spec.inner}/{spec.cidr.prefixlen}"),
        (names.outer, f"{spec.outer}/{spec.services.cidr.prefixlen}"),
    )
    for name, address in sides:
        port = find_row(tables, "Logical_Router_Port", "name", name)
        if port is None:
            port = txn.insert(tables["Logical_Router_Port"])
            port.name = name
            router.addvalue("ports", port)
        set_columns(port, mac=router_mac(name), networks=[address], external_ids=ids)
        if name == names.outer:
            edit_chassis(tables, txn, port, name, spec.chassis)
    edit_parts(tables, txn, router, "static_routes", "Logical_Router_Static_Route", [])
    nat = {"type": "snat", "external_ip": str(spec.outer), "logical_ip": str(spec.cidr)}
    edit_parts(tables, txn, router, "nat", "NAT", [nat])
    policies = resolver_policies(spec, names.inner, names.outer)
    edit_parts(
        tables,
        txn,
        router,
        "policies",
        "Logical_Router_Policy",
        [
            {"priority": priority, "match": match, "action": action}
            for priority, (match, action) in policies.items()
        ],
    )
