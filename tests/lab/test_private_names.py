"""Names in a private network as a customer uses them: two guests without public cards, and without a way out."""

from __future__ import annotations

import base64
import json
import time

import pytest

from tests.support.lab_cloud import LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.mark.sampled("story")
def test_a_database_by_its_name(cloud: LabCloud, capsys: pytest.CaptureFixture[str]) -> None:
    where = {"location_id": cloud.location_id}
    made = cloud.client.post("/networks/private", json={"name": "backend", **where}).json()
    assert cloud.wait(made["operation"]["uuid"])["status"] == "succeeded"
    network = made["data"]["uuid"]
    private = {"use_public_ip": False, "vswitch": network}
    database = cloud.create_instance(hostname="db", **private)
    web = cloud.create_instance(hostname="web", **private)
    cloud.wait_ready(web["uuid"])
    cloud.wait_ready(database["uuid"])
    shown = cloud.client.get(f"/networks/private/{network}").json()["data"]
    (address,) = (it["ip_address"] for it in shown["instances"] if it["hostname"] == "db")
    assert shown["domain"] in inside(cloud, web["uuid"], "cat /etc/resolv.conf")

    until(
        lambda: ", 0% packet loss" in inside(cloud, web["uuid"], "ping -c 2 -W 5 db"), 60, "no db"
    )
    assert inside(cloud, web["uuid"], "getent hosts db").split()[0] == address
    assert (
        inside(cloud, database["uuid"], "getent hosts web").split()[1] == f"web.{shown['domain']}"
    )
    # Its own names are all that the network has of the world.
    assert (
        inside(cloud, web["uuid"], f"ping -c 2 -W 2 {cloud.info.nameserver.resolver}").count(
            "bytes from"
        )
        == 0
    )

    path = f"/instances/{database['uuid']}/hostname"
    renamed = cloud.client.put(path, json={"hostname": "postgres"})
    assert renamed.status_code == 200, renamed.text
    began = time.monotonic()
    until(lambda: address in inside(cloud, web["uuid"], "getent hosts postgres"), 20, "no new name")
    renamed_s = time.monotonic() - began
    assert inside(cloud, web["uuid"], "getent hosts db") == ""
    cloud.assert_green()
    with capsys.disabled():
        print(f"\na new hostname is a new name after {renamed_s:.1f} s", end="")


def inside(cloud: LabCloud, uuid: str, command: str) -> str:
    """What a command prints in the guest: by its agent, since no card of it is reached from outside."""
    node = cloud.node_of(uuid)["name"]

    def ask(verb: str, **arguments: object) -> dict[str, object]:
        line = json.dumps({"execute": verb, "arguments": arguments})
        argv = ["virsh", "-c", "qemu:///system", "qemu-agent-command", uuid, line]
        return dict(json.loads(cloud.lab.node_exec(node, argv).stdout)["return"])

    started = ask("guest-exec", path="/bin/sh", arg=["-c", command], **{"capture-output": True})
    done = until(
        lambda: it if (it := ask("guest-exec-status", pid=started["pid"]))["exited"] else None,
        60,
        f"{command} has not ended",
    )
    return base64.b64decode(str(done.get("out-data", ""))).decode()
