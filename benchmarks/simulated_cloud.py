"""A control plane with real processes over many simulated nodes, and a customer who may have as much as he likes."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg

from awan.runtime.control_plane import ControlPlane
from lab.http_api import Api
from lab.seed_catalogue import (
    Engine,
    SeedLocation,
    SeedNode,
    SeedPool,
    create_customer_key,
    ensure_customer,
    seed_location,
)

UNLIMITED = {
    "instances_max": 100_000,
    "vcpus_max": 10**6,
    "memory_gib_max": 10**6,
    "storage_gib_max": 10**7,
    "public_ips_max": 10**6,
}
REMOVE = {"remove_ip": True, "remove_block_storage": True}


@dataclass
class ManyNodes:
    """What a benchmark works with."""

    plane: ControlPlane
    admin_key: str
    customer_key: str
    location_id: int
    tier_id: int
    template_id: int

    def client(self) -> httpx.Client:
        """A connection of the customer's; each thread takes one of its own."""
        return httpx.Client(
            base_url=self.plane.api_url,
            headers={"x-apikey": self.customer_key},
            timeout=60,
            trust_env=False,
        )

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """An autocommit connection to the control plane's database."""
        return psycopg.connect(self.plane.environment()["AWAN_DATABASE_URL"], autocommit=True)

    def query(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of the database."""
        with self.connect() as connection:
            return connection.execute(statement.encode(), parameters).fetchall()

    def order(self) -> dict[str, Any]:
        """The body of a creation."""
        return {
            "location_id": self.location_id,
            "tier_id": self.tier_id,
            "template_id": self.template_id,
            "hostname": f"vm-{uuid4().hex}",
            "cpu": 1,
            "memory": 1,
            "storage": 20,
            "username": "budi",
            "password": "Correct-Horse-7",
            "use_public_ip": True,
        }

    def set_latency(self, seconds: float) -> None:
        """How long each call of an engine takes, within a second for all processes."""
        with self.connect() as connection:
            connection.execute(
                "INSERT INTO sim.setting (key, value) VALUES ('latency_s', %s)"
                " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                [seconds],
            )

    def audit(self) -> list[str]:
        """The findings of an audit, a sentence each."""
        with Api(self.plane.api_url, self.admin_key) as api:
            answer = api.call("POST", "admin/audit", {})
            api.follow(answer["operation"])
            shown = api.get(f"admin/audit/{answer['data']['uuid']}")
        return [f"{finding['kind']}: {finding['sentence']}" for finding in shown["findings"]]

    def wait_until_idle(self, timeout_s: float = 120.0) -> float:
        """Returns when no operation is unfinished; gives the seconds. Raises: TimeoutError."""
        began = time.monotonic()
        with self.connect() as connection:
            while True:
                row = connection.execute(
                    "SELECT count(*) FROM operation WHERE status IN ('queued', 'running')"
                ).fetchone()
                if row == (0,):
                    return time.monotonic() - began
                if time.monotonic() - began > timeout_s:
                    raise TimeoutError(f"{row} operations have not ended")
                time.sleep(0.05)


@contextmanager
def many_nodes(nodes: int, port: int, **settings: str) -> Iterator[ManyNodes]:
    """A cloud with one location of that many simulated nodes; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="awan-bench-") as directory:
        Path(directory).chmod(0o755)
        plane = ControlPlane(Path(directory) / "state")
        plane.up(lambda step, seconds: None, {"AWAN_LISTEN_PORT": str(port), **settings})
        try:
            yield _fill(plane, nodes)
        finally:
            with contextlib.suppress(KeyboardInterrupt):
                plane.down()


def _fill(plane: ControlPlane, nodes: int) -> ManyNodes:
    admin_key = plane.run_command("init").strip().splitlines()[-1]
    location = SeedLocation(
        name="Many nodes",
        code="many",
        country="ID",
        engines={kind: Engine("fake") for kind in ("hypervisor", "volumes", "fabric")},
        nodes=[SeedNode(f"n{number}", f"fake://n{number}/") for number in range(1, nodes + 1)],
        pools=[
            SeedPool("198.18.0.0/20", "198.18.0.1"),
            SeedPool("2001:db8:0:1::/64", "2001:db8:0:1::1"),
        ],
    )
    with psycopg.connect(plane.environment()["AWAN_DATABASE_URL"], autocommit=True) as connection:
        unlimited = "UPDATE api_key SET reads_per_minute = 1000000, writes_per_minute = 1000000"
        connection.execute(unlimited)
        with Api(plane.api_url, admin_key) as api:
            location_id = seed_location(api, location)
            tier_id = int(api.get("admin/tiers")[0]["id"])
            template = api.post("admin/templates", {"name": "Debian", "version": "12"})
            account = ensure_customer(api, "Bench", **UNLIMITED)
            customer_key = create_customer_key(api, account, "bench")
        connection.execute(unlimited)
        connection.execute(
            "INSERT INTO template_image (image_id, template_id, state, declared_format, format,"
            " sha256, size_bytes, virtual_size_bytes, has_agent)"
            " VALUES (gen_random_uuid(), %s, 'ready', 'qcow2', 'qcow2', repeat('ab', 32), 1024,"
            " 2147483648, true)",
            [template["id"]],
        )
    return ManyNodes(plane, admin_key, customer_key, location_id, tier_id, template["id"])
