"""Wire shapes of private networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from awan.kit.http import Timestamp
from awan.networks.private_networks import Member, PrivateNetworkView
from awan.networks.private_rules import count_free, gateway_of
from awan.networks.schemas import NamedLocation

NAME_LENGTH_MAX = 64


def _check_name(name: str) -> str:
    if not name.isprintable() or name != name.strip():
        raise ValueError("The name must be printable characters, with no spaces around it.")
    return name


Name = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH_MAX), AfterValidator(_check_name)]


class PrivateNetworkCreate(BaseModel):
    """A private network to make."""

    model_config = ConfigDict(extra="forbid")

    name: Name = Field(description="Name of private network, unique in the location.")
    location_id: int = Field(ge=1, description="ID of location.")
    cidr: str | None = Field(
        None,
        max_length=32,
        examples=["10.20.3.0/24"],
        description="Its prefix: /16 to /28 of RFC 1918, overlapping none of the account's; else a free /24.",
    )


class PrivateNetworkRename(BaseModel):
    """Another name."""

    model_config = ConfigDict(extra="forbid")

    name: Name = Field(description="Name of private network, unique in the location.")


class GatewayChange(BaseModel):
    """Another gateway, or none."""

    model_config = ConfigDict(extra="forbid")

    public_gateway: UUID | None = Field(
        description="Uuid of a free public network of the location; empty: the gateway is removed."
    )


class GatewayQuery(BaseModel):
    """For which network."""

    model_config = ConfigDict(extra="forbid")

    location_id: int = Field(ge=1, description="Id of location.")
    vswitch_uuid: UUID = Field(description="UUID of private network.")


class PublicGateway(BaseModel):
    """The public address of a gateway."""

    uuid: UUID
    ip_address: str


class PrivateNetworkDetail(BaseModel):
    """A private network."""

    id: int
    uuid: UUID
    name: str
    location: NamedLocation
    cidr: str
    gateway_ip: str
    domain: str | None = Field(
        description="Where its members find each other by hostname, if it has names."
    )
    public_gateway: PublicGateway | None
    instances_count: int
    status: str
    status_reason: str | None
    created_at: Timestamp

    @classmethod
    def of(cls, view: PrivateNetworkView) -> PrivateNetworkDetail:
        """The rows as the API shows them."""
        return cls(**_fields(view))


def _fields(view: PrivateNetworkView) -> dict[str, object]:
    network, gateway = view.network, view.gateway
    return {
        "id": network.network_id,
        "uuid": network.resource_id,
        "name": view.resource.name,
        "location": NamedLocation(id=view.location.location_id, name=view.location.name),
        "cidr": str(network.cidr),
        "gateway_ip": str(gateway_of(network.cidr)),
        "domain": view.domain,
        "public_gateway": PublicGateway(uuid=gateway.resource_id, ip_address=str(gateway.inet))
        if gateway is not None and gateway.resource_id is not None
        else None,
        "instances_count": view.instances_count,
        "status": network.state,
        "status_reason": network.status_reason,
        "created_at": network.created_at,
    }


class MemberView(BaseModel):
    """An instance in a private network."""

    uuid: UUID
    hostname: str
    name: str | None = Field(description="The name by which other members find it, if it has one.")
    ip_address: str
    mac_address: str
    status: str

    @classmethod
    def of(cls, member: Member, status: str, names: Mapping[str, str]) -> MemberView:
        """A card as the API shows it; `status` is its instance's, `names` those of all members by address."""
        return cls(
            uuid=member.nic.instance_id,
            hostname=member.hostname,
            name=names.get(str(member.nic.private_ip)),
            ip_address=str(member.nic.private_ip),
            mac_address=member.nic.mac,
            status=status,
        )


class PrivateNetworkWithMembers(PrivateNetworkDetail):
    """A private network, whole."""

    instances: list[MemberView]

    @classmethod
    def with_members(
        cls, view: PrivateNetworkView, members: list[MemberView]
    ) -> PrivateNetworkWithMembers:
        """The rows as the API shows them."""
        return cls(**_fields(view), instances=members)


class InstanceOfIp(BaseModel):
    """Who has an address."""

    uuid: UUID
    hostname: str


class PrivateIp(BaseModel):
    """An address in use."""

    ip_address: str
    mac_address: str
    instance: InstanceOfIp


class PrivateIps(BaseModel):
    """The addresses of a private network."""

    cidr: str
    used: int
    free: int
    ips: list[PrivateIp]

    @classmethod
    def of(cls, view: PrivateNetworkView, members: list[Member]) -> PrivateIps:
        """A network and its cards as the API shows them."""
        return cls(
            cidr=str(view.network.cidr),
            used=len(members),
            free=count_free(view.network.cidr, len(members)),
            ips=[
                PrivateIp(
                    ip_address=str(it.nic.private_ip),
                    mac_address=it.nic.mac,
                    instance=InstanceOfIp(uuid=it.nic.instance_id, hostname=it.hostname),
                )
                for it in members
            ],
        )


class GatewayOption(BaseModel):
    """An address that the gateway may have."""

    uuid: UUID
    ip_address: str
    selected: bool


class PrivateNetworkOption(BaseModel):
    """A network to choose."""

    uuid: UUID
    name: str
    cidr: str
