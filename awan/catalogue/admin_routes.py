"""The operator's side of the catalogue: `/admin/locations`, `/admin/tiers`, `/admin/sizes`, `/admin/templates`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

from fastapi import APIRouter, Depends
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import select
from sqlalchemy.orm import Session

from awan.accounts import Caller, idempotent, operator, replay
from awan.accounts.idempotency import IdempotentCall
from awan.catalogue import images, present, service
from awan.catalogue.models import (
    REQUIRED_ENGINES,
    Component,
    EngineKind,
    Location,
    LocationEngine,
    Price,
    Size,
    Template,
    TemplateImage,
    Tier,
)
from awan.catalogue.rules import COMPONENT_UNITS
from awan.catalogue.schemas import (
    AdminLocationView,
    AdminPriceView,
    AdminTierView,
    EngineSet,
    EngineView,
    ImageUpload,
    ImageView,
    LocationChange,
    LocationCreate,
    PriceSet,
    SizeCreate,
    SizeTemplateView,
    TemplateChange,
    TemplateCreate,
    TemplateView,
    TierChange,
    TierCreate,
)
from awan.errors import Invalid, NotFound
from awan.kit.database import transaction
from awan.kit.http import (
    Answer,
    EmptyForm,
    Envelope,
    OperationView,
    PathId,
    Request,
    answer,
    form_body,
    query_of,
)
from awan.kit.ids import new_id
from awan.kit.money import display_hourly
from awan.kit.uploads import save_body
from awan.operations import Operation, summary
from awan.settings import get_settings

Row = TypeVar("Row")

admin_router = APIRouter()


@admin_router.post("/locations", status_code=201, response_model=Envelope[AdminLocationView])
def create_location(
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: LocationCreate = Depends(form_body(LocationCreate)),
) -> Answer:
    """Add a location."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, _location(session, _again(session, Location, call)))
        location = service.create_location(session, caller, body.model_dump())
        view = _location(session, location)
        return call.keep(answer("Location created", view, status=201), location.location_id)


@admin_router.get("/locations", response_model=Envelope[list[AdminLocationView]])
def admin_list_locations(caller: Caller = Depends(operator("read"))) -> Answer:
    """List locations and their engines."""
    with transaction() as session:
        rows = service.list_locations(session, enabled_only=False)
        views = [_location(session, row) for row in rows]
    return answer("Locations", views)


@admin_router.patch("/locations/{location_id}", response_model=Envelope[AdminLocationView])
def change_location(
    location_id: PathId,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: LocationChange = Depends(form_body(LocationChange)),
) -> Answer:
    """Rename a location, or take it out of sale."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        location = _get(session, Location, location_id, "Location not found.")
        if call.earlier:
            return replay(call.earlier, _location(session, location))
        fields = body.model_dump(exclude_none=True)
        service.change(session, caller, location, fields, "location.changed")
        return call.keep(answer("Location changed", _location(session, location)), location_id)


@admin_router.put(
    "/locations/{location_id}/engines/{kind}", response_model=Envelope[AdminLocationView]
)
def set_engine(
    location_id: PathId,
    kind: EngineKind,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: EngineSet = Depends(form_body(EngineSet)),
) -> Answer:
    """Say which driver serves an engine of the location, and how to reach it."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        location = _get(session, Location, location_id, "Location not found.")
        if call.earlier:
            return replay(call.earlier, _location(session, location))
        service.set_engine(session, caller, location, kind, body.driver, body.options)
        return call.keep(answer("Engine set", _location(session, location)), location_id)


def _location(session: Session, row: Location) -> AdminLocationView:
    engines = session.scalars(
        select(LocationEngine)
        .where(LocationEngine.location_id == row.location_id)
        .order_by(LocationEngine.kind)
    ).all()
    has_all = {engine.kind for engine in engines} >= REQUIRED_ENGINES
    configured = {row.location_id} if has_all else set()
    return AdminLocationView(
        **present.show_location(row, configured).model_dump(),
        is_enabled=row.is_enabled,
        engines=[
            EngineView(kind=EngineKind(engine.kind), driver=engine.driver, options=engine.options)
            for engine in engines
        ],
    )


