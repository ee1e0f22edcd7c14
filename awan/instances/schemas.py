"""Wire shapes of instances."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from awan.instances.rules import (
    MEMORY_GIB_PLAUSIBLE,
    SSH_KEYS_MAX,
    STATUSES,
    check_hostname,
    check_username,
)
from awan.kit.http import OperationView, Timestamp
from awan.kit.pagination import LIMIT_DEFAULT, LIMIT_MAX, PageInfo

Hostname = Annotated[str, AfterValidator(check_hostname), Field(min_length=1, max_length=64)]
Username = Annotated[str, AfterValidator(check_username), Field(min_length=1, max_length=30)]


def _check_memory(memory: int) -> int:
    if memory > MEMORY_GIB_PLAUSIBLE:
        raise ValueError("The memory is in GiB: 1 means 1 GiB.")
    return memory


def _no_vswitch(vswitch: str | None) -> str | None:
    if vswitch is not None:
        raise ValueError("Private networks are not offered in this version.")
    return vswitch


def _no_backup(include_backup: bool | None) -> bool | None:
    if include_backup:
        raise ValueError("Backups are not offered in this version.")
    return include_backup


class InstanceCreate(BaseModel):
    """An order. `memory` and `storage` in GiB."""

    model_config = ConfigDict(extra="forbid")

    location_id: int = Field(ge=1, description="Id of location.")
    tier_id: int = Field(ge=1, description="Id of tier.")
    template_id: int = Field(ge=1, description="Id of template.")
    hostname: Hostname = Field(description="Hostname of instance: RFC 1123, unique in the account.")
    cpu: int = Field(ge=1, description="vCPUs, within the tier's limits.")
    memory: Annotated[int, AfterValidator(_check_memory)] = Field(
        ge=1, description="Memory in GiB, within the tier's limits."
    )
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
    vswitch: Annotated[str | None, AfterValidator(_no_vswitch)] = Field(
        None, description="Private network; not offered in this version."
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
    statuses: str | None = Field(
        None, max_length=255, description="Comma list of statuses: " + ", ".join(STATUSES) + "."
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
    """Its public addresses. `uuid` is that of the IPv4 address."""

    uuid: UUID
    ip_address: str
    ipv6_address: str | None


class InstalledKey(BaseModel):
    """An SSH key that was installed at creation."""

    id: int
    title: str
    fingerprint: str
    deleted: bool


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
    ssh_keys: list[InstalledKey]
    labels: dict[str, str]
    ready_at: Timestamp | None
    updated_at: Timestamp


class InstanceOption(BaseModel):
    """An instance that could get a public address."""

    uuid: UUID
    hostname: str
    status: str
