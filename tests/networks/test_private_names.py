"""Names inside private networks: who has one, when it goes, and what happens when something is away or wrong."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import func, select, text

from awan.catalogue import engines
from awan.engines.registry import sim_store
from awan.errors import EngineRejected, EngineUnavailable
from awan.kit.database import transaction
from awan.networks import private_names
from awan.networks.models import PrivateNetwork, StalePrivateNetwork
from awan.networks.private_names import push_stale_private_names
from awan.reconcile import run_audit
from awan.reconcile.locations import check_location
from awan.reconcile.private_networks import put_back_private_networks
from tests.networks.test_private_networks import attach, make, shown
from tests.support.changed_settings import changed_settings
from tests.support.guests import create_ready
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.private_names import (
    PRIVATE_ZONE,
    RESOLVER,
    names_of,
    told,
    turn_off,
    turn_on,
    ways,
)
from tests.support.simulated_cloud import SimulatedCloud

pytestmark = pytest.mark.usefixtures("worker")


def delete_instance(cloud: SimulatedCloud, uuid: str) -> None:
    body = {"remove_ip": True, "remove_block_storage": True}
    gone = cloud.customer.http.request("DELETE", f"/instances/{uuid}", json=body)
    assert cloud.wait(gone.json()["operation"]["uuid"])["status"] == "succeeded"


def delete_network(cloud: SimulatedCloud, uuid: str) -> None:
    gone = cloud.customer.http.delete(f"/networks/private/{uuid}")
    assert cloud.wait(gone.json()["operation"]["uuid"])["status"] == "succeeded"


def marked() -> int:
    with transaction() as session:
        return session.scalar(select(func.count()).select_from(StalePrivateNetwork)) or 0


def try_again() -> None:
    """What waits for its turn is tried at once."""
    with transaction() as session:
        session.execute(text("UPDATE stale_private_network SET retry_at = now()"))
    push_stale_private_names()


def test_without_a_zone_all_is_as_it_was(cloud: SimulatedCloud) -> None:
    network = make(cloud)
    cloud.create_running(hostname="db", vswitch=network["uuid"], use_public_ip=False)
    assert network["domain"] is None
    (member,) = shown(cloud, network["uuid"])["instances"]
    assert member["name"] is None
    assert told(network["uuid"]) is None
    push_stale_private_names()
    assert (ways(), marked()) == ({}, 0)
    assert run_audit() == []


def test_members_have_names_and_lose_them(cloud: SimulatedCloud) -> None:
    turn_on(cloud)
    network = make(cloud)
    domain = network["domain"]
    assert domain == f"{network['uuid'].replace('-', '')}.{PRIVATE_ZONE}"
    switch = f"private-{network['uuid']}"
    assert told(network["uuid"]) == {
        "domain": domain, "resolver": RESOLVER, "router": "10.20.0.254",
    }  # fmt: skip
    way = ways()[switch]
    assert (way["inner"], way["outer"], way["resolver"]) == (
        "10.20.0.254",
        "100.64.0.1",
        RESOLVER,
    )
    database = cloud.create_running(hostname="db", vswitch=network["uuid"], use_public_ip=False)
    web = cloud.create_running(hostname="web")
    push_stale_private_names()
    assert names_of(domain) == {"db": ["10.20.0.2"]}
    assert attach(cloud, web["uuid"], vswitch=network["uuid"]).status_code == 200
    push_stale_private_names()
    assert names_of(domain) == {"db": ["10.20.0.2"], "web": ["10.20.0.3"]}
    members = shown(cloud, network["uuid"])["instances"]
    assert [it["name"] for it in members] == [f"db.{domain}", f"web.{domain}"]
    assert run_audit() == []
    assert attach(cloud, web["uuid"], vswitch="").status_code == 200
    push_stale_private_names()
    assert names_of(domain) == {"db": ["10.20.0.2"]}
    delete_instance(cloud, database["uuid"])
    push_stale_private_names()
    assert names_of(domain) == {}
    delete_network(cloud, network["uuid"])
    push_stale_private_names()
    assert (ways(), marked()) == ({}, 0)
    assert run_audit() == []


def test_a_new_hostname_is_a_new_name(cloud: SimulatedCloud) -> None:
    turn_on(cloud)
    network = make(cloud)
    uuid = create_ready(cloud, hostname="db", vswitch=network["uuid"])
    push_stale_private_names()
    path = f"/instances/{uuid}/hostname"
    assert cloud.customer.http.put(path, json={"hostname": "postgres"}).status_code == 200
    push_stale_private_names()
    assert names_of(network["domain"]) == {"postgres": ["10.20.0.2"]}


@contextmanager
def failing_later(worker: InProcessWorker) -> Iterator[None]:
    """What is asked for inside is wanted meanwhile, and then it fails."""
    worker.stop()
    with changed_settings(operation_wait_s="0.1"):
        yield
    push_stale_private_names()
    sim_store().faults.fail_at(1, EngineRejected)
    worker.start()
    wait_until_idle()
    sim_store().faults.clear()


def test_a_hostname_that_could_not_be_had(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    turn_on(cloud)
    network = make(cloud)
    uuid = create_ready(cloud, hostname="db", vswitch=network["uuid"])
    with failing_later(worker):
        path = f"/instances/{uuid}/hostname"
        assert cloud.customer.http.put(path, json={"hostname": "mysql"}).status_code == 202
        push_stale_private_names()
        assert names_of(network["domain"]) == {"mysql": ["10.20.0.2"]}
    push_stale_private_names()
    assert names_of(network["domain"]) == {"db": ["10.20.0.2"]}
    assert run_audit() == []


def test_a_failed_creation_leaves_no_name(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    turn_on(cloud)
    network = make(cloud)
    with failing_later(worker):
        cloud.create(hostname="db", vswitch=network["uuid"])
        push_stale_private_names()
        assert names_of(network["domain"]) == {"db": ["10.20.0.2"]}
    push_stale_private_names()
    assert (names_of(network["domain"]), marked()) == ({}, 0)
    assert run_audit() == []


def test_a_failed_attachment_leaves_no_name(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    turn_on(cloud)
    network = make(cloud)
    web = create_ready(cloud, hostname="web")
    with failing_later(worker):
        assert attach(cloud, web, vswitch=network["uuid"]).status_code == 202
        push_stale_private_names()
        assert names_of(network["domain"]) == {"web": ["10.20.0.2"]}
    push_stale_private_names()
    assert (names_of(network["domain"]), marked()) == ({}, 0)
    assert run_audit() == []


def test_addresses_of_networks_are_used_again(cloud: SimulatedCloud) -> None:
    turn_on(cloud, services_cidr="100.64.0.52/30", resolver="100.64.0.53")
    one = make(cloud)
    assert one["domain"] is not None
    full = make(cloud)
    assert full["domain"] is None
    assert told(full["uuid"]) is None
    assert [way["outer"] for way in ways().values()] == ["100.64.0.54"]
    put_back_private_networks(cloud.location_id)
    assert (shown(cloud, full["uuid"])["domain"], marked()) == (None, 0)
    delete_network(cloud, one["uuid"])
    put_back_private_networks(cloud.location_id)
    assert {switch: way["outer"] for switch, way in ways().items()} == {
        f"private-{full['uuid']}": "100.64.0.54"
    }
    assert shown(cloud, full["uuid"])["domain"] is not None
    push_stale_private_names()
    assert run_audit() == []


def test_names_come_and_go_with_the_configuration(cloud: SimulatedCloud) -> None:
    network = make(cloud)
    cloud.create_running(hostname="db", vswitch=network["uuid"])
    turn_on(cloud)
    check_location(cloud.location_id)
    push_stale_private_names()
    domain = shown(cloud, network["uuid"])["domain"]
    assert names_of(domain) == {"db": ["10.20.0.2"]}
    assert told(network["uuid"]) is not None
    assert run_audit() == []
    turn_on(cloud, services_cidr="100.100.0.0/24", resolver="100.100.0.1")
    check_location(cloud.location_id)
    assert [way["outer"] for way in ways().values()] == ["100.100.0.2"]
    push_stale_private_names()
    assert run_audit() == []
    turn_off(cloud)
    check_location(cloud.location_id)
    assert shown(cloud, network["uuid"])["domain"] is None
    assert (told(network["uuid"]), ways()) == (None, {})
    assert run_audit() == []


def test_a_nameserver_that_is_away_is_told_later(cloud: SimulatedCloud) -> None:
    turn_on(cloud)
    network = make(cloud)
    create_ready(cloud, hostname="db", vswitch=network["uuid"])
    wait_until_idle()
    for call in (1, 2):
        for error in (EngineUnavailable, EngineRejected):
            sim_store().faults.fail_at(call, error)
            try_again()
            sim_store().faults.clear()
            assert marked() == 1
    try_again()
    assert (names_of(network["domain"]), marked()) == ({"db": ["10.20.0.2"]}, 0)


def test_a_late_push_does_not_bring_a_name_back(
    cloud: SimulatedCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker freezes before its push, another one pushes that the network is gone, and the first goes on."""
    turn_on(cloud)
    network = make(cloud)
    instance = cloud.create_running(hostname="db", vswitch=network["uuid"])
    push = private_names._push

    def push_late(location_id: int, zone: str, wanted: Any) -> None:
        monkeypatch.setattr(private_names, "_push", push)
        delete_instance(cloud, instance["uuid"])
        delete_network(cloud, network["uuid"])
        push_stale_private_names()
        assert marked() == 0
        push(location_id, zone, wanted)
        assert names_of(network["domain"]) == {"db": ["10.20.0.2"]}

    monkeypatch.setattr(private_names, "_push", push_late)
    push_stale_private_names()
    push_stale_private_names()
    assert (names_of(network["domain"]), marked()) == ({}, 0)


