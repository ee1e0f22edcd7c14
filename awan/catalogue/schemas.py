"""Wire shapes of the catalogue."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from awan.catalogue.models import Component, EngineKind, OsFamily
from awan.kit.forms import Matching
from awan.kit.http import Timestamp


class Form(BaseModel):
    """A body that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid")


class LocationFilter(Form):
    """Only what is offered in a location."""

    location_id: int | None = Field(None, ge=1, description="Id of location.")


class SystemsFilter(Form):
    """Only what is offered in a location."""

    location: int | None = Field(None, ge=1, description="Id of location.")


class SizePrice(BaseModel):
    """What a size costs in a tier, with shared CPUs where offered."""

    tier_id: int
    per_hour: str
    per_month: int


class SizeTemplateView(BaseModel):
    """A suggested size. `total_ram` and `total_disk` in GiB."""

    id: int
    title: str
    total_cpu: int
    total_ram: int
    total_disk: int
    prices: list[SizePrice]
    created_at: Timestamp
    updated_at: Timestamp


class VersionView(BaseModel):
    """A version of a system. `min_memory` and `min_storage` in GiB."""

    template_id: int
    name: str
    min_cpu: int
    min_memory: int
    min_storage: int
    default_username: str
    license_per_month: int
    deprecated: bool


class SystemView(BaseModel):
    """A system and its versions."""

    id: int
    name: str
    family: str
    logo: str
    versions: list[VersionView]


class LocationView(BaseModel):
    """A data centre."""

    id: int
    name: str
    code: str
    country: str
    is_default: bool
    available: bool = Field(description="Whether all its engines are configured.")


class Limit(BaseModel):
    """Bounds and step of an input."""

    min: int
    max: int
    step: int


class TierLimits(BaseModel):
    """Bounds of what may be ordered: vCPUs, GiB, GiB."""

    cpu: Limit
    memory: Limit
    storage: Limit


class TierView(BaseModel):
    """A class of servers."""

    id: int
    name: str
    description: str
    cpu_model: str
    offers_shared: bool
    offers_dedicated: bool
    limits: TierLimits
    available: bool
    location_ids: list[int]


class AdminTierView(TierView):
    """A tier for the operator."""

    unpriced: dict[str, list[Component]] = Field(
        description="Currency in which something of the tier has a price -> what has none yet. Instances are sold in"
        " currencies where nothing is left; either kind of CPU can be without one where the other is to be sold alone.",
        examples=[{"IDR": [], "USD": ["storage", "public_ip"]}],
    )


class PriceView(BaseModel):
    """The price of one unit of a component."""

    component: str
    unit: str
    price_per_month: int
    price_per_hour: str


class LocationCreate(Form):
    """A new location."""

    name: str = Field(min_length=1, max_length=64)
    code: Annotated[
        str,
        Matching(
            r"^[a-z][a-z0-9-]{1,15}$",
            "The code must be 2 to 16 lower-case letters, digits and -, with a letter first.",
        ),
    ]
    country: Annotated[
        str, Matching(r"^[A-Z]{2}$", "The country must be two capital letters, as in ISO 3166.")
    ] = Field(description="ISO 3166 code.")
    is_default: bool = False


class LocationChange(Form):
    """What may change."""

    name: str | None = Field(None, min_length=1, max_length=64)
    is_enabled: bool | None = None


class EngineSet(Form):
    """A driver and its options."""

    driver: str = Field(min_length=1, max_length=32)
    options: dict[str, Any] = Field(default_factory=dict)


class EngineView(BaseModel):
    """An engine of a location."""

    kind: EngineKind
    driver: str
    options: dict[str, Any]


class AdminLocationView(LocationView):
    """A location for the operator."""

    is_enabled: bool
    engines: list[EngineView]


class TierCreate(Form):
    """A new tier. Memory in GiB, storage in GiB, ratios in percent."""

    name: str = Field(min_length=1, max_length=64)
    description: str = Field("", max_length=255)
    cpu_model: str = Field(min_length=1, max_length=64)
    offers_shared: bool = True
    offers_dedicated: bool = False
    cpu_min: int = Field(1, ge=1, le=256)
    cpu_max: int = Field(16, ge=1, le=256)
    memory_gib_min: int = Field(1, ge=1, le=1024)
    memory_gib_max: int = Field(64, ge=1, le=1024)
    storage_gib_min: int = Field(20, ge=1, le=16384)
    storage_gib_max: int = Field(1000, ge=1, le=16384)
    storage_gib_step: int = Field(10, ge=1, le=1024)
    cpu_overcommit_percent: int = Field(400, ge=100, le=1600)
    memory_overcommit_percent: int = Field(100, ge=50, le=200)
    storage_overcommit_percent: int = Field(100, ge=50, le=1000)
    location_ids: list[int] = Field(default_factory=list, max_length=100)


class TierChange(Form):
    """What may change; instances that exist keep what they have."""

    description: str | None = Field(None, max_length=255)
    is_enabled: bool | None = None
    cpu_overcommit_percent: int | None = Field(None, ge=100, le=1600)
    memory_overcommit_percent: int | None = Field(None, ge=50, le=200)
    storage_overcommit_percent: int | None = Field(None, ge=50, le=1000)
    location_ids: list[int] | None = Field(None, max_length=100)


class PriceSet(Form):
    """A price from now on, in minor units of the currency a month."""

    component: Component
    currency: Annotated[
        str, Matching(r"^[A-Z]{3}$", "The currency must be three capital letters, as in ISO 4217.")
    ] = "IDR"
    monthly_minor: int = Field(ge=0, le=10**12)


class AdminPriceView(PriceView):
    """A price as stored."""

    currency: str


class SizeCreate(Form):
    """A new size template. Memory and storage in GiB."""

    title: str = Field(min_length=1, max_length=64)
    cpu: int = Field(ge=1, le=256)
    memory: int = Field(ge=1, le=1024)
    storage: int = Field(ge=1, le=16384)


class TemplateCreate(Form):
    """A new template, without an image yet."""

    name: str = Field(min_length=1, max_length=64)
    version: str = Field(min_length=1, max_length=64)
    family: OsFamily = OsFamily.LINUX
    logo: str = Field("", max_length=255)
    default_username: str = Field("root", min_length=1, max_length=30)
    cpu_min: int = Field(1, ge=1, le=256)
    memory_mib_min: int = Field(512, ge=64, le=1024 * 1024)
    storage_gib_min: int = Field(1, ge=1, le=16384)
    license_monthly_minor: int = Field(0, ge=0, le=10**12)


class TemplateChange(Form):
    """What may change."""

    is_enabled: bool | None = None
    is_deprecated: bool | None = None


class ImageView(BaseModel):
    """A build of a template. Sizes in bytes."""

    uuid: str
    state: str
    format: str | None
    sha256: str | None
    size_bytes: int | None
    virtual_size_bytes: int | None
    has_agent: bool
    refusal: str | None
    created_at: Timestamp


class TemplateView(BaseModel):
    """A template for the operator."""

    id: int
    name: str
    version: str
    family: str
    default_username: str
    cpu_min: int
    memory_mib_min: int
    storage_gib_min: int
    license_monthly_minor: int
    is_enabled: bool
    is_deprecated: bool
    images: list[ImageView]


class ImageUpload(Form):
    """How the uploaded bytes are to be read."""

    format: Literal["qcow2", "raw"] = Field(
        "qcow2", description="Checked; a file that lies is refused."
    )
    has_agent: bool = Field(True, description="Whether the guest answers by qemu-guest-agent.")
