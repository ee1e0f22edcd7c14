"""The traffic of a private network is that of its own cards, to the number."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from awan.engines.hypervisor import CardCounters
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.metrics import history
from awan.metrics.cards import SILENT_S
from awan.metrics.rules import CARD_STEP_S, NOTHING, CardReading, Sums, advance_card, floor
from tests.metrics.conftest import Meter, make_meter
from tests.support.in_process_worker import InProcessWorker
from tests.support.simulated_cloud import SimulatedCloud

BEGAN = datetime.fromtimestamp(0).astimezone()
NODE = uuid4()


class Counted:
    """A card that is read again and again."""

    def __init__(self) -> None:
        self.reading: CardReading | None = None
        self.steps: dict[float, Sums] = {}

    def read(self, after_s: float, received: int, *, run: int = 1, node: UUID = NODE) -> None:
        self.reading, over = advance_card(
            self.reading,
            CardCounters("tap", received, 2 * received),
            node_id=node,
            run_id=run,
            read_at=BEGAN + timedelta(seconds=after_s),
        )
        for start, sums in (*over.items(), (self.reading.step_at, NOTHING)):
            known = self.steps.get(start.timestamp(), NOTHING)
            self.steps[start.timestamp()] = known.plus(sums)

    def received(self) -> dict[float, tuple[float, float]]:
        """Seconds measured and bytes received by the beginning of the step; without empty ones."""
        assert self.reading is not None
        open_ = {self.reading.step_at.timestamp(): self.reading.step}
        found = {start: sums.plus(open_.get(start, NOTHING)) for start, sums in self.steps.items()}
        return {
            start: (sums.measured_s, sums.net_in_bytes)
            for start, sums in found.items()
            if sums != NOTHING
        }


def test_a_step_gets_its_share() -> None:
    counted = Counted()
    counted.read(1_790, 1_000)
    counted.read(1_820, 4_000)
    assert counted.received() == {0.0: (10.0, 1_000.0), 1_800.0: (20.0, 2_000.0)}
    assert counted.reading is not None
    assert counted.reading.step.net_out_bytes == 4_000.0


@pytest.mark.parametrize(
    ("after_s", "received", "changes"),
    [(121, 2_000, {}), (10, 999, {}), (10, 2_000, {"run": 2}), (10, 2_000, {"node": uuid4()}), (0, 2_000, {})],
)  # fmt: skip
def test_what_cannot_be_compared_is_not_counted(
    after_s: float, received: int, changes: dict[str, Any]
) -> None:
    """A gap, a counter that fell, another run, another node, no time in between."""
    counted = Counted()
    counted.read(0, 1_000)
    counted.read(after_s, received, **changes)
    assert counted.received() == {}


# -- stored and shown ------------------------------------------------------------------------------


class Wire:
    """An instance with a card in each of some networks."""

    def __init__(self, cloud: SimulatedCloud, *networks: str) -> None:
        self.cloud = cloud
        self.meter = make_meter(cloud, vswitch=networks[0])
        for network in networks[1:]:
            join(self.meter, network)
        # The half hour before the one that goes on.
        self.meter.began_at = floor(now(), CARD_STEP_S) - timedelta(seconds=CARD_STEP_S)

    def read(self, after_s: float, *received: int) -> None:
        """The counters of the private cards, in the order of the networks; they send the double."""
        for nic_id, number in zip(self.cards(), received, strict=False):
            self.meter.fake.set_card_counters(
                self.meter.node, self.meter.uuid, nic_id, in_bytes=number, out_bytes=2 * number
            )
        self.meter.read(after_s, net_in_bytes=5 * int(after_s), net_out_bytes=0)

    def cards(self) -> list[UUID]:
        return [
            row[0]
            for row in rows(
                "SELECT nic_id FROM nic WHERE instance_id = :id AND role = 'private'"
                " AND deleted_at IS NULL ORDER BY network_id",
                id=self.meter.uuid,
            )
        ]

    def traffic(self, network: str) -> dict[int, tuple[float | None, float | None]]:
        """What the graph shows, by seconds after `began_at`; without what was not measured."""
        answer = self.cloud.customer.http.get(f"/networks/private/{network}/graph")
        assert answer.status_code == 200, answer.text
        points = answer.json()["data"]["traffic"]
        assert [point["time"] % CARD_STEP_S for point in points] == [0] * 48
        began = int(self.meter.began_at.timestamp())
        return {
            point["time"] - began: (point["netin"], point["netout"])
            for point in points
            if (point["netin"], point["netout"]) != (None, None)
        }


def rows(statement: str, **parameters: Any) -> list[Any]:
    with transaction() as session:
        return list(session.execute(text(statement), parameters))


def make_network(cloud: SimulatedCloud, name: str) -> str:
    answer = cloud.customer.http.post(
        "/networks/private", json={"name": name, "location_id": cloud.location_id}
    ).json()
    assert cloud.wait(answer["operation"]["uuid"])["status"] == "succeeded"
    uuid: str = answer["data"]["uuid"]
    return uuid


def join(meter: Meter, network: str) -> None:
    answer = meter.cloud.customer.http.put(
        f"/instances/{meter.uuid}/private-network", json={"vswitch": network}
    )
    assert answer.status_code == 200, answer.text


pytestmark = pytest.mark.usefixtures("partitions")


def test_each_network_shows_its_own(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    """And the instance's chart is the sum over its cards, the public one too."""
    one, two = make_network(cloud, "one"), make_network(cloud, "two")
    first, second = Wire(cloud, one, two), Wire(cloud, one)
    for wire in (first, second):
        wire.meter.fake.set_clock(wire.meter.node, wire.meter.began_at)
    for after_s in (0, 60, 120):
        first.read(after_s, 10 * after_s, 100 * after_s)
        second.read(after_s, 1_000 * after_s)
    assert first.traffic(one) == {0: (1_010.0, 2_020.0)}
    assert first.traffic(two) == {0: (100.0, 200.0)}
    shown = first.meter.chart()[0]
    assert (shown["netin"], shown["netout"]) == (5.0 + 10.0 + 100.0, 20.0 + 200.0)


