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
    edit_parts,
    edit_peer,
    edit_router,
    remove_router,
)
from awan.engines.fabric.ovn_rows import NETWORK_KEY, ROLE_KEY, edit_localnet
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
    edit_localnet(tables, txn, switch, SERVICES_SWITCH, spec.physical_network, spec.vlan)
    return switch


def _edit_router(tables: Tables, txn: Any, spec: ResolverSpec) -> None:
    names = RouterNames.of_resolver(spec.switch)
    ids = {NETWORK_KEY: spec.switch, ROLE_KEY: ROLE}
    inner = f"{spec.inner}/{spec.cidr.prefixlen}"
    outer = f"{spec.outer}/{spec.services.cidr.prefixlen}"
    router = edit_router(tables, txn, names, (inner, outer), ids, spec.chassis)
    # Otherwise every router of the services network would hold a flow for every other one.
    set_columns(router, options={"dynamic_neigh_routers": "true"})
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
