"""Verbs of the catalogue. The caller holds the transaction."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import and_, bindparam, false, func, select, text, true, union_all
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.catalogue.models import (
    REQUIRED_ENGINES,
    Component,
    EngineKind,
    ImageState,
    Location,
    LocationEngine,
    Price,
    Size,
    Template,
    TemplateImage,
    Tier,
    TierLocation,
)
from awan.catalogue.rules import PriceTag
from awan.engines.nameserver import Zones
from awan.engines.registry import (
    LocationEngines,
    PrivateNamesOptions,
    check_options,
    open_engines,
    secret_options,
)
from awan.engines.volumes import ImageSource
from awan.errors import Conflict, Invalid, NotFound, Unavailable
from awan.events import record
from awan.kit.clock import now
from awan.kit.money import minor_digits
from awan.kit.resolving import split_server
from awan.kit.secrets import delete_secret, get_secret, put_secret
from awan.settings import get_settings

ENGINE_PURPOSE = "engine.options"

# Every creation of an instance asks these; built once, because building them takes longer than sending them.
_OFFER = (
    select(Location, Tier, LocationEngine)
    .outerjoin(LocationEngine, LocationEngine.location_id == Location.location_id)
    .outerjoin(
        TierLocation,
        and_(
            TierLocation.location_id == Location.location_id,
            TierLocation.tier_id == bindparam("tier"),
        ),
    )
    .outerjoin(Tier, and_(Tier.tier_id == TierLocation.tier_id, Tier.is_enabled))
    .where(Location.location_id == bindparam("location"), Location.is_enabled)
)
_NEWEST = (
    select(Template, TemplateImage)
    .join(TemplateImage, TemplateImage.template_id == Template.template_id)
    .where(
        Template.template_id == bindparam("template"),
        Template.is_enabled,
        TemplateImage.state == ImageState.READY,
    )
    .order_by(TemplateImage.created_at.desc())
    .limit(1)
    .with_for_update(read=True, key_share=True, of=TemplateImage)
)
_PRICE = (Price.component, Price.currency, Price.monthly_minor, Price.price_id)
_PRICES = (
    select(*_PRICE)
    .where(
        Price.tier_id == bindparam("tier"),
        Price.currency == bindparam("currency"),
        Price.valid_from <= func.now(),
    )
    .ext(distinct_on(Price.component))
    .order_by(Price.component, Price.valid_from.desc())
)
_FIRST_PRICE = (
    select(*_PRICE)
    .join(TierLocation, TierLocation.tier_id == Price.tier_id)
    .where(
        TierLocation.location_id == bindparam("location"),
        Price.component == bindparam("component"),
        Price.currency == bindparam("currency"),
        Price.valid_from <= func.now(),
    )
    .order_by(Price.tier_id, Price.valid_from.desc())
    .limit(1)
)
_ORDER_PRICES = union_all(
    _PRICES.add_columns(false().label("is_of_address")),
    _FIRST_PRICE.add_columns(true().label("is_of_address")),
)
_LOCK_ZONES = text("SELECT pg_advisory_xact_lock(hashtext('awan.zones'))")
_ENGINES = select(LocationEngine).where(LocationEngine.location_id == bindparam("location"))


class EngineRow(NamedTuple):
    """What opening an engine takes of its row, for who has read columns and no `LocationEngine`."""

    kind: str
    driver: str
    options: dict[str, Any]
    secret_id: UUID | None


@dataclass(frozen=True)
class EngineOutline:
    """What is told of a location's engines without opening one.

    `volumes_driver` keeps its disks; `zones` has the names of its addresses, None without a nameserver.
    """

    volumes_driver: str
    zones: Zones | None


@dataclass(frozen=True)
class Offer:
    """An enabled location as a creation finds it; the tier is None unless it is enabled and offered there."""

    location: Location
    tier: Tier | None
    engine_rows: Sequence[LocationEngine]

    def outline(self) -> EngineOutline:
        """What is told of the location's engines. Raises: Unavailable while one of them is not configured."""
        by_kind = {row.kind: row for row in self.engine_rows}
        _refuse_if_missing(by_kind)
        nameserver = by_kind.get(EngineKind.NAMESERVER)
        return EngineOutline(
            by_kind[EngineKind.VOLUMES].driver,
            _zones(nameserver.options) if nameserver is not None else None,
        )


