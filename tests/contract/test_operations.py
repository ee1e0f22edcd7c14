"""The operations of the public API, letter for letter as `operations.json` has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from awan.api import PREFIX, create_app
from tests.support.guests import wait_until_booted
from tests.support.in_process_worker import InProcessWorker
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.ssh_keys import ED25519_KEYS

OPERATIONS: dict[int, dict[str, Any]] = {
    operation["no"]: operation
    for operation in json.loads(Path(__file__).with_name("operations.json").read_text())
}
Walk = Callable[..., httpx.Response]


@pytest.fixture
def walk(cloud: SimulatedCloud, worker: InProcessWorker) -> Walk:
    """`walk(no, body, query, **path)` calls an operation and checks status, message and the kind of its data."""

    def call(
        no: int, status: int, body: Any = None, *, query: Any = None, **path: object
    ) -> httpx.Response:
        operation = OPERATIONS[no]
        answer = cloud.customer.http.request(
            operation["method"], operation["path"].format(**path), data=body, params=query
        )
        assert answer.status_code == status, f"{no}: {answer.text}"
        assert answer.json()["message"] == operation["message"], no
        kind = {"list": list, "object": dict, "null": type(None), "string": str}[operation["data"]]
        assert type(answer.json()["data"]) is kind, no
        walked.add(no)
        if "operation" in answer.json():
            uuid = answer.json()["operation"]["uuid"]
            assert answer.headers["x-operation-id"] == uuid
            assert cloud.wait(uuid)["status"] == "succeeded", no
        return answer

    walked: set[int] = set()
    call.walked = walked  # type: ignore[attr-defined]
    return call


def _walk_private_networks(cloud: SimulatedCloud, walk: Walk, instance: str) -> None:
    where = {"location_id": cloud.location_id}
    network = walk(52, 202, query={"name": "backend", **where}).json()["data"]
    assert [row["uuid"] for row in walk(49, 200).json()["data"]] == [network["uuid"]]
    assert walk(56, 200, query=where).json()["data"][0]["name"] == "backend"
    attached = cloud.customer.http.put(
        f"/instances/{instance}/private-network", data={"vswitch": network["uuid"]}
    )
    assert attached.status_code == 200, attached.text
    of_network = {"vswitch_uuid": network["uuid"]}
    assert walk(50, 200, **of_network).json()["data"]["instances"][0]["uuid"] == instance
    assert walk(51, 200, **of_network).json()["data"]["used"] == 1
    address = cloud.customer.http.post("/networks/public", data=where).json()["data"]
    choices = walk(55, 200, query={**where, **of_network}).json()["data"]
    assert [row["uuid"] for row in choices] == [address["uuid"]]
    shown = walk(53, 200, {"public_gateway": address["uuid"]}, **of_network).json()["data"]
    assert shown["public_gateway"]["ip_address"] == address["ip_address"]
    assert len(walk(54, 200, **of_network).json()["data"]["nodes"]) == 4
    walk(15, 200, {"vswitch": ""}, instance_uuid=instance)


def test_every_operation_answers_as_the_contract_says(cloud: SimulatedCloud, walk: Walk) -> None:
    where = {"location_id": cloud.location_id}
    walk(1, 200)
    walk(74, 200, query={"location": cloud.location_id})
    walk(75, 200)
    walk(76, 200, query=where)
    walk(77, 200, tier_id=cloud.tier_id)
    key = walk(71, 201, {"title": "laptop", "key": ED25519_KEYS[0]}).json()["data"]
    assert [row["id"] for row in walk(70, 200).json()["data"]] == [key["id"]]
    assert walk(73, 200).json()["data"] == [{"id": key["id"], "title": "laptop"}]
    address = walk(59, 201, where).json()["data"]
    assert [row["uuid"] for row in walk(57, 200, query=where).json()["data"]] == [address["uuid"]]
    assert walk(58, 200).json()["data"]["page"]["total"] == 1
    assert walk(61, 200, {"rdns": ""}, ip_uuid=address["uuid"]).json()["data"].startswith("ip-")
    walk(14, 200, {"rdns": ""}, ip_uuid=address["uuid"])
    walk(62, 200, ip_uuid=address["uuid"])
    order = cloud.order(hostname="web-1", ssh_keys=[key["id"]], use_public_ip="true")
    uuid = walk(3, 202, order).json()["data"]["uuid"]
    assert walk(2, 200).json()["data"]["data"][0]["uuid"] == uuid
    assert walk(4, 200, instance_uuid=uuid).json()["data"]["status"] == "Running"
    assert (
        len(walk(5, 200, query={"periode": "hour"}, instance_uuid=uuid).json()["data"]["points"])
        == 60
    )
    assert walk(7, 200, instance_uuid=uuid).json()["data"]["protocol"] == "rfb"
    assert [row["id"] for row in walk(48, 200, instance_uuid=uuid).json()["data"]] == [key["id"]]
    assert walk(13, 200, query=where).json()["data"] == []
    _walk_private_networks(cloud, walk, uuid)
    wait_until_booted(uuid)
    password = {"password": "Brave-Donkey-8", "password_confirmation": "Brave-Donkey-8"}
    walk(19, 200, password, instance_uuid=uuid)
    walk(22, 200, {"hostname": "web-2"}, instance_uuid=uuid)
    walk_firewall(walk, uuid)
    had = walk(4, 200, instance_uuid=uuid).json()["data"]["public_network"]["uuid"]
    walk(60, 200, {"instance_id": ""}, ip_uuid=had)
    walk(16, 200, instance_uuid=uuid)
    walk(17, 200, {"public_network": had}, instance_uuid=uuid)
    walk(11, 202, instance_uuid=uuid)
    walk(10, 202, instance_uuid=uuid)
    walk(12, 202, instance_uuid=uuid)
    delete = {"_method": "DELETE", "remove_ip": "true", "remove_block_storage": "false"}
    walk(9, 202, delete, instance_uuid=uuid)
    walk(72, 200, ssh_id=key["id"])
    assert walk.walked == set(OPERATIONS)  # type: ignore[attr-defined]


def walk_firewall(walk: Walk, uuid: str) -> None:
    """Operations 35 to 47 on an instance."""
    assert walk(35, 200, instance_uuid=uuid).json()["data"]["action"] == "ACCEPT"
    assert walk(36, 200).json()["data"][0]["type"] == "ssh"
    walk(37, 200, {"action": "DROP"}, instance_uuid=uuid)
    ipset = walk(44, 201, {"name": "office", "description": ""}, instance_uuid=uuid).json()["data"]
    here = {"instance_uuid": uuid, "ipset_id": ipset["id"]}
    entry = walk(46, 201, {"cidr": "198.51.100.7", "description": ""}, **here).json()["data"]
    words = {"destination_port": "22", "action": "ACCEPT", "protocol": "tcp", "description": "ssh"}
    source = {"use_ipset": "true", "source_ipset": ipset["id"]}
    rule = walk(39, 201, {**words, **source}, instance_uuid=uuid).json()["data"]
    assert walk(38, 200, instance_uuid=uuid).json()["data"]["data"][0]["uuid"] == rule["uuid"]
    assert walk(43, 200, instance_uuid=uuid).json()["data"]["data"][0]["rules_count"] == 1
    named = {"instance_uuid": uuid, "firewall_rule_id": rule["uuid"]}
    walk(40, 200, {**words, "destination_port": "2222"}, **named)
    walk(41, 200, {"action": "enable"}, **named)
    walk(42, 200, **named)
    walk(47, 200, iplist_id=entry["uuid"], **here)
    walk(45, 200, **here)


@pytest.mark.parametrize("no", sorted(OPERATIONS))
def test_the_document_has_the_operation(no: int, openapi: dict[str, Any]) -> None:
    """Same method and path, and every parameter that the contract names."""
    operation = OPERATIONS[no]
    found = openapi["paths"][f"{PREFIX}{operation['path']}"][operation["method"].lower()]
    known = {parameter["name"] for parameter in found.get("parameters", [])}
    if "requestBody" in found:
        media = found["requestBody"]["content"]["application/x-www-form-urlencoded"]
        name = media["schema"]["$ref"].rpartition("/")[2]
        known |= set(openapi["components"]["schemas"][name]["properties"])
    assert set(operation["parameters"]) - {"x-apikey"} <= known


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    """The document of the whole API."""
    return create_app().openapi()
