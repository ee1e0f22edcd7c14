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
    both = [cloud.create(hostname=name, **private) for name in ("db", "web")]
    for it in both:
        assert cloud.wait(it["operation"]["uuid"])["status"] == "succeeded"
    database, web = (it["data"] for it in both)
    shown = cloud.client.get(f"/networks/private/{network}").json()["data"]
    domain, addresses = shown["domain"], {it["name"]: it["ip_address"] for it in shown["instances"]}
    address = addresses[f"db.{domain}"]
    cloud.wait_ready(web["uuid"])
    until(
        lambda: ", 0% packet loss" in inside(cloud, web["uuid"], "ping -c 1 -W 5 db"),
        120,
        "the database is not reached by its name",
    )
    said = inside(
        cloud,
        web["uuid"],
        f"getent hosts db; ping -c 1 -W 1 {cloud.info.nameserver.resolver}",
    )
    assert said.splitlines()[0].split() == [address, f"db.{domain}"]
    assert "100% packet loss" in said

    cloud.wait_ready(database["uuid"])
    path = f"/instances/{database['uuid']}/hostname"
    renamed = cloud.client.put(path, json={"hostname": "postgres"})
    assert renamed.status_code == 200, renamed.text
    began = time.monotonic()
    until(lambda: address in inside(cloud, web["uuid"], "getent hosts postgres"), 20, "no new name")
    renamed_s = time.monotonic() - began
    assert inside(cloud, web["uuid"], "getent hosts db") == ""
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
