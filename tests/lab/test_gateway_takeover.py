"""The node that carries a private network's gateway falls silent: only the watch over nodes does anything about it."""

from __future__ import annotations

import time

import pytest

from awan.engines.fabric.ovn import OvnFabric
from tests.support.lab_cloud import LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

# The silence that is waited for, looks, time-outs of calls to the dead node, the push; and some machines are slow.
TAKEN_OVER_S = 180


@pytest.mark.sampled("story")
def test_a_gateway_moves_when_its_node_falls_silent(
    cloud: LabCloud, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gateway answers at its public address again, from another node; the gap is printed."""
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
        until(lambda: answers(cloud, address["ip_address"]), TAKEN_OVER_S, "it does not answer")
        cloud.lab.kill_node_processes(carrier)
        silent_at = time.monotonic()
        until(lambda: not answers(cloud, address["ip_address"]), TAKEN_OVER_S, "it answers")
        until(lambda: answers(cloud, address["ip_address"]), TAKEN_OVER_S, "it stays silent")
        gap_s = time.monotonic() - silent_at
        assert carrier_of(fabric, network) not in ("", carrier)
        with capsys.disabled():
            print(
                f"\ngateway's node silent: {gap_s:.1f} s without a gateway, seen from outside",
                end="",
            )
    finally:
        fabric.close()
        cloud.lab.up()
        until(lambda: all_reachable(cloud), 120, "the node does not come back")
    gone = cloud.client.delete(f"/networks/private/{network}").json()
    assert cloud.wait(gone["operation"]["uuid"])["status"] == "succeeded"
    assert cloud.client.delete(f"/networks/public/{address['uuid']}").status_code == 200


def answers(cloud: LabCloud, address: str) -> bool:
    """Whether the provider's router gets an answer: a gateway answers nobody at addresses of organisations only."""
    ping = ["ping", "-n", "-c", "1", "-W", "1", address]
    return cloud.lab.router_exec(ping, check=False).returncode == 0


def carrier_of(fabric: OvnFabric, network: str) -> str:
    """The node that carries the network's gateway."""
    found = {it.switch: it.active_chassis for it in fabric.list_private_networks()}
    return found[f"private-{network}"] or ""


def all_reachable(cloud: LabCloud) -> bool:
    """Whether the control plane hears all nodes."""
    return {row[0] for row in cloud.query("SELECT health FROM node")} == {"reachable"}