def list_locations(session: Session, *, enabled_only: bool = True) -> Sequence[Location]:
    """Locations by id."""
    query = select(Location).order_by(Location.location_id)
    return session.scalars(query.where(Location.is_enabled) if enabled_only else query).all()


def find_location(session: Session, location_id: int) -> Location | None:
    """An enabled location, or None."""
    location = session.get(Location, location_id) if location_id < 2**63 else None
    return location if location is not None and location.is_enabled else None


def check_location(session: Session, location_id: int, field: str = "location_id") -> Location:
    """An enabled location. Raises: Invalid on `field` when there is none."""
    location = find_location(session, location_id)
    if location is None:
        raise Invalid.field(field, "The selected location is invalid.")
    return location


def list_tiers(session: Session, location_id: int | None = None) -> Sequence[Tier]:
    """Enabled tiers by id, of one location when given."""
    query = select(Tier).where(Tier.is_enabled).order_by(Tier.tier_id)
    if location_id is not None:
        query = query.join(TierLocation).where(TierLocation.location_id == location_id)
    return session.scalars(query).all()


def tier_locations(session: Session) -> dict[int, list[int]]:
    """Tier id -> ids of the enabled locations that offer it."""
    rows = session.execute(
        select(TierLocation.tier_id, TierLocation.location_id)
        .join(Location, Location.location_id == TierLocation.location_id)
        .where(Location.is_enabled)
        .order_by(TierLocation.tier_id, TierLocation.location_id)
    )
    found: dict[int, list[int]] = {}
    for tier_id, location_id in rows:
        found.setdefault(tier_id, []).append(location_id)
    return found


def find_tier(session: Session, tier_id: int) -> Tier | None:
    """An enabled tier, or None."""
    tier = session.get(Tier, tier_id) if tier_id < 2**63 else None
    return tier if tier is not None and tier.is_enabled else None


def find_offer(session: Session, location_id: int, tier_id: int) -> Offer | None:
    """What is offered in a location, in one statement; None where there is no enabled location."""
    if location_id >= 2**63:
        return None
    # No tier has the number 0.
    wanted = {"location": location_id, "tier": tier_id if tier_id < 2**63 else 0}
    rows = session.execute(_OFFER, wanted).all()
    if not rows:
        return None
    location, tier, _ = rows[0]
    return Offer(location, tier, [engine for *_, engine in rows if engine is not None])


def current_prices(session: Session, tier_id: int, currency: str) -> dict[Component, PriceTag]:
    """The prices of a tier that are valid now, by component."""
    rows = session.execute(_PRICES, {"tier": tier_id, "currency": currency})
    return {Component(row.component): _tag(row) for row in rows}


def order_prices(
    session: Session, location_id: int, tier_id: int, currency: str
) -> tuple[dict[Component, PriceTag], PriceTag | None]:
    """What `current_prices` gives, and `first_price` of a public address in the location, in one statement."""
    wanted = {"tier": tier_id, "location": location_id, "component": Component.PUBLIC_IP}
    rows = session.execute(_ORDER_PRICES, {**wanted, "currency": currency}).all()
    of_tier = {Component(row.component): _tag(row) for row in rows if not row.is_of_address}
    return of_tier, next((_tag(row) for row in rows if row.is_of_address), None)


def all_current_prices(session: Session, currency: str) -> dict[int, dict[Component, PriceTag]]:
    """Tier id -> its valid prices, in one query."""
    rows = session.scalars(
        select(Price)
        .where(Price.currency == currency, Price.valid_from <= func.now())
        .ext(distinct_on(Price.tier_id, Price.component))
        .order_by(Price.tier_id, Price.component, Price.valid_from.desc())
    )
    found: dict[int, dict[Component, PriceTag]] = {}
    for row in rows:
        found.setdefault(row.tier_id, {})[Component(row.component)] = _tag(row)
    return found


