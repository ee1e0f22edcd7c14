"""Labels, delete protection, hard resets and bulk actions."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import pytest

from awan.engines.registry import sim_store
from awan.instances.rules import LABELS_MAX
from awan.instances.schemas import BULK_MAX
from awan.kit.database import transaction
from awan.resources import Resource
from tests.support.guests import guest
from tests.support.simulated_cloud import SimulatedCloud

REMOVE = {"remove_ip": True, "remove_block_storage": False}


def label(cloud: SimulatedCloud, uuid: str, **labels: str) -> httpx.Response:
    """Replaces the labels."""
    return cloud.customer.http.put(f"/instances/{uuid}/labels", json={"labels": labels})


def names(cloud: SimulatedCloud, **query: Any) -> set[str]:
    """The host names that a list shows."""
    answer = cloud.customer.http.get("/instances", params=query)
    assert answer.status_code == 200, answer.text
    return {row["hostname"] for row in answer.json()["data"]["data"]}


def act(cloud: SimulatedCloud, **body: Any) -> httpx.Response:
    """A bulk action."""
    return cloud.customer.http.post("/instances/actions", json=body)


def test_labels_are_replaced_and_found(cloud: SimulatedCloud) -> None:
    http = cloud.customer.http
    made = {n: cloud.create(hostname=n)["data"]["uuid"] for n in ("web-1", "web-2", "db-1")}
    answer = label(cloud, made["web-1"], env="prod", tier="web")
    assert (answer.status_code, answer.json()["data"]["labels"]) == (
        200,
        {"env": "prod", "tier": "web"},
    )
    form = {"labels[env]": "test", "labels[tier]": "web"}
    assert http.put(f"/instances/{made['web-2']}/labels", data=form).status_code == 200
    assert label(cloud, made["db-1"], env="prod").status_code == 200
    assert names(cloud, label="env:prod") == {"web-1", "db-1"}
    assert names(cloud, label="env") == {"web-1", "web-2", "db-1"}
    assert names(cloud, label="env:prod,tier:web") == {"web-1"}
    assert names(cloud, label="env:prod, tier") == {"web-1"}
    assert names(cloud, label="env:prod", search="db") == {"db-1"}
    assert names(cloud, label="env:") == set()
    assert names(cloud, label="nope") == set()
    other = cloud.new_customer()
    assert other.http.get("/instances", params={"label": "env"}).json()["data"]["data"] == []
    assert label(cloud, made["web-1"]).json()["data"]["labels"] == {}
    assert names(cloud, label="env:prod") == {"db-1"}
    kinds = [row["kind"] for row in http.get("/account/events").json()["data"]]
    assert kinds.count("instance.labelled") == 4
    again = label(cloud, made["db-1"], env="prod")
    assert again.status_code == 200
    assert len(http.get("/account/events").json()["data"]) == len(kinds), "nothing has changed"


def test_labels_that_are_refused(cloud: SimulatedCloud) -> None:
    uuid, http = cloud.create()["data"]["uuid"], cloud.customer.http
    path = f"/instances/{uuid}/labels"
    bad: list[Any] = [
        {"": "x"}, {"a b": "x"}, {"-a": "x"}, {"a": "b c"}, {"a:b": "x"}, {"a": "x,y"}, {"a": "é"},
        {"x" * 64: "y"}, {"x": "y" * 64}, {"a": None}, {"a": 1}, {"a": {"b": "c"}}, ["a"], "a", None,
        {f"k{n}": "" for n in range(LABELS_MAX + 1)},
    ]  # fmt: skip
    for labels in bad:
        refused = http.put(path, json={"labels": labels})
        assert refused.status_code == 422, labels
        assert all(field.startswith("labels") for field in refused.json()["errors"]), labels
    assert http.put(path, json={"labels": {f"k{n}": "" for n in range(LABELS_MAX)}}).is_success
    for text in ("", " ", "a b", ":x", "a:b:c", "a,a", ","):
        query = {"label": text}
        answer = http.get("/instances", params=query)
        expected = 200 if text == "" else 422
        assert answer.status_code == expected, text
    assert http.put(f"/instances/{uuid4()}/labels", json={"labels": {}}).status_code == 404


@pytest.mark.usefixtures("worker")
def test_a_protected_instance_is_not_deleted(cloud: SimulatedCloud) -> None:
    http, uuid = cloud.customer.http, cloud.create_running()["uuid"]
    path = f"/instances/{uuid}/protection"
    assert http.get(f"/instances/{uuid}").json()["data"]["is_protected"] is False
    answer = http.put(path, data={"is_protected": "on"})
    assert (answer.status_code, answer.json()["data"]["is_protected"]) == (200, True)
    form = {"_method": "DELETE", "remove_ip": "1", "remove_block_storage": "0"}
    for refused in (
        http.request("DELETE", f"/instances/{uuid}", json=REMOVE),
        http.post(f"/instances/{uuid}", data=form),
        cloud.admin.request("DELETE", f"/instances/{uuid}", json=REMOVE),
    ):
        assert (refused.status_code, refused.json()["type"]) == (409, "PROTECTED")
    assert http.post(f"/instances/{uuid}/stop").status_code == 202, "it can be stopped all the same"
    assert http.put(path, json={"is_protected": None}).status_code == 422
    assert http.put(path, json={"is_protected": False}).json()["data"]["is_protected"] is False
    assert http.request("DELETE", f"/instances/{uuid}", json=REMOVE).status_code == 202
    kinds = [row["kind"] for row in http.get("/account/events").json()["data"]]
    assert {"instance.protected", "instance.unprotected"} <= set(kinds)


@pytest.mark.usefixtures("worker")
def test_a_hard_reset(cloud: SimulatedCloud) -> None:
    http, uuid = cloud.customer.http, cloud.create_running()["uuid"]
    answer = http.post(f"/instances/{uuid}/reset")
    assert (answer.status_code, answer.json()["data"]["status"]) == (202, "Restarting")
    assert cloud.wait(answer.json()["operation"]["uuid"])["kind"] == "instance.reset"
    assert guest(uuid)["resets"] == 1
    assert http.get(f"/instances/{uuid}").json()["data"]["status"] == "Running"
    stopped = http.post(f"/instances/{uuid}/stop").json()["operation"]["uuid"]
    cloud.wait(stopped)
    refused = http.post(f"/instances/{uuid}/reset")
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")


@pytest.mark.usefixtures("worker")
def test_a_reset_that_fails_shows_the_truth(cloud: SimulatedCloud) -> None:
    http, uuid = cloud.customer.http, cloud.create_running()["uuid"]
    sim_store().execute("UPDATE sim.domain SET power = 'stopped'")
    answer = http.post(f"/instances/{uuid}/reset")
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "failed"
    assert http.get(f"/instances/{uuid}").json()["data"]["status"] == "Stopped"


@pytest.mark.usefixtures("worker")
def test_bulk_actions_have_a_result_each(cloud: SimulatedCloud) -> None:
    http = cloud.customer.http
    running = [cloud.create_running()["uuid"] for _ in range(2)]
    stopped = cloud.create_running()["uuid"]
    cloud.wait(http.post(f"/instances/{stopped}/stop").json()["operation"]["uuid"])
    for uuid in (*running, stopped):
        assert label(cloud, uuid, env="test").is_success
    headers = {"Idempotency-Key": "bulk-1"}
    body = {"action": "stop", "label": "env:test", "force": True}
    answer = http.post("/instances/actions", json=body, headers=headers)
    assert (answer.status_code, answer.json()["message"]) == (202, "Bulk action")
    results = {row["uuid"]: row for row in answer.json()["data"]}
    assert set(results) == {*running, stopped}
    assert results[stopped]["operation"] is None
    assert results[stopped]["error"] == {
        "type": "INVALID_OPERATION",
        "message": "The instance is already stopped.",
    }
    for uuid in running:
        assert results[uuid]["error"] is None
        ended = cloud.wait(results[uuid]["operation"]["uuid"])
        assert (ended["kind"], ended["status"]) == ("instance.stop", "succeeded")
    again = {
        row["uuid"]: row
        for row in http.post("/instances/actions", json=body, headers=headers).json()["data"]
    }
    for uuid in running:
        assert again[uuid]["operation"]["uuid"] == results[uuid]["operation"]["uuid"]
        assert again[uuid]["operation"]["status"] == "succeeded"
    assert again[stopped]["error"]["type"] == "INVALID_OPERATION"
    started = act(cloud, action="start", uuids=[running[0], running[0], stopped]).json()["data"]
    assert [row["uuid"] for row in started] == sorted([running[0], stopped])
    assert all(row["error"] is None for row in started)


def test_bulk_actions_that_are_refused(cloud: SimulatedCloud) -> None:
    uuid = cloud.create()["data"]["uuid"]
    foreign = cloud.create(cloud.new_customer())["data"]["uuid"]
    for body, fields in (
        ({}, {"action"}),
        ({"action": "explode", "label": "a"}, {"action"}),
        ({"action": "stop"}, {"request"}),
        ({"action": "stop", "uuids": [uuid], "label": "a"}, {"request"}),
        ({"action": "stop", "uuids": [uuid, foreign]}, {"uuids"}),
        ({"action": "stop", "uuids": [uuid, str(uuid4())]}, {"uuids"}),
        ({"action": "stop", "uuids": ["x"]}, {"uuids.0"}),
        ({"action": "stop", "label": "a b"}, {"label"}),
        ({"action": "stop", "uuids": [str(uuid4())] * (BULK_MAX + 1)}, {"uuids"}),
    ):
        refused = act(cloud, **body)
        assert (refused.status_code, set(refused.json()["errors"])) == (422, fields), body
    nobody = act(cloud, action="stop", label="nobody-has-it")
    assert (nobody.status_code, nobody.json()["data"]) == (200, [])
    nothing = act(cloud, action="reset", uuids=[uuid])
    assert nothing.status_code == 200, "nothing was accepted"
    (busy,) = nothing.json()["data"]
    assert "instance.create" in busy["error"]["message"]


def test_a_label_on_too_many_instances(cloud: SimulatedCloud) -> None:
    with transaction() as session:
        session.add_all(
            Resource(
                resource_id=uuid4(),
                kind="instance",
                account_id=cloud.customer.account_id,
                name=f"many-{number}",
                labels={"env": "many"},
            )
            for number in range(BULK_MAX + 1)
        )
    refused = act(cloud, action="stop", label="env:many")
    assert (refused.status_code, set(refused.json()["errors"])) == (422, {"label"})
