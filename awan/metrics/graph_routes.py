"""Operation 54: what hangs together in a private network, and what its cards have received and sent for a day."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from awan.accounts import Caller, authenticated
from awan.instances.service import statuses_of
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.http import Answer, Envelope, answer
from awan.metrics.cards import network_traffic
from awan.networks import private_networks
from awan.networks.private_networks import Member, PrivateNetworkView
from awan.networks.private_rules import gateway_of

router = APIRouter(prefix="/networks/private", tags=["Networks"])

INTERNET = "internet"


class GraphNode(BaseModel):
    """A thing in the picture."""

    id: str
    type: str = Field(description="internet, gateway, vswitch or instance.")
    label: str
    status: str


class GraphEdge(BaseModel):
    """A connection, and the address that it has at its first end."""

    from_: str = Field(serialization_alias="from")
    to: str
    ip_address: str | None


class GraphTraffic(BaseModel):
    """Bytes a second that all members together received and sent on this network; null where nothing was measured."""

    time: int
    netin: float | None
    netout: float | None


class PrivateNetworkGraph(BaseModel):
    """A picture of a private network."""

    nodes: list[GraphNode]
    edges: list[GraphEdge]
    traffic: list[GraphTraffic]


@router.get("/{vswitch_uuid}/graph", response_model=Envelope[PrivateNetworkGraph])
def get_private_network_graph(
    vswitch_uuid: str, caller: Caller = Depends(authenticated("read"))
) -> Answer:
    """Get private network graph: its topology, and the traffic on it for a day in steps of half an hour."""
    with transaction() as session:
        resource_id = private_networks.resolve(session, caller, vswitch_uuid)
        view = private_networks.get_private_network(session, resource_id)
        members = private_networks.members_of(session, network_id=view.network.network_id)
        ids = [member.nic.instance_id for member in members]
        statuses = statuses_of(session, ids)
        data = PrivateNetworkGraph(
            nodes=_nodes(view, members, statuses),
            edges=_edges(view, members),
            traffic=[
                GraphTraffic(
                    time=int(point.starts_at.timestamp()), netin=point.netin, netout=point.netout
                )
                for point in network_traffic(session, view.network.network_id, now())
            ],
        )
    return answer("Private Network graph data", data)


def _nodes(
    view: PrivateNetworkView, members: Sequence[Member], statuses: dict[UUID, str]
) -> list[GraphNode]:
    network = view.network
    nodes = [
        GraphNode(
            id=str(network.resource_id),
            type="vswitch",
            label=view.resource.name,
            status=network.state,
        )
    ]
    if view.gateway is not None:
        nodes.insert(0, GraphNode(id=INTERNET, type=INTERNET, label="Internet", status="active"))
        nodes.insert(
            1,
            GraphNode(
                id=str(view.gateway.resource_id),
                type="gateway",
                label=str(view.gateway.inet),
                status=network.state,
            ),
        )
    nodes += [
        GraphNode(
            id=str(member.nic.instance_id),
            type="instance",
            label=member.hostname,
            status=statuses[member.nic.instance_id],
        )
        for member in members
    ]
    return nodes


def _edges(view: PrivateNetworkView, members: Sequence[Member]) -> list[GraphEdge]:
    vswitch = str(view.network.resource_id)
    edges = []
    if view.gateway is not None:
        gateway = str(view.gateway.resource_id)
        inner = str(gateway_of(view.network.cidr))
        edges = [
            GraphEdge(from_=gateway, to=INTERNET, ip_address=str(view.gateway.inet)),
            GraphEdge(from_=gateway, to=vswitch, ip_address=inner),
        ]
    edges += [
        GraphEdge(
            from_=str(member.nic.instance_id), to=vswitch, ip_address=str(member.nic.private_ip)
        )
        for member in members
    ]
    return edges
