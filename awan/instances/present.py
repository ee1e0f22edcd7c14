"""Instances as the API shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session

from awan.catalogue import PricedItem
from awan.catalogue.service import find_zones
from awan.credentials import SshKey
from awan.engines.nameserver import Zones
from awan.instances.models import Instance
from awan.instances.rules import (
    NODE_UNREACHABLE,
    display_memory,
    display_storage,
    display_time,
    status_of,
)
from awan.instances.schemas import (
    CostDetail,
    CostItem,
    InstalledKey,
    InstanceDetail,
    InstanceRow,
    LeftOver,
    LocationDetail,
    PlacedRow,
    PrivateNetworkOfInstance,
    PublicNetworkDetail,
    TemplateDetail,
    TierDetail,
)
from awan.instances.service import Belongings, InstanceView, PlacedView, installed_keys
from awan.kit.http import OperationView
from awan.kit.money import display_hourly, u720_to_minor
from awan.ledger import locked_prices, monthly_prices
from awan.networks import Address, public_addresses
from awan.networks.names import name_of
from awan.networks.prefixes import find_prefix
from awan.networks.private_networks import members_of
from awan.operations import summary
from awan.resources import ResourceKind
from awan.settings import get_settings


def show_rows(session: Session, views: Sequence[InstanceView]) -> list[InstanceRow]:
    """The rows of a list, their addresses read in one query."""
    addresses = public_addresses(session, [view.instance.instance_id for view in views])
    return [
        InstanceRow(**_row(view, addresses.get(view.instance.instance_id, []))) for view in views
    ]


def show_placed(session: Session, views: Sequence[PlacedView]) -> list[PlacedRow]:
    """The rows of the operator's list, their addresses read in one query."""
    addresses = public_addresses(session, [placed.view.instance.instance_id for placed in views])
    return [
        PlacedRow(
            **_row(placed.view, addresses.get(placed.view.instance.instance_id, [])),
            account_uuid=placed.account.account_id,
            account=placed.account.name,
            node_uuid=placed.node.node_id if placed.node is not None else None,
            node=placed.node.name if placed.node is not None else None,
            labels=placed.view.resource.labels,
        )
        for placed in views
    ]


def show_detail(session: Session, view: InstanceView) -> InstanceDetail:
    """One instance, whole."""
    instance_id = view.instance.instance_id
    return show_with(
        view,
        Belongings(
            addresses=public_addresses(session, [instance_id]).get(instance_id, []),
            prefix=find_prefix(session, instance_id),
            prices=locked_prices(session, instance_id),
            zones=find_zones(session, view.location.location_id),
            members=members_of(session, instance_ids=[instance_id]),
            ssh_keys=installed_keys(session, instance_id),
        ),
    )


def show_with(view: InstanceView, has: Belongings) -> InstanceDetail:
    """As `show_detail`, of an instance whose belongings are known."""
    instance = view.instance
    row = _row(view, has.addresses)
    return InstanceDetail(
        **row,
        username=instance.username,
        cpu_type=instance.cpu_mode,
        status_reason=NODE_UNREACHABLE if row["state"] == "unknown" else instance.status_reason,
        lock=view.operation.kind if view.operation is not None else None,
        location_detail=LocationDetail(
            id=view.location.location_id, name=view.location.name, code=view.location.code
        ),
        tier_detail=TierDetail(
            id=view.tier.tier_id, name=view.tier.name, cpu_model=view.tier.cpu_model
        ),
        template_detail=TemplateDetail(
            id=view.template.template_id,
            name=view.template.name,
            version=view.template.version,
            os_family=view.template.family,
        ),
        cost_detail=_cost(instance, has.prices),
        public_network=_public_network(has.addresses, has.zones),
        ipv6_prefix=str(has.prefix.cidr) if has.prefix is not None else None,
        private_networks=[
            PrivateNetworkOfInstance(
                uuid=member.network.resource_id,
                name=member.network_name,
                ip_address=str(member.nic.private_ip),
                mac_address=member.nic.mac,
            )
            for member in has.members
        ],
        ssh_keys=[show_key(key) for key in has.ssh_keys],
        labels=view.resource.labels,
        is_protected=view.resource.is_protected,
        hostname_applied="next_boot" if instance.hostname_is_pending else "now",
        ready_at=instance.ready_at,
        updated_at=instance.updated_at,
    )


def show_left_over(session: Session, instance_id: UUID, *, remove_ip: bool) -> list[LeftOver]:
    """What a deletion of the instance would leave, as it is now."""
    rows = public_addresses(session, [instance_id]).get(instance_id, [])
    kept = {row.resource_id: row for row in rows if row.resource_id is not None and not remove_ip}
    prices = monthly_prices(session, list(kept))
    return [
        LeftOver(
            kind=ResourceKind.PUBLIC_IP,
            uuid=uuid,
            name=str(row.inet),
            price_per_month=prices[uuid][0],
            price_per_hour=display_hourly(*prices[uuid]),
        )
        for uuid, row in kept.items()
    ]


def show_key(key: SshKey) -> InstalledKey:
    """An installed key."""
    return InstalledKey(
        id=key.ssh_key_id,
        title=key.title,
        fingerprint=key.fingerprint,
        deleted=key.deleted_at is not None,
    )


def _row(view: InstanceView, addresses: Sequence[Address]) -> dict[str, Any]:
    instance, operation = view.instance, view.operation
    state = status_of(
        instance.desired_state,
        instance.observed_state,
        operation.kind if operation is not None else None,
        is_node_silent=view.is_node_silent,
    )
    four = next((address for address in addresses if address.family == 4), None)
    return {
        "uuid": instance.instance_id,
        "hostname": instance.hostname,
        "ip_address": str(four.inet) if four is not None else None,
        "cpu": instance.vcpus,
        "memory": display_memory(instance.memory_mib),
        "memory_mib": instance.memory_mib,
        "storage": display_storage(instance.storage_gib),
        "storage_gib": instance.storage_gib,
        "status": state.title(),
        "state": state,
        "location": view.location.name,
        "tier": view.tier.name,
        "price_per_hour": u720_to_minor(instance.monthly_minor),
        "estimated_monthly_cost": instance.monthly_minor,
        "cost": None,
        "operation_flag": 1 if operation is not None else 0,
        "active_operation": OperationView(**summary(operation)) if operation is not None else None,
        "created_at": display_time(view.resource.created_at, get_settings().display_timezone),
        "created_at_iso": view.resource.created_at,
    }


def _cost(instance: Instance, prices: Sequence[PricedItem]) -> CostDetail:
    return CostDetail(
        currency=instance.currency,
        per_hour=display_hourly(instance.monthly_minor, instance.currency),
        per_month=instance.monthly_minor,
        items=[
            CostItem(
                component=item.tag.component,
                quantity=item.quantity,
                price_per_month=item.monthly_minor,
                price_per_hour=display_hourly(item.monthly_minor, instance.currency),
            )
            for item in sorted(prices, key=lambda item: item.tag.component)
        ],
    )


def _public_network(
    addresses: Sequence[Address], zones: Zones | None
) -> PublicNetworkDetail | None:
    four = next((address for address in addresses if address.family == 4), None)
    six = next((address for address in addresses if address.family == 6), None)
    if four is None:
        return None
    assert four.resource_id is not None
    return PublicNetworkDetail(
        uuid=four.resource_id,
        ip_address=str(four.inet),
        rdns=name_of(four, zones),
        ipv6_address=str(six.inet) if six is not None else None,
        ipv6_rdns=name_of(six, zones) if six is not None else None,
    )
