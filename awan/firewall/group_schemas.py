"""Wire shapes of firewall groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from awan.engines.fabric.firewall import (
    GROUP_RULES_MAX,
    GROUPS_MAX,
    Direction,
    RuleAction,
    RuleProtocol,
)
from awan.firewall.groups import GroupView, Member
from awan.firewall.models import Firewall, FirewallGroup
from awan.firewall.rules import ALL_PORTS, check_protocol, parse_ports, show_ports
from awan.firewall.schemas import (
    NAME,
    Action,
    AnyDirection,
    AnyProtocol,
    Description,
    IcmpType,
    Ports,
    Prefix,
    SyncStatus,
    sync_status,
)
from awan.kit.http import Timestamp
from awan.kit.pagination import PageInfo

SOURCES_MAX = 100
LABELS_MAX = 8

Name = Annotated[
    str,
    NAME,
    Field(description="Name of firewall group, of 2 to 64 characters."),
]


def _labels(given: dict[str, str]) -> dict[str, str]:
    if len(given) > LABELS_MAX:
        raise ValueError(f"A firewall group goes by {LABELS_MAX} labels at most.")
    if any(not key for key in given):
        raise ValueError("A label has a key.")
    return given


Labels = Annotated[
    dict[str, Annotated[str, StringConstraints(max_length=63)]], AfterValidator(_labels)
]


class GroupRule(BaseModel):
    """A rule of a group. Without `sources` it is about everybody; of an outbound rule they are destinations."""

    model_config = ConfigDict(extra="forbid")

    protocol: AnyProtocol
    destination_port: Ports = ALL_PORTS
    action: Action
    direction: AnyDirection = Direction.IN
    icmp_type: IcmpType = None
    sources: list[Prefix] = Field(
        default_factory=list,
        max_length=SOURCES_MAX,
        description="IPv4 and IPv6 addresses and prefixes.",
        examples=[["198.51.100.0/24", "2001:db8::/32"]],
    )
    description: Description = ""
    is_enabled: bool = True

    @model_validator(mode="after")
    def _fits(self) -> GroupRule:
        problems = check_protocol(self.protocol, parse_ports(self.destination_port), self.icmp_type)
        for sentences in problems.values():
            raise ValueError(sentences[0])
        return self

    @property
    def stored(self) -> dict[str, Any]:
        """As the group's row keeps it."""
        ports = parse_ports(self.destination_port)
        return {
            "direction": str(self.direction),
            "protocol": str(self.protocol),
            "ports": list(ports) if ports is not None else None,
            "icmp_type": self.icmp_type,
            "sources": list(dict.fromkeys(self.sources)),
            "action": str(self.action),
            "description": self.description,
            "is_enabled": self.is_enabled,
        }


class GroupCreate(BaseModel):
    """A new group. Instances of the account that have all `labels` are behind it."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    location_id: int = Field(ge=1, description="Id of location: a group is for instances there.")
    description: Description = ""
    rules: list[GroupRule] = Field(default_factory=list, max_length=GROUP_RULES_MAX)
    labels: Labels = Field(default_factory=dict, examples=[{"role": "web"}])


class GroupUpdate(BaseModel):
    """What is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    name: Name | None = None
    description: Description | None = None
    labels: Labels | None = Field(None, description="All labels that it goes by; empty for none.")


class GroupRulesReplace(BaseModel):
    """All rules of a group, in the order in which they are tried."""

    model_config = ConfigDict(extra="forbid")

    rules: list[GroupRule] = Field(max_length=GROUP_RULES_MAX)


class GroupsChange(BaseModel):
    """All groups that an instance shall have, in the order in which they are tried."""

    model_config = ConfigDict(extra="forbid")

    groups: list[UUID] = Field(
        max_length=GROUPS_MAX, description="Uuids of firewall groups; empty for none."
    )


class GroupRuleView(BaseModel):
    """A rule of a group. `destination_port` is the first port, 0 for all; `destination_ports` is the whole range."""

    position: int
    direction: Direction
    protocol: RuleProtocol
    destination_port: int
    destination_ports: str
    icmp_type: int | None
    sources: list[str]
    action: RuleAction
    description: str
    is_enabled: bool

    @classmethod
    def of(cls, position: int, stored: dict[str, Any]) -> GroupRuleView:
        """The stored rule as the API shows it."""
        first, last = stored["ports"] or (None, None)
        return cls(
            position=position,
            direction=Direction(stored["direction"]),
            protocol=RuleProtocol(stored["protocol"]),
            destination_port=ALL_PORTS if first is None else first,
            destination_ports=show_ports(first, last),
            icmp_type=stored["icmp_type"],
            sources=stored["sources"],
            action=RuleAction(stored["action"]),
            description=stored["description"],
            is_enabled=stored["is_enabled"],
        )


class GroupShort(BaseModel):
    """A group in a list."""

    uuid: UUID
    name: str
    location_id: int
    description: str
    labels: dict[str, str]
    rules_count: int
    instances_count: int
    sync_status: SyncStatus
    created_at: Timestamp

    @classmethod
    def of(cls, view: GroupView) -> GroupShort:
        """The row as the API shows it."""
        return cls(**_fields(view))


class GroupDetail(GroupShort):
    """A group with its rules."""

    rules: list[GroupRuleView]

    @classmethod
    def of(cls, view: GroupView) -> GroupDetail:
        """The row as the API shows it."""
        rules = enumerate(view.group.rules, start=1)
        return cls(**_fields(view), rules=[GroupRuleView.of(*it) for it in rules])


def _fields(view: GroupView) -> dict[str, Any]:
    group = view.group
    return {
        "uuid": group.group_id,
        "name": view.name,
        "location_id": group.location_id,
        "description": group.description,
        "labels": group.member_labels,
        "rules_count": len(group.rules),
        "instances_count": view.instances_count,
        "sync_status": sync_status(group),
        "created_at": group.created_at,
    }


class GroupPage(BaseModel):
    """A page of groups, oldest first."""

    data: list[GroupShort]
    page: PageInfo


class MemberView(BaseModel):
    """An instance that is behind a group."""

    uuid: UUID
    hostname: str
    attached_by: Literal["hand", "label"]

    @classmethod
    def of(cls, member: Member) -> MemberView:
        """The member as the API shows it."""
        return cls(
            uuid=member.instance_id,
            hostname=member.hostname,
            attached_by="label" if member.is_by_label else "hand",
        )


class MemberPage(BaseModel):
    """A page of members, by name."""

    data: list[MemberView]
    page: PageInfo


class PlacedGroup(BaseModel):
    """A group of an instance's firewall; the first one is tried first."""

    uuid: UUID
    name: str
    place: int
    attached_by: Literal["hand", "label"]
    sync_status: SyncStatus


def show_placed(
    firewall: Firewall, groups: Sequence[tuple[FirewallGroup, str]], by_hand: set[UUID]
) -> list[PlacedGroup]:
    """The groups of an instance's firewall with their names, in their order.

    One is applied there when the nodes have both: that the firewall has the group, and what the group says.
    """
    return [
        PlacedGroup(
            uuid=group.group_id,
            name=name,
            place=place,
            attached_by="hand" if group.group_id in by_hand else "label",
            sync_status="pending" if sync_status(firewall) == "pending" else sync_status(group),
        )
        for place, (group, name) in enumerate(groups, start=1)
    ]
