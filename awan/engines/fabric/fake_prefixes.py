"""Routed IPv6 prefixes without a network: rows in the schema `sim`. A router is carried by the first living chassis."""

from __future__ import annotations

from typing import LiteralString

from psycopg.types.json import Jsonb

from awan.engines.fabric.fake_rows import ENGINE, as_fields, require_network, silent_chassis
from awan.engines.fabric.prefixes import PrefixRouterFacts, PrefixRouterSpec
from awan.engines.sim import SimStore

ROUTER_DDL: LiteralString = """
CREATE TABLE IF NOT EXISTS sim.fabric_prefix_router (
    location text NOT NULL,
    name text NOT NULL,
    spec jsonb NOT NULL,
    PRIMARY KEY (location, name)
)"""


class FakePrefixRouters:
    """`PrefixRouters` on a table."""

    def __init__(self, store: SimStore, location: str) -> None:
        self._store = store
        self._location = location
        store.ensure_table(ROUTER_DDL)

    def ensure_prefix_router(self, spec: PrefixRouterSpec) -> bool:
        """See `PrefixRouters`."""
        with self._store.call(ENGINE, "ensure_prefix_router", spec.name):
            call = f"ensure_prefix_router {spec.name}"
            require_network(self._store, self._location, spec.public_switch, call)
            changed = self._store.execute(
                "INSERT INTO sim.fabric_prefix_router AS router (location, name, spec)"
                " VALUES (%s, %s, %s)"
                " ON CONFLICT (location, name) DO UPDATE SET spec = excluded.spec"
                " WHERE router.spec <> excluded.spec",
                [self._location, spec.name, Jsonb(as_fields(spec))],
            )
            return changed > 0

    def ensure_prefix_router_absent(self, name: str) -> bool:
        """See `PrefixRouters`."""
        with self._store.call(ENGINE, "ensure_prefix_router_absent", name):
            changed = self._store.execute(
                "DELETE FROM sim.fabric_prefix_router WHERE location = %s AND name = %s",
                [self._location, name],
            )
            return changed > 0

    def wait_prefix_router_carried(self, name: str, *, timeout_s: float) -> bool:
        """See `PrefixRouters`. Never sleeps: a chassis that is away does not come back by waiting."""
        found = self.list_prefix_routers()
        return any(it.name == name and it.active_chassis is not None for it in found)

    def list_prefix_routers(self) -> list[PrefixRouterFacts]:
        """See `PrefixRouters`."""
        with self._store.call(ENGINE, "list_prefix_routers", self._location):
            rows = self._store.fetch_all(
                "SELECT name, spec FROM sim.fabric_prefix_router WHERE location = %s"
                ' ORDER BY name COLLATE "C"',
                [self._location],
            )
            away = silent_chassis(self._store, self._location)
        return [
            PrefixRouterFacts(
                name=row["name"],
                address=row["spec"]["address"],
                routes=tuple(
                    sorted((it["prefix"], it["next_hop"]) for it in row["spec"]["routes"])
                ),
                active_chassis=next((it for it in row["spec"]["chassis"] if it not in away), None),
            )
            for row in rows
        ]
