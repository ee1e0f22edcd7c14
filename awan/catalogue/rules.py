"""Arithmetic of prices. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from awan.catalogue.models import Component

COMPONENT_UNITS: dict[Component, str] = {
    Component.CPU_SHARED: "vCPU",
    Component.CPU_DEDICATED: "vCPU",
    Component.MEMORY: "GiB",
    Component.STORAGE: "GiB",
    Component.SNAPSHOT: "GiB",
    Component.BACKUP: "GiB",
    Component.PUBLIC_IP: "address",
    Component.LICENSE: "vCPU",
}


@dataclass(frozen=True)
class PriceTag:
    """A price as sold: `monthly_minor` minor units of `currency` a month for one unit of the component."""

    component: Component
    currency: str
    monthly_minor: int
    price_id: int | None


@dataclass(frozen=True)
class PricedItem:
    """A quantity of a component at a price."""

    tag: PriceTag
    quantity: int

    @property
    def monthly_minor(self) -> int:
        """Price of the whole quantity a month, in minor units."""
        return self.tag.monthly_minor * self.quantity


def instance_items(
    prices: Mapping[Component, PriceTag],
    *,
    dedicated: bool,
    vcpus: int,
    memory_gib: int,
    storage_gib: int,
    license_monthly_minor: int,
) -> tuple[PricedItem, ...]:
    """What an instance of this size is billed for; a licence only when it costs something.

    Raises: KeyError when the tier lacks a price (`is_priced` tells beforehand).
    """
    cpu = prices[Component.CPU_DEDICATED if dedicated else Component.CPU_SHARED]
    items = [
        PricedItem(cpu, vcpus),
        PricedItem(prices[Component.MEMORY], memory_gib),
        PricedItem(prices[Component.STORAGE], storage_gib),
    ]
    if license_monthly_minor > 0:
        tag = PriceTag(Component.LICENSE, cpu.currency, license_monthly_minor, None)
        items.append(PricedItem(tag, vcpus))
    return tuple(items)


def is_priced(prices: Mapping[Component, PriceTag], *, dedicated: bool) -> bool:
    """Whether the tier has every price that an instance needs."""
    return not unpriced(prices, shared=not dedicated, dedicated=dedicated)


def unpriced(priced: Collection[Component], *, shared: bool, dedicated: bool) -> list[Component]:
    """What a tier with these kinds of CPU needs a price of, beside what has one."""
    needed = {
        Component.CPU_SHARED: shared,
        Component.CPU_DEDICATED: dedicated,
        Component.MEMORY: True,
        Component.STORAGE: True,
        Component.PUBLIC_IP: True,
    }
    return [component for component in needed if needed[component] and component not in priced]


def total_monthly_minor(items: tuple[PricedItem, ...]) -> int:
    """Sum of the items, in minor units a month."""
    return sum(item.monthly_minor for item in items)
