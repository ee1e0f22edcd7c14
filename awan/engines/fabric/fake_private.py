"""Private networks without a network: rows beside those of the public ones, in the schema `sim`.

A gateway is carried by the first of its chassis that is alive.
"""

from __future__ import annotations

from typing import Any, LiteralString

from psycopg.types.json import Jsonb

from awan.engines.fabric.fake_rows import ENGINE, as_fields, require_network, silent_chassis
from awan.engines.fabric.private import GatewaySpec, PrivateNetworkFacts, PrivateNetworkSpec
from awan.engines.fabric.resolvers import ResolverSpec
from awan.engines.sim import SimStore

GATEWAY_DDL: LiteralString = """
CREATE TABLE IF NOT EXISTS sim.fabric_gateway (
    location text NOT NULL,
    switch text NOT NULL,
    spec jsonb NOT NULL,
    PRIMARY KEY (location, switch)
)"""
RESOLVER_DDL: LiteralString = """
CREATE TABLE IF NOT EXISTS sim.fabric_resolver (
    location text NOT NULL,
    switch text NOT NULL,
    spec jsonb NOT NULL,
    PRIMARY KEY (location, switch)
)"""


class FakePrivateNetworks:
    """`PrivateNetworks` and `Resolvers` on tables; the networks share `sim.fabric_network` with the public ones."""

    def __init__(self, store: SimStore, location: str) -> None:
        self._store = store
        self._location = location
        store.ensure_table(GATEWAY_DDL)
        store.ensure_table(RESOLVER_DDL)

    def ensure_private_network(self, spec: PrivateNetworkSpec) -> bool:
        """See `PrivateNetworks`."""
        with self._store.call(ENGINE, "ensure_private_network", spec.switch):
            changed = self._store.execute(
                "INSERT INTO sim.fabric_network AS network (location, switch, spec)"
                " VALUES (%s, %s, %s)"
                " ON CONFLICT (location, switch) DO UPDATE SET spec = excluded.spec"
                " WHERE network.spec <> excluded.spec",
                [self._location, spec.switch, Jsonb({"is_private": True, **as_fields(spec)})],
            )
            return changed > 0

    def ensure_private_network_absent(self, switch: str) -> None:
        """See `PrivateNetworks`."""
        with self._store.call(ENGINE, "ensure_private_network_absent", switch):
            queries: tuple[LiteralString, ...] = (
                "DELETE FROM sim.fabric_gateway WHERE location = %s AND switch = %s",
                "DELETE FROM sim.fabric_resolver WHERE location = %s AND switch = %s",
                "DELETE FROM sim.fabric_port WHERE location = %s AND switch = %s",
                "DELETE FROM sim.fabric_network WHERE location = %s AND switch = %s",
            )
            for query in queries:
                self._store.execute(query, [self._location, switch])

    def ensure_gateway(self, spec: GatewaySpec) -> bool:
        """See `PrivateNetworks`."""
        switch = spec.network.switch
        with self._store.call(ENGINE, "ensure_gateway", switch):
            for name in (switch, spec.public_switch):
                require_network(self._store, self._location, name, f"ensure_gateway {switch}")
            changed = self._store.execute(
                "INSERT INTO sim.fabric_gateway AS gateway (location, switch, spec)"
                " VALUES (%s, %s, %s)"
                " ON CONFLICT (location, switch) DO UPDATE SET spec = excluded.spec"
                " WHERE gateway.spec <> excluded.spec",
                [self._location, switch, Jsonb(as_fields(spec))],
            )
            return changed > 0

    def ensure_gateway_absent(self, switch: str) -> bool:
        """See `PrivateNetworks`."""
        with self._store.call(ENGINE, "ensure_gateway_absent", switch):
            changed = self._store.execute(
                "DELETE FROM sim.fabric_gateway WHERE location = %s AND switch = %s",
                [self._location, switch],
            )
            return changed > 0

    def wait_gateway_carried(self, switch: str, *, timeout_s: float) -> bool:
        """See `PrivateNetworks`. Never sleeps: a chassis that is away does not come back by waiting."""
        found = self.list_private_networks()
        return any(it.switch == switch and it.active_chassis is not None for it in found)

    def ensure_resolver(self, spec: ResolverSpec) -> bool:
        """See `Resolvers`. The services network has no row here."""
        with self._store.call(ENGINE, "ensure_resolver", spec.switch):
            call = f"ensure_resolver {spec.switch}"
            require_network(self._store, self._location, spec.switch, call)
            changed = self._store.execute(
                "INSERT INTO sim.fabric_resolver AS resolver (location, switch, spec)"
                " VALUES (%s, %s, %s)"
                " ON CONFLICT (location, switch) DO UPDATE SET spec = excluded.spec"
                " WHERE resolver.spec <> excluded.spec",
                [self._location, spec.switch, Jsonb(as_fields(spec))],
            )
            return changed > 0

    def ensure_resolver_absent(self, switch: str) -> bool:
        """See `Resolvers`."""
        with self._store.call(ENGINE, "ensure_resolver_absent", switch):
            changed = self._store.execute(
                "DELETE FROM sim.fabric_resolver WHERE location = %s AND switch = %s",
                [self._location, switch],
            )
            return changed > 0

    def list_private_networks(self) -> list[PrivateNetworkFacts]:
        """See `PrivateNetworks`."""
        with self._store.call(ENGINE, "list_private_networks", self._location):
            rows = self._store.fetch_all(
                "SELECT network.switch, gateway.spec AS gateway, resolver.spec AS resolver"
                " FROM sim.fabric_network AS network"
                " LEFT JOIN sim.fabric_gateway AS gateway USING (location, switch)"
                " LEFT JOIN sim.fabric_resolver AS resolver USING (location, switch)"
                " WHERE location = %s AND network.spec ->> 'is_private' = 'true'"
                ' ORDER BY network.switch COLLATE "C"',
                [self._location],
            )
            away = silent_chassis(self._store, self._location)
        return [
            PrivateNetworkFacts(
                row["switch"],
                public_ip=row["gateway"]["public_ip"] if row["gateway"] else None,
                active_chassis=_carrier(row["gateway"], away),
                service_ip=row["resolver"]["outer"] if row["resolver"] else None,
                resolver_chassis=_carrier(row["resolver"], away),
            )
            for row in rows
        ]


def _carrier(spec: dict[str, Any] | None, away: set[str]) -> str | None:
    """The first chassis of a router that is alive."""
    return next((it for it in spec["chassis"] if it not in away), None) if spec else None
