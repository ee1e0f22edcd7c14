"""Wire shapes of instances."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address
from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from awan.errors import Invalid
from awan.instances.rules import (
    SERIAL_LOG_KIB,
    SERIAL_LOG_KIB_MAX,
    SSH_KEYS_MAX,
    STATUSES,
    Filters,
    check_hostname,
    check_labels,
    check_username,
    parse_label_filter,
)
from awan.kit.forms import CommaList
from awan.kit.http import OperationView, Timestamp
from awan.kit.pagination import LIMIT_DEFAULT, LIMIT_MAX, PageInfo

VswitchReference = Annotated[str, Field(min_length=1, max_length=36)]
BULK_MAX = 100
"""Instances of one bulk action."""

Hostname = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(check_hostname)]
Username = Annotated[str, Field(min_length=1, max_length=30), AfterValidator(check_username)]


def _no_backup(include_backup: bool | None) -> bool | None:
    if include_backup:
        raise ValueError("Backups are not offered in this version.")
    return include_backup


def _check_label_filter(text: str) -> str:
    parse_label_filter(text)
    return text


LabelFilter = Annotated[
    str, Field(max_length=1024), AfterValidator(_check_label_filter), CommaList()
]
LABEL_FILTER = (
    "Only instances with this label, `key:value`, or with this key, `key`; several, joined by commas: with all of"
    " them."
)


class InstanceCreate(BaseModel):
    """An order. `memory` and `storage` in GiB."""

    model_config = ConfigDict(extra="forbid")

    location_id: int = Field(ge=1, description="Id of location.")
    tier_id: int = Field(ge=1, description="Id of tier.")
    template_id: int = Field(ge=1, description="Id of template.")
    hostname: Hostname = Field(description="Hostname of instance: RFC 1123, unique in the account.")
    cpu: int = Field(ge=1, description="vCPUs, within the tier's limits.")
    memory: int = Field(ge=1, description="Memory in GiB, within the tier's limits.")
    storage: int = Field(ge=1, description="Root disk in GiB, within the tier's limits and step.")
    username: Username = Field(description="Login name of the first user; root is allowed.")
    password: str = Field(
        min_length=8,
        max_length=64,
        repr=False,
        description="8 to 64 printable ASCII characters with lower case, upper case and a digit; no colon.",
    )
    use_public_ip: bool = Field(description="Whether the instance gets a public address.")
    use_shared_cpu: bool | None = Field(None, description="Shared CPUs; the default where offered.")
    use_dedicated_cpu: bool | None = Field(None, description="Dedicated CPUs.")
    vswitch: VswitchReference | None = Field(
        None, description="Vswitch of instance: uuid or id of a private network of the location."
    )
    ssh_keys: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, max_length=SSH_KEYS_MAX, description="Ids of the account's SSH keys."
    )
    include_backup: Annotated[bool | None, AfterValidator(_no_backup)] = Field(
        None, description="Backup schedule; not offered in this version."
    )
    public_network: UUID | None = Field(None, description="Uuid of a free public address to use.")
    user_data: str | None = Field(
        None, max_length=16384, repr=False, description="cloud-init user data, up to 16 KiB."
    )


class PrivateNetworkChange(BaseModel):
    """A private network to be attached to."""

    model_config = ConfigDict(extra="forbid")

    vswitch: VswitchReference | None = Field(
        description="UUID of vswitch; empty: the instance is detached from all its private networks."
    )
    private_ip: IPv4Address | None = Field(
        None, description="Its address in the network; else the lowest that is free."
    )


class InstanceDelete(BaseModel):
    """What happens to what is attached."""

    model_config = ConfigDict(extra="forbid")

    remove_ip: bool = Field(
        description="Release the public address; else it stays yours, and billed."
    )
    remove_block_storage: bool = Field(
        description="Delete attached block storages; else they are detached."
    )


class InstanceDeleteForm(InstanceDelete):
    """A deletion in the form of a POST."""

    method: Literal["DELETE"] = Field(alias="_method", description="Define delete http method.")


class PowerRequest(BaseModel):
    """A stop or restart."""

    model_config = ConfigDict(extra="forbid")

    force: bool | None = Field(
        None, description="Cut the power at once instead of asking the guest."
    )


class PasswordChange(BaseModel):
    """A new password for the instance's first account."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"password": "Correct-Horse-7", "password_confirmation": "Correct-Horse-7"}
            ]
        },
    )

    password: str = Field(
        min_length=8,
        max_length=64,
        repr=False,
        description="8 to 64 printable ASCII characters with lower case, upper case and a digit; no colon.",
    )
    password_confirmation: str = Field(
        max_length=64, repr=False, description="The same password again."
    )