def priced_components(session: Session) -> dict[int, dict[str, set[Component]]]:
    """Tier id -> currency -> what has a price there now, in one query."""
    rows = session.execute(
        select(Price.tier_id, Price.currency, Price.component)
        .where(Price.valid_from <= func.now())
        .distinct()
        .order_by(Price.currency)
    )
    found: dict[int, dict[str, set[Component]]] = {}
    for tier_id, currency, component in rows:
        found.setdefault(tier_id, {}).setdefault(currency, set()).add(Component(component))
    return found


def first_price(
    session: Session, location_id: int, component: Component, currency: str
) -> PriceTag | None:
    """What the component costs now in the first tier of the location that prices it; None when none does."""
    wanted = {"location": location_id, "component": component, "currency": currency}
    row = session.execute(_FIRST_PRICE, wanted).first()
    return _tag(row) if row is not None else None


def _tag(row: Any) -> PriceTag:
    return PriceTag(Component(row.component), row.currency, row.monthly_minor, row.price_id)


def list_templates(session: Session, *, on_sale_only: bool = True) -> Sequence[Template]:
    """Templates by id, without removed ones; those on sale are enabled and have a ready image."""
    query = select(Template).where(Template.removed_at.is_(None)).order_by(Template.template_id)
    ready = select(TemplateImage.image_id).where(
        TemplateImage.template_id == Template.template_id, TemplateImage.state == ImageState.READY
    )
    return session.scalars(
        query.where(Template.is_enabled, ready.exists()) if on_sale_only else query
    ).all()


def lock_newest_image(
    session: Session, template_id: int
) -> tuple[Template, TemplateImage] | tuple[None, None]:
    """An enabled template and the image that a new instance gets; None of both without a ready one.

    The image is locked against its removal (FOR KEY SHARE) until the transaction ends.
    """
    row = (
        session.execute(_NEWEST, {"template": template_id}).first() if template_id < 2**63 else None
    )
    return (row[0], row[1]) if row is not None else (None, None)


def stored_path(sha256: str) -> Path:
    """Where the control plane keeps an image that was found good."""
    return get_settings().image_dir / f"{sha256}.qcow2"


def image_source(image: TemplateImage) -> ImageSource:
    """Where the control plane keeps a ready image. Raises: NotFound when it is not one any more."""
    if image.state != ImageState.READY:
        raise NotFound("The template image is not available.")
    assert image.sha256 is not None
    assert image.size_bytes is not None
    assert image.virtual_size_bytes is not None
    return ImageSource(
        path=stored_path(image.sha256),
        sha256=image.sha256,
        format="qcow2",
        size_bytes=image.size_bytes,
        virtual_size_bytes=image.virtual_size_bytes,
    )


def engines(session: Session, location_id: int) -> LocationEngines:
    """The opened engines of a location. Raises: Unavailable while one is not configured."""
    return open_engines(location_id, _engine_rows(session, location_id))


def engines_of(
    session: Session, location_id: int, rows: Iterable[LocationEngine | EngineRow | None]
) -> LocationEngines:
    """As `engines`, of a location whose rows were all read with something else, by an outer join (None: none)."""
    return open_engines(location_id, _checked(session, [row for row in rows if row is not None]))


def find_zones(session: Session, location_id: int) -> Zones | None:
    """The zones of the names of a location's addresses; None where it has no nameserver."""
    nameserver = session.get(LocationEngine, (location_id, EngineKind.NAMESERVER))
    return _zones(nameserver.options) if nameserver is not None else None


def _engine_rows(session: Session, location_id: int) -> dict[str, tuple[str, dict[str, Any]]]:
    return _checked(session, session.scalars(_ENGINES, {"location": location_id}).all())


def _checked(
    session: Session, rows: Sequence[LocationEngine | EngineRow]
) -> dict[str, tuple[str, dict[str, Any]]]:
    found = {row.kind: (row.driver, _with_secrets(session, row)) for row in rows}
    _refuse_if_missing(found)
    return found


