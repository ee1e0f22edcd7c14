"""What a contract test gets: an engine and the nodes to use it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from awan.engines.hypervisor import NodeEndpoint
from awan.engines.volumes import Volumes


@dataclass(frozen=True)
class Site:
    """An engine, two nodes without a pool, and a way to put a foreign file into the first one's."""

    volumes: Volumes
    node: NodeEndpoint
    other_node: NodeEndpoint
    pool_path: str
    plant_foreign: Callable[[str], None]


@dataclass(frozen=True)
class LocalSite(Site):
    """The real engine, with a connection past it and the pool's name."""

    conn: Any
    pool_name: str
