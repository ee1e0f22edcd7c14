"""Another password: by the guest's agent, by the seed of the next boot, or not at all, with a reason."""

from __future__ import annotations

import hashlib
import time
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import func, select

from awan.engines.registry import sim_store
from awan.errors import EngineUnavailable
from awan.instances.first_boot import mark_guest_ready, scrub_seed
from awan.instances.models import Instance
from awan.instances.password_boots import READ_MARGIN_S, scrub_booted
from awan.instances.situation import PASSWORD_PURPOSE
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.secrets import Secret, get_secret
from awan.operations import durable
from awan.reconcile import run_audit
from awan.resources import Resource
from awan.settings import Settings
from tests.support.guests import cd, create_ready, guest, instance_row, seeds, set_sign
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud

NEW = "Brave-Donkey-8"
MESSAGE = "Virtual machine password successfully updated"


def put(cloud: SimulatedCloud, uuid: str, password: str = NEW, **more: Any) -> httpx.Response:
    """The call, with the confirmation that belongs to it."""
    body = {"password": password, "password_confirmation": password, **more}
    return cloud.customer.http.put(f"/instances/{uuid}/password", data=body)


def stored_hash(uuid: str) -> str:
    """The hash that is stored as the instance's."""
    with transaction() as session:
        secret_id = instance_row(uuid).password_secret_id
        assert secret_id is not None
        return get_secret(session, secret_id, PASSWORD_PURPOSE)


def secrets_kept() -> int:
    """How many secrets there are."""
    with transaction() as session:
        return session.scalar(select(func.count()).select_from(Secret)) or 0


@pytest.mark.usefixtures("worker")
def test_a_running_guest_gets_it_from_its_agent(cloud: SimulatedCloud) -> None:
    uuid = create_ready(cloud)
    before = stored_hash(uuid)
    answer = put(cloud, uuid)
    assert (answer.status_code, answer.json()["message"]) == (200, MESSAGE)
    assert answer.json()["data"] is None
    assert "warnings" not in answer.json()
    assert answer.json()["operation"]["kind"] == "instance.set_password"
    assert answer.json()["operation"]["status"] == "succeeded"
    assert answer.headers["x-operation-id"] == answer.json()["operation"]["uuid"]
    after = stored_hash(uuid)
    assert after != before
    assert guest(uuid)["username"] == "budi"
    assert guest(uuid)["password_digest"] == hashlib.sha256(after.encode()).hexdigest()
    assert secrets_kept() == 1
    assert instance_row(uuid).new_password_secret_id is None
    assert NEW not in str(vars(instance_row(uuid)))


@pytest.mark.parametrize("sign", ["none", "traffic"])
@pytest.mark.usefixtures("worker")
def test_a_silent_agent_is_a_409_with_a_way_out(cloud: SimulatedCloud, sign: str) -> None:
    uuid = create_ready(cloud)
    before = stored_hash(uuid)
    set_sign(uuid, sign)
    refused = put(cloud, uuid)
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    assert "agent does not answer" in refused.json()["message"]
    assert "stop the instance" in refused.json()["message"]
    assert stored_hash(uuid) == before
    assert secrets_kept() == 1
    shown = cloud.customer.http.get(f"/instances/{uuid}").json()["data"]
    assert (shown["status"], shown["status_reason"], shown["lock"]) == ("Running", None, None)


@pytest.mark.usefixtures("worker")
def test_a_guest_that_refuses_is_a_409(cloud: SimulatedCloud) -> None:
    uuid = create_ready(cloud)
    before = stored_hash(uuid)
    sim_store().execute(
        "INSERT INTO sim.guest (location, node_id, uuid, is_obedient)"
        " SELECT location, node_id, uuid, false FROM sim.domain WHERE uuid = %s",
        [UUID(uuid)],
    )
    refused = put(cloud, uuid)
    assert refused.status_code == 409
    assert "budi" in refused.json()["message"]
    assert (stored_hash(uuid), secrets_kept()) == (before, 1)


def stop(cloud: SimulatedCloud, uuid: str, verb: str = "stop") -> None:
    """A power change, waited for."""
    answer = cloud.customer.http.post(f"/instances/{uuid}/{verb}")
    assert answer.status_code == 202, answer.text
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"


def look_now(uuid: str) -> int:
    """What the periodic task does when it is the instance's turn: how many seeds are about to be scrubbed."""
    with transaction() as session:
        session.get_one(Instance, UUID(uuid)).seed_look_at = now()
    return scrub_booted()