def _refuse_if_missing(found: Collection[str]) -> None:
    missing = {kind.value for kind in REQUIRED_ENGINES} - set(found)
    if missing:
        raise Unavailable(f"The location has no {' and no '.join(sorted(missing))} engine yet.")


def _with_secrets(session: Session, row: LocationEngine | EngineRow) -> dict[str, Any]:
    if row.secret_id is None:
        return row.options
    hidden: dict[str, Any] = json.loads(get_secret(session, row.secret_id, ENGINE_PURPOSE))
    return {**row.options, **hidden}


def all_zones(session: Session) -> dict[int, Zones]:
    """Location id -> the zones of its addresses' names, where it has a nameserver."""
    rows = session.scalars(
        select(LocationEngine).where(LocationEngine.kind == EngineKind.NAMESERVER)
    )
    return {row.location_id: _zones(row.options) for row in rows}


def _zones(options: Mapping[str, Any]) -> Zones:
    """Those that a nameserver's stored options name."""
    return Zones(
        options["forward_zone"],
        tuple(options["reverse_zones"]),
        (options.get("private_names") or {}).get("zone"),
    )


def private_names_options(
    session: Session, location_id: int, *, is_locked: bool = False
) -> PrivateNamesOptions | None:
    """How names inside the private networks of a location are had; None where they have none.

    `is_locked`: whoever else asks so waits for the end of this transaction.
    """
    query = select(LocationEngine.options).where(
        LocationEngine.location_id == location_id, LocationEngine.kind == EngineKind.NAMESERVER
    )
    options = session.scalar(query.with_for_update() if is_locked else query)
    found = (options or {}).get("private_names")
    return PrivateNamesOptions.model_validate(found) if found is not None else None


def configured_locations(session: Session) -> list[int]:
    """Ids of the locations that have all the engines they need."""
    return list(
        session.scalars(
            select(LocationEngine.location_id)
            .where(LocationEngine.kind.in_(REQUIRED_ENGINES))
            .group_by(LocationEngine.location_id)
            .having(func.count() == len(REQUIRED_ENGINES))
            .order_by(LocationEngine.location_id)
        )
    )


def list_sizes(session: Session) -> Sequence[Size]:
    """Enabled size templates by id."""
    return session.scalars(select(Size).where(Size.is_enabled).order_by(Size.size_id)).all()


def create_location(session: Session, caller: Caller, fields: Mapping[str, Any]) -> Location:
    """A new location. Raises: Conflict when name or code is taken."""
    if fields.get("is_default"):
        for other in list_locations(session, enabled_only=False):
            other.is_default = False
        session.flush()
    location = Location(**fields)
    _add(session, location, "A location of this name or code exists.")
    _note(session, caller, "location.created", location_id=location.location_id)
    return location


def set_engine(
    session: Session,
    caller: Caller,
    location: Location,
    kind: EngineKind,
    driver: str,
    options: Mapping[str, Any],
) -> None:
    """Which driver serves an engine of the location. Raises: Invalid (driver or options)."""
    shown = check_options(kind, driver, options)
    hidden = {name: shown.pop(name) for name in sorted(secret_options(kind, driver))}
    key = location.location_id
    if kind is EngineKind.NAMESERVER:
        _refuse_shared_zones(session, location, shown)
    row = session.get(LocationEngine, (key, kind), with_for_update=True)
    if row is None:
        row = LocationEngine(location_id=key, kind=kind)
        session.add(row)
    old, row.secret_id = row.secret_id, None
    row.driver, row.options = driver, shown
    if hidden:
        secret_id = put_secret(session, ENGINE_PURPOSE, json.dumps(hidden))
        session.flush()
        row.secret_id = secret_id
    session.flush()
    if old is not None:
        delete_secret(session, old)
    _note(session, caller, "location.engine_set", location_id=key, engine=kind, driver=driver)


