"""The node that carries a private network's gateway falls silent: only the watch over nodes does anything about it."""

from __future__ import annotations

import subprocess
import time

import pytest

from awan.engines.fabric.ovn import OvnFabric
from awan.settings import Settings
from tests.lab.test_moving_addresses import longest_gap_s
from tests.support.lab_cloud import LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

SILENCE_S = float(Settings.model_fields["node_silence_s"].default)
# The silence that is waited for, and beside it looks, time-outs of calls to the dead node, the push.
WATCHED_S = 70


@pytest.mark.sampled("story")
def test_a_gateway_moves_when_its_node_falls_silent(
    cloud: LabCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gateway answers at its public address all the while, but for the gap that is printed."""
    where = {"location_id": cloud.location_id}
    made = cloud.client.post("/networks/private", json={"name": "watched", **where}).json()
    assert cloud.wait(made["operation"]["uuid"])["status"] == "succeeded"
    network = made["data"]["uuid"]
    address = cloud.client.post("/networks/public", json=where).json()["data"]
    gateway = cloud.client.put(
        f"/networks/private/{network}/gateway", json={"public_gateway": address["uuid"]}
    )
    assert cloud.wait(gateway.json()["operation"]["uuid"])["status"] == "succeeded"
    fabric = OvnFabric(cloud.info.ovn_nb, cloud.info.ovn_sb)
    try:
        carrier = carrier_of(fabric, network)
        # From the provider's router, for a gateway answers nobody at addresses that exist inside organisations only.
        ping = ["ping", "-D", "-n", "-i", "0.2", "-w", str(WATCHED_S), address["ip_address"]]
        argv = cloud.lab.machine_argv(cloud.lab.layout.router_name, ping)
        watch = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        time.sleep(3)
        cloud.lab.kill_node_processes(carrier)
        until(lambda: carrier_of(fabric, network) != carrier, WATCHED_S, "it stays where it was")
        output, _ = watch.communicate(timeout=WATCHED_S + 30)
        answers = [
            float(line.partition("]")[0].removeprefix("["))
            for line in output.splitlines()
            if "bytes from" in line
        ]
        gap_s = longest_gap_s(answers)
        with capsys.disabled():
            print(
                f"\ngateway's node silent: {gap_s:.1f} s without a gateway, seen from outside",
                end="",
            )
        assert SILENCE_S / 2 < gap_s < WATCHED_S - 5
        assert answers[-1] > time.time() - 10, "it answers at the end"
    finally:
        fabric.close()
        cloud.lab.up()
        until(lambda: all_reachable(cloud), 120, "the node does not come back")
    gone = cloud.client.delete(f"/networks/private/{network}").json()
    assert cloud.wait(gone["operation"]["uuid"])["status"] == "succeeded"
    assert cloud.client.delete(f"/networks/public/{address['uuid']}").status_code == 200


def carrier_of(fabric: OvnFabric, network: str) -> str:
    """The node that carries the network's gateway."""
    found = {it.switch: it.active_chassis for it in fabric.list_private_networks()}
    return found[f"private-{network}"] or ""


def all_reachable(cloud: LabCloud) -> bool:
    """Whether the control plane hears all nodes."""
    return {row[0] for row in cloud.query("SELECT health FROM node")} == {"reachable"}
