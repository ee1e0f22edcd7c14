"""The networks of an instance: operations 15, 16, 17 and 60 of the public API."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Depends

from awan.accounts import Caller, authenticated
from awan.instances import private_cards, public_networks
from awan.instances.answers import GOES_ON, operation_view, quick, quick_with_detail
from awan.instances.schemas import (
    AddressAssignment,
    InstanceDetail,
    PrivateNetworkChange,
    PublicNetworkAssignment,
)
from awan.kit.http import Answer, EmptyForm, Envelope, Request, answer, form_body
from awan.operations.quick import status_of
from awan.resources import ResourceKind, in_path

router = APIRouter(prefix="/instances", tags=["Instance"])
_check_path = in_path(ResourceKind.INSTANCE, "instance_uuid")
DETACHED = "Instance successfully detached from Private Network"
addresses_router = APIRouter(prefix="/networks/public", tags=["Networks"])


@router.post(
    "/{instance_uuid:uuid}/public-network",
    response_model=Envelope[InstanceDetail],
    responses={202: {"model": Envelope[InstanceDetail], "description": GOES_ON}},
)
def add_instance_public_network(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Add public network instance: a new address, and a card for it; a running guest gets both while it runs."""
    return quick_with_detail(
        request,
        caller,
        instance_uuid,
        "Public Network Address successfully added to the instance",
        lambda session: public_networks.add(session, caller, instance_uuid),
    )


@router.put(
    "/{instance_uuid:uuid}/public-network",
    response_model=Envelope[InstanceDetail],
    responses={202: {"model": Envelope[InstanceDetail], "description": GOES_ON}},
)
def change_instance_public_network(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PublicNetworkAssignment = Depends(
        form_body(PublicNetworkAssignment, path_check=_check_path)
    ),
) -> Answer:
    """Change public network instance: another free address, or none. No reboot; the former address stays yours.

    A running guest's card is taken and given back, so that it asks for its address.
    """
    wanted = body.public_network
    return quick_with_detail(
        request,
        caller,
        instance_uuid,
        f"Instance's Public Network successfully {'removed' if wanted is None else 'changed'}.",
        lambda session: public_networks.change(session, caller, instance_uuid, wanted),
    )


@addresses_router.put(
    "/{ip_uuid:uuid}/instance",
    response_model=Envelope[list[str]],
    responses={202: {"model": Envelope[list[str]], "description": GOES_ON}},
)
def change_address_instance(
    ip_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: AddressAssignment = Depends(
        form_body(AddressAssignment, path_check=in_path(ResourceKind.PUBLIC_IP, "ip_uuid"))
    ),
) -> Answer:
    """Change instance IP: to another instance, also from one that has it, while both run; empty: detached.

    Between the two the address is unreachable for as long as the other guest takes to ask for it.
    """
    wanted = body.instance_id
    ended = quick(
        request,
        caller,
        ip_uuid,
        lambda session: public_networks.attach(session, caller, ip_uuid, wanted),
    )
    return answer(
        f"Public network instance successfully {'removed' if wanted is None else 'changed'}.",
        [],
        status=status_of(ended),
        operation=operation_view(ended),
    )


@router.put(
    "/{instance_uuid:uuid}/private-network",
    response_model=Envelope[InstanceDetail],
    responses={202: {"model": Envelope[InstanceDetail], "description": GOES_ON}},
)
def change_private_network(
    instance_uuid: UUID,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: PrivateNetworkChange = Depends(form_body(PrivateNetworkChange, path_check=_check_path)),
) -> Answer:
    """Update private network instance: attaches it to one more private network, also while it runs.

    An empty `vswitch` detaches it from all of them. A guest that does not let go of its card is 409.
    """
    vswitch = body.vswitch
    if vswitch is None:
        return quick_with_detail(
            request,
            caller,
            instance_uuid,
            DETACHED,
            lambda session: private_cards.detach(session, caller, instance_uuid, None),
        )
    return quick_with_detail(
        request,
        caller,
        instance_uuid,
        "Instance successfully attached to Private Network",
        lambda session: private_cards.attach(
            session, caller, instance_uuid, vswitch, body.private_ip
        ),
    )


@router.delete(
    "/{instance_uuid:uuid}/private-network/{vswitch_uuid}",
    response_model=Envelope[InstanceDetail],
    responses={202: {"model": Envelope[InstanceDetail], "description": GOES_ON}},
)
def leave_private_network(
    instance_uuid: UUID,
    vswitch_uuid: str,
    request: Request,
    caller: Caller = Depends(authenticated("write")),
    body: EmptyForm = Depends(form_body(EmptyForm, path_check=_check_path)),
) -> Answer:
    """Detach an instance from one of its private networks, also while it runs."""
    return quick_with_detail(
        request,
        caller,
        instance_uuid,
        DETACHED,
        lambda session: private_cards.detach(session, caller, instance_uuid, vswitch_uuid),
    )
