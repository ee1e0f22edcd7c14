"""Wire shapes of firewalls, rules and sets of addresses."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from awan.engines.fabric.firewall import Direction, RuleAction, RuleProtocol
from awan.firewall.models import Firewall, FirewallGroup, FirewallTrial, Ipset, IpsetEntry, Rule
from awan.firewall.rules import (
    ALL_PORTS,
    DESCRIPTION_MAX,
    RULES_MAX,
    RuleType,
    RuleValues,
    parse_ports,
    parse_prefix,
    show_ports,
)
from awan.kit.forms import INTEGER_MAX, Matching
from awan.kit.http import Timestamp
from awan.kit.pagination import PageInfo

NAME = Matching(
    r"^[A-Za-z][A-Za-z0-9_-]{1,63}$",
    "The name must be 2 to 64 letters, digits, _ and -, with a letter first.",
)
"""What sets of addresses and groups may be called."""

SyncStatus = Literal["applied", "pending"]


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _ports(value: int | str) -> int | str:
    parse_ports(value)
    return value


def _prefix(value: str) -> str:
    return str(parse_prefix(value))


Action = Annotated[RuleAction, BeforeValidator(_upper), Field(description="Action of firewall.")]
AnyProtocol = Annotated[
    RuleProtocol, BeforeValidator(_lower), Field(description="Protocol of firewall.")
]
AnyDirection = Annotated[
    Direction, BeforeValidator(_lower), Field(description="`in` to the instance, `out` from it.")
]
Ports = Annotated[
    int | str,
    AfterValidator(_ports),
    Field(
        description="Destination port of firewall: a port, a range such as 8000-8100, or 0 for all.",
        examples=[22],
    ),
]
IcmpType = Annotated[
    int | None, Field(ge=0, le=255, description="Type of ICMP (or ICMPv6) alone; all without.")
]
Description = Annotated[str, StringConstraints(max_length=DESCRIPTION_MAX)]
Prefix = Annotated[str, StringConstraints(max_length=64), AfterValidator(_prefix)]


def sync_status(firewall: Firewall | FirewallGroup) -> SyncStatus:
    """Whether the nodes have confirmed the firewall or group as it is wanted now."""
    return "applied" if firewall.applied_revision >= firewall.wanted_revision else "pending"


class PolicyChange(BaseModel):
    """What happens to packets that no rule is about."""

    model_config = ConfigDict(extra="forbid")

    action: Action
    outbound_action: Annotated[RuleAction | None, BeforeValidator(_upper)] = Field(
        None, description="The same for what the instance sends; as it is without."
    )
    apply_to_private: bool | None = Field(
        None, description="Whether the firewall stands before private cards too; as it is without."
    )


class PolicyView(BaseModel):
    """The policies of a firewall."""

    action: RuleAction
    direction: Direction
    outbound_action: RuleAction
    apply_to_private: bool
    enabled_rules: int
    trial_ends_at: Timestamp | None
    sync_status: SyncStatus

    @classmethod
    def of(cls, firewall: Firewall, enabled_rules: int, trial: FirewallTrial | None) -> PolicyView:
        """The row as the API shows it."""
        return cls(
            action=RuleAction(firewall.policy),
            direction=Direction.IN,
            outbound_action=RuleAction(firewall.outbound_policy),
            apply_to_private=firewall.apply_to_private,
            enabled_rules=enabled_rules,
            trial_ends_at=trial.ends_at if trial is not None else None,
            sync_status=sync_status(firewall),
        )


class TrialBegin(BaseModel):
    """How long changes count unless they are confirmed."""

    model_config = ConfigDict(extra="forbid")

    seconds: int = Field(60, ge=10, le=3600, description="Time to confirm, in seconds.")


class RuleTypeView(BaseModel):
    """A service to choose a rule for."""

    type: str
    label: str
    protocol: RuleProtocol
    destination_port: int
    actions: list[RuleAction]

    @classmethod
    def of(cls, row: RuleType) -> RuleTypeView:
        """The service as the API shows it."""
        return cls(
            type=row.type,
            label=row.label,
            protocol=row.protocol,
            destination_port=row.destination_port,
            actions=list(RuleAction),
        )


class _RuleWords(BaseModel):
    model_config = ConfigDict(extra="forbid")

    destination_port: Ports
    action: Action
    protocol: AnyProtocol
    description: Description = Field(description="Description of firewall; may be empty.")
    icmp_type: IcmpType = None

    @property
    def ports(self) -> tuple[int, int] | None:
        """First and last port; None for all."""
        return parse_ports(self.destination_port)


class _WholeRule(_RuleWords):
    source_ipset: int = Field(
        ge=0, le=INTEGER_MAX, description="Source ipset of firewall; 0 without one."
    )
    use_ipset: bool = Field(description="Is using ipset of firewall.")
    source: Prefix | None = Field(
        None,
        description="One address or prefix instead of an ipset; of an outbound rule, the destination.",
        examples=["2001:db8::/32"],
    )
    direction: AnyDirection = Direction.IN

    @model_validator(mode="after")
    def _one_source(self) -> _WholeRule:
        if self.use_ipset and self.source_ipset == 0:
            raise ValueError("A rule with use_ipset needs a source_ipset.")
        if not self.use_ipset and self.source_ipset != 0:
            raise ValueError("The source_ipset must be 0 without use_ipset.")
        if self.use_ipset and self.source is not None:
            raise ValueError("A rule has either a source_ipset or a source.")
        return self

    @property
    def values(self) -> RuleValues:
        """What the rule says."""
        return RuleValues(
            direction=self.direction,
            protocol=self.protocol,
            ports=self.ports,
            icmp_type=self.icmp_type,
            ipset_id=self.source_ipset if self.use_ipset else None,
            peer=parse_prefix(self.source) if self.source is not None else None,
            action=self.action,
        )


class RuleCreate(_WholeRule):
    """A new rule."""

    position: int | None = Field(
        None, ge=1, le=RULES_MAX, description="Its place; behind all others without."
    )


class RuleUpdate(_RuleWords):
    """What a rule is about and does from now on. Its source and direction stay."""


class ReplacedRule(_WholeRule):
    """A rule of a whole list."""

    is_enabled: bool = True


class RulesReplace(BaseModel):
    """All rules of a firewall, in the order in which they are tried."""

    model_config = ConfigDict(extra="forbid")

    rules: list[ReplacedRule] = Field(max_length=RULES_MAX)


class RuleStatusChange(BaseModel):
    """Whether a rule counts."""

    model_config = ConfigDict(extra="forbid")

    action: Annotated[Literal["enable", "disable"], BeforeValidator(_lower)] = Field(
        description="Action of firewall: enable or disable."
    )


class RulePositionChange(BaseModel):
    """A rule's new place."""

    model_config = ConfigDict(extra="forbid")

    position: int = Field(ge=1, le=RULES_MAX, description="Its place among the rules, from 1.")


