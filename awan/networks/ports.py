"""All ports of an instance, public and private, each with the network it is on."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.orm import Session

from awan.engines.fabric import Fabric, PortSpec, PrivateNetworkSpec, PublicNetworkSpec
from awan.networks.cards import nics_of, public_port_specs
from awan.networks.private_networks import private_port_specs

NetworkSpec = PublicNetworkSpec | PrivateNetworkSpec


def port_specs(
    session: Session, instance_id: UUID, *, hostname: str, operation_id: UUID, firewall_id: UUID
) -> list[tuple[NetworkSpec, PortSpec]]:
    """The ports that the fabric must have for an instance, the public one first.

    Each belongs to its firewall, which says itself whether it stands before the private ones.
    """
    nics = nics_of(session, instance_id)
    return [
        *public_port_specs(
            session,
            nics,
            hostname=hostname,
            operation_id=operation_id,
            firewall_id=firewall_id,
        ),
        *private_port_specs(
            session,
            nics,
            hostname=hostname,
            operation_id=operation_id,
            firewall_id=firewall_id,
        ),
    ]


def ensure_network(fabric: Fabric, network: NetworkSpec) -> None:
    """The network that a port is on exists."""
    if isinstance(network, PublicNetworkSpec):
        fabric.ensure_public_network(network)
    else:
        fabric.ensure_private_network(network)