class HostnameChange(BaseModel):
    """A new name."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"hostname": "web-2"}]}
    )

    hostname: Hostname = Field(description="Hostname of instance: RFC 1123, unique in the account.")


class PublicNetworkAssignment(BaseModel):
    """Another public address, or none."""

    model_config = ConfigDict(extra="forbid")

    public_network: UUID | None = Field(
        None,
        description="A free public network of the account; blank or left out: the instance's is removed.",
    )


class LeftOverQuery(BaseModel):
    """How the instance would be deleted."""

    model_config = ConfigDict(extra="forbid")

    remove_ip: bool = Field(False, description="As in the deletion: whether its address goes too.")


class LeftOver(BaseModel):
    """Something that stays the account's, and is billed, after a deletion."""

    kind: str = Field(description="`public_ip`.")
    uuid: UUID
    name: str
    price_per_month: int
    price_per_hour: str


class AddressAssignment(BaseModel):
    """The instance that is to have an address, or none."""

    model_config = ConfigDict(extra="forbid")

    instance_id: UUID | None = Field(
        description="UUID of an instance without public network; empty: the address is detached."
    )


class LabelsChange(BaseModel):
    """All labels that the instance shall have; those that are not named here are taken away."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"labels": {"env": "prod", "team": "web"}}]}
    )

    labels: Annotated[dict[str, str], AfterValidator(check_labels)] = Field(
        description="Up to 32 labels; in forms `labels[env]=prod`."
    )


class ProtectionChange(BaseModel):
    """Whether the instance can be deleted."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"is_protected": True}]}
    )

    is_protected: bool = Field(description="A protected instance cannot be deleted.")


class BulkAction(BaseModel):
    """A power action on many instances, named by `uuids` or chosen by `label`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"action": "stop", "label": "env:test", "force": False},
                {"action": "start", "uuids": ["018f3c7e-5d3b-7c44-9a5e-0c1f2a3b4c5d"]},
            ]
        },
    )

    action: Literal["start", "stop", "restart", "reset"] = Field(description="What to do.")
    uuids: list[UUID] | None = Field(
        None, max_length=BULK_MAX, description="Uuids of the instances, or `label`."
    )
    label: LabelFilter | None = Field(None, description=LABEL_FILTER, examples=["env:prod"])
    force: bool | None = Field(
        None,
        description="With stop and restart: cut the power at once instead of asking the guest.",
    )

    @model_validator(mode="after")
    def _chooses_once(self) -> Self:
        if (self.uuids is None) == (self.label is None):
            raise ValueError("Name the instances by either uuids or label.")
        return self


class BulkError(BaseModel):
    """Why nothing was begun on an instance."""

    type: str
    message: str


class BulkResult(BaseModel):
    """What became of one instance: an operation that was begun, or an error."""

    uuid: UUID
    operation: OperationView | None
    error: BulkError | None


class SerialLogQuery(BaseModel):
    """How much of the serial console."""

    model_config = ConfigDict(extra="forbid")

    kib: int = Field(
        SERIAL_LOG_KIB,
        ge=1,
        le=SERIAL_LOG_KIB_MAX,
        description="How much of its end, in KiB; the first line is left out when it is not whole.",
    )


class NoteCreate(BaseModel):
    """A note."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"text": "Owner asked for a quiet night; ticket 4711."}]},
    )

    text: str = Field(
        min_length=1, max_length=4000, description="What other operators should know."
    )


class NoteView(BaseModel):
    """A note about an instance."""

    id: int
    text: str
    actor: str = Field(examples=["key:0123456789abcdef"])
    created_at: Timestamp


class ListQuery(BaseModel):
    """Filters of the list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(LIMIT_DEFAULT, ge=1, le=LIMIT_MAX, description="Rows per page.")
    page: int = Field(1, ge=1, le=1_000_000, description="Number of page.")
    search: str | None = Field(
        None, min_length=1, max_length=64, description="Part of the hostname."
    )
    sort: Literal["created_at", "-created_at", "cost", "-cost"] = Field(
        "-created_at", description="Order; a minus means descending."
    )
    statuses: Annotated[str, CommaList()] | None = Field(
        None, max_length=255, description="Comma list of statuses: " + ", ".join(STATUSES) + "."
    )
    label: LabelFilter | None = Field(None, description=LABEL_FILTER, examples=["env:prod"])

    def filters(self) -> Filters:
        """What is asked for. Raises: Invalid (statuses)."""
        return Filters(
            search=self.search,
            statuses=self._statuses(),
            labels=parse_label_filter(self.label) if self.label is not None else None,
        )

    def _statuses(self) -> list[str] | None:
        if self.statuses is None:
            return None
        wanted = [part.strip().lower() for part in self.statuses.split(",")]
        if unknown := [status for status in wanted if status not in STATUSES]:
            raise Invalid.field(
                "statuses", f'Unknown status "{unknown[0]}"; there are {", ".join(STATUSES)}.'
            )
        return wanted


class EveryonesQuery(ListQuery):
    """Filters of the operator's list."""

    account_uuid: UUID | None = Field(None, description="Only instances of this account.")
    location_id: int | None = Field(None, ge=1, description="Only those in this location.")
    node_uuid: UUID | None = Field(None, description="Only those on this node.")

    def filters(self) -> Filters:
        """What is asked for. Raises: Invalid (statuses)."""
        return replace(
            super().filters(),
            account_id=self.account_uuid,
            location_id=self.location_id,
            node_id=self.node_uuid,
        )


