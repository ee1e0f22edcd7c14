"""Wire shapes of nodes and capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from awan.fleet.models import Node
from awan.fleet.rules import check_libvirt_uri
from awan.kit.forms import Matching
from awan.kit.http import Timestamp


class NodeCreate(BaseModel):
    """A hypervisor to add. Caps lower what the probe finds: threads, MiB, GiB."""

    model_config = ConfigDict(extra="forbid")

    location_id: int = Field(ge=1)
    name: Annotated[
        str,
        Matching(
            r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$",
            "The name must be 1 to 63 lower-case letters, digits, dots and -, with neither of these at an end.",
        ),
    ]
    libvirt_uri: Annotated[str, AfterValidator(check_libvirt_uri)] = Field(max_length=255)
    ovn_system_id: str | None = Field(
        None, max_length=255, description="Else matched by host name."
    )
    mgmt_ip: str | None = Field(None, max_length=64)
    tier_ids: list[int] = Field(min_length=1, max_length=100)
    cpu_threads_cap: int | None = Field(None, ge=1, le=4096)
    memory_mib_cap: int | None = Field(None, ge=512)
    disk_gib_cap: int | None = Field(None, ge=1)


class NodeRemoval(BaseModel):
    """How a node goes."""

    model_config = ConfigDict(extra="forbid")

    lost: bool = Field(
        False, description="It will never answer again: forget it, with whatever lies on it."
    )


class NodeAbandonment(BaseModel):
    """A node that is given up."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"confirm": "hv1"}]})

    confirm: str = Field(
        min_length=1,
        max_length=255,
        description="Name of the node: it is switched off, and its instances end.",
    )


class NodeView(BaseModel):
    """A node and what is placed on it."""

    uuid: UUID
    location_id: int
    name: str
    libvirt_uri: str
    state: str
    health: str
    health_since: Timestamp
    health_reason: str | None
    seen_at: Timestamp | None
    host_uuid: UUID | None
    ovn_system_id: str | None
    mgmt_ip: str | None
    cpu_model: str
    has_kvm: bool
    tier_ids: list[int]
    cpu_threads: int
    vcpus_used: int
    dedicated_threads_used: int
    memory_mib: int
    memory_mib_used: int
    disk_gib: int
    disk_gib_used: int
    facts: dict[str, Any]
    probed_at: Timestamp | None
    created_at: Timestamp

    @classmethod
    def of(cls, row: Node, tier_ids: Sequence[int]) -> NodeView:
        """The row as the operator sees it."""
        return cls(
            uuid=row.node_id,
            location_id=row.location_id,
            name=row.name,
            libvirt_uri=row.libvirt_uri,
            state=row.state,
            health=row.health,
            health_since=row.health_since,
            health_reason=row.health_reason,
            seen_at=row.seen_at,
            host_uuid=row.libvirt_host_uuid,
            ovn_system_id=row.ovn_system_id,
            mgmt_ip=row.mgmt_ip,
            cpu_model=row.cpu_model,
            has_kvm=row.has_kvm,
            tier_ids=list(tier_ids),
            cpu_threads=row.cpu_threads,
            vcpus_used=row.vcpus_used,
            dedicated_threads_used=row.dedicated_threads_used,
            memory_mib=row.memory_mib,
            memory_mib_used=row.memory_mib_used,
            disk_gib=row.disk_gib,
            disk_gib_used=row.disk_gib_used,
            facts=row.facts,
            probed_at=row.probed_at,
            created_at=row.created_at,
        )


class TierCapacity(BaseModel):
    """How much a location can still take in a tier, over-commitment included."""

    location_id: int
    tier_id: int
    tier: str
    nodes_active: int
    nodes_out_of_service: int
    vcpus_free: int
    memory_mib_free: int
    disk_gib_free: int
