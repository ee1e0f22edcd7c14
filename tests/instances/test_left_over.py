"""A failed creation whose undo could not be finished."""

from __future__ import annotations

from awan.engines.registry import sim_store
from awan.instances import workflows
from awan.instances.models import Instance
from awan.kit.database import transaction
from awan.settings import Settings
from tests.support.in_process_worker import InProcessWorker
from tests.support.simulated_cloud import SimulatedCloud

REMOVE = {"remove_ip": True, "remove_block_storage": False}


def test_what_stands_for_leftovers_is_kept_until_a_deletion_removed_them(
    settings: Settings, cloud: SimulatedCloud, worker: InProcessWorker
) -> None:
    http = cloud.customer.http
    store = sim_store()
    store.faults.clear()
    answer = cloud.create()
    uuid, operation = answer["data"]["uuid"], answer["operation"]["uuid"]
    assert cloud.wait(operation)["status"] == "succeeded"
    with transaction() as session:
        # What the end of a creation does when an undo failed, on an instance that holds everything.
        instance = session.get_one(Instance, uuid)
        failure = workflows.Failure("ENGINE_ERROR", "It failed.", "undo", False, left_over=True)
        target = workflows.Target(instance.create_operation_id, instance.instance_id)
        workflows.mark_create_failed(session, target, failure)
    shown = http.get(f"/instances/{uuid}").json()["data"]
    assert (shown["status"], shown["status_reason"]) == ("Error", "It failed.")
    assert http.get("/account").json()["data"]["quotas"]["instances"]["used"] == 1
    assert shown["ip_address"] is not None
    gone = http.request("DELETE", f"/instances/{uuid}", json=REMOVE).json()
    assert cloud.wait(gone["operation"]["uuid"])["status"] == "succeeded"
    assert store.fetch_all("SELECT uuid FROM sim.domain") == []
    assert store.fetch_all("SELECT name FROM sim.volume WHERE name NOT LIKE 'image-%%'") == []
    assert http.get("/account").json()["data"]["quotas"]["instances"]["used"] == 0