class OptionsQuery(BaseModel):
    """Whose options."""

    model_config = ConfigDict(extra="forbid")

    location_id: int = Field(ge=1, description="Id of location.")


class InstanceRow(BaseModel):
    """An instance in a list. Strings as the API has always shown them, each with a twin for machines."""

    uuid: UUID
    hostname: str
    ip_address: str | None
    cpu: int
    memory: str = Field(examples=["2 GB"])
    memory_mib: int
    storage: str = Field(examples=["30GB"])
    storage_gib: int
    status: str = Field(examples=["Running"])
    state: str = Field(examples=["running"])
    location: str
    tier: str
    price_per_hour: int = Field(description="Rounded to the currency's minor unit, for display.")
    estimated_monthly_cost: int
    cost: str | None
    operation_flag: int = Field(description="1 while an operation runs.")
    active_operation: OperationView | None
    created_at: str = Field(examples=["25 January 2024, 14:43"])
    created_at_iso: Timestamp


class PlacedRow(InstanceRow):
    """An instance in the operator's list: also whose it is, and where. It has no node before it was placed."""

    account_uuid: UUID
    account: str = Field(description="Name of the account.")
    node_uuid: UUID | None
    node: str | None = Field(description="Name of the node.")
    labels: dict[str, str]


class PlacedPage(BaseModel):
    """A page of all accounts' instances."""

    data: list[PlacedRow]
    page: PageInfo


class InstancePage(BaseModel):
    """A page of instances."""

    data: list[InstanceRow]
    active_operation: OperationView | None
    page: PageInfo


class LocationDetail(BaseModel):
    """Where the instance is."""

    id: int
    name: str
    code: str


class TierDetail(BaseModel):
    """Its class of server."""

    id: int
    name: str
    cpu_model: str


class TemplateDetail(BaseModel):
    """What was installed."""

    id: int
    name: str
    version: str
    os_family: str


class CostItem(BaseModel):
    """One component of the price, at which it was sold."""

    component: str
    quantity: int
    price_per_month: int
    price_per_hour: str


class CostDetail(BaseModel):
    """What the instance costs."""

    currency: str
    per_hour: str = Field(examples=["319.44"])
    per_month: int
    items: list[CostItem]


class PublicNetworkDetail(BaseModel):
    """Its public addresses and their reverse names. `uuid` is that of the IPv4 address."""

    uuid: UUID
    ip_address: str
    rdns: str | None = Field(description="Null where the location has no names.")
    ipv6_address: str | None
    ipv6_rdns: str | None


class InstalledKey(BaseModel):
    """An SSH key that was installed at creation."""

    id: int
    title: str
    fingerprint: str
    deleted: bool


class PrivateNetworkOfInstance(BaseModel):
    """A private network that an instance is in, and its card there."""

    uuid: UUID
    name: str
    ip_address: str
    mac_address: str


class InstanceDetail(InstanceRow):
    """An instance, whole. Never its password, nor the hypervisor's name."""

    username: str
    cpu_type: str
    status_reason: str | None
    lock: str | None = Field(description="The kind of the running operation.")
    location_detail: LocationDetail
    tier_detail: TierDetail
    template_detail: TemplateDetail
    cost_detail: CostDetail
    public_network: PublicNetworkDetail | None
    ipv6_prefix: str | None = Field(description="The /64 that is routed to it.")
    private_networks: list[PrivateNetworkOfInstance]
    ssh_keys: list[InstalledKey]
    labels: dict[str, str]
    is_protected: bool = Field(description="Whether its deletion is refused.")
    hostname_applied: Literal["now", "next_boot"] = Field(
        description="Whether the guest has this hostname already, or takes it at its next boot."
    )
    ready_at: Timestamp | None
    updated_at: Timestamp


class RenamedInstance(InstanceDetail):
    """An instance, and when its guest has the new name."""

    applied: Literal["now", "next_boot"] | None = Field(
        description="As `hostname_applied`; null while the operation goes on."
    )


class InstanceOption(BaseModel):
    """An instance that could get a public address."""

    uuid: UUID
    hostname: str
    status: str
