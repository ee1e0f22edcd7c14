"""A private database as a customer makes it: joined to a running web server, with a way out and no way in."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.lab_cloud import LabCloud, until

CAPTURE_S = 24
MIB = 1024**2

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.mark.sampled("story")
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

    check_no_way_out(cloud, web, card["ip_address"])
    # A way out for the database: a public address of its network's gateway.
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
    check_the_way_out(cloud, web, card["ip_address"], address["ip_address"])
    check_no_way_in(cloud, web, card["ip_address"], address["ip_address"])
    check_traffic(cloud, network, web, card["ip_address"])
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


def check_no_way_out(cloud: LabCloud, web: dict[str, str], database: str) -> None:
    """Without a gateway the database is reached from the web server, and reaches nobody outside itself."""

    def logged_in() -> bool:
        return cloud.ssh(database, "hostname", via=web["ip_address"]).stdout == "db\n"

    until(logged_in, 120, "no way into the database from the web server")
    ping = f"ping -c 2 -W 2 {cloud.info.public_v4_gateway}"
    assert "100% packet loss" in cloud.ssh(database, ping, via=web["ip_address"]).stdout


def check_the_way_out(cloud: LabCloud, web: dict[str, str], database: str, gateway: str) -> None:
    """From within the database: pings and TCP reach the outside, where they come from the gateway's public address."""

    def inside(command: str) -> str:
        return cloud.ssh(database, command, via=web["ip_address"]).stdout

    outside = cloud.info.public_v4_gateway
    assert ", 0% packet loss" in inside(f"ping -c 3 -W 5 {outside}"), "no ping to the outside"
    public = web["ip_address"]
    with ThreadPoolExecutor(1) as pool:
        capture = f"sudo timeout {CAPTURE_S} tcpdump -l -nne -i eth0 tcp dst port 22 and dst host {public}"
        heard = pool.submit(cloud.ssh, public, capture)
        time.sleep(CAPTURE_S / 3)
        banner = inside(f"nc -w 5 {public} 22 </dev/null | head -c 4")
        lines = heard.result().stdout.splitlines()
    assert banner == "SSH-", "no TCP to the outside"
    assert any(f"{gateway}." in line for line in lines), lines[-10:]
    assert not [line for line in lines if "10.20.0." in line]


def check_no_way_in(cloud: LabCloud, web: dict[str, str], database: str, gateway: str) -> None:
    """Nothing answers at the gateway's address for the database, nor to who sends its address there."""
    assert cloud.ssh(gateway, "hostname").returncode == 255
    # A neighbour in the public network and the provider's router, each with a route that they should not have.
    wrong_way = (
        f"sudo ip route add {database}/32 via {gateway} dev eth0;"
        f" ip route get {database};"
        f" ping -c 3 -i 0.3 -W 2 {database} >/dev/null && echo answers;"
        f" nc -z -w 3 {database} 22 && echo answers;"
        f" sudo ip route del {database}/32 via {gateway} dev eth0; echo done"
    )
    said = seen(cloud, web, wrong_way)
    assert f"via {gateway}" in said, said
    assert said.endswith("done\n")
    assert "answers" not in said
    route = [f"{database}/32", "via", gateway]
    cloud.lab.router_exec(["ip", "route", "add", *route])
    try:
        ping = ["ping", "-c", "3", "-i", "0.3", "-W", "2", database]
        assert "100% packet loss" in cloud.lab.router_exec(ping, check=False).stdout
    finally:
        cloud.lab.router_exec(["ip", "route", "del", *route])
    # The web server is in the network too: from there it answers as ever.
    assert ", 0% packet loss" in seen(cloud, web, f"ping -c 3 -W 5 {database}")


def check_traffic(cloud: LabCloud, network: str, web: dict[str, str], database: str) -> None:
    """The graph counts what went through this network, and nothing of what came in on the public side."""

    def moved() -> float:
        """MiB that the network's cards have received, as far as it is counted."""
        rows = cloud.query(
            "SELECT coalesce(sum(net_in_bytes), 0) FROM (SELECT nic_id, net_in_bytes FROM metric_card_point"
            " UNION ALL SELECT nic_id, net_in_bytes FROM metric_card_reading) AS part"
            " JOIN nic USING (nic_id) JOIN private_network USING (network_id) WHERE resource_id = %s",
            network,
        )
        return float(rows[0][0]) / MIB

    before = moved()
    public = cloud.ssh(web["ip_address"], "cat >/dev/null", stdin="x" * 8 * MIB, timeout_s=300)
    assert public.returncode == 0
    private = cloud.ssh(
        database, "cat >/dev/null", stdin="x" * 2 * MIB, via=web["ip_address"], timeout_s=300
    )
    assert private.returncode == 0, private
    until(lambda: moved() - before >= 2, 60, "the network's traffic is not counted")
    time.sleep(12)
    # Frames and acknowledgements come on top, and what SSH says itself.
    assert 2 <= moved() - before < 3.5
    graph = cloud.client.get(f"/networks/private/{network}/graph").json()["data"]
    assert graph["traffic"][-1]["netin"] > 0 or graph["traffic"][-2]["netin"] > 0


def seen(cloud: LabCloud, instance: dict[str, str], command: str) -> str:
    """What a command prints in the guest."""
    return cloud.ssh(instance["ip_address"], command).stdout
