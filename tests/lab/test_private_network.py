"""A private database as a customer makes it: joined to a running web server, with a way out and no way in."""

from __future__ import annotations

import time

import pytest

from tests.support.lab_cloud import LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def test_a_private_database(cloud: LabCloud, capsys: pytest.CaptureFixture[str]) -> None:
    where = {"location_id": cloud.location_id}
    made = cloud.client.post("/networks/private", json={"name": "backend", **where}).json()
    assert cloud.wait(made["operation"]["uuid"])["status"] == "succeeded"
    network = made["data"]["uuid"]
    web = cloud.create_instance(hostname="web")
    database = cloud.create_instance(hostname="db", use_public_ip=False, vswitch=network)
    (card,) = database["private_networks"]
    cloud.ssh_when_up(web["ip_address"])

    # The web server runs: its card is plugged in, and its guest asks for the address by itself.
    began = time.monotonic()
    path = f"/instances/{web['uuid']}/private-network"
    joined = cloud.client.put(path, json={"vswitch": network, "private_ip": "10.20.0.77"})
    assert joined.status_code == 200, joined.text
    until(lambda: "10.20.0.77" in seen(cloud, web, "ip -4 -o address"), 60, "no private address")
    plugged_s = time.monotonic() - began
    # The public card stays the way out.
    assert "10.20.0.1" not in seen(cloud, web, "ip route")
    until(
        lambda: ", 0% packet loss" in seen(cloud, web, f"ping -c 3 -W 2 {card['ip_address']}"),
        240,
        "the database does not answer",
    )

    # It goes out through the gateway: what comes back proves it, for a ping from it cannot be seen otherwise.
    address = cloud.client.post("/networks/public", json=where).json()["data"]
    gateway = cloud.client.put(
        f"/networks/private/{network}/gateway", json={"public_gateway": address["uuid"]}
    )
    assert gateway.status_code == 200, gateway.text
    until(
        lambda: seen(
            cloud, web, f"ping -c 1 -W 2 {address['ip_address']} && echo answers"
        ).endswith("answers\n"),
        30,
        "the gateway does not answer at its public address",
    )
    cloud.assert_green()

    left = cloud.client.put(path, json={"vswitch": ""})
    assert left.status_code == 200, left.text
    assert "10.20.0.77" not in seen(cloud, web, "ip -4 -o address")
    cloud.delete_instance(database["uuid"])
    gone = cloud.client.delete(f"/networks/private/{network}").json()
    assert cloud.wait(gone["operation"]["uuid"])["status"] == "succeeded"
    assert cloud.client.delete(f"/networks/public/{address['uuid']}").status_code == 200
    with capsys.disabled():
        print(f"\ncard plugged in until its guest has the address: {plugged_s:.1f} s", end="")


def seen(cloud: LabCloud, instance: dict[str, str], command: str) -> str:
    """What a command prints in the guest."""
    return cloud.ssh(instance["ip_address"], command).stdout
