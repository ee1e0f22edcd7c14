"""Names inside private networks, and addresses in the services network. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network
from uuid import UUID

from awan.engines.nameserver import RecordKey, RecordKind
from awan.networks.rules import LABEL, NAME_MAX

DOMAIN_LABEL = re.compile(r"[0-9a-f]{32}")


def domain_of(network: UUID, zone: str) -> str:
    """The domain of a private network in the location's zone of them: nobody guesses that of another one."""
    return f"{network.hex}.{zone}"


def member_name(hostname: str, domain: str) -> str | None:
    """The name of a member in its network's domain; None for one that is too long for the DNS, or no name at all."""
    name = f"{hostname.lower()}.{domain}"
    labels = hostname.lower().split(".")
    is_name = len(name) <= NAME_MAX and all(LABEL.fullmatch(label) for label in labels)
    return name if is_name else None


def names_of_members(
    members: Iterable[tuple[str, IPv4Address]], domain: str
) -> dict[RecordKey, str]:
    """What the nameserver has of a network; `members` are hostnames and addresses, the oldest first.

    Where two have one hostname, the oldest has the name.
    """
    records: dict[RecordKey, str] = {}
    for hostname, address in members:
        name = member_name(hostname, domain)
        if name is not None:
            records.setdefault(RecordKey(name, RecordKind.A), str(address))
    return records


def network_of_name(name: str, zone: str) -> UUID | None:
    """The private network in whose domain a name of the zone lies; None for a name of another form."""
    rest = name.removesuffix(f".{zone}")
    label = rest.rpartition(".")[2]
    return UUID(hex=label) if rest != name and DOMAIN_LABEL.fullmatch(label) else None


def choose_service_ip(
    services: IPv4Network, resolver: IPv4Address, taken: Sequence[IPv4Address]
) -> IPv4Address | None:
    """The lowest address of the services network that no private network has; None when there is none left."""
    used = {*taken, resolver}
    return next((address for address in services.hosts() if address not in used), None)