def test_the_next_half_hour_is_another_point(
    cloud: SimulatedCloud, worker: InProcessWorker
) -> None:
    one = make_network(cloud, "one")
    wire = Wire(cloud, one)
    for after_s in (1_740, 1_770, 1_800):
        wire.read(after_s, 10 * after_s)
    wire.read(1_830, 18_000 + 30 * 70)
    assert wire.traffic(one) == {0: (10.0, 20.0), 1_800: (70.0, 140.0)}
    assert rows("SELECT measured_s, net_in_bytes FROM metric_card_point") == [(60.0, 600.0)]


def test_a_card_that_went_has_had_its_traffic(
    cloud: SimulatedCloud, worker: InProcessWorker
) -> None:
    one, two = make_network(cloud, "one"), make_network(cloud, "two")
    wire = Wire(cloud, one, two)
    wire.read(0, 0, 0)
    wire.read(60, 600, 60)
    left = cloud.customer.http.put(
        f"/instances/{wire.meter.uuid}/private-network", json={"vswitch": ""}
    )
    assert left.status_code == 200, left.text
    wire.read(90)
    assert (wire.traffic(one), wire.traffic(two)) == ({0: (10.0, 20.0)}, {0: (1.0, 2.0)})
    assert rows("SELECT 1 FROM metric_card_reading") == []
    # It comes back with other cards, whose counters begin anew.
    join(wire.meter, one)
    wire.read(120, 5)
    wire.read(150, 5 + 30 * 4)
    assert wire.traffic(one) == {0: (14.0, 28.0)}


def test_a_stopped_instance_sends_nothing(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    one = make_network(cloud, "one")
    wire = Wire(cloud, one)
    wire.read(0, 0)
    wire.read(60, 600)
    http = cloud.customer.http
    answer = http.post(f"/instances/{wire.meter.uuid}/stop", json={"force": True})
    cloud.wait(answer.json()["operation"]["uuid"])
    wire.meter.read(90)
    assert rows("SELECT 1 FROM metric_card_reading") == []
    assert rows("SELECT step_s, measured_s, net_in_bytes FROM metric_card_point") == [
        (CARD_STEP_S, 60.0, 600.0)
    ]
    assert wire.traffic(one) == {0: (10.0, 20.0)}


def test_readings_that_no_round_goes_on_with_become_points(
    cloud: SimulatedCloud, worker: InProcessWorker
) -> None:
    one = make_network(cloud, "one")
    wire = Wire(cloud, one)
    wire.meter.began_at = now() - timedelta(seconds=SILENT_S + 120)
    wire.read(0, 0)
    wire.read(60, 600)
    with transaction() as session:
        session.execute(text("UPDATE nic SET deleted_at = now() WHERE role = 'private'"))
        session.execute(text("UPDATE instance SET deleted_at = now()"))
    history.keep()
    assert rows("SELECT 1 FROM metric_card_reading") == []
    assert rows("SELECT sum(net_in_bytes)::float8 FROM metric_card_point") == [(600.0,)]


def test_rounds_without_private_cards_store_none(meter: Meter) -> None:
    meter.read(0, net_in_bytes=0)
    meter.read(60, net_in_bytes=60)
    assert rows("SELECT 1 FROM metric_card_reading") == []
    assert rows("SELECT 1 FROM metric_card_point") == []