def _refuse_shared_zones(session: Session, location: Location, options: Mapping[str, Any]) -> None:
    """Raises: Invalid when another location has a zone at the same address and port: each would take its records for
    strays.
    """
    session.execute(_LOCK_ZONES)
    if "server" not in options:
        return
    server, wanted = split_server(options["server"]), set(_zones(options).all)
    for name, others in session.execute(
        select(Location.name, LocationEngine.options)
        .join(LocationEngine, LocationEngine.location_id == Location.location_id)
        .where(
            LocationEngine.kind == EngineKind.NAMESERVER,
            LocationEngine.location_id != location.location_id,
        )
    ):
        shared = wanted.intersection(_zones(others).all)
        if shared and "server" in others and split_server(others["server"]) == server:
            raise Invalid.field(
                "options", f"The zone {min(shared)} is that of the location {name} at this server."
            )


def create_tier(
    session: Session, caller: Caller, fields: Mapping[str, Any], location_ids: list[int]
) -> Tier:
    """A new tier, offered in the given locations. Raises: Invalid, Conflict."""
    tier = Tier(**fields)
    _add(session, tier, "A tier of this name exists.")
    set_tier_locations(session, tier.tier_id, location_ids)
    _note(session, caller, "tier.created", tier_id=tier.tier_id)
    return tier


def set_tier_locations(session: Session, tier_id: int, location_ids: list[int]) -> None:
    """Offers the tier in exactly these locations. Raises: Invalid for one that does not exist."""
    known = {location.location_id for location in list_locations(session, enabled_only=False)}
    if unknown := sorted(set(location_ids) - known):
        raise Invalid.field("location_ids", f"Unknown location {unknown[0]}.")
    for row in session.scalars(select(TierLocation).where(TierLocation.tier_id == tier_id)).all():
        if row.location_id not in location_ids:
            session.delete(row)
    present = set(
        session.scalars(select(TierLocation.location_id).where(TierLocation.tier_id == tier_id))
    )
    session.add_all(
        TierLocation(tier_id=tier_id, location_id=i) for i in set(location_ids) - present
    )
    session.flush()


def set_price(
    session: Session,
    caller: Caller,
    tier_id: int,
    component: Component,
    currency: str,
    monthly_minor: int,
) -> Price:
    """A new price version, valid from now. Resources that exist keep the price they were sold at.

    Raises: NotFound (tier), Invalid (currency).
    """
    if session.get(Tier, tier_id) is None:
        raise NotFound("Tier not found.")
    try:
        minor_digits(currency)
    except ValueError:
        raise Invalid.field("currency", "The currency is not supported.") from None
    price = Price(
        tier_id=tier_id,
        component=component,
        currency=currency,
        monthly_minor=monthly_minor,
        valid_from=now(),
    )
    session.add(price)
    session.flush()
    _note(
        session,
        caller,
        "price.set",
        tier_id=tier_id,
        component=component,
        monthly_minor=monthly_minor,
    )
    return price


def create_size(session: Session, caller: Caller, fields: Mapping[str, Any]) -> Size:
    """A new size template. Raises: Conflict when the title is taken."""
    size = Size(**fields)
    _add(session, size, "A size of this title exists.")
    _note(session, caller, "size.created", size_id=size.size_id)
    return size


def create_template(session: Session, caller: Caller, fields: Mapping[str, Any]) -> Template:
    """A new template, without an image yet. Raises: Conflict when name and version are taken."""
    template = Template(**fields)
    _add(session, template, "A template of this name and version exists.")
    _note(session, caller, "template.created", template_id=template.template_id)
    return template


def change(
    session: Session, caller: Caller, row: Any, fields: Mapping[str, Any], kind: str
) -> None:
    """Sets the given columns of a catalogue row. Raises: Conflict when a unique value is taken."""
    for name, value in fields.items():
        setattr(row, name, value)
    _flush(session, "Another entry has this value already.")
    _note(session, caller, kind, fields=sorted(fields))


def _add(session: Session, row: Any, taken: str) -> None:
    session.add(row)
    _flush(session, taken)


def _flush(session: Session, taken: str) -> None:
    try:
        session.flush()
    except IntegrityError as err:
        raise Conflict(taken) from err


def _note(session: Session, caller: Caller, kind: str, **data: Any) -> None:
    record(session, kind=kind, actor=caller.actor, account_id=None, data=data)
