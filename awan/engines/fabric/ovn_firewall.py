"""Firewalls on OVN: one port group each, its ACLs, and two address sets for each of its sets.

The functions work on the rows of one transaction; `ovn.OvnFabric` runs them.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from awan.engines.fabric.acls import Acl, address_sets, group_name, lines_of, render
from awan.engines.fabric.firewall import FirewallFacts, FirewallSpec
from awan.engines.fabric.ovsdb import (
    ENGINE,
    Row,
    Tables,
    find_row,
    referenced,
    refers_to,
    set_columns,
)
from awan.errors import EngineRejected

FIREWALL_KEY = "awan:firewall"
FIREWALL_ACCOUNT_KEY = "awan:account"
REVISION_KEY = "awan:revision"
APPLY_TO_PRIVATE_KEY = "awan:apply_to_private"  # of a port group
SIDE_KEY = "awan:side"  # of a port: "private" or "public"
RULE_KEY = "awan:rule"


def edit_firewall(tables: Tables, txn: Any, spec: FirewallSpec) -> None:
    """The port group with exactly these rows and sets, unless a newer revision is there."""
    name = group_name(spec.firewall_id)
    group = find_row(tables, "Port_Group", "name", name)
    present: list[Row] = []
    was_private = group is not None and _applies_to_private(group)
    if group is None:
        # Of two that make it at once, one is refused by the index over names and looks again.
        group = txn.insert(tables["Port_Group"])
        group.name = name
    else:
        if _revision(group) > spec.revision:
            return
        # Whoever pushes another revision at this moment must win or lose as a whole.
        group.verify("external_ids")
        present = list(group.acls)
        for port_uuid in referenced(group, "ports"):
            port = tables["Logical_Switch_Port"].rows[port_uuid]
            if port.external_ids.get(FIREWALL_KEY) != str(spec.firewall_id):
                group.delvalue("ports", port)
    own = {FIREWALL_KEY: str(spec.firewall_id)}
    set_columns(
        group,
        external_ids={
            **own,
            FIREWALL_ACCOUNT_KEY: str(spec.account_id),
            REVISION_KEY: str(spec.revision),
            APPLY_TO_PRIVATE_KEY: "true" if spec.apply_to_private else "false",
        },
    )
    if spec.apply_to_private != was_private:
        _move_private_ports(tables, group, spec)
    _edit_sets(tables, txn, spec)
    known = {row.external_ids.get(RULE_KEY, ""): row for row in present}
    rows = []
    for acl in render(spec):
        row = known.get(acl.key)
        if row is None:
            row = txn.insert(tables["ACL"])
        set_columns(
            row,
            priority=acl.priority,
            direction=acl.direction,
            match=acl.match,
            action=acl.action,
            options={},
            external_ids={**own, RULE_KEY: acl.key},
        )
        rows.append(row)
    if {row.uuid for row in rows} != {row.uuid for row in present}:
        group.acls = rows


def _move_private_ports(tables: Tables, group: Row, spec: FirewallSpec) -> None:
    """The firewall's ports on private networks come into the group, or leave it."""
    # A port that is being made joins by what the group says: whoever comes second looks again.
    next(iter(tables["NB_Global"].rows.values())).verify("nb_cfg")
    for port in tables["Logical_Switch_Port"].rows.values():
        ids = port.external_ids
        if ids.get(FIREWALL_KEY) == str(spec.firewall_id) and ids.get(SIDE_KEY) == "private":
            (group.addvalue if spec.apply_to_private else group.delvalue)("ports", port)


def _edit_sets(tables: Tables, txn: Any, spec: FirewallSpec) -> None:
    wanted = address_sets(spec)
    for row in _sets_of(tables, spec.firewall_id):
        if row.name not in wanted:
            row.delete()
    for name, networks in wanted.items():
        row = find_row(tables, "Address_Set", "name", name)
        if row is None:
            row = txn.insert(tables["Address_Set"])
            row.name = name
            row.addresses = networks
        elif sorted(row.addresses) != sorted(networks):
            row.addresses = networks
        set_columns(row, external_ids={FIREWALL_KEY: str(spec.firewall_id)})


