"""Operators' notes: written, read and removed by operators, and unknown to customers."""

from __future__ import annotations

from uuid import uuid4

import pytest

from tests.support.simulated_cloud import SimulatedCloud

MARKER = "marker-note-6612"


@pytest.mark.usefixtures("worker")
def test_notes_are_the_operators_alone(cloud: SimulatedCloud) -> None:
    uuid, http, admin = cloud.create_running()["uuid"], cloud.customer.http, cloud.admin
    path = f"/admin/instances/{uuid}/notes"
    headers = {"Idempotency-Key": "n-1"}
    first = admin.post(path, json={"text": MARKER}, headers=headers)
    assert first.status_code == 201
    assert admin.post(path, json={"text": MARKER}, headers=headers).json() == first.json()
    second = admin.post(path, data={"text": f"{MARKER} <b>two</b>"}).json()["data"]
    listed = admin.get(path).json()["data"]
    assert [row["id"] for row in listed] == [second["id"], first.json()["data"]["id"]]
    assert listed[0]["text"] == f"{MARKER} <b>two</b>"
    assert listed[0]["actor"].startswith("key:")
    for shown in (
        f"/instances/{uuid}", "/instances", "/account/events", "/operations",
        f"/account/events?resource_uuid={uuid}",
    ):  # fmt: skip
        answer = http.get(shown)
        assert answer.status_code == 200
        assert MARKER not in answer.text
        assert "note" not in answer.text
    assert http.get(path).status_code == 404
    assert http.post(path, json={"text": "x"}).status_code == 404
    removed = admin.delete(f"{path}/{second['id']}")
    assert (removed.status_code, removed.json()["data"]) == (200, second)
    assert admin.delete(f"{path}/{second['id']}").status_code == 404
    other = cloud.create()["data"]["uuid"]
    foreign = f"/admin/instances/{other}/notes/{first.json()['data']['id']}"
    assert admin.delete(foreign).status_code == 404
    body = {"remove_ip": True, "remove_block_storage": True}
    cloud.wait(http.request("DELETE", f"/instances/{uuid}", json=body).json()["operation"]["uuid"])
    assert len(admin.get(path).json()["data"]) == 1, "notes outlive the instance"


def test_wrong_notes(cloud: SimulatedCloud) -> None:
    uuid = cloud.create()["data"]["uuid"]
    path = f"/admin/instances/{uuid}/notes"
    for body in ({}, {"text": ""}, {"text": "x" * 4001}, {"text": "\x00"}, {"text": "x", "y": 1}):
        assert cloud.admin.post(path, json=body).status_code == 422, body
    unknown = f"/admin/instances/{uuid4()}/notes"
    assert cloud.admin.get(unknown).status_code == 404
    assert cloud.admin.post(unknown, json={"text": "x"}).status_code == 404
    assert cloud.admin.delete(f"{path}/99").status_code == 404
    assert cloud.admin.get("/admin/instances/nope/notes").status_code == 404
