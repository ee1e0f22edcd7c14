"""Firewalls of the simulated fabric: what they would do is kept as the lines that OVN would be told."""

from __future__ import annotations

from uuid import UUID

from awan.engines.fabric.acls import firewall_lines, group_lines, group_name, place_name
from awan.engines.fabric.firewall import (
    FirewallFacts,
    FirewallGroupFacts,
    FirewallGroupSpec,
    FirewallSpec,
)
from awan.engines.sim import SimStore

FIREWALL_DDL = """
CREATE TABLE IF NOT EXISTS sim.fabric_firewall (
    location text NOT NULL,
    firewall_id uuid NOT NULL,
    account_id uuid NOT NULL,
    revision bigint NOT NULL,
    apply_to_private boolean NOT NULL,
    group_ids uuid[] NOT NULL,
    lines text[] NOT NULL,
    PRIMARY KEY (location, firewall_id)
)"""
GROUP_DDL = """
CREATE TABLE IF NOT EXISTS sim.fabric_firewall_group (
    location text NOT NULL,
    group_id uuid NOT NULL,
    place bigint NOT NULL,
    revision bigint NOT NULL,
    lines text[] NOT NULL,
    PRIMARY KEY (location, group_id, place)
)"""
IS_GUARDED = (
    "(port.location, port.firewall_id) = (known.location, known.firewall_id)"
    " AND (known.apply_to_private OR NOT port.is_private)"
)


def ensure_firewall(store: SimStore, location: str, spec: FirewallSpec) -> bool:
    """The firewall and its groups as given, unless newer ones are there; whether anything was changed."""
    made = [_ensure_place(store, location, it, place) for place, it in enumerate(spec.groups)]
    changed = store.execute(
        "INSERT INTO sim.fabric_firewall AS known"
        "   (location, firewall_id, account_id, revision, apply_to_private, group_ids, lines)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s)"
        " ON CONFLICT (location, firewall_id) DO UPDATE SET account_id = excluded.account_id,"
        "   revision = excluded.revision, apply_to_private = excluded.apply_to_private,"
        "   group_ids = excluded.group_ids, lines = excluded.lines"
        " WHERE known.revision <= excluded.revision"
        "   AND (known.account_id, known.revision, known.apply_to_private, known.group_ids, known.lines)"
        "     <> (excluded.account_id, excluded.revision, excluded.apply_to_private,"
        "       excluded.group_ids, excluded.lines)",
        [
            location,
            spec.firewall_id,
            spec.account_id,
            spec.revision,
            spec.apply_to_private,
            [it.group_id for it in spec.groups],
            list(firewall_lines(spec)),
        ],
    )
    return changed > 0 or any(made)


def _ensure_place(store: SimStore, location: str, spec: FirewallGroupSpec, place: int) -> bool:
    changed = store.execute(
        "INSERT INTO sim.fabric_firewall_group AS known (location, group_id, place, revision, lines)"
        " VALUES (%s, %s, %s, %s, %s)"
        " ON CONFLICT (location, group_id, place) DO UPDATE SET revision = excluded.revision,"
        "   lines = excluded.lines"
        " WHERE known.revision <= excluded.revision"
        "   AND (known.revision, known.lines) <> (excluded.revision, excluded.lines)",
        [location, spec.group_id, place, spec.revision, list(group_lines(spec, place))],
    )
    return changed > 0


def ensure_group(store: SimStore, location: str, spec: FirewallGroupSpec) -> bool:
    """The group as given wherever firewalls have it, and nowhere else; whether anything was changed."""
    left = store.execute(
        "DELETE FROM sim.fabric_firewall_group AS known WHERE location = %s AND group_id = %s"
        " AND NOT EXISTS (SELECT FROM sim.fabric_firewall AS firewall"
        "   WHERE firewall.location = known.location"
        "     AND firewall.group_ids[known.place + 1] = known.group_id)",
        [location, spec.group_id],
    )
    places = store.fetch_all(
        "SELECT place FROM sim.fabric_firewall_group WHERE location = %s AND group_id = %s",
        [location, spec.group_id],
    )
    made = [_ensure_place(store, location, spec, row["place"]) for row in places]
    return left > 0 or any(made)


def ensure_group_absent(store: SimStore, location: str, group_id: UUID) -> None:
    """No such group."""
    store.execute(
        "DELETE FROM sim.fabric_firewall_group WHERE location = %s AND group_id = %s",
        [location, group_id],
    )


def chassis_of_group(store: SimStore, location: str, group_id: UUID) -> list[str]:
    """The nodes that have a port in the group."""
    rows = store.fetch_all(
        "SELECT DISTINCT chassis"  # noqa: S608 - no outside words
        " FROM sim.fabric_port AS port"
        f" JOIN sim.fabric_firewall AS known ON {IS_GUARDED}"
        " WHERE port.location = %s AND %s = ANY (known.group_ids) AND chassis IS NOT NULL"
        " ORDER BY chassis",
        [location, group_id],
    )
    return [row["chassis"] for row in rows]


def read_groups(store: SimStore, location: str) -> list[FirewallGroupFacts]:
    """All that there are, by name."""
    rows = store.fetch_all(
        "SELECT group_id, place, revision, lines,"  # noqa: S608 - no outside words
        " ARRAY(SELECT CAST(name AS uuid) FROM sim.fabric_port AS port"
        f"   JOIN sim.fabric_firewall AS known ON {IS_GUARDED}"
        "   WHERE known.location = it.location"
        "     AND known.group_ids[it.place + 1] = it.group_id ORDER BY 1) AS port_ids"
        " FROM sim.fabric_firewall_group AS it WHERE location = %s ORDER BY group_id, place",
        [location],
    )
    return [
        FirewallGroupFacts(
            name=place_name(row["group_id"], row["place"]),
            group_id=row["group_id"],
            place=row["place"],
            revision=row["revision"],
            lines=tuple(row["lines"]),
            port_ids=tuple(row["port_ids"]),
        )
        for row in rows
    ]


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
