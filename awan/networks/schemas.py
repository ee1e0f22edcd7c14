"""Wire shapes of public addresses and pools."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import RowMapping

from awan.engines.nameserver import Zones
from awan.kit.http import Timestamp
from awan.kit.money import display_hourly
from awan.kit.pagination import LIMIT_DEFAULT, LIMIT_MAX, PageInfo
from awan.networks.models import Pool
from awan.networks.names import name_of


class LocationQuery(BaseModel):
    """Which location."""

    model_config = ConfigDict(extra="forbid")

    location_id: int = Field(ge=1, description="Id of location.")


class PageQuery(BaseModel):
    """Which page."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(LIMIT_DEFAULT, ge=1, le=LIMIT_MAX, description="Rows per page.")
    page: int = Field(1, ge=1, le=1_000_000, description="Number of page.")


class RdnsChange(BaseModel):
    """A name for an address."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"rdns": "mail.example.com"}]}
    )

    rdns: str | None = Field(
        max_length=255,
        description="RDNS of ip: a fully qualified host name with an A record of this address; empty for the default.",
    )


class NamedLocation(BaseModel):
    """A location by id and name."""

    id: int
    name: str


class HostOfAddress(BaseModel):
    """The instance that has the address."""

    uuid: UUID
    hostname: str


class VswitchOfAddress(BaseModel):
    """The private network whose gateway has the address."""

    uuid: UUID
    name: str


class PublicAddressView(BaseModel):
    """A public address of the account."""

    uuid: UUID
    ip_address: str
    version: int
    gateway: str
    prefix: int
    rdns: str | None = Field(description="Its reverse name; null where the location has none.")
    location: NamedLocation
    instance: HostOfAddress | None
    vswitch: VswitchOfAddress | None
    status: str
    price_per_hour: str
    price_per_month: int
    created_at: Timestamp

    @classmethod
    def of(cls, row: RowMapping, price: tuple[int, str], zones: Zones | None) -> PublicAddressView:
        """A row of `service.list_addresses`, its locked price (monthly, currency) and its location's zones."""
        address, pool, location = row["Address"], row["Pool"], row["Location"]
        monthly_minor, currency = price
        host = (
            HostOfAddress(uuid=row["instance_id"], hostname=row["hostname"])
            if row["instance_id"] is not None
            else None
        )
        return cls(
            uuid=row["uuid"],
            ip_address=str(address.inet),
            version=address.family,
            gateway=str(pool.gateway),
            prefix=pool.cidr.prefixlen,
            rdns=name_of(address, zones),
            location=NamedLocation(id=location.location_id, name=location.name),
            instance=host,
            vswitch=VswitchOfAddress(uuid=row["network_id"], name=row["network_name"])
            if row["network_id"] is not None
            else None,
            status=address.state,
            price_per_hour=display_hourly(monthly_minor, currency),
            price_per_month=monthly_minor,
            created_at=row["created_at"],
        )


class PublicAddressPage(BaseModel):
    """A page of addresses."""

    data: list[PublicAddressView]
    page: PageInfo


class AddressOption(BaseModel):
    """A free address to choose."""

    uuid: UUID
    ip_address: str


class PoolCreate(BaseModel):
    """A public prefix."""

    model_config = ConfigDict(extra="forbid")

    location_id: int = Field(ge=1)
    cidr: str = Field(max_length=64, examples=["198.51.100.0/24"])
    gateway: str = Field(max_length=64, examples=["198.51.100.1"])
    physical_network: str = Field("public", min_length=1, max_length=64)
    vlan: int | None = Field(None, ge=1, le=4094)
    dns_servers: list[str] = Field(default_factory=list, max_length=8)
    reserved: list[str] = Field(default_factory=list, max_length=1024)


class PoolView(BaseModel):
    """A pool and how many of its addresses are in which state."""

    id: int
    location_id: int
    family: int
    cidr: str
    gateway: str
    physical_network: str
    vlan: int | None
    dns_servers: list[str]
    addresses: dict[str, int]

    @classmethod
    def of(cls, pool: Pool, counts: Mapping[str, int]) -> PoolView:
        """The row as the API shows it."""
        return cls(
            id=pool.pool_id,
            location_id=pool.location_id,
            family=pool.family,
            cidr=str(pool.cidr),
            gateway=str(pool.gateway),
            physical_network=pool.physical_network,
            vlan=pool.vlan,
            dns_servers=[str(server) for server in pool.dns_servers],
            addresses=dict(counts),
        )
