"""Firewall groups on OVN: a port group with the rules for each place that a group has among those of firewalls.

Which places those are is said by the firewalls' own port groups; see `ovn_firewall`, whose functions use these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from uuid import UUID

from awan.engines.fabric.acls import Acl, lines_of, place_name, render_group
from awan.engines.fabric.firewall import FirewallGroupFacts, FirewallGroupSpec
from awan.engines.fabric.ovsdb import Row, Tables, find_row, referenced, set_columns

GROUP_KEY = "awan:firewall_group"
GROUP_ACCOUNT_KEY = "awan:account"
PLACE_KEY = "awan:place"
REVISION_KEY = "awan:revision"
RULE_KEY = "awan:rule"


def edit_place(tables: Tables, txn: Any, spec: FirewallGroupSpec, place: int) -> tuple[Row, bool]:
    """The group's port group at a place with exactly these rules, unless a newer revision is there; whether it is new.

    Its ports stay.
    """
    name = place_name(spec.group_id, place)
    group = find_row(tables, "Port_Group", "name", name)
    is_new = group is None
    if group is None:
        group = txn.insert(tables["Port_Group"])
        group.name = name
    else:
        if revision_of(group) > spec.revision:
            return group, False
        group.verify("external_ids")
    own = {GROUP_KEY: str(spec.group_id)}
    set_columns(
        group,
        external_ids={
            **own,
            GROUP_ACCOUNT_KEY: str(spec.account_id),
            PLACE_KEY: str(place),
            REVISION_KEY: str(spec.revision),
        },
    )
    present = [] if is_new else list(group.acls)
    edit_acls(tables, txn, group, present, render_group(spec, place), own)
    return group, is_new


def edit_group(tables: Tables, txn: Any, spec: FirewallGroupSpec, wanted: Collection[str]) -> None:
    """The group at every place that it has; those whose port group none of the firewalls names (`wanted`) go."""
    for group in places(tables, spec.group_id):
        if group.name not in wanted:
            # A firewall that is about to name it is seen by the next attempt.
            next(iter(tables["NB_Global"].rows.values())).verify("nb_cfg")
            group.delete()
        else:
            edit_place(tables, txn, spec, int(group.external_ids[PLACE_KEY]))


def edit_group_absent(tables: Tables, group_id: UUID) -> None:
    """No port group of it. Its ACLs go with them: nothing else holds them."""
    for group in places(tables, group_id):
        group.delete()


def edit_acls(
    tables: Tables,
    txn: Any,
    group: Row,
    present: Sequence[Row],
    wanted: Sequence[Acl],
    own: Mapping[str, str],
) -> None:
    """The port group has exactly these rows; `present` are those it has. `own`: by what they are known as ours."""
    known = {row.external_ids.get(RULE_KEY, ""): row for row in present}
    rows = []
    for acl in wanted:
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


def group_port_names(tables: Tables, group_id: UUID) -> list[str]:
    """Names of the ports in the group, wherever it is."""
    ports = tables["Logical_Switch_Port"].rows
    return [
        ports[uuid].name
        for group in places(tables, group_id)
        for uuid in referenced(group, "ports")
    ]


def read_groups(tables: Tables) -> list[FirewallGroupFacts]:
    """All that there are, by name."""
    found = []
    for group in places(tables):
        rows = [Acl("", acl.priority, acl.direction, acl.match, acl.action) for acl in group.acls]
        group_id, place = _identity(group)
        found.append(
            FirewallGroupFacts(
                name=group.name,
                group_id=group_id,
                place=place,
                revision=revision_of(group),
                lines=lines_of(rows, {}),
                port_ids=port_ids_of(tables, group),
            )
        )
    return sorted(found, key=lambda facts: facts.name)


def places(tables: Tables, group_id: UUID | None = None) -> list[Row]:
    """The port groups of all groups, or of one."""
    return [
        row
        for row in tables["Port_Group"].rows.values()
        if (known := row.external_ids.get(GROUP_KEY)) is not None
        and (group_id is None or known == str(group_id))
    ]


def port_ids_of(tables: Tables, group: Row) -> tuple[UUID, ...]:
    """The port group's ports, as far as they are ours."""
    ports = tables["Logical_Switch_Port"].rows
    names = [ports[uuid].name for uuid in referenced(group, "ports")]
    return tuple(sorted(UUID(name) for name in names if is_uuid(name)))


def revision_of(group: Row) -> int:
    """The revision of a firewall or group; 0 for one that has none."""
    text = group.external_ids.get(REVISION_KEY, "")
    return int(text) if text.isdecimal() else 0


def _identity(group: Row) -> tuple[UUID | None, int]:
    text, number = group.external_ids[GROUP_KEY], group.external_ids.get(PLACE_KEY, "")
    place = int(number) if number.isdecimal() else 0
    is_ours = is_uuid(text) and group.name == place_name(UUID(text), place)
    return (UUID(text) if is_ours else None), place


def is_uuid(text: str) -> bool:
    """Whether the text is a uuid."""
    try:
        UUID(text)
    except ValueError:
        return False
    return True
