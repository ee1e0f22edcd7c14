"""What instances hold: on the simulated engines, of the nodes' room, and of their account's quota."""

from __future__ import annotations

from typing import LiteralString

from awan.engines.registry import sim_store
from tests.support.simulated_cloud import SimulatedCloud


def engine_state(cloud: SimulatedCloud) -> dict[str, list[tuple[object, ...]]]:
    """What the simulated engines hold, beside images."""
    store = sim_store()

    def rows(query: LiteralString) -> list[tuple[object, ...]]:
        return [tuple(row.values()) for row in store.fetch_all(query)]

    return {
        "domains": rows("SELECT uuid, power FROM sim.domain ORDER BY uuid"),
        "ports": rows("SELECT name FROM sim.fabric_port ORDER BY name"),
        "files": rows("SELECT name FROM sim.volume WHERE name NOT LIKE 'image-%' ORDER BY name"),
    }


def assert_counts(cloud: SimulatedCloud, instances: int) -> None:
    """So many instances hold domain, port, disk, seed, address, room and quota; nothing more is held."""
    state = engine_state(cloud)
    assert len(state["domains"]) == instances, state
    assert len(state["ports"]) == instances, state
    files = [str(row[0]) for row in state["files"]]
    seeds = {name[: len("seed-") + 36] for name in files if name.startswith("seed-")}
    assert len([name for name in files if name.startswith("vol-")]) == instances, state
    # While a seed is being replaced by a scrubbed one, an instance has two.
    assert len(seeds) == instances, state
    account = cloud.customer.http.get("/account").json()["data"]
    assert account["quotas"]["instances"]["used"] == instances, account
    assert account["quotas"]["public_ips"]["used"] == instances, account
    nodes = cloud.admin.get("/admin/nodes").json()["data"]
    assert sum(node["memory_mib_used"] for node in nodes) == 1024 * instances
    assert sum(node["disk_gib_used"] for node in nodes) == 20 * instances