@pytest.mark.usefixtures("worker")
def test_a_stopped_guest_takes_it_at_its_next_boot_and_the_seed_forgets_it(
    cloud: SimulatedCloud,
) -> None:
    uuid = create_ready(cloud)
    before = stored_hash(uuid)
    set_sign(uuid, "none")
    stop(cloud, uuid)
    answer = put(cloud, uuid)
    assert (answer.status_code, answer.json()["data"]) == (200, None)
    assert "next boot" in answer.json()["warnings"][0]
    assert stored_hash(uuid) != before
    assert seeds(uuid) == [f"seed-{uuid}-3.iso"]
    assert cd(uuid) == f"seed-{uuid}-3.iso"
    assert instance_row(uuid).seed_has_password
    assert guest(uuid) == {}
    again = put(cloud, uuid, "Calm-Badger-9")
    assert again.status_code == 200
    assert (seeds(uuid), secrets_kept()) == ([f"seed-{uuid}-4.iso"], 1)
    assert look_now(uuid) == 0, "it is off"
    stop(cloud, uuid, "start")
    assert look_now(uuid) == 0
    assert instance_row(uuid).seed_has_password, "before the guest has booted, the seed is needed"
    set_sign(uuid, "agent")
    deadline = time.monotonic() + 20
    while not look_now(uuid):
        assert time.monotonic() < deadline, "the guest was not seen"
    wait_until_idle()
    assert not instance_row(uuid).seed_has_password
    assert seeds(uuid) == [cd(uuid)] == [f"seed-{uuid}-5.iso"]
    kinds = [
        row["kind"]
        for row in cloud.customer.http.get("/operations", params={"resource": uuid}).json()["data"][
            "data"
        ]
    ]
    assert kinds[0] == "instance.scrub_seed"


@pytest.mark.usefixtures("worker")
def test_a_minute_of_packets_says_that_a_guest_without_an_agent_has_booted(
    cloud: SimulatedCloud,
) -> None:
    uuid = create_ready(cloud)
    stop(cloud, uuid)
    assert put(cloud, uuid).status_code == 200
    stop(cloud, uuid, "start")
    set_sign(uuid, "traffic")
    deadline = time.monotonic() + 20
    while instance_row(uuid).seed_heard_at is None:
        assert look_now(uuid) == 0
        assert time.monotonic() < deadline
    set_sign(uuid, "none")
    assert look_now(uuid) == 0
    assert instance_row(uuid).seed_heard_at is None, "the minute begins anew"
    set_sign(uuid, "traffic")
    assert look_now(uuid) == 0
    with transaction() as session:
        row = session.get_one(Instance, UUID(uuid))
        row.seed_heard_at = now() - timedelta(seconds=READ_MARGIN_S)
    # A restart begins it anew too.
    stop(cloud, uuid, "restart")
    assert instance_row(uuid).seed_heard_at is None
    with transaction() as session:
        row = session.get_one(Instance, UUID(uuid))
        row.seed_heard_at = now() - timedelta(seconds=READ_MARGIN_S)
    while look_now(uuid) == 0:
        assert time.monotonic() < deadline
        with transaction() as session:
            row = session.get_one(Instance, UUID(uuid))
            row.seed_heard_at = now() - timedelta(seconds=READ_MARGIN_S)
    wait_until_idle()
    assert not instance_row(uuid).seed_has_password


@pytest.mark.usefixtures("worker")
def test_the_agent_takes_an_older_password_out_of_the_seed(cloud: SimulatedCloud) -> None:
    """Set while stopped, and once more before the guest was seen to have booted: the second one counts."""
    uuid = create_ready(cloud)
    stop(cloud, uuid)
    set_sign(uuid, "none")
    assert put(cloud, uuid).status_code == 200
    stop(cloud, uuid, "start")
    refused = put(cloud, uuid, "Calm-Badger-9")
    assert refused.status_code == 409
    assert (seeds(uuid), cd(uuid)) == ([f"seed-{uuid}-3.iso"], f"seed-{uuid}-3.iso")
    assert instance_row(uuid).seed_has_password


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_stopped_guest_whose_first_boot_was_not_seen_takes_it_all_the_same(
    cloud: SimulatedCloud, settings: Settings, is_silent: bool
) -> None:
    """Whether that boot is still to come, or is over in a guest that nobody hears."""
    with InProcessWorker(settings, queues=[durable.OPERATIONS_QUEUE]):
        uuid = cloud.create_running()["uuid"]
        if is_silent:
            mark_guest_ready(uuid, "none")
            set_sign(uuid, "none")
            refused = put(cloud, uuid)
            assert "stop the instance and set the password then" in refused.json()["message"]
        first = stored_hash(uuid)
        stop(cloud, uuid)
        answer = put(cloud, uuid)
        assert answer.status_code == 200, answer.text
        assert "next boot" in answer.json()["warnings"][0]
        assert stored_hash(uuid) != first
        assert seeds(uuid) == [cd(uuid)] == [f"seed-{uuid}-1.iso"]
        assert instance_row(uuid).seed_has_password
        assert put(cloud, uuid, "Calm-Badger-9").status_code == 200
        assert run_audit() == []
        stop(cloud, uuid, "start")
        # Seen at last: the wait for the first boot takes all secrets out of the seed.
        scrub_seed(uuid)
    assert not instance_row(uuid).seed_has_password
    assert seeds(uuid) == [cd(uuid)] == [f"seed-{uuid}-2.iso"]


