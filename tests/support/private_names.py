"""Names inside private networks of a simulated location: turning them on, and what its nameserver has of them."""

from __future__ import annotations

from typing import Any

from awan.engines.registry import sim_store
from tests.support.simulated_cloud import REVERSE_ZONES, ZONE, SimulatedCloud

PRIVATE_ZONE = f"internal.{ZONE}"
RESOLVER = "100.64.0.53"


def turn_on(cloud: SimulatedCloud, **changes: Any) -> None:
    """The location has names inside its private networks from now on; `changes` are other options of them."""
    private = {"zone": PRIVATE_ZONE, "resolver": RESOLVER, "physical_network": "public", **changes}
    options = {"forward_zone": ZONE, "reverse_zones": REVERSE_ZONES, "private_names": private}
    path = f"/admin/locations/{cloud.location_id}/engines/nameserver"
    answer = cloud.admin.put(path, json={"driver": "fake", "options": options})
    assert answer.status_code == 200, answer.text


def turn_off(cloud: SimulatedCloud) -> None:
    """It has none any more."""
    path = f"/admin/locations/{cloud.location_id}/engines/nameserver"
    options = {"forward_zone": ZONE, "reverse_zones": REVERSE_ZONES}
    answer = cloud.admin.put(path, json={"driver": "fake", "options": options})
    assert answer.status_code == 200, answer.text


def names_of(domain: str) -> dict[str, list[str]]:
    """Name in the domain -> addresses, as the nameserver has it."""
    rows = sim_store().fetch_all("SELECT name, record_values FROM sim.name_record ORDER BY name")
    ending = f".{domain}"
    return {
        row["name"].removesuffix(ending): list(row["record_values"])
        for row in rows
        if row["name"].endswith(ending)
    }


def ways() -> dict[str, dict[str, Any]]:
    """Switch -> the way to the resolver, as the fabric has it."""
    rows = sim_store().fetch_all("SELECT switch, spec FROM sim.fabric_resolver ORDER BY switch")
    return {row["switch"]: row["spec"] for row in rows}


def told(network: str) -> dict[str, Any] | None:
    """What DHCP tells the members of a network about names."""
    query = "SELECT spec FROM sim.fabric_network WHERE switch = %s"
    row = sim_store().find_one(query, [f"private-{network}"])
    assert row is not None
    found: dict[str, Any] | None = row["spec"]["names"]
    return found
