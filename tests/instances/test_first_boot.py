"""The end of a first boot: billing begins and the seed loses its secrets, whatever comes between."""

from __future__ import annotations

import pytest

from awan.engines.registry import sim_store
from awan.instances.first_boot import FIRST_BOOT
from tests.support.guests import create_settled, instance_row, wait_until_booted
from tests.support.held_call import held
from tests.support.simulated_cloud import SimulatedCloud


@pytest.mark.usefixtures("worker")
def test_one_that_is_seen_at_once_costs_one_checkpoint(cloud: SimulatedCloud) -> None:
    create_settled(cloud)
    rows = sim_store().fetch_all(
        "SELECT function_name FROM dbos.operation_outputs JOIN dbos.workflow_status USING (workflow_uuid)"
        " WHERE name = %s",
        [FIRST_BOOT],
    )
    assert [row["function_name"] for row in rows] == ["wait_round"]


@pytest.mark.usefixtures("worker")
def test_a_guest_that_is_stopped_before_its_seed_was_scrubbed_gives_no_sign_again(
    cloud: SimulatedCloud,
) -> None:
    """The stop runs while the seed is exchanged, which has to be tried again, and the guest stays off."""
    with held("ensure_media") as exchange, held("ensure_stopped") as power_off:
        uuid = cloud.create_running()["uuid"]
        assert exchange.entered.wait(20)
        stop = cloud.customer.http.post(f"/instances/{uuid}/stop", json={"force": True})
        assert power_off.entered.wait(20)
        exchange.let_go.set()
        assert exchange.left.wait(20)
        assert instance_row(uuid).seed_generation == 1
        power_off.let_go.set()
        assert cloud.wait(stop.json()["operation"]["uuid"])["status"] == "succeeded"
        wait_until_booted(uuid)
    assert instance_row(uuid).observed_state == "stopped"
    assert instance_row(uuid).ready_at is not None
