"""Firewalls on OVN: one port group each, its ACLs, and two address sets for each of its sets.

The functions work on the rows of one transaction; `ovn.OvnFabric` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from awan.engines.fabric.acls import Acl, address_sets, group_name, lines_of, place_name, render
from awan.engines.fabric.firewall import FirewallFacts, FirewallSpec
from awan.engines.fabric.ovn_firewall_groups import (
    REVISION_KEY,
    edit_acls,
    edit_place,
    is_uuid,
    places,
    port_ids_of,
    revision_of,
)
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
# Of a firewall's port group: what `_Reach` says.
APPLY_TO_PRIVATE_KEY = "awan:apply_to_private"
GROUPS_KEY = "awan:groups"
SIDE_KEY = "awan:side"  # of a port: "private" or "public"


def edit_firewall(tables: Tables, txn: Any, spec: FirewallSpec) -> None:
    """The port group with exactly these rows and sets, and its ports in its groups, unless a newer one is there."""
    name = group_name(spec.firewall_id)
    group = find_row(tables, "Port_Group", "name", name)
    present: list[Row] = []
    before = _Reach() if group is None else _Reach.of(group)
    if group is None:
        # Of two that make it at once, one is refused by the index over names and looks again.
        group = txn.insert(tables["Port_Group"])
        group.name = name
    else:
        if revision_of(group) > spec.revision:
            return
        # Whoever pushes another revision at this moment must win or lose as a whole.
        group.verify("external_ids")
        present = list(group.acls)
        for port_uuid in referenced(group, "ports"):
            port = tables["Logical_Switch_Port"].rows[port_uuid]
            if port.external_ids.get(FIREWALL_KEY) != str(spec.firewall_id):
                group.delvalue("ports", port)
    own = {FIREWALL_KEY: str(spec.firewall_id)}
    reach = _Reach(spec.apply_to_private, tuple(str(it.group_id) for it in spec.groups))
    set_columns(
        group,
        external_ids={
            **own,
            FIREWALL_ACCOUNT_KEY: str(spec.account_id),
            REVISION_KEY: str(spec.revision),
            **reach.external_ids,
        },
    )
    made = [edit_place(tables, txn, it, place) for place, it in enumerate(spec.groups)]
    if reach != before or any(is_new for _, is_new in made):
        # A port that is being made joins by what the group says: whoever comes second looks again.
        next(iter(tables["NB_Global"].rows.values())).verify("nb_cfg")
        for port in tables["Logical_Switch_Port"].rows.values():
            if port.external_ids.get(FIREWALL_KEY) == str(spec.firewall_id):
                wanted = [group, *(row for row, _ in made)]
                _join(tables, port, wanted if reach.holds(port) else [])
    _edit_sets(tables, txn, spec)
    edit_acls(tables, txn, group, present, render(spec), own)


@dataclass(frozen=True)
class _Reach:
    """What a firewall's port group says of its ports: whether private ones are in it, and in which groups all are."""

    applies_to_private: bool = False
    groups: tuple[str, ...] = ()

    @classmethod
    def of(cls, group: Row) -> _Reach:
        ids = group.external_ids
        return cls(ids.get(APPLY_TO_PRIVATE_KEY) == "true", tuple(ids.get(GROUPS_KEY, "").split()))

    @property
    def external_ids(self) -> dict[str, str]:
        """As the port group has it."""
        return {
            APPLY_TO_PRIVATE_KEY: "true" if self.applies_to_private else "false",
            GROUPS_KEY: " ".join(self.groups),
        }

    def holds(self, port: Row) -> bool:
        """Whether a port of the firewall's instance is in it."""
        return self.applies_to_private or port.external_ids.get(SIDE_KEY) != "private"

    def places(self, tables: Tables) -> list[Row]:
        """The port groups of its groups, as far as they are there."""
        names = [place_name(UUID(text), place) for place, text in enumerate(self.groups)]
        found = [find_row(tables, "Port_Group", "name", name) for name in names]
        return [row for row in found if row is not None]


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
    tables: Tables, call: str, port: Row, firewall_id: UUID | None, *, is_new: bool
) -> None:
    """The port, its columns set, is in this firewall and its groups, where they apply, and in no others.

    `is_new`: it is made by this very transaction, so it is in none yet.
    Raises: EngineRejected when the firewall does not exist.
    """
    wanted: list[Row] = []
    if firewall_id is not None:
        group = find_row(tables, "Port_Group", "name", group_name(firewall_id))
        if group is None:
            raise EngineRejected(ENGINE, call, f"there is no firewall {firewall_id}")
        group.verify("external_ids")
        reach = _Reach.of(group)
        if reach.holds(port):
            wanted = [group, *reach.places(tables)]
    _join(tables, port, wanted, is_new=is_new)