def test_a_password_that_is_set_while_the_first_seed_is_taken_away_is_not_lost(
    cloud: SimulatedCloud, settings: Settings
) -> None:
    """The guest was seen, and stopped before its seed was scrubbed: it has not read the new one yet."""
    with InProcessWorker(settings, queues=[durable.OPERATIONS_QUEUE]):
        uuid = cloud.create_running()["uuid"]
        stop(cloud, uuid)
        assert put(cloud, uuid).status_code == 200
        with transaction() as session:
            operation_id = session.get_one(Instance, UUID(uuid)).create_operation_id
            session.get_one(Resource, UUID(uuid)).active_operation_id = operation_id
        with pytest.raises(EngineUnavailable):
            scrub_seed(uuid)
        with transaction() as session:
            session.get_one(Resource, UUID(uuid)).active_operation_id = None
        scrub_seed(uuid)
    assert instance_row(uuid).seed_has_password
    assert seeds(uuid) == [cd(uuid)] == [f"seed-{uuid}-2.iso"]
    assert instance_row(uuid).seed_look_at is not None


def test_wrong_input(cloud: SimulatedCloud) -> None:
    created = cloud.create(username="budi", hostname="web-1")
    uuid, http = created["data"]["uuid"], cloud.customer.http
    for body, fields in (
        ({}, {"password", "password_confirmation"}),
        ({"password": "short", "password_confirmation": "short"}, {"password"}),
        ({"password": "x" * 65, "password_confirmation": "x" * 65}, {"password", "password_confirmation"}),
        ({"password": NEW, "password_confirmation": f"{NEW}x"}, {"password_confirmation"}),
        ({"password": f"{NEW}:", "password_confirmation": f"{NEW}:"}, {"password"}),
        ({"password": "alllowercase1", "password_confirmation": "alllowercase1"}, {"password"}),
        ({"password": f"{NEW}\x00", "password_confirmation": NEW}, {"password"}),
        ({"password": NEW, "password_confirmation": NEW, "username": "root"}, {"username"}),
    ):  # fmt: skip
        refused = http.put(f"/instances/{uuid}/password", json=body)
        assert (refused.status_code, set(refused.json()["errors"])) == (422, fields), body
        assert NEW not in refused.text
    assert put(cloud, str(uuid4())).status_code == 404
    assert put(cloud, uuid, username="root").status_code == 422
    busy = put(cloud, uuid)
    assert busy.status_code == 409
    assert "instance.create" in busy.json()["message"]


@pytest.mark.usefixtures("worker")
def test_a_repeat_under_the_same_key_has_one_effect(cloud: SimulatedCloud) -> None:
    uuid = create_ready(cloud)
    body = {"password": NEW, "password_confirmation": NEW}
    headers = {"Idempotency-Key": "p-1"}
    path = f"/instances/{uuid}/password"
    answers = [cloud.customer.http.put(path, json=body, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    other = {"password": "Calm-Badger-9", "password_confirmation": "Calm-Badger-9"}
    conflict = cloud.customer.http.put(path, json=other, headers=headers)
    assert (conflict.status_code, conflict.json()["type"]) == (409, "IDEMPOTENCY_CONFLICT")


@pytest.mark.usefixtures("worker")
def test_a_form_with_a_method(cloud: SimulatedCloud) -> None:
    uuid = create_ready(cloud)
    body = {"_method": "PUT", "password": NEW, "password_confirmation": NEW}
    answer = cloud.customer.http.post(f"/instances/{uuid}/password", data=body)
    assert (answer.status_code, answer.json()["message"]) == (200, MESSAGE)
