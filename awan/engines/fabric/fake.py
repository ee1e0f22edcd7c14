"""The fabric without a network: the same contract on tables of the schema `sim`.

A simulated port has no guest behind it: `wait_port_up` finds it up as soon as it exists, and binds it to the chassis
it was waited for on. Chassis need no registration: one appears when it is first spoken of, and answers until a test
sends it away with `set_chassis_alive`.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from awan.engines.fabric import (
    APPLY_TIMEOUT_S,
    ChassisFacts,
    PortFacts,
    PortSpec,
    PublicNetworkSpec,
    fake_firewall,
)
from awan.engines.fabric.fake_prefixes import FakePrefixRouters
from awan.engines.fabric.fake_private import FakePrivateNetworks
from awan.engines.fabric.fake_rows import as_json
from awan.engines.fabric.firewall import (
    FirewallFacts,
    FirewallGroupFacts,
    FirewallGroupSpec,
    FirewallSpec,
)
from awan.engines.fabric.prefixes import PrefixRouterFacts, PrefixRouterSpec
from awan.engines.fabric.private import GatewaySpec, PrivateNetworkFacts, PrivateNetworkSpec
from awan.engines.fabric.resolvers import ResolverSpec
from awan.engines.sim import SimStore
from awan.errors import EngineRejected

ENGINE = "fabric"

NETWORK_DDL = """
CREATE TABLE IF NOT EXISTS sim.fabric_network (
    location text NOT NULL,
    switch text NOT NULL,
    spec jsonb NOT NULL,
    PRIMARY KEY (location, switch)
)"""
PORT_DDL = """
CREATE TABLE IF NOT EXISTS sim.fabric_port (
    location text NOT NULL,
    name text NOT NULL,
    switch text NOT NULL,
    address_line text NOT NULL,
    security_line text NOT NULL,
    hostname text NOT NULL,
    instance_id uuid,
    account_id uuid,
    operation_id uuid,
    firewall_id uuid,
    is_private boolean NOT NULL DEFAULT false,
    dhcp_families integer[] NOT NULL DEFAULT '{}',
    is_confined boolean NOT NULL DEFAULT true,
    is_up boolean NOT NULL DEFAULT false,
    chassis text,
    PRIMARY KEY (location, name)
)"""
READ_PORTS = (
    "SELECT port.*, known.firewall_id AS guarded_by"  # noqa: S608 - no outside words
    " FROM sim.fabric_port AS port"
    f" LEFT JOIN sim.fabric_firewall AS known ON {fake_firewall.IS_GUARDED}"
)
CHASSIS_DDL = """
CREATE TABLE IF NOT EXISTS sim.fabric_chassis (
    location text NOT NULL,
    system_id text NOT NULL,
    is_alive boolean NOT NULL DEFAULT true,
    PRIMARY KEY (location, system_id)
)"""


class FakeFabric:
    """One simulated location. Thread-safe; several processes may share it."""

    def __init__(self, store: SimStore, *, location: str = "default") -> None:
        self._store = store
        self._location = location
        for ddl in (
            NETWORK_DDL,
            PORT_DDL,
            CHASSIS_DDL,
            fake_firewall.FIREWALL_DDL,
            fake_firewall.GROUP_DDL,
        ):
            store.ensure_table(ddl)
        self._private = FakePrivateNetworks(store, location)
        self._prefixes = FakePrefixRouters(store, location)

    def ensure_public_network(self, spec: PublicNetworkSpec) -> bool:
        """See `Fabric`."""
        stored = {name: as_json(value) for name, value in vars(spec).items()}
        with self._store.call(ENGINE, "ensure_public_network", spec.switch):
            changed = self._store.execute(
                "INSERT INTO sim.fabric_network AS network (location, switch, spec)"
                " VALUES (%s, %s, %s)"
                " ON CONFLICT (location, switch) DO UPDATE SET spec = excluded.spec"
                " WHERE network.spec <> excluded.spec",
                [self._location, spec.switch, Jsonb(stored)],
            )
            return changed > 0

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
        return self._private.ensure_resolver(spec)

    def ensure_resolver_absent(self, switch: str) -> bool:
        """See `Resolvers`."""
        return self._private.ensure_resolver_absent(switch)

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
        """See `Fabric`."""
        call = f"ensure_port {spec.port_id}"
        with self._store.call(ENGINE, "ensure_port", str(spec.port_id)):
            if spec.firewall_id is not None and not fake_firewall.exists(
                self._store, self._location, spec.firewall_id
            ):
                raise EngineRejected(ENGINE, call, f"there is no firewall {spec.firewall_id}")
            stored = self._store.execute(
                "INSERT INTO sim.fabric_port AS port (location, name, switch, address_line,"
                "   security_line, hostname, dhcp_families, instance_id, account_id, operation_id,"
                "   firewall_id, is_private)"
                " SELECT location, %(name)s, switch, %(address_line)s,"
                "   %(security_line)s, %(hostname)s,"
                "   CASE WHEN spec ->> 'ipv6_cidr' IS NULL"
                "     THEN array_remove(%(families)s::integer[], 6) ELSE %(families)s END,"
                "   %(instance_id)s, %(account_id)s, %(operation_id)s, %(firewall_id)s,"
                "   %(is_private)s"
                " FROM sim.fabric_network"
                " WHERE location = %(location)s AND switch = %(switch)s"
                " ON CONFLICT (location, name) DO UPDATE SET switch = excluded.switch,"
                "   address_line = excluded.address_line, security_line = excluded.security_line,"
                "   hostname = excluded.hostname, dhcp_families = excluded.dhcp_families,"
                "   is_confined = true,"
                "   instance_id = excluded.instance_id, account_id = excluded.account_id,"
                "   operation_id = excluded.operation_id, firewall_id = excluded.firewall_id,"
                "   is_private = excluded.is_private",
                {
                    "location": self._location,
                    "name": str(spec.port_id),
                    "switch": spec.switch,
                    "address_line": spec.address_line,
                    "security_line": spec.security_line,
                    "hostname": spec.hostname,
                    "families": [
                        family
                        for family, address in ((4, spec.ipv4), (6, spec.ipv6))
                        if address is not None
                    ],
                    "instance_id": spec.instance_id,
                    "account_id": spec.account_id,
                    "operation_id": spec.operation_id,
                    "firewall_id": spec.firewall_id,
                    "is_private": spec.is_private,
                },
            )
            if not stored:
                raise EngineRejected(ENGINE, call, f"there is no network {spec.switch}")

    def ensure_port_absent(self, port_id: UUID) -> None:
        """See `Fabric`."""
        with self._store.call(ENGINE, "ensure_port_absent", str(port_id)):
            self._store.execute(
                "DELETE FROM sim.fabric_port WHERE location = %s AND name = %s",
                [self._location, str(port_id)],
            )

    def wait_applied(self, chassis: str, *, timeout_s: float = APPLY_TIMEOUT_S) -> bool:
        """See `Fabric`. Never sleeps: a chassis that is away does not come back by waiting."""
        with self._store.call(ENGINE, "wait_applied", chassis):
            return self._is_alive(chassis)

    def wait_port_up(self, port_id: UUID, chassis: str, *, timeout_s: float) -> bool:
        """See `Fabric`. Never sleeps: an absent port does not appear by waiting."""
        with self._store.call(ENGINE, "wait_port_up", str(port_id)):
            if not self._is_alive(chassis):
                return False
            found = self._store.execute(
                "UPDATE sim.fabric_port SET is_up = true, chassis = %s"
                " WHERE location = %s AND name = %s",
                [chassis, self._location, str(port_id)],
            )
            return found == 1

    def find_port(self, port_id: UUID) -> PortFacts | None:
        """See `Fabric`."""
        with self._store.call(ENGINE, "find_port", str(port_id)):
            row = self._store.find_one(
                f"{READ_PORTS} WHERE port.location = %s AND name = %s",
                [self._location, str(port_id)],
            )
            return None if row is None else _port_facts(row)

    def list_ports(self) -> list[PortFacts]:
        """See `Fabric`."""
        with self._store.call(ENGINE, "list_ports", self._location):
            rows = self._store.fetch_all(
                f'{READ_PORTS} WHERE port.location = %s ORDER BY name COLLATE "C"',
                [self._location],
            )
            return [_port_facts(row) for row in rows]

    def list_chassis(self) -> list[ChassisFacts]:
        """See `Fabric`."""
        with self._store.call(ENGINE, "list_chassis", self._location):
            rows = self._store.fetch_all(
                "SELECT system_id, is_alive FROM sim.fabric_chassis"
                ' WHERE location = %s ORDER BY system_id COLLATE "C"',
                [self._location],
            )
            return [
                ChassisFacts(
                    system_id=row["system_id"],
                    hostname=row["system_id"],
                    encap_ip="127.0.0.1",
                    nb_cfg=0,
                    is_alive=row["is_alive"],
                )
                for row in rows
            ]

    def ensure_firewall(self, spec: FirewallSpec) -> bool:
        """See `Firewalls`."""
        with self._store.call(ENGINE, "ensure_firewall", str(spec.firewall_id)):
            return fake_firewall.ensure_firewall(self._store, self._location, spec)

    def ensure_firewall_absent(self, firewall_id: UUID) -> None:
        """See `Firewalls`."""
        with self._store.call(ENGINE, "ensure_firewall_absent", str(firewall_id)):
            fake_firewall.ensure_firewall_absent(self._store, self._location, firewall_id)

    def wait_firewall_applied(
        self, firewall_id: UUID, *, timeout_s: float = APPLY_TIMEOUT_S
    ) -> bool:
        """See `Firewalls`. Never sleeps: a chassis that is away does not come back by waiting."""
        with self._store.call(ENGINE, "wait_firewall_applied", str(firewall_id)):
            chassis = fake_firewall.chassis_of(self._store, self._location, firewall_id)
            return all(self._is_alive(name) for name in chassis)

    def list_firewalls(self) -> list[FirewallFacts]:
        """See `Firewalls`."""
        with self._store.call(ENGINE, "list_firewalls", self._location):
            return fake_firewall.read_firewalls(self._store, self._location)

    def ensure_firewall_group(self, spec: FirewallGroupSpec) -> bool:
        """See `Firewalls`."""
        with self._store.call(ENGINE, "ensure_firewall_group", str(spec.group_id)):
            return fake_firewall.ensure_group(self._store, self._location, spec)

    def ensure_firewall_group_absent(self, group_id: UUID) -> None:
        """See `Firewalls`."""
        with self._store.call(ENGINE, "ensure_firewall_group_absent", str(group_id)):
            fake_firewall.ensure_group_absent(self._store, self._location, group_id)

    def wait_firewall_group_applied(
        self, group_id: UUID, *, timeout_s: float = APPLY_TIMEOUT_S
    ) -> bool:
        """See `Firewalls`. Never sleeps: a chassis that is away does not come back by waiting."""
        with self._store.call(ENGINE, "wait_firewall_group_applied", str(group_id)):
            chassis = fake_firewall.chassis_of_group(self._store, self._location, group_id)
            return all(self._is_alive(name) for name in chassis)

    def list_firewall_groups(self) -> list[FirewallGroupFacts]:
        """See `Firewalls`."""
        with self._store.call(ENGINE, "list_firewall_groups", self._location):
            return fake_firewall.read_groups(self._store, self._location)

    def close(self) -> None:
        """See `Fabric`. The store belongs to whoever opened it."""

    def set_chassis_alive(self, system_id: str, *, is_alive: bool) -> None:
        """A node registers or comes back, or falls silent. Not part of the contract."""
        self._store.execute(
            "INSERT INTO sim.fabric_chassis (location, system_id, is_alive) VALUES (%s, %s, %s)"
            " ON CONFLICT (location, system_id) DO UPDATE SET is_alive = excluded.is_alive",
            [self._location, system_id, is_alive],
        )

    def forget_dhcp(self, port_id: UUID) -> None:
        """Somebody removes the port's reservations. Not part of the contract."""
        self._store.execute(
            "UPDATE sim.fabric_port SET dhcp_families = '{}' WHERE location = %s AND name = %s",
            [self._location, str(port_id)],
        )

    def _is_alive(self, chassis: str) -> bool:
        self._store.execute(
            "INSERT INTO sim.fabric_chassis (location, system_id) VALUES (%s, %s)"
            " ON CONFLICT DO NOTHING",
            [self._location, chassis],
        )
        row = self._store.find_one(
            "SELECT is_alive FROM sim.fabric_chassis WHERE location = %s AND system_id = %s",
            [self._location, chassis],
        )
        return row is not None and row["is_alive"]


def _port_facts(row: dict[str, Any]) -> PortFacts:
    return PortFacts(
        name=row["name"],
        switch=row["switch"],
        port_id=None if row["instance_id"] is None else UUID(row["name"]),
        instance_id=row["instance_id"],
        addresses=(row["address_line"],),
        port_security=(row["security_line"],),
        is_up=row["is_up"],
        chassis=row["chassis"],
        dhcp_families=tuple(row["dhcp_families"]),
        is_confined=row["is_confined"],
        firewall_ids=() if row["guarded_by"] is None else (row["guarded_by"],),
    )
