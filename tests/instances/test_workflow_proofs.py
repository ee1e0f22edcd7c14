"""The generic proofs of durable work on create, delete, start, stop, restart, reset, password and hostname."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from uuid import UUID

import pytest
from httpx import Response
from passlib.hash import sha512_crypt
from sqlalchemy import func, select

from awan.engines.hypervisor import GuestSign
from awan.engines.registry import sim_store
from awan.instances.models import Instance
from awan.instances.password_boots import note_sign
from awan.instances.situation import PASSWORD_PURPOSE
from awan.kit.database import transaction
from awan.kit.secrets import Secret, get_secret
from awan.resources import Resource
from awan.settings import Settings
from tests.support import proofs
from tests.support.changed_settings import changed_settings
from tests.support.guests import cd, finish_first_boot, guest, instance_row, seeds
from tests.support.holdings import assert_counts, engine_state
from tests.support.simulated_cloud import SimulatedCloud

REMOVE = {"remove_ip": True, "remove_block_storage": False}


@dataclass
class World:
    """A cloud, and the instance under proof (None until it is created)."""

    cloud: SimulatedCloud
    uuid: str = ""


def start_create(world: World) -> UUID:
    """Begins a creation."""
    answer = world.cloud.create()
    world.uuid = answer["data"]["uuid"]
    return UUID(answer["operation"]["uuid"])


def is_created(world: World) -> None:
    """Exactly the created instance exists, and runs."""
    assert_counts(world.cloud, 1)
    shown = world.cloud.customer.http.get(f"/instances/{world.uuid}").json()["data"]
    assert shown["status"] == "Running"


def is_not_created(world: World) -> None:
    """Nothing is held; the instance stays, in error, with a reason."""
    assert_counts(world.cloud, 0)
    shown = world.cloud.customer.http.get(f"/instances/{world.uuid}").json()["data"]
    assert shown["status"] == "Error"
    assert shown["status_reason"]


def remove(world: World) -> None:
    """Deletes the instance through the API."""
    answer = world.cloud.customer.http.request("DELETE", f"/instances/{world.uuid}", json=REMOVE)
    assert answer.status_code == 202, answer.text
    ended = world.cloud.wait(answer.json()["operation"]["uuid"])
    assert ended["status"] == "succeeded", ended


def fresh(cloud: SimulatedCloud) -> World:
    """The cloud without the instances of the case before."""
    for row in cloud.customer.http.get("/instances").json()["data"]["data"]:
        remove(World(cloud, row["uuid"]))
    assert_counts(cloud, 0)
    return World(cloud)


def create_case(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[World]:
    """Creation."""
    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=lambda: fresh(cloud),
        begin=start_create,
        succeeded=is_created,
        undone=is_not_created,
    )


def existing(cloud: SimulatedCloud, power: str) -> World:
    """An instance that runs, or is stopped."""
    world = fresh(cloud)
    world.uuid = cloud.create_running()["uuid"]
    if power == "stopped":
        change(world, "stop")
    return world


def change(world: World, verb: str) -> None:
    """A power change, waited for."""
    answer = world.cloud.customer.http.post(f"/instances/{world.uuid}/{verb}")
    assert answer.status_code == 202, answer.text
    assert world.cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"


def power_case(
    settings: Settings, cloud: SimulatedCloud, verb: str, before: str, after: str
) -> proofs.Case[World]:
    """A power change from one state to another."""

    def begin(world: World) -> UUID:
        answer = world.cloud.customer.http.post(f"/instances/{world.uuid}/{verb}")
        assert answer.status_code == 202, answer.text
        return UUID(answer.json()["operation"]["uuid"])

    def shows_truth(world: World) -> None:
        """Status and engine agree, whatever happened; nothing was doubled or lost."""
        shown = world.cloud.customer.http.get(f"/instances/{world.uuid}").json()["data"]
        power = dict(engine_state(world.cloud)["domains"])[UUID(world.uuid)]
        assert shown["status"] == ("Running" if power == "running" else "Stopped")
        assert shown["active_operation"] is None
        assert_counts(world.cloud, 1)

    def succeeded(world: World) -> None:
        shown = world.cloud.customer.http.get(f"/instances/{world.uuid}").json()["data"]
        assert shown["status"] == after
        shows_truth(world)

    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=lambda: existing(cloud, before),
        begin=begin,
        succeeded=succeeded,
        undone=shows_truth,
    )


def delete_case(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[World]:
    """Deletion. When a call is refused for good it fails; asked again, it ends."""

    def begin(world: World) -> UUID:
        answer = world.cloud.customer.http.request(
            "DELETE", f"/instances/{world.uuid}", json=REMOVE
        )
        assert answer.status_code == 202, answer.text
        return UUID(answer.json()["operation"]["uuid"])

    def gone(world: World) -> None:
        assert_counts(world.cloud, 0)
        assert world.cloud.customer.http.get(f"/instances/{world.uuid}").status_code == 404
        with transaction() as session:
            instance = session.get_one(Instance, UUID(world.uuid))
            assert instance.password_secret_id is None

    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=lambda: existing(cloud, "running"),
        begin=begin,
        succeeded=gone,
        undone=remove,
    )


Proof = Callable[..., None]


@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_outage_at_each_call,
        proofs.survives_death_at_each_call,
        proofs.survives_death_while_undoing,
    ],
)
def test_create(settings: Settings, cloud: SimulatedCloud, proof: Proof) -> None:
    proof(create_case(settings, cloud))


@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_outage_at_each_call,
        proofs.survives_death_at_each_call,
    ],
)
def test_delete(settings: Settings, cloud: SimulatedCloud, proof: Proof) -> None:
    proof(delete_case(settings, cloud))


@pytest.mark.parametrize(
    ("verb", "before", "after"),
    [
        ("start", "stopped", "Running"),
        ("stop", "running", "Stopped"),
        ("restart", "running", "Running"),
        ("reset", "running", "Running"),
    ],
)
@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_death_at_each_call,
    ],
)
def test_power(
    settings: Settings, cloud: SimulatedCloud, proof: Proof, verb: str, before: str, after: str
) -> None:
    proof(power_case(settings, cloud, verb, before, after))


def booted(cloud: SimulatedCloud, power: str) -> World:
    """An instance whose first boot is over, running or stopped."""
    world = existing(cloud, "running")
    finish_first_boot(world.uuid)
    if power == "stopped":
        change(world, "stop")
    return world


def guest_case(
    settings: Settings,
    cloud: SimulatedCloud,
    power: str,
    begin: Callable[[World], None],
    is_changed: Callable[[World, bool], bool],
) -> proofs.Case[World]:
    """A change in a guest. `begin` calls the API, which does not wait; `is_changed(world, wished)` asks the rows."""

    def start(world: World) -> UUID:
        begin(world)
        with transaction() as session:
            row = session.get_one(Resource, UUID(world.uuid))
            assert row.active_operation_id is not None
            return row.active_operation_id

    def holds_together(world: World) -> None:
        """One seed, which is the one in the CD drive and the one that the rows know; one secret; no lock."""
        assert_counts(world.cloud, 1)
        row = instance_row(world.uuid)
        assert seeds(world.uuid) == [cd(world.uuid)]
        assert cd(world.uuid) == f"seed-{world.uuid}-{row.seed_generation}.iso"
        assert row.new_password_secret_id is None
        with transaction() as session:
            assert session.scalar(select(func.count()).select_from(Secret)) == 1
            resource = session.get_one(Resource, UUID(world.uuid))
        assert (resource.name, resource.active_operation_id) == (row.hostname, None)
        shown = world.cloud.customer.http.get(f"/instances/{world.uuid}").json()["data"]
        assert shown["status"] == power.title()

    def succeeded(world: World) -> None:
        holds_together(world)
        assert is_changed(world, True)

    def undone(world: World) -> None:
        holds_together(world)
        assert is_changed(world, False)

    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=lambda: booted(cloud, power),
        begin=start,
        succeeded=succeeded,
        undone=undone,
    )


def at_once(call: Callable[[], Response]) -> None:
    """Makes a call that would wait for its operation, without waiting."""
    with changed_settings(operation_wait_s="0"):
        answer = call()
    assert answer.status_code in (200, 202), answer.text


def password_case(settings: Settings, cloud: SimulatedCloud, power: str) -> proofs.Case[World]:
    """Another password."""
    body = {"password": "Brave-Donkey-8", "password_confirmation": "Brave-Donkey-8"}

    def begin(world: World) -> None:
        http = world.cloud.customer.http
        at_once(lambda: http.put(f"/instances/{world.uuid}/password", json=body))

    def is_changed(world: World, wished: bool) -> bool:
        row = instance_row(world.uuid)
        assert row.password_secret_id is not None
        with transaction() as session:
            stored = get_secret(session, row.password_secret_id, PASSWORD_PURPOSE)
        if sha512_crypt.verify(body["password"], stored) is not wished:
            return False
        if power == "stopped":
            return row.seed_has_password is wished
        digest = sha256(stored.encode()).hexdigest()
        return not wished or bool(guest(world.uuid)["password_digest"] == digest)

    return guest_case(settings, cloud, power, begin, is_changed)


def hostname_case(settings: Settings, cloud: SimulatedCloud, power: str) -> proofs.Case[World]:
    """Another name."""

    def begin(world: World) -> None:
        http = world.cloud.customer.http
        at_once(lambda: http.put(f"/instances/{world.uuid}/hostname", json={"hostname": "renamed"}))

    def is_changed(world: World, wished: bool) -> bool:
        row = instance_row(world.uuid)
        port = sim_store().find_one("SELECT hostname FROM sim.fabric_port")
        assert port is not None
        assert port["hostname"] == row.hostname
        if power == "running":
            assert guest(world.uuid).get("hostname", row.hostname) == row.hostname
        return (row.hostname == "renamed") is wished

    return guest_case(settings, cloud, power, begin, is_changed)


@pytest.mark.parametrize("power", ["running", "stopped"])
@pytest.mark.parametrize("make_case", [password_case, hostname_case])
@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_death_at_each_call,
    ],
)
def test_guest(
    settings: Settings,
    cloud: SimulatedCloud,
    proof: Proof,
    make_case: Callable[[Settings, SimulatedCloud, str], proofs.Case[World]],
    power: str,
) -> None:
    proof(make_case(settings, cloud, power))


def scrub_case(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[World]:
    """The password goes out of a seed that a guest has booted with."""

    def prepare() -> World:
        world = booted(cloud, "stopped")
        body = {"password": "Brave-Donkey-8", "password_confirmation": "Brave-Donkey-8"}
        answer = cloud.customer.http.put(f"/instances/{world.uuid}/password", json=body)
        assert answer.status_code == 200, answer.text
        change(world, "start")
        return world

    def begin(world: World) -> None:
        assert note_sign(UUID(world.uuid), GuestSign.AGENT)

    def is_changed(world: World, wished: bool) -> bool:
        return instance_row(world.uuid).seed_has_password is not wished

    case = guest_case(settings, cloud, "running", begin, is_changed)
    return replace(case, prepare=prepare)


@pytest.mark.parametrize(
    "proof",
    [
        proofs.runs_twice_once,
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_death_at_each_call,
    ],
)
def test_scrub_seed(settings: Settings, cloud: SimulatedCloud, proof: Proof) -> None:
    proof(scrub_case(settings, cloud))
