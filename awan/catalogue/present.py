"""The catalogue as the API shows it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy.orm import Session

from awan.catalogue import service
from awan.catalogue.models import Component, Location, Size, Template, TemplateImage, Tier
from awan.catalogue.rules import (
    COMPONENT_UNITS,
    PriceTag,
    instance_items,
    is_priced,
    total_monthly_minor,
    unpriced,
)
from awan.catalogue.schemas import (
    AdminTierView,
    ImageView,
    Limit,
    LocationView,
    PriceView,
    SizePrice,
    SizeTemplateView,
    SystemView,
    TemplateView,
    TierLimits,
    TierView,
    VersionView,
)
from awan.kit.money import display_hourly


def show_sizes(session: Session, sizes: Sequence[Size], currency: str) -> list[SizeTemplateView]:
    """Sizes, each with its price in every tier whose limits allow it."""
    tiers = service.list_tiers(session)
    prices = service.all_current_prices(session, currency)
    views = []
    for size in sizes:
        offers = []
        for tier in tiers:
            tags = prices.get(tier.tier_id, {})
            dedicated = not tier.offers_shared
            fits = (
                tier.cpu_min <= size.cpu <= tier.cpu_max
                and tier.memory_mib_min <= size.memory_gib * 1024 <= tier.memory_mib_max
                and tier.storage_gib_min <= size.storage_gib <= tier.storage_gib_max
            )
            if fits and is_priced(tags, dedicated=dedicated):
                items = instance_items(
                    tags,
                    dedicated=dedicated,
                    vcpus=size.cpu,
                    memory_gib=size.memory_gib,
                    storage_gib=size.storage_gib,
                    license_monthly_minor=0,
                )
                monthly = total_monthly_minor(items)
                offers.append(
                    SizePrice(
                        tier_id=tier.tier_id,
                        per_hour=display_hourly(monthly, currency),
                        per_month=monthly,
                    )
                )
        views.append(
            SizeTemplateView(
                id=size.size_id,
                title=size.title,
                total_cpu=size.cpu,
                total_ram=size.memory_gib,
                total_disk=size.storage_gib,
                prices=offers,
                created_at=size.created_at,
                updated_at=size.updated_at,
            )
        )
    return views


def show_systems(templates: Sequence[Template]) -> list[SystemView]:
    """Templates grouped by name; a system's id is that of its first template."""
    systems: dict[str, SystemView] = {}
    for row in templates:
        system = systems.setdefault(
            row.name,
            SystemView(
                id=row.template_id, name=row.name, family=row.family, logo=row.logo, versions=[]
            ),
        )
        system.versions.append(
            VersionView(
                template_id=row.template_id,
                name=row.version,
                min_cpu=row.cpu_min,
                min_memory=-(-row.memory_mib_min // 1024),
                min_storage=row.storage_gib_min,
                default_username=row.default_username,
                license_per_month=row.license_monthly_minor,
                deprecated=row.is_deprecated,
            )
        )
    return list(systems.values())


def show_location(row: Location, configured: Collection[int]) -> LocationView:
    """A location; available when all its engines are configured."""
    return LocationView(
        id=row.location_id,
        name=row.name,
        code=row.code,
        country=row.country,
        is_default=row.is_default,
        available=row.is_enabled and row.location_id in configured,
    )


def show_tier(row: Tier, location_ids: list[int]) -> TierView:
    """A tier with its limits in the units of input."""
    return TierView(
        id=row.tier_id,
        name=row.name,
        description=row.description,
        cpu_model=row.cpu_model,
        offers_shared=row.offers_shared,
        offers_dedicated=row.offers_dedicated,
        limits=TierLimits(
            cpu=Limit(min=row.cpu_min, max=row.cpu_max, step=1),
            memory=Limit(
                min=-(-row.memory_mib_min // 1024), max=row.memory_mib_max // 1024, step=1
            ),
            storage=Limit(
                min=row.storage_gib_min, max=row.storage_gib_max, step=row.storage_gib_step
            ),
        ),
        available=bool(location_ids),
        location_ids=location_ids,
    )


def show_admin_tiers(session: Session, rows: Sequence[Tier]) -> list[AdminTierView]:
    """Tiers for the operator: where they are offered, and which prices they lack."""
    offered = service.tier_locations(session)
    priced = service.priced_components(session)
    return [
        AdminTierView(
            **dict(show_tier(row, offered.get(row.tier_id, []))),
            unpriced={
                currency: unpriced(
                    components, shared=row.offers_shared, dedicated=row.offers_dedicated
                )
                for currency, components in priced.get(row.tier_id, {}).items()
            },
        )
        for row in rows
    ]


def show_prices(prices: Mapping[Component, PriceTag], currency: str) -> list[PriceView]:
    """Prices in the order of the components."""
    return [
        PriceView(
            component=component,
            unit=COMPONENT_UNITS[component],
            price_per_month=prices[component].monthly_minor,
            price_per_hour=display_hourly(prices[component].monthly_minor, currency),
        )
        for component in Component
        if component in prices
    ]


def show_template(row: Template, images: Sequence[TemplateImage]) -> TemplateView:
    """A template and its builds, newest first, for the operator."""
    return TemplateView(
        id=row.template_id,
        name=row.name,
        version=row.version,
        family=row.family,
        default_username=row.default_username,
        cpu_min=row.cpu_min,
        memory_mib_min=row.memory_mib_min,
        storage_gib_min=row.storage_gib_min,
        license_monthly_minor=row.license_monthly_minor,
        is_enabled=row.is_enabled,
        is_deprecated=row.is_deprecated,
        images=[show_image(image) for image in images],
    )


def show_image(row: TemplateImage) -> ImageView:
    """A build."""
    return ImageView(
        uuid=str(row.image_id),
        state=row.state,
        format=row.format,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        virtual_size_bytes=row.virtual_size_bytes,
        has_agent=row.has_agent,
        refusal=row.refusal,
        created_at=row.created_at,
    )