class NamedIpset(BaseModel):
    """A set by id and name."""

    id: int
    name: str


class RuleView(BaseModel):
    """A rule. `destination_port` is the first port, 0 for all; `destination_ports` is the whole range."""

    uuid: UUID
    position: int
    direction: Direction
    protocol: RuleProtocol
    destination_port: int
    destination_ports: str
    icmp_type: int | None
    use_ipset: bool
    source_ipset: NamedIpset | None
    source: str | None
    action: RuleAction
    description: str
    status: Literal["enabled", "disabled"]
    sync_status: SyncStatus
    created_at: Timestamp

    @classmethod
    def of(cls, row: Rule, ipset: Ipset | None, firewall: Firewall) -> RuleView:
        """The row as the API shows it."""
        return cls(
            uuid=row.rule_id,
            position=row.position,
            direction=Direction(row.direction),
            protocol=RuleProtocol(row.protocol),
            destination_port=ALL_PORTS if row.port_first is None else row.port_first,
            destination_ports=show_ports(row.port_first, row.port_last),
            icmp_type=row.icmp_type,
            use_ipset=ipset is not None,
            source_ipset=NamedIpset(id=ipset.ipset_id, name=ipset.name) if ipset else None,
            source=str(row.peer) if row.peer is not None else None,
            action=RuleAction(row.action),
            description=row.description,
            status="enabled" if row.is_enabled else "disabled",
            sync_status=sync_status(firewall),
            created_at=row.created_at,
        )


class RulePage(BaseModel):
    """A page of rules, by position."""

    data: list[RuleView]
    page: PageInfo


class IpsetCreate(BaseModel):
    """A new set."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, NAME] = Field(description="Name of ipset, of 2 to 64 characters.")
    description: Description = Field(description="Description of ipset; may be empty.")


class EntryCreate(BaseModel):
    """An address or prefix more in a set."""

    model_config = ConfigDict(extra="forbid")

    cidr: Prefix = Field(description="CIDR of IPSet; host bits are cleared.")
    description: Description = Field(description="Description of CIDR; may be empty.")

    @property
    def network(self) -> IPv4Network | IPv6Network:
        """The prefix."""
        return parse_prefix(self.cidr)


class EntryView(BaseModel):
    """An address or prefix of a set."""

    uuid: UUID
    cidr: str
    description: str
    created_at: Timestamp

    @classmethod
    def of(cls, row: IpsetEntry) -> EntryView:
        """The row as the API shows it."""
        return cls(
            uuid=row.entry_id,
            cidr=str(row.cidr),
            description=row.description,
            created_at=row.created_at,
        )


class IpsetView(BaseModel):
    """A set with its entries. `rules_count`: how many rules refer to it."""

    id: int
    name: str
    description: str
    entries: list[EntryView]
    rules_count: int
    created_at: Timestamp

    @classmethod
    def of(cls, row: Ipset, entries: Sequence[IpsetEntry], rules_count: int) -> IpsetView:
        """The rows as the API shows them."""
        return cls(
            id=row.ipset_id,
            name=row.name,
            description=row.description,
            entries=[EntryView.of(entry) for entry in entries],
            rules_count=rules_count,
            created_at=row.created_at,
        )


class IpsetPage(BaseModel):
    """A page of sets."""

    data: list[IpsetView]
    page: PageInfo