def _join(tables: Tables, port: Row, wanted: list[Row], *, is_new: bool = False) -> None:
    """The port is in these port groups of firewalls and groups, and in no others of them."""
    ids = {group.uuid for group in wanted}
    for group in wanted:
        if not refers_to(group, "ports", port):
            group.addvalue("ports", port)
    # A location has as many groups as instances: they are searched only where that can find something.
    for group in () if is_new else (*_groups(tables), *places(tables)):
        if group.uuid not in ids and refers_to(group, "ports", port):
            group.delvalue("ports", port)


def firewalls_by_port(tables: Tables) -> dict[UUID, tuple[UUID, ...]]:
    """Row of a port -> the firewalls it is in."""
    found: dict[UUID, tuple[UUID, ...]] = {}
    for group in _groups(tables):
        firewall_id = _firewall_id(group)
        if firewall_id is not None:
            for port_uuid in referenced(group, "ports"):
                found[port_uuid] = (*found.get(port_uuid, ()), firewall_id)
    return found


def named_places(tables: Tables, group_id: UUID) -> set[str]:
    """The port groups of a group that firewalls name."""
    return {
        place_name(group_id, place)
        for group in _groups(tables)
        for place, text in enumerate(_Reach.of(group).groups)
        if text == str(group_id)
    }


def port_names(tables: Tables, firewall_id: UUID) -> list[str]:
    """Names of the firewall's ports."""
    group = find_row(tables, "Port_Group", "name", group_name(firewall_id))
    if group is None:
        return []
    ports = tables["Logical_Switch_Port"].rows
    return [ports[uuid].name for uuid in referenced(group, "ports")]


def read_firewalls(tables: Tables) -> list[FirewallFacts]:
    """All that there are, by name."""
    sets: dict[str, dict[str, list[str]]] = {}
    for row in tables["Address_Set"].rows.values():
        owner = row.external_ids.get(FIREWALL_KEY)
        if owner is not None:
            sets.setdefault(owner, {})[row.name] = list(row.addresses)
    found = []
    for group in _groups(tables):
        rows = [Acl("", acl.priority, acl.direction, acl.match, acl.action) for acl in group.acls]
        found.append(
            FirewallFacts(
                name=group.name,
                firewall_id=_firewall_id(group),
                revision=revision_of(group),
                lines=lines_of(rows, sets.get(group.external_ids[FIREWALL_KEY], {})),
                port_ids=port_ids_of(tables, group),
            )
        )
    return sorted(found, key=lambda facts: facts.name)


def _groups(tables: Tables) -> list[Row]:
    return [row for row in tables["Port_Group"].rows.values() if FIREWALL_KEY in row.external_ids]


def _sets_of(tables: Tables, firewall_id: UUID) -> list[Row]:
    prefix = f"{group_name(firewall_id)}_"
    return [row for row in tables["Address_Set"].rows.values() if row.name.startswith(prefix)]


def _firewall_id(group: Row) -> UUID | None:
    text = group.external_ids.get(FIREWALL_KEY, "")
    return UUID(text) if is_uuid(text) and group.name == group_name(UUID(text)) else None