@admin_router.post("/tiers", status_code=201, response_model=Envelope[AdminTierView])
def create_tier(
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: TierCreate = Depends(form_body(TierCreate)),
) -> Answer:
    """Add a tier."""
    if not (body.offers_shared or body.offers_dedicated):
        raise Invalid.field("offers_shared", "A tier offers shared CPUs, dedicated ones, or both.")
    for limit in ("cpu", "memory_gib", "storage_gib"):
        if getattr(body, f"{limit}_min") > getattr(body, f"{limit}_max"):
            raise Invalid.field(
                f"{limit}_min", f"The {limit}_min must not be larger than the {limit}_max."
            )
    fields = body.model_dump(exclude={"location_ids", "memory_gib_min", "memory_gib_max"})
    fields["memory_mib_min"] = body.memory_gib_min * 1024
    fields["memory_mib_max"] = body.memory_gib_max * 1024
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, _tier(session, _again(session, Tier, call)))
        tier = service.create_tier(session, caller, fields, body.location_ids)
        return call.keep(answer("Tier created", _tier(session, tier), status=201), tier.tier_id)


@admin_router.get("/tiers", response_model=Envelope[list[AdminTierView]])
def admin_list_tiers(caller: Caller = Depends(operator("read"))) -> Answer:
    """List tiers, also those out of sale, with the prices that they lack."""
    with transaction() as session:
        rows = session.scalars(select(Tier).order_by(Tier.tier_id)).all()
        views = present.show_admin_tiers(session, rows)
    return answer("Tiers", views)


@admin_router.patch("/tiers/{tier_id}", response_model=Envelope[AdminTierView])
def change_tier(
    tier_id: PathId,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: TierChange = Depends(form_body(TierChange)),
) -> Answer:
    """Change a tier's text, ratios or locations."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        tier = _get(session, Tier, tier_id, "Tier not found.")
        if call.earlier:
            return replay(call.earlier, _tier(session, tier))
        if body.location_ids is not None:
            service.set_tier_locations(session, tier_id, body.location_ids)
        fields = body.model_dump(exclude_none=True, exclude={"location_ids"})
        service.change(session, caller, tier, fields, "tier.changed")
        return call.keep(answer("Tier changed", _tier(session, tier)), tier_id)


def _tier(session: Session, tier: Tier) -> AdminTierView:
    (view,) = present.show_admin_tiers(session, [tier])
    return view


@admin_router.post(
    "/tiers/{tier_id}/prices", status_code=201, response_model=Envelope[AdminPriceView]
)
def set_price(
    tier_id: PathId,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: PriceSet = Depends(form_body(PriceSet)),
) -> Answer:
    """Set a price from now on. What was sold before keeps its price."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, _price(_again(session, Price, call)))
        price = service.set_price(
            session, caller, tier_id, body.component, body.currency, body.monthly_minor
        )
        return call.keep(answer("Price set", _price(price), status=201), price.price_id)


def _price(row: Price) -> AdminPriceView:
    return AdminPriceView(
        component=row.component,
        unit=COMPONENT_UNITS[Component(row.component)],
        currency=row.currency,
        price_per_month=row.monthly_minor,
        price_per_hour=display_hourly(row.monthly_minor, row.currency),
    )


@admin_router.post("/sizes", status_code=201, response_model=Envelope[SizeTemplateView])
def create_size(
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: SizeCreate = Depends(form_body(SizeCreate)),
) -> Answer:
    """Add a size template."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, _size(session, caller, _again(session, Size, call)))
        size = service.create_size(
            session,
            caller,
            {
                "title": body.title,
                "cpu": body.cpu,
                "memory_gib": body.memory,
                "storage_gib": body.storage,
            },
        )
        view = _size(session, caller, size)
        return call.keep(answer("Size template created", view, status=201), size.size_id)


def _size(session: Session, caller: Caller, row: Size) -> SizeTemplateView:
    (view,) = present.show_sizes(session, [row], caller.currency)
    return view


@admin_router.delete("/sizes/{size_id}", response_model=Envelope[None])
def disable_size(
    size_id: PathId,
    request: Request,
    caller: Caller = Depends(operator("write")),
    _: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Take a size template out of the list."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, None)
        size = _get(session, Size, size_id, "Size template not found.")
        service.change(session, caller, size, {"is_enabled": False}, "size.disabled")
        return call.keep(answer("Size template removed", None), size_id)


@admin_router.post("/templates", status_code=201, response_model=Envelope[TemplateView])
def create_template(
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: TemplateCreate = Depends(form_body(TemplateCreate)),
) -> Answer:
    """Add a template; it is offered as soon as it has an image."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            return replay(call.earlier, _template(session, _again(session, Template, call)))
        template = service.create_template(session, caller, body.model_dump())
        view = _template(session, template)
        return call.keep(answer("Template created", view, status=201), template.template_id)


