"""Operation 50: a private network with the instances in it."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from awan.accounts import Caller, authenticated
from awan.instances.service import statuses_of
from awan.kit.database import transaction
from awan.kit.http import Answer, Envelope, answer
from awan.networks import private_networks
from awan.networks.private_names import names_by_address
from awan.networks.private_schemas import MemberView, PrivateNetworkWithMembers

router = APIRouter(prefix="/networks/private", tags=["Networks"])


@router.get("/{vswitch_uuid}", response_model=Envelope[PrivateNetworkWithMembers])
def get_private_network(
    vswitch_uuid: str, caller: Caller = Depends(authenticated("read"))
) -> Answer:
    """Get detailed information of private network."""
    with transaction() as session:
        resource_id = private_networks.resolve(session, caller, vswitch_uuid)
        view = private_networks.get_private_network(session, resource_id)
        members = private_networks.members_of(session, network_id=view.network.network_id)
        statuses = statuses_of(session, [member.nic.instance_id for member in members])
        names = names_by_address(session, view.network)
        data = PrivateNetworkWithMembers.with_members(
            view, [MemberView.of(it, statuses[it.nic.instance_id], names) for it in members]
        )
    return answer("Private Network details", data)
