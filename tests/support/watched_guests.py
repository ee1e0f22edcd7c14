"""What happens to simulated guests and nodes beside the control plane, and watches that are driven by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import select

from awan.catalogue import engines
from awan.engines.fabric.fake import FakeFabric
from awan.engines.hypervisor import NodeEndpoint
from awan.engines.hypervisor.fake import FakeHypervisor
from awan.events import history
from awan.fleet import Node, endpoint
from awan.instances.models import Instance
from awan.kit.database import transaction
from awan.networks import Nic
from awan.reconcile.nodes import NodeWatch
from tests.support.simulated_cloud import SimulatedCloud


@dataclass(frozen=True)
class Guest:
    """An instance with the simulated engines and the node that it is on."""

    cloud: SimulatedCloud
    uuid: str
    node: NodeEndpoint
    hypervisor: FakeHypervisor
    fabric: FakeFabric
    port_id: UUID

    @property
    def id(self) -> UUID:
        """The uuid, as engines take it."""
        return UUID(self.uuid)

    def show(self) -> dict[str, Any]:
        """The detail, as its owner sees it."""
        return dict(self.cloud.customer.http.get(f"/instances/{self.uuid}").json()["data"])

    def crash(self) -> None:
        """Its QEMU dies."""
        self.hypervisor.crash(self.node, self.id)

    def shut_down(self) -> None:
        """Its user shuts it down."""
        self.hypervisor.shut_down_from_inside(self.node, self.id)

    def undefine(self) -> None:
        """Somebody removes its definition."""
        self.hypervisor.undefine(self.node, self.id)

    def power(self) -> str | None:
        """The domain's power; None when there is none."""
        facts = self.hypervisor.find_domain(self.node, self.id)
        return None if facts is None else str(facts.power)

    def watch(self, gap_s: float = 0.0) -> NodeWatch:
        """A watch over its node. Without a gap, what is found crashed has crashed by itself."""
        return NodeWatch(self.node.node_id, gap_s=gap_s)

    def kinds(self) -> list[str]:
        """Kinds of the events of this instance, the first at the front."""
        with transaction() as session:
            return [event.kind for event in reversed(history(session, self.id))]

    def count(self, kind: str) -> int:
        """How many events of this kind there are."""
        return self.kinds().count(kind)


def find_guest(cloud: SimulatedCloud, uuid: str) -> Guest:
    """The guest of an instance that exists."""
    with transaction() as session:
        instance = session.get_one(Instance, UUID(uuid))
        node = session.get_one(Node, instance.node_id)
        opened = engines(session, instance.location_id)
        nic = session.scalars(select(Nic).where(Nic.instance_id == instance.instance_id)).one()
        assert isinstance(opened.hypervisor, FakeHypervisor)
        assert isinstance(opened.fabric, FakeFabric)
        return Guest(cloud, uuid, endpoint(node), opened.hypervisor, opened.fabric, nic.nic_id)