def test_names_are_put_back_and_what_nobody_explains_is_reported(cloud: SimulatedCloud) -> None:
    turn_on(cloud)
    network, gone = make(cloud), make(cloud)
    cloud.create_running(hostname="db", vswitch=network["uuid"])
    delete_network(cloud, gone["uuid"])
    push_stale_private_names()
    store, location = sim_store(), str(cloud.location_id)
    store.execute("DELETE FROM sim.name_record WHERE name = %s", [f"db.{network['domain']}"])
    strangers = [f"evil.{network['domain']}", f"late.{gone['domain']}"]
    unknown = f"who.{'ab' * 16}.{PRIVATE_ZONE}"
    for name in (*strangers, unknown, f"ns.{PRIVATE_ZONE}"):
        store.execute(
            "INSERT INTO sim.name_record VALUES (%s, %s, 'A', '{10.9.9.9}')", [location, name]
        )
    found = {(it.kind, it.subject) for it in run_audit()}
    assert found == {
        ("name.wrong", f"db.{network['domain']}"),
        *(("name.stray", name) for name in (*strangers, unknown)),
    }
    check_location(cloud.location_id)
    push_stale_private_names()
    assert names_of(network["domain"]) == {"db": ["10.20.0.2"]}
    assert names_of(gone["domain"]) == {}
    assert [(it.kind, it.subject) for it in run_audit()] == [("name.stray", unknown)]
    check_location(cloud.location_id)
    rows = cloud.admin.get("/admin/quarantine").json()["data"]
    assert [(row["kind"], row["subject"]) for row in rows] == [("name", unknown)]


