"""Networks: address pools, public addresses, and the network cards of instances."""

from awan.networks.addresses import allocate, bill_address, find_owned_address
from awan.networks.cards import nics_of, public_addresses, release_nics
from awan.networks.models import Address, Nic, NicRole
from awan.networks.ports import ensure_network, port_specs

__all__ = [
    "Address",
    "Nic",
    "NicRole",
    "allocate",
    "bill_address",
    "ensure_network",
    "find_owned_address",
    "nics_of",
    "port_specs",
    "public_addresses",
    "release_nics",
]
