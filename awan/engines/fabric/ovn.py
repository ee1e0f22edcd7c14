"""The fabric on OVN: rows of the northbound database, waits on the southbound one.

| concept          | OVN                                                                              |
| ---------------- | -------------------------------------------------------------------------------- |
| public network   | Logical_Switch + Logical_Switch_Port of type localnet                            |
| addresses        | one DHCP_Options row per family; the reservation is the port's `addresses`        |
| private network  | see `ovn_private`                                                                 |
| tenant port      | Logical_Switch_Port named by its uuid, `port_security` = its own addresses        |
| tenants          | Port_Group `tenants_<switch>` carrying the ACLs that no tenant can get around     |
| firewall         | Port_Group `fw_<uuid>`, its ACLs and Address_Sets: see `acls`                     |
| firewall group   | Port_Group `fwg_<uuid>_<place>` for each place it has among those of firewalls    |
| "it is in force" | `Chassis_Private.nb_cfg` of the node has reached `NB_Global.nb_cfg`               |

Source: ovn-nb(5), ovn-sb(5) of OVN 23.03.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import UUID

from awan.engines.fabric import (
    APPLY_TIMEOUT_S,
    ChassisFacts,
    PortFacts,
    PortSpec,
    PublicNetworkSpec,
    ovn_private,
)
from awan.engines.fabric.firewall import (
    FirewallFacts,
    FirewallGroupFacts,
    FirewallGroupSpec,
    FirewallSpec,
)
from awan.engines.fabric.ovn_firewall import (
    FIREWALL_KEY,
    SIDE_KEY,
    edit_firewall,
    edit_firewall_absent,
    firewalls_by_port,
    join_firewall,
    named_places,
    port_names,
    read_firewalls,
)
from awan.engines.fabric.ovn_firewall_groups import (
    edit_group,
    edit_group_absent,
    group_port_names,
    read_groups,
)
from awan.engines.fabric.ovn_prefixes import OvnPrefixRouters
from awan.engines.fabric.ovn_private import OvnPrivateNetworks
from awan.engines.fabric.ovn_resolvers import OvnResolvers
from awan.engines.fabric.ovn_rows import (
    ACCOUNT_KEY,
    INSTANCE_KEY,
    NETWORK_KEY,
    OPERATION_KEY,
    ROLE_KEY,
    as_set,
    dhcp_of,
    edit_dhcp,
    edit_localnet,
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
    refers_to,
    set_columns,
)
from awan.engines.fabric.prefixes import PrefixRouterFacts, PrefixRouterSpec
from awan.engines.fabric.private import GatewaySpec, PrivateNetworkFacts, PrivateNetworkSpec
from awan.engines.fabric.resolvers import ResolverSpec
from awan.engines.fabric.tls import TlsKeys
from awan.errors import EngineRejected

CALL_TIMEOUT_S = 5.0
ALIVE_TIMEOUT_S = 2.0  # a chassis that confirms later than this counts as away
DHCP_LEASE_S = 3600  # how long a guest may keep an address that was changed while it ran

NORTHBOUND = {
    "NB_Global": ["nb_cfg"],
    "Logical_Switch": ["name", "ports", "external_ids"],
    "Logical_Switch_Port": [
        "name",
        "type",
        "tag",
        "options",
        "addresses",
        "port_security",
        "dhcpv4_options",
        "dhcpv6_options",
        "external_ids",
    ],
    "DHCP_Options": ["cidr", "options", "external_ids"],
    "Port_Group": ["name", "ports", "acls", "external_ids"],
    "ACL": ["name", "priority", "direction", "match", "action", "options", "external_ids"],
    **ovn_private.NORTHBOUND,
    "Address_Set": ["name", "addresses", "external_ids"],
}
SOUTHBOUND = {
    "SB_Global": ["nb_cfg"],
    "Chassis": ["name", "hostname", "encaps"],
    "Encap": ["type", "ip"],
    "Chassis_Private": ["name", "nb_cfg"],
    "Port_Binding": ["logical_port", "chassis", "up"],
}


class OvnFabric:
    """One location's OVN. Thread-safe; connects at the first call and reconnects by itself."""

    def __init__(
        self, nb: str, sb: str, *, keys: TlsKeys | None = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> None:
        """`nb` and `sb` are OVSDB remotes such as `ssl:192.0.2.1:6641`, several joined by commas.

        `keys` are for those over TLS. `timeout_s` bounds each transaction and each read.
        """
        self._nb = Database(
            nb,
            "OVN_Northbound",
            NORTHBOUND,
            root="NB_Global",
            indexes={
                "Logical_Switch": "name",
                "Logical_Switch_Port": "name",
                "Port_Group": "name",
                **ovn_private.INDEXES,
                "Address_Set": "name",
            },
            timeout_s=timeout_s,
            keys=keys,
        )
        self._sb = Database(
            sb,
            "OVN_Southbound",
            SOUTHBOUND,
            root="SB_Global",
            indexes={"Chassis_Private": "name", "Port_Binding": "logical_port"},
            timeout_s=timeout_s,
            keys=keys,
        )
        self._private = OvnPrivateNetworks(self._nb, self._sb)
        self._prefixes = OvnPrefixRouters(self._nb, self._sb)
        self._resolvers = OvnResolvers(self._nb)

    def ensure_public_network(self, spec: PublicNetworkSpec) -> bool:
        """See `Fabric`. Two callers at once make one network: OVN itself allows switches of equal name."""

        def edit(tables: Tables, txn: Any) -> None:
            # Every change of ours raises nb_cfg: if another one came first, look again.
            next(iter(tables["NB_Global"].rows.values())).verify("nb_cfg")
            switch = find_row(tables, "Logical_Switch", "name", spec.switch)
            if switch is None:
                switch = txn.insert(tables["Logical_Switch"])
                switch.name = spec.switch
            set_columns(switch, external_ids={NETWORK_KEY: spec.switch, ROLE_KEY: "public"})
            edit_localnet(tables, txn, switch, spec.switch, spec.physical_network, spec.vlan)
            edit_dhcp(tables, txn, spec.switch, "dhcpv4", dhcpv4_options(spec))
            edit_dhcp(tables, txn, spec.switch, "dhcpv6", dhcpv6_options(spec))
            edit_tenants(tables, txn, spec.switch, is_tracked=True)

        return self._nb.change(f"ensure_public_network {spec.switch}", edit)

    def ensure_private_network(self, spec: PrivateNetworkSpec) -> bool:
        """See `PrivateNetworks`."""
        return self._private.ensure_private_network(spec)

    def ensure_private_network_absent(self, switch: str) -> None:
        """See `PrivateNetworks`."""
        self._private.ensure_private_network_absent(switch)

    def ensure_gateway(self, spec: GatewaySpec) -> bool:
        """See `PrivateNetworks`."""
        return self._private.ensure_gateway(spec)

    def ensure_gateway_absent(self, switch: str) -> bool:
        """See `PrivateNetworks`."""
        return self._private.ensure_gateway_absent(switch)

    def wait_gateway_carried(self, switch: str, *, timeout_s: float) -> bool:
        """See `PrivateNetworks`."""
        return self._private.wait_gateway_carried(switch, timeout_s=timeout_s)

    def ensure_resolver(self, spec: ResolverSpec) -> bool:
        """See `Resolvers`."""
        return self._resolvers.ensure_resolver(spec)

    def ensure_resolver_absent(self, switch: str) -> bool:
        """See `Resolvers`."""
        return self._resolvers.ensure_resolver_absent(switch)

    def list_private_networks(self) -> list[PrivateNetworkFacts]:
        """See `PrivateNetworks`."""
        return self._private.list_private_networks()

    def ensure_prefix_router(self, spec: PrefixRouterSpec) -> bool:
        """See `PrefixRouters`."""
        return self._prefixes.ensure_prefix_router(spec)

    def ensure_prefix_router_absent(self, name: str) -> bool:
        """See `PrefixRouters`."""
        return self._prefixes.ensure_prefix_router_absent(name)

    def wait_prefix_router_carried(self, name: str, *, timeout_s: float) -> bool:
        """See `PrefixRouters`."""
        return self._prefixes.wait_prefix_router_carried(name, timeout_s=timeout_s)

    def list_prefix_routers(self) -> list[PrefixRouterFacts]:
        """See `PrefixRouters`."""
        return self._prefixes.list_prefix_routers()

    def ensure_port(self, spec: PortSpec) -> None:
        """See `Fabric`. A switch without its tenants' group does not count as one."""
        call = f"ensure_port {spec.port_id}"
        external_ids = {
            NETWORK_KEY: spec.switch,
            ROLE_KEY: "tenant",
            INSTANCE_KEY: str(spec.instance_id),
            ACCOUNT_KEY: str(spec.account_id),
            OPERATION_KEY: str(spec.operation_id),
            SIDE_KEY: "private" if spec.is_private else "public",
        }
        if spec.firewall_id is not None:
            external_ids[FIREWALL_KEY] = str(spec.firewall_id)

        def edit(tables: Tables, txn: Any) -> None:
            switch = find_row(tables, "Logical_Switch", "name", spec.switch)
            group = find_row(tables, "Port_Group", "name", tenants_group(spec.switch))
            if switch is None or group is None:
                raise EngineRejected(ENGINE, call, f"there is no network {spec.switch}")
            port = find_row(tables, "Logical_Switch_Port", "name", str(spec.port_id))
            is_new = port is None
            if port is None:
                port = txn.insert(tables["Logical_Switch_Port"])
                port.name = str(spec.port_id)
                options: dict[str, str] = {}
                homes: list[Row] = []
                is_member = False
            else:
                options = dict(port.options)
                homes = _switches_of(tables, port)
                is_member = refers_to(group, "ports", port)
            set_columns(
                port,
                type="",
                addresses=[spec.address_line],
                # OVN permits the link-local address by itself, but then drops its neighbour advertisements
                # (its rule expects a hop limit of 225): it must be listed.
                port_security=[spec.security_line],
                dhcpv4_options=dhcp_of(tables, spec.switch, spec.dhcpv4_role, spec.ipv4),
                dhcpv6_options=dhcp_of(tables, spec.switch, "dhcpv6", spec.ipv6),
                # Other keys of options (where a port may be bound) belong to other verbs.
                # Without its quotes the name is an expression that no node can parse: there would be no DHCP at all.
                options={**options, "hostname": f'"{spec.hostname}"'},
                external_ids=external_ids,
            )
            for other in homes:
                if other != switch:
                    other.delvalue("ports", port)
                    left = find_row(tables, "Port_Group", "name", tenants_group(other.name))
                    if left is not None:
                        left.delvalue("ports", port)
            if switch not in homes:
                switch.addvalue("ports", port)
            if not is_member:
                group.addvalue("ports", port)
            join_firewall(tables, call, port, spec.firewall_id, is_new=is_new)

        self._nb.change(call, edit)

    def ensure_port_absent(self, port_id: UUID) -> None:
        """See `Fabric`. The port leaves all port groups with its row: they hold weak references."""

        def edit(tables: Tables, txn: Any) -> None:
            port = find_row(tables, "Logical_Switch_Port", "name", str(port_id))
            if port is not None:
                for switch in _switches_of(tables, port):
                    switch.delvalue("ports", port)
                port.delete()

        self._nb.change(f"ensure_port_absent {port_id}", edit)

    def wait_applied(self, chassis: str, *, timeout_s: float = APPLY_TIMEOUT_S) -> bool:
        """See `Fabric`. A chassis that does not exist is waited for as well."""
        call = f"wait_applied {chassis}"
        wanted = self._nb.read(call, _nb_cfg)

        def has_applied(tables: Tables) -> bool:
            row = find_row(tables, "Chassis_Private", "name", chassis)
            return row is not None and row.nb_cfg >= wanted

        return self._sb.wait_for(call, has_applied, timeout_s=timeout_s)

    def wait_port_up(self, port_id: UUID, chassis: str, *, timeout_s: float) -> bool:
        """See `Fabric`."""

        def is_up(tables: Tables) -> bool:
            binding = find_row(tables, "Port_Binding", "logical_port", str(port_id))
            return binding is not None and binding.up == [True] and _claimed_by(binding) == chassis

        deadline = time.monotonic() + timeout_s
        if not self._sb.wait_for(f"wait_port_up {port_id}", is_up, timeout_s=timeout_s):
            return False
        return self.wait_applied(chassis, timeout_s=max(0.0, deadline - time.monotonic()))

    def find_port(self, port_id: UUID) -> PortFacts | None:
        """See `Fabric`."""
        call = f"find_port {port_id}"

        def look(tables: Tables) -> _NorthPort | None:
            row = find_row(tables, "Logical_Switch_Port", "name", str(port_id))
            if row is None or row.type:
                return None
            switch = next((switch.name for switch in _switches_of(tables, row)), "")
            group = find_row(tables, "Port_Group", "name", tenants_group(switch))
            return _NorthPort.of(
                row,
                switch,
                is_confined=group is not None and refers_to(group, "ports", row),
                firewall_ids=firewalls_by_port(tables).get(row.uuid, ()),
            )

        port = self._nb.read(call, look)
        if port is None:
            return None

        def look_binding(tables: Tables) -> tuple[bool, str | None]:
            binding = find_row(tables, "Port_Binding", "logical_port", str(port_id))
            return (False, None) if binding is None else _binding_state(binding)

        return port.facts(*self._sb.read(call, look_binding))

    def list_ports(self) -> list[PortFacts]:
        """See `Fabric`."""
        ports = self._nb.read("list_ports", _tenant_ports)
        bindings = self._sb.read(
            "list_ports",
            lambda tables: {
                row.logical_port: _binding_state(row)
                for row in tables["Port_Binding"].rows.values()
            },
        )
        ports.sort(key=lambda port: port.name)
        return [port.facts(*bindings.get(port.name, (False, None))) for port in ports]

    def list_chassis(self) -> list[ChassisFacts]:
        """See `Fabric`. Takes up to ALIVE_TIMEOUT_S when a chassis is away."""
        call = "list_chassis"
        wanted = self._nb.read(call, _nb_cfg)
        self._sb.wait_for(
            call,
            lambda tables: all(
                row.nb_cfg >= wanted for row in tables["Chassis_Private"].rows.values()
            ),
            timeout_s=ALIVE_TIMEOUT_S,
        )

        def look(tables: Tables) -> list[ChassisFacts]:
            confirmed = {row.name: row.nb_cfg for row in tables["Chassis_Private"].rows.values()}
            return [
                ChassisFacts(
                    system_id=row.name,
                    hostname=row.hostname,
                    encap_ip=min((encap.ip for encap in row.encaps), default=""),
                    nb_cfg=confirmed.get(row.name, 0),
                    is_alive=row.name in confirmed and confirmed[row.name] >= wanted,
                )
                for row in sorted(tables["Chassis"].rows.values(), key=lambda row: row.name)
            ]

        return self._sb.read(call, look)

    def ensure_firewall(self, spec: FirewallSpec) -> bool:
        """See `Firewalls`."""
        return self._nb.change(
            f"ensure_firewall {spec.firewall_id}",
            lambda tables, txn: edit_firewall(tables, txn, spec),
        )

    def ensure_firewall_absent(self, firewall_id: UUID) -> None:
        """See `Firewalls`."""
        self._nb.change(
            f"ensure_firewall_absent {firewall_id}",
            lambda tables, _txn: edit_firewall_absent(tables, firewall_id),
        )

    def wait_firewall_applied(
        self, firewall_id: UUID, *, timeout_s: float = APPLY_TIMEOUT_S
    ) -> bool:
        """See `Firewalls`."""
        return self._wait_ports_applied(
            f"wait_firewall_applied {firewall_id}",
            lambda tables: port_names(tables, firewall_id),
            timeout_s,
        )

    def list_firewalls(self) -> list[FirewallFacts]:
        """See `Firewalls`."""
        return self._nb.read("list_firewalls", read_firewalls)

    def ensure_firewall_group(self, spec: FirewallGroupSpec) -> bool:
        """See `Firewalls`."""
        return self._nb.change(
            f"ensure_firewall_group {spec.group_id}",
            lambda tables, txn: edit_group(tables, txn, spec, named_places(tables, spec.group_id)),
        )

    def ensure_firewall_group_absent(self, group_id: UUID) -> None:
        """See `Firewalls`."""
        self._nb.change(
            f"ensure_firewall_group_absent {group_id}",
            lambda tables, _txn: edit_group_absent(tables, group_id),
        )

    def wait_firewall_group_applied(
        self, group_id: UUID, *, timeout_s: float = APPLY_TIMEOUT_S
    ) -> bool:
        """See `Firewalls`."""
        return self._wait_ports_applied(
            f"wait_firewall_group_applied {group_id}",
            lambda tables: group_port_names(tables, group_id),
            timeout_s,
        )

    def list_firewall_groups(self) -> list[FirewallGroupFacts]:
        """See `Firewalls`."""
        return self._nb.read("list_firewall_groups", read_groups)

    def close(self) -> None:
        """See `Fabric`."""
        self._nb.close()
        self._sb.close()

    def _wait_ports_applied(
        self, call: str, find_names: Callable[[Tables], list[str]], timeout_s: float
    ) -> bool:
        """Waits until the nodes of these ports have everything committed so far; False after `timeout_s`."""
        wanted, names = self._nb.read(call, lambda tables: (_nb_cfg(tables), find_names(tables)))

        def has_applied(tables: Tables) -> bool:
            bindings = [find_row(tables, "Port_Binding", "logical_port", name) for name in names]
            chassis = {_claimed_by(binding) for binding in bindings if binding is not None}
            rows = [
                find_row(tables, "Chassis_Private", "name", name)
                for name in chassis
                if name is not None
            ]
            return all(row is not None and row.nb_cfg >= wanted for row in rows)

        return not names or self._sb.wait_for(call, has_applied, timeout_s=timeout_s)


def dhcpv4_options(spec: PublicNetworkSpec) -> tuple[str, dict[str, str]]:
    """CIDR and options of the DHCPv4 answers. The netmask is OVN's own addition.

    The gateway's address serves as the server's identity; OVN answers in its place on every node.
    """
    options = {
        "router": str(spec.ipv4_gateway),
        "server_id": str(spec.ipv4_gateway),
        "server_mac": server_mac(spec.switch),
        "lease_time": str(DHCP_LEASE_S),
        "mtu": str(spec.mtu),
    }
    servers = [server for server in spec.dns_servers if isinstance(server, IPv4Address)]
    if servers:
        options["dns_server"] = as_set(servers)
    return str(spec.ipv4_cidr), options


def dhcpv6_options(spec: PublicNetworkSpec) -> tuple[str, dict[str, str]] | None:
    """CIDR and options of the DHCPv6 answers; None without IPv6. Gateway and MTU come by router advertisement."""
    if spec.ipv6_cidr is None:
        return None
    options = {"server_id": server_mac(spec.switch)}
    servers = [server for server in spec.dns_servers if isinstance(server, IPv6Address)]
    if servers:
        options["dns_server"] = as_set(servers)
    return str(spec.ipv6_cidr), options


@dataclass(frozen=True)
class _NorthPort:
    """What the northbound database knows of a port."""

    name: str
    switch: str
    external_ids: Mapping[str, str]
    addresses: tuple[str, ...]
    port_security: tuple[str, ...]
    dhcp_families: tuple[int, ...]
    is_confined: bool
    firewall_ids: tuple[UUID, ...]

    @classmethod
    def of(
        cls, row: Row, switch: str, *, is_confined: bool, firewall_ids: tuple[UUID, ...]
    ) -> _NorthPort:
        return cls(
            name=row.name,
            switch=switch,
            external_ids=dict(row.external_ids),
            addresses=tuple(row.addresses),
            port_security=tuple(row.port_security),
            # A reference to options that were deleted is gone with them: it is a weak one.
            dhcp_families=tuple(
                family for family in (4, 6) if referenced(row, f"dhcpv{family}_options")
            ),
            is_confined=is_confined,
            firewall_ids=firewall_ids,
        )

    def facts(self, is_up: bool, chassis: str | None) -> PortFacts:
        is_ours = INSTANCE_KEY in self.external_ids
        return PortFacts(
            name=self.name,
            switch=self.switch,
            port_id=_as_uuid(self.name) if is_ours else None,
            instance_id=_as_uuid(self.external_ids.get(INSTANCE_KEY, "")),
            addresses=self.addresses,
            port_security=self.port_security,
            is_up=is_up,
            chassis=chassis,
            dhcp_families=self.dhcp_families,
            is_confined=self.is_confined,
            firewall_ids=self.firewall_ids,
        )


def _switches_of(tables: Tables, port: Row) -> list[Row]:
    """The switches that a stored port belongs to: one, unless someone has tampered with it."""
    return [row for row in tables["Logical_Switch"].rows.values() if refers_to(row, "ports", port)]


def _tenant_ports(tables: Tables) -> list[_NorthPort]:
    """All ports that a guest may hang on, in no order."""
    rows = tables["Logical_Switch_Port"].rows
    firewalls = firewalls_by_port(tables)
    found = []
    for switch in tables["Logical_Switch"].rows.values():
        group = find_row(tables, "Port_Group", "name", tenants_group(switch.name))
        confined = set(referenced(group, "ports")) if group is not None else set()
        found += [
            _NorthPort.of(
                rows[uuid],
                switch.name,
                is_confined=uuid in confined,
                firewall_ids=firewalls.get(uuid, ()),
            )
            for uuid in referenced(switch, "ports")
            if not rows[uuid].type
        ]
    return found


def _nb_cfg(tables: Tables) -> int:
    value: int = next(iter(tables["NB_Global"].rows.values())).nb_cfg
    return value


def _claimed_by(binding: Row) -> str | None:
    return binding.chassis[0].name if binding.chassis else None


def _binding_state(binding: Row) -> tuple[bool, str | None]:
    return binding.up == [True], _claimed_by(binding)


def _as_uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