def test_a_way_that_is_missing_or_wrong_is_put_back(cloud: SimulatedCloud) -> None:
    turn_on(cloud)
    network = make(cloud)
    switch = f"private-{network['uuid']}"
    before = ways()
    with transaction() as session:
        fabric = engines(session, cloud.location_id).fabric
    fabric.ensure_resolver_absent(switch)
    assert [(it.kind, it.subject) for it in run_audit()] == [("network.resolver", switch)]
    put_back_private_networks(cloud.location_id)
    assert ways() == before
    assert run_audit() == []
    sim_store().execute(
        "UPDATE sim.fabric_network SET spec = jsonb_set(spec, '{names}', 'null') WHERE switch = %s",
        [switch],
    )
    put_back_private_networks(cloud.location_id)
    assert told(network["uuid"]) is not None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"resolver": "10.0.0.1"}, "options.private_names"),
        ({"resolver": "100.64.0.0"}, "options.private_names"),
        ({"services_cidr": "100.64.0.52/31"}, "options.private_names.services_cidr"),
        (
            {"services_cidr": "10.64.0.0/16", "resolver": "10.64.0.53"},
            "options.private_names.services_cidr",
        ),
        ({"vlan": 5000}, "options.private_names.vlan"),
        ({"zone": "jkt1.awan.example"}, "options"),
        ({"other": 1}, "options.private_names.other"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(
    cloud: SimulatedCloud, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(AssertionError, match=field):
        turn_on(cloud, **changes)


def test_owners_cannot_give_names_in_the_zone(cloud: SimulatedCloud) -> None:
    turn_on(cloud, zone="awan.internal")
    made = cloud.customer.http.post("/networks/public", json={"location_id": cloud.location_id})
    path = f"/networks/public/{made.json()['data']['uuid']}/rdns"
    refused = cloud.customer.http.put(path, json={"rdns": "db.awan.internal"})
    assert refused.status_code == 422
    assert "given by us alone" in refused.text


def test_networks_made_at_once_have_addresses_of_their_own(cloud: SimulatedCloud) -> None:
    turn_on(cloud)
    wanted = [{"name": f"net-{number}", "location_id": cloud.location_id} for number in range(3)]
    customers = [cloud.new_customer(f"customer {number}") for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(
            pool.map(
                lambda it: it[0].http.post("/networks/private", json=it[1]),
                zip(customers, wanted, strict=True),
            )
        )
    assert [answer.status_code for answer in answers] == [202] * 3
    wait_until_idle()
    with transaction() as session:
        found = session.scalars(select(PrivateNetwork.service_ip)).all()
    assert sorted(str(it) for it in found) == ["100.64.0.1", "100.64.0.2", "100.64.0.3"]
