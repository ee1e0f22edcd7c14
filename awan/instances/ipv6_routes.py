"""IPv6 of an instance: the prefix that is routed to it, and the names of its addresses. Beyond the source."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from awan.accounts import Caller, authenticated, once, replay
from awan.accounts.idempotency import EarlierAnswer, is_repeat
from awan.errors import IdempotencyConflict
from awan.instances import ipv6_prefixes, service
from awan.instances.answers import GOES_ON, quick_with_detail
from awan.instances.schemas import InstanceDetail
from awan.kit.database import transaction
from awan.kit.http import Answer, EmptyForm, Envelope, Request, answer, form_body
from awan.networks import ipv6_names, names, public_addresses
from awan.networks.prefixes import find_prefix
from awan.resources import ResourceKind, in_path

router = APIRouter(prefix="/instances", tags=["Instance"])
_check_path = in_path(ResourceKind.INSTANCE, "instance_uuid")


class Ipv6NameChange(BaseModel):
    """A name for an IPv6 address of the instance."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"ip_address": "2001:db8:0:100::25", "rdns": "mail.example.com"}]
        },
    )

    ip_address: str = Field(
        max_length=45, description="The instance's own IPv6 address, or one of its prefix."
    )
    rdns: str | None = Field(
        max_length=255,
        description="A fully qualified host name with an AAAA record of this address; empty for the default, which"
        " an address of a prefix does not have.",
    )


class Ipv6Name(BaseModel):
    """An address and its name."""

    ip_address: str
    rdns: str | None


class Ipv6Detail(BaseModel):
    """The IPv6 side of an instance. `names` are those of addresses of the prefix."""

    ip_address: str | None
    rdns: str | None
    prefix: str | None
    names: list[Ipv6Name]


@router.get("/{instance_uuid:uuid}/ipv6", response_model=Envelope[Ipv6Detail])
def get_instance_ipv6(
    instance_uuid: UUID, caller: Caller = Depends(authenticated("read"))
) -> Answer:
    """Get the IPv6 address, the routed prefix, and the names of an instance."""
    with transaction() as session:
        service.get_view(session, caller, instance_uuid)
        found = public_addresses(session, [instance_uuid]).get(instance_uuid, [])
        own = next((str(it.inet) for it in found if it.family == 6), None)
        prefix = find_prefix(session, instance_uuid)
        named = ipv6_names.names_of_prefix(session, prefix) if prefix is not None else []
        data = Ipv6Detail(
            ip_address=own,
            rdns=ipv6_names.shown_ipv6_name(session, instance_uuid, own) if own else None,
            prefix=str(prefix.cidr) if prefix is not None else None,
            names=[Ipv6Name(ip_address=str(it.address), rdns=it.name) for it in named],
        )
    return answer("IPv6 of the instance", data)


@router.post(
    "/{instance_uuid:uuid}/ipv6/prefix",
    response_model=Envelope[InstanceDetail],
    responses={202: {"model": Envelope[InstanceDetail], "description": GOES_ON}},
)
def add_instance_prefix(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Route an IPv6 /64 to the instance, also while it runs. It may then use every address of it."""
    return quick_with_detail(
        request,
        caller,
        instance_uuid,
        "IPv6 prefix successfully added to the instance",
        lambda session: ipv6_prefixes.add(session, caller, instance_uuid),
    )


@router.delete(
    "/{instance_uuid:uuid}/ipv6/prefix",
    response_model=Envelope[InstanceDetail],
    responses={202: {"model": Envelope[InstanceDetail], "description": GOES_ON}},
)
def remove_instance_prefix(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Take the IPv6 prefix of an instance away, with the names of its addresses. It rests before others get it."""
    return quick_with_detail(
        request,
        caller,
        instance_uuid,
        "IPv6 prefix successfully removed from the instance",
        lambda session: ipv6_prefixes.remove(session, caller, instance_uuid),
    )


@router.put("/{instance_uuid:uuid}/ipv6/rdns", response_model=Envelope[str | None])
def set_instance_ipv6_name(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: Ipv6NameChange = Depends(form_body(Ipv6NameChange, path_check=_check_path)),
) -> Answer:
    """Name an IPv6 address of an instance: what a reverse lookup of it gives, a second later.

    The name must lead to the address at this moment (an AAAA record). It is looked up between two transactions.
    """
    with transaction() as session:
        wish = None
        if not (is_known := is_repeat(session, caller, request)):
            wish = ipv6_names.check_ipv6_wish(
                session, caller, instance_uuid, body.ip_address, body.rdns
            )
    if wish is not None:
        names.confirm(wish)

    def change(session: Session) -> tuple[Answer, UUID]:
        if is_known:
            raise IdempotencyConflict("The first call with this key was forgotten just now.")
        name = ipv6_names.set_ipv6_name(session, caller, instance_uuid, body.ip_address, body.rdns)
        return answer("RDNS successfully updated", name), instance_uuid

    def again(session: Session, earlier: EarlierAnswer) -> Answer:
        return replay(earlier, ipv6_names.shown_ipv6_name(session, instance_uuid, body.ip_address))

    return once(request, caller, change, again)