@admin_router.get("/templates", response_model=Envelope[list[TemplateView]])
def admin_list_templates(caller: Caller = Depends(operator("read"))) -> Answer:
    """List templates and their images."""
    with transaction() as session:
        rows = service.list_templates(session, on_sale_only=False)
        views = [_template(session, row) for row in rows]
    return answer("Templates", views)


@admin_router.patch("/templates/{template_id}", response_model=Envelope[TemplateView])
def change_template(
    template_id: PathId,
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: TemplateChange = Depends(form_body(TemplateChange)),
) -> Answer:
    """Take a template out of sale, or mark it deprecated."""
    with transaction() as session:
        call = idempotent(session, caller, request)
        template = _get(session, Template, template_id, "Template not found.")
        if call.earlier:
            return replay(call.earlier, _template(session, template))
        if template.removed_at is not None:
            raise NotFound("Template not found.")
        fields = body.model_dump(exclude_none=True)
        service.change(session, caller, template, fields, "template.changed")
        return call.keep(answer("Template changed", _template(session, template)), template_id)


def _template(session: Session, row: Template) -> TemplateView:
    return present.show_template(row, images.list_images(session, row.template_id))


@admin_router.post(
    "/templates/{template_id}/images",
    status_code=202,
    response_model=Envelope[ImageView],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            },
        }
    },
)
async def upload_image(
    template_id: PathId,
    request: Request,
    caller: Caller = Depends(operator("write")),
    query: ImageUpload = Depends(query_of(ImageUpload)),
) -> Answer:
    """Upload an image as the raw body; a worker checks it before it is used.

    Refused are files with a backing file, an external data file, another format than declared, or absurd sizes.
    """
    await run_in_threadpool(_check_template, template_id)
    image_id = new_id()
    path = images.incoming_path(image_id)
    sha256 = await save_body(request, path, max_bytes=get_settings().image_upload_max_bytes)
    # What tells this call from another one under the same Idempotency-Key.
    request.state.parsed_body = {**query.model_dump(mode="json"), "sha256": sha256}
    is_taken = False
    try:
        uploaded = await run_in_threadpool(
            _begin_import, request, caller, template_id, image_id, query
        )
        is_taken = uploaded.is_first
        return uploaded.answer
    finally:
        if not is_taken:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Uploaded:
    """What an upload is answered with, and whether its file is wanted (a repeat's is not)."""

    answer: Answer
    is_first: bool


def _check_template(template_id: int) -> None:
    """Before a large body is read. Raises: NotFound for a template that never was."""
    with transaction() as session:
        _get(session, Template, template_id, "Template not found.")


def _begin_import(
    request: Request, caller: Caller, template_id: int, image_id: UUID, query: ImageUpload
) -> _Uploaded:
    with transaction() as session:
        call = idempotent(session, caller, request)
        if call.earlier:
            earlier = session.get_one(TemplateImage, UUID(call.earlier.resource_id))
            started = session.get_one(Operation, call.earlier.operation_id)
            again = replay(call.earlier, present.show_image(earlier), operation=_shown(started))
            return _Uploaded(again, is_first=False)
        image, operation = images.begin_import(
            session,
            caller,
            template_id=template_id,
            image_id=image_id,
            declared_format=query.format,
            has_agent=query.has_agent,
        )
        view = present.show_image(image)
        begun = answer("Image is being checked", view, status=202, operation=_shown(operation))
        return _Uploaded(call.keep(begun, image_id), is_first=True)


def _shown(operation: Operation) -> OperationView:
    return OperationView(**summary(operation))


def _again(session: Session, model: type[Row], call: IdempotentCall) -> Row:
    """The row that an earlier call with the same key made."""
    assert call.earlier is not None
    return session.get_one(model, int(call.earlier.resource_id or 0))


def _get(session: Session, model: type[Row], key: int, missing: str) -> Row:
    row = session.get(model, key)
    if row is None:
        raise NotFound(missing)
    return row
