"""Starting, stopping and restarting: when it may be asked for, and what a failure leaves."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest

from awan.engines.registry import sim_store
from awan.errors import EngineRejected, EngineUnavailable
from awan.instances.models import DesiredState, Instance
from awan.kit.database import transaction
from tests.support.changed_settings import changed_settings
from tests.support.guests import create_settled
from tests.support.simulated_cloud import SimulatedCloud

VERBS = ("start", "stop", "restart")


def test_a_busy_instance_names_what_runs(cloud: SimulatedCloud) -> None:
    created = cloud.create()
    uuid, operation = created["data"]["uuid"], created["operation"]["uuid"]
    for verb in VERBS:
        refused = cloud.customer.http.post(f"/instances/{uuid}/{verb}")
        assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
        assert "instance.create" in refused.json()["message"]
        assert operation in refused.json()["message"]
        assert int(refused.headers["retry-after"]) > 0


@pytest.mark.usefixtures("worker")
def test_every_refusal_and_success_in_turn(cloud: SimulatedCloud) -> None:
    http, uuid = cloud.customer.http, cloud.create_running()["uuid"]
    already = http.post(f"/instances/{uuid}/start").json()["message"]
    assert already == "The instance is already running."
    for verb, status in (
        ("start", 409), ("restart", 202), ("stop", 202), ("stop", 409), ("restart", 409), ("start", 202),
    ):  # fmt: skip
        answer = http.post(f"/instances/{uuid}/{verb}")
        assert answer.status_code == status, f"{verb}: {answer.text}"
        if status == 202:
            assert answer.json()["data"]["operation_flag"] == 1
            assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    assert http.get(f"/instances/{uuid}").json()["data"]["status"] == "Running"


@pytest.mark.parametrize("verb", VERBS)
def test_unknown_instances_and_fields(cloud: SimulatedCloud, verb: str) -> None:
    uuid = cloud.create()["data"]["uuid"]
    http = cloud.customer.http
    assert http.post(f"/instances/{uuid4()}/{verb}", json={"x": 1}).status_code == 404
    assert http.post(f"/instances/not-a-uuid/{verb}").status_code == 404
    refused = http.post(f"/instances/{uuid}/{verb}", json={"x": 1})
    assert set(refused.json()["errors"]) == {"x"}
    if verb != "start":
        wrong = http.post(f"/instances/{uuid}/{verb}", data={"force": "maybe"})
        assert set(wrong.json()["errors"]) == {"force"}


@pytest.mark.parametrize(("force", "most_s"), [("true", 30.0), ("false", 30.0)])
@pytest.mark.usefixtures("worker")
def test_a_deaf_guest_is_cut_off(cloud: SimulatedCloud, force: str, most_s: float) -> None:
    """At once with `force`, else after the grace time."""
    uuid = cloud.create_running()["uuid"]
    sim_store().execute("UPDATE sim.domain SET hears_power = false")
    with changed_settings(stop_grace_s="0.5" if force == "false" else "60"):
        answer = cloud.customer.http.post(f"/instances/{uuid}/stop", data={"force": force})
        assert cloud.wait(answer.json()["operation"]["uuid"], most_s)["status"] == "succeeded"
    assert cloud.customer.http.get(f"/instances/{uuid}").json()["data"]["status"] == "Stopped"


REFUSED = (
    "The infrastructure refused a part of the operation. Please try again later; if it fails again, tell the operator"
    " the uuid of the operation."
)


@pytest.mark.usefixtures("worker")
def test_a_change_that_fails_says_why_and_shows_the_truth(cloud: SimulatedCloud) -> None:
    http, uuid = cloud.customer.http, cloud.create_running()["uuid"]
    sim_store().execute("DELETE FROM sim.volume WHERE name LIKE 'vol-%' OR name LIKE '%seed%'")
    answer = http.post(f"/instances/{uuid}/restart")
    ended = cloud.wait(answer.json()["operation"]["uuid"])
    assert ended["status"] == "failed"
    assert ended["error"] == {
        "type": "ENGINE_ERROR",
        "message": REFUSED,
    }
    shown = http.get(f"/instances/{uuid}").json()["data"]
    assert (shown["status"], shown["status_reason"]) == ("Stopped", ended["error"]["message"])


@pytest.mark.usefixtures("worker")
def test_an_engine_that_comes_back_is_waited_for(cloud: SimulatedCloud) -> None:
    http, uuid = cloud.customer.http, cloud.create_running()["uuid"]
    sim_store().faults.fail_at(1, EngineUnavailable)
    answer = http.post(f"/instances/{uuid}/stop")
    ended = cloud.wait(answer.json()["operation"]["uuid"])
    sim_store().faults.clear()
    assert ended["status"] == "succeeded"


@pytest.mark.usefixtures("worker")
def test_the_account_sees_its_operations(cloud: SimulatedCloud) -> None:
    http = cloud.customer.http
    first, second = cloud.create_running()["uuid"], cloud.create_running()["uuid"]
    stopped = http.post(f"/instances/{first}/stop").json()["operation"]["uuid"]
    cloud.wait(stopped)

    def kinds(**query: Any) -> list[str]:
        rows = http.get("/operations", params=query).json()["data"]["data"]
        return [row["kind"] for row in rows]

    assert kinds() == ["instance.stop", "instance.create", "instance.create"]
    assert kinds(resource=first) == ["instance.stop", "instance.create"]
    assert kinds(kind="instance.create", resource=second) == ["instance.create"]
    assert kinds(status="running") == []
    assert kinds(limit=1, page=2) == ["instance.create"]
    assert set(http.get("/operations", params={"status": "x"}).json()["errors"]) == {"status"}
    shown = http.get(f"/operations/{stopped}").json()["data"]
    assert shown["resource"] == {"kind": "instance", "uuid": first}
    assert (shown["percent"], shown["error"]) == (100, None)
    assert UUID(shown["uuid"])


@pytest.mark.usefixtures("worker")
def test_a_start_that_failed_leaves_it_stopped_with_the_reason(cloud: SimulatedCloud) -> None:
    http, uuid = cloud.customer.http, create_settled(cloud)
    cloud.wait(http.post(f"/instances/{uuid}/stop").json()["operation"]["uuid"])
    sim_store().faults.clear()
    sim_store().faults.fail_at(1, EngineRejected)
    begun = http.post(f"/instances/{uuid}/start").json()["operation"]["uuid"]
    assert cloud.wait(begun)["status"] == "failed"
    sim_store().faults.clear()
    with transaction() as session:
        instance = session.get_one(Instance, UUID(uuid))
        assert instance.desired_state == DesiredState.STOPPED
        assert instance.status_reason
