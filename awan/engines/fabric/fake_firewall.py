"""Firewalls of the simulated fabric: what they would do is kept as the lines that OVN would be told."""

from __future__ import annotations

from uuid import UUID

from awan.engines.fabric.acls import firewall_lines, group_name
from awan.engines.fabric.firewall import FirewallFacts, FirewallSpec
from awan.engines.sim import SimStore

FIREWALL_DDL = """
CREATE TABLE IF NOT EXISTS sim.fabric_firewall (
    location text NOT NULL,
    firewall_id uuid NOT NULL,
    account_id uuid NOT NULL,
    revision bigint NOT NULL,
    apply_to_private boolean NOT NULL,
    lines text[] NOT NULL,
    PRIMARY KEY (location, firewall_id)
)"""
IS_GUARDED = (
    "(port.location, port.firewall_id) = (known.location, known.firewall_id)"
    " AND (known.apply_to_private OR NOT port.is_private)"
)


def ensure_firewall(store: SimStore, location: str, spec: FirewallSpec) -> bool:
    """The firewall as given, unless a newer one is there; whether anything was changed."""
    changed = store.execute(
        "INSERT INTO sim.fabric_firewall AS known"
        "   (location, firewall_id, account_id, revision, apply_to_private, lines)"
        " VALUES (%s, %s, %s, %s, %s, %s)"
        " ON CONFLICT (location, firewall_id) DO UPDATE SET account_id = excluded.account_id,"
        "   revision = excluded.revision, apply_to_private = excluded.apply_to_private,"
        "   lines = excluded.lines"
        " WHERE known.revision <= excluded.revision"
        "   AND (known.account_id, known.revision, known.apply_to_private, known.lines)"
        "     <> (excluded.account_id, excluded.revision, excluded.apply_to_private, excluded.lines)",
        [
            location,
            spec.firewall_id,
            spec.account_id,
            spec.revision,
            spec.apply_to_private,
            list(firewall_lines(spec)),
        ],
    )
    return changed > 0


def ensure_firewall_absent(store: SimStore, location: str, firewall_id: UUID) -> None:
    """No such firewall, and no port in it."""
    store.execute(
        "DELETE FROM sim.fabric_firewall WHERE location = %s AND firewall_id = %s",
        [location, firewall_id],
    )
    store.execute(
        "UPDATE sim.fabric_port SET firewall_id = NULL WHERE location = %s AND firewall_id = %s",
        [location, firewall_id],
    )


def exists(store: SimStore, location: str, firewall_id: UUID) -> bool:
    """Whether there is such a firewall."""
    query = "SELECT 1 FROM sim.fabric_firewall WHERE location = %s AND firewall_id = %s"
    return store.find_one(query, [location, firewall_id]) is not None


def chassis_of(store: SimStore, location: str, firewall_id: UUID) -> list[str]:
    """The nodes that have a port of the firewall."""
    rows = store.fetch_all(
        "SELECT DISTINCT chassis"  # noqa: S608 - no outside words
        " FROM sim.fabric_port AS port"
        f" JOIN sim.fabric_firewall AS known ON {IS_GUARDED}"
        " WHERE port.location = %s AND port.firewall_id = %s AND chassis IS NOT NULL"
        " ORDER BY chassis",
        [location, firewall_id],
    )
    return [row["chassis"] for row in rows]


def read_firewalls(store: SimStore, location: str) -> list[FirewallFacts]:
    """All that there are, by name."""
    rows = store.fetch_all(
        "SELECT firewall_id, revision, lines,"  # noqa: S608 - no outside words
        " ARRAY(SELECT CAST(name AS uuid)"
        f"   FROM sim.fabric_port AS port WHERE {IS_GUARDED} ORDER BY 1) AS port_ids"
        " FROM sim.fabric_firewall AS known WHERE location = %s ORDER BY firewall_id",
        [location],
    )
    return [
        FirewallFacts(
            name=group_name(row["firewall_id"]),
            firewall_id=row["firewall_id"],
            revision=row["revision"],
            lines=tuple(row["lines"]),
            port_ids=tuple(row["port_ids"]),
        )
        for row in rows
    ]
