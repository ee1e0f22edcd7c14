"""`/admin/prefix-pools`: ranges of IPv6 prefixes that are routed to instances, for the operator."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from awan.accounts import Caller, operator, replay
from awan.accounts.idempotency import EarlierAnswer, once
from awan.kit.database import transaction
from awan.kit.http import Answer, EmptyForm, Envelope, PathId, Remains, Request, answer, form_body
from awan.networks import prefixes
from awan.networks.models import PrefixPool

admin_router = APIRouter(prefix="/prefix-pools")


class PrefixPoolCreate(BaseModel):
    """A range of prefixes that the provider's router sends to one address."""

    model_config = ConfigDict(extra="forbid")

    location_id: int = Field(ge=1)
    cidr: str = Field(max_length=64, examples=["2001:db8:0:100::/56"])
    router_address: str = Field(
        max_length=64,
        examples=["2001:db8:0:1::2"],
        description="In the location's on-link IPv6 pool: the next hop of the provider's route for the range.",
    )


class PrefixPoolView(BaseModel):
    """A range, and how many of its prefixes are in which state."""

    id: int
    location_id: int
    pool_id: int
    cidr: str
    router_address: str
    prefixes: dict[str, int]

    @classmethod
    def of(cls, pool: PrefixPool, counts: Mapping[str, int]) -> PrefixPoolView:
        """The row as the API shows it."""
        return cls(
            id=pool.prefix_pool_id,
            location_id=pool.location_id,
            pool_id=pool.pool_id,
            cidr=str(pool.cidr),
            router_address=str(pool.router_address),
            prefixes=dict(counts),
        )


@admin_router.post("", status_code=201, response_model=Envelope[PrefixPoolView | Remains])
def create_prefix_pool(
    request: Request,
    caller: Caller = Depends(operator("write")),
    body: PrefixPoolCreate = Depends(form_body(PrefixPoolCreate)),
) -> Answer:
    """Add a range of IPv6 prefixes to a location, one /64 for each instance that wants one.

    The provider's router needs a route for the range by way of `router_address`.
    """

    def change(session: Session) -> tuple[Answer, int]:
        pool = prefixes.create_prefix_pool(session, caller, **body.model_dump())
        given = answer("Prefix pool created", _view(session, pool), status=201)
        return given, pool.prefix_pool_id

    def again(session: Session, earlier: EarlierAnswer) -> Answer:
        known = session.get(PrefixPool, int(earlier.resource_id or 0))
        return replay(earlier, earlier.remains if known is None else _view(session, known))

    return once(request, caller, change, again)


@admin_router.get("", response_model=Envelope[list[PrefixPoolView]])
def list_prefix_pools(caller: Caller = Depends(operator("read"))) -> Answer:
    """List ranges of routed IPv6 prefixes and what of them is in use."""
    with transaction() as session:
        pools = [PrefixPoolView.of(*found) for found in prefixes.list_prefix_pools(session)]
    return answer("Prefix pools", pools)


@admin_router.delete("/{prefix_pool_id}", response_model=Envelope[None])
def delete_prefix_pool(
    prefix_pool_id: PathId,
    request: Request,
    caller: Caller = Depends(operator("write")),
    _: EmptyForm = Depends(form_body(EmptyForm)),
) -> Answer:
    """Remove a range of which no instance has a prefix."""

    def change(session: Session) -> tuple[Answer, int]:
        prefixes.delete_prefix_pool(session, caller, prefix_pool_id)
        return answer("Prefix pool removed", None), prefix_pool_id

    return once(request, caller, change, lambda _, earlier: replay(earlier, None))


def _view(session: Session, wanted: PrefixPool) -> PrefixPoolView:
    found = {pool.prefix_pool_id: counts for pool, counts in prefixes.list_prefix_pools(session)}
    return PrefixPoolView.of(wanted, found.get(wanted.prefix_pool_id, {}))
