"""A running instance whose firewall the tests change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
import pytest

from awan.catalogue import engines
from awan.engines.fabric.fake import FakeFabric
from awan.engines.fabric.firewall import FirewallFacts
from awan.firewall import firewall_id_of
from awan.kit.database import transaction
from tests.support.guests import create_settled
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud

SSH = {
    "destination_port": 22,
    "protocol": "tcp",
    "action": "ACCEPT",
    "description": "ssh",
    "use_ipset": "false",
    "source_ipset": 0,
}


@dataclass
class Guarded:
    """An instance and its firewall, seen through the API and in the simulated fabric."""

    cloud: SimulatedCloud
    uuid: str

    @property
    def path(self) -> str:
        """Of the firewall."""
        return f"/instances/{self.uuid}/firewall"

    def send(self, method: str, below: str = "", **body: Any) -> httpx.Response:
        """A call as a form, whatever it answers."""
        return self.cloud.customer.http.request(method, f"{self.path}{below}", data=body)

    def do(self, method: str, below: str = "", **body: Any) -> Any:
        """The data of a call that succeeds."""
        answer = self.send(method, below, **body)
        assert answer.is_success, answer.text
        return answer.json()["data"]

    def refused(self, method: str, below: str = "", **body: Any) -> list[str]:
        """The fields that a call is refused for as invalid."""
        answer = self.send(method, below, **body)
        assert answer.status_code == 422, answer.text
        return sorted(answer.json()["errors"])

    def add_rule(self, **changes: Any) -> dict[str, Any]:
        """A rule more: SSH, unless `changes` say otherwise."""
        return dict(self.do("POST", "/rules", **{**SSH, **changes}))

    def positions(self) -> dict[int, int]:
        """Position -> first port, of all rules."""
        rows = self.do("GET", "/rules?limit=100")["data"]
        return {row["position"]: row["destination_port"] for row in rows}

    def in_fabric(self) -> FirewallFacts | None:
        """What the fabric has, once nothing is under way."""
        wait_until_idle()
        wanted = firewall_id_of(UUID(self.uuid))
        found = fabric_of(self.cloud).list_firewalls()
        return next((it for it in found if it.firewall_id == wanted), None)


def fabric_of(cloud: SimulatedCloud) -> FakeFabric:
    """The simulated fabric of the location."""
    with transaction() as session:
        fabric = engines(session, cloud.location_id).fabric
    assert isinstance(fabric, FakeFabric)
    return fabric


@pytest.fixture
def guarded(cloud: SimulatedCloud, worker: InProcessWorker) -> Guarded:
    """A running instance whose first boot is over."""
    return Guarded(cloud, create_settled(cloud))
