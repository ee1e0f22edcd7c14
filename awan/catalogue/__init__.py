"""Catalogue: what is sold, where, and at what price."""

from awan.catalogue.models import Component
from awan.catalogue.rules import PricedItem, PriceTag
from awan.catalogue.service import (
    check_location,
    configured_locations,
    engines,
    find_tier,
    image_source,
    lock_newest_image,
)

__all__ = [
    "Component",
    "PriceTag",
    "PricedItem",
    "check_location",
    "configured_locations",
    "engines",
    "find_tier",
    "image_source",
    "lock_newest_image",
]