def edit_firewall_absent(tables: Tables, firewall_id: UUID) -> None:
    """Neither the port group nor a set of it. Its ACLs go with it: nothing else holds them."""
    group = find_row(tables, "Port_Group", "name", group_name(firewall_id))
    if group is not None:
        group.delete()
    for row in _sets_of(tables, firewall_id):
        row.delete()


def join_firewall(
    tables: Tables,
    call: str,
    port: Row,
    firewall_id: UUID | None,
    *,
    is_private: bool,
    is_new: bool,
) -> None:
    """The port is in this firewall, where that applies to it, and in no other.

    `is_new`: it is made by this very transaction, so it is in none yet.

    Raises: EngineRejected when the firewall does not exist.
    """
    wanted = None
    if firewall_id is not None:
        wanted = find_row(tables, "Port_Group", "name", group_name(firewall_id))
        if wanted is None:
            raise EngineRejected(ENGINE, call, f"there is no firewall {firewall_id}")
        if is_private:
            wanted.verify("external_ids")
            if not _applies_to_private(wanted):
                wanted = None
    is_member = False
    # A location has as many groups as instances: they are searched only where that can find something.
    for group in () if is_new else _groups(tables):
        if refers_to(group, "ports", port):
            if group == wanted:
                is_member = True
            else:
                group.delvalue("ports", port)
    if wanted is not None and not is_member:
        wanted.addvalue("ports", port)


def firewalls_by_port(tables: Tables) -> dict[UUID, tuple[UUID, ...]]:
    """Row of a port -> the firewalls it is in."""
    found: dict[UUID, tuple[UUID, ...]] = {}
    for group in _groups(tables):
        firewall_id = _firewall_id(group)
        if firewall_id is not None:
            for port_uuid in referenced(group, "ports"):
                found[port_uuid] = (*found.get(port_uuid, ()), firewall_id)
    return found


def port_names(tables: Tables, firewall_id: UUID) -> list[str]:
    """Names of the firewall's ports."""
    group = find_row(tables, "Port_Group", "name", group_name(firewall_id))
    if group is None:
        return []
    ports = tables["Logical_Switch_Port"].rows
    return [ports[uuid].name for uuid in referenced(group, "ports")]


def read_firewalls(tables: Tables) -> list[FirewallFacts]:
    """All that there are, by name."""
    ports = tables["Logical_Switch_Port"].rows
    sets: dict[str, dict[str, list[str]]] = {}
    for row in tables["Address_Set"].rows.values():
        owner = row.external_ids.get(FIREWALL_KEY)
        if owner is not None:
            sets.setdefault(owner, {})[row.name] = list(row.addresses)
    found = []
    for group in _groups(tables):
        rows = [Acl("", acl.priority, acl.direction, acl.match, acl.action) for acl in group.acls]
        members = [ports[uuid].name for uuid in referenced(group, "ports")]
        found.append(
            FirewallFacts(
                name=group.name,
                firewall_id=_firewall_id(group),
                revision=_revision(group),
                lines=lines_of(rows, sets.get(group.external_ids[FIREWALL_KEY], {})),
                port_ids=tuple(sorted(UUID(name) for name in members if _is_uuid(name))),
            )
        )
    return sorted(found, key=lambda facts: facts.name)


def _groups(tables: Tables) -> list[Row]:
    return [row for row in tables["Port_Group"].rows.values() if FIREWALL_KEY in row.external_ids]


def _sets_of(tables: Tables, firewall_id: UUID) -> list[Row]:
    prefix = f"{group_name(firewall_id)}_"
    return [row for row in tables["Address_Set"].rows.values() if row.name.startswith(prefix)]


def _applies_to_private(group: Row) -> bool:
    return bool(group.external_ids.get(APPLY_TO_PRIVATE_KEY) == "true")


def _revision(group: Row) -> int:
    text = group.external_ids.get(REVISION_KEY, "")
    return int(text) if text.isdecimal() else 0


def _firewall_id(group: Row) -> UUID | None:
    text = group.external_ids.get(FIREWALL_KEY, "")
    return UUID(text) if _is_uuid(text) and group.name == group_name(UUID(text)) else None


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True
