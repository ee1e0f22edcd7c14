"""`/pricing` and the size templates: operations 1 and 74 to 77 of the public API."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from awan.accounts import Caller, authenticated
from awan.catalogue import present, service
from awan.catalogue.schemas import (
    LocationFilter,
    LocationView,
    PriceView,
    SizeTemplateView,
    SystemsFilter,
    SystemView,
    TierView,
)
from awan.errors import NotFound
from awan.kit.database import transaction
from awan.kit.http import Answer, Envelope, PathId, answer, query_of

CACHE = "private, max-age=60"

router = APIRouter(prefix="/pricing", tags=["Pricing"])
sizes_router = APIRouter(prefix="/instances", tags=["Instance"])


def _cached(built: Answer) -> Answer:
    built.headers["cache-control"] = CACHE
    return built


@sizes_router.get("/size-templates", response_model=Envelope[list[SizeTemplateView]])
def list_size_templates(caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get instance size template."""
    with transaction() as session:
        views = present.show_sizes(session, service.list_sizes(session), caller.currency)
    return answer("VM size templates", views)


@router.get("/systems", response_model=Envelope[list[SystemView]])
def list_systems(
    caller: Caller = Depends(authenticated("read")),
    query: SystemsFilter = Depends(query_of(SystemsFilter)),
) -> Answer:
    """Get available systems."""
    with transaction() as session:
        if query.location is not None:
            service.check_location(session, query.location, field="location")
        views = present.show_systems(service.list_templates(session))
    return _cached(answer("Available Systems", views))


@router.get("/locations", response_model=Envelope[list[LocationView]])
def list_locations(caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get locations."""
    with transaction() as session:
        configured = set(service.configured_locations(session))
        views = [present.show_location(row, configured) for row in service.list_locations(session)]
    return _cached(answer("Daftar lokasi data center", views))


@router.get("/tiers", response_model=Envelope[list[TierView]])
def list_tiers(
    caller: Caller = Depends(authenticated("read")),
    query: LocationFilter = Depends(query_of(LocationFilter)),
) -> Answer:
    """Get tiers."""
    with transaction() as session:
        if query.location_id is not None:
            service.check_location(session, query.location_id)
        offered = service.tier_locations(session)
        views = [
            present.show_tier(tier, offered.get(tier.tier_id, []))
            for tier in service.list_tiers(session, query.location_id)
        ]
    return _cached(answer("Tier list", views))


@router.get("/tiers/{tier_id}", response_model=Envelope[list[PriceView]])
def list_tier_prices(tier_id: PathId, caller: Caller = Depends(authenticated("read"))) -> Answer:
    """Get tier pricing."""
    with transaction() as session:
        if service.find_tier(session, tier_id) is None:
            raise NotFound("Tier not found.")
        prices = service.current_prices(session, tier_id, caller.currency)
    return _cached(answer("Pricing list", present.show_prices(prices, caller.currency)))
