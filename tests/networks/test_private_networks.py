"""Private networks as their owner sees them: making, filling, giving a way out, and taking apart."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import select, update

from awan.catalogue import engines
from awan.engines.hypervisor.fake import FakeHypervisor
from awan.engines.registry import sim_store
from awan.errors import EngineRejected
from awan.fleet import Node, endpoint
from awan.instances.models import Instance
from awan.kit.database import transaction
from awan.networks.models import Nic, PrivateNetwork
from awan.networks.private_rules import private_spec
from awan.reconcile.audit import run_audit
from awan.reconcile.locations import check_location
from awan.reconcile.private_networks import put_back_private_networks
from tests.networks.test_public_addresses import take
from tests.support.changed_settings import changed_settings
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.simulated_cloud import Customer, SimulatedCloud

VIEW = {
    "id", "uuid", "name", "location", "cidr", "gateway_ip", "domain", "public_gateway", "instances_count",
    "status", "status_reason", "created_at",
}  # fmt: skip


def make(cloud: SimulatedCloud, customer: Customer | None = None, **body: Any) -> dict[str, Any]:
    """A private network that is active."""
    http = (customer or cloud.customer).http
    answer = http.post(
        "/networks/private",
        json={"name": f"net-{uuid4().hex[:6]}", "location_id": cloud.location_id, **body},
    )
    assert answer.status_code == 202, answer.text
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    return shown(cloud, answer.json()["data"]["uuid"], customer)


def shown(cloud: SimulatedCloud, uuid: str, customer: Customer | None = None) -> dict[str, Any]:
    answer = (customer or cloud.customer).http.get(f"/networks/private/{uuid}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["data"])


def attach(cloud: SimulatedCloud, instance: str, **body: Any) -> httpx.Response:
    return cloud.customer.http.put(f"/instances/{instance}/private-network", json=body)


def cards(cloud: SimulatedCloud, instance: str) -> list[dict[str, Any]]:
    detail = cloud.customer.http.get(f"/instances/{instance}").json()["data"]
    return list(detail["private_networks"])


def ports(cloud: SimulatedCloud, instance: str) -> set[str]:
    """The ports that the instance's domain has cards on, which the fabric has too, and the rows as well."""
    with transaction() as session:
        row = session.get_one(Instance, UUID(instance))
        node = endpoint(session.get_one(Node, row.node_id))
        opened = engines(session, cloud.location_id)
        known = session.scalars(
            select(Nic.nic_id).where(Nic.instance_id == row.instance_id, Nic.deleted_at.is_(None))
        ).all()
    domain = opened.hypervisor.find_domain(node, UUID(instance))
    assert domain is not None
    assert set(domain.port_ids) == set(known)
    found = [it for it in opened.fabric.list_ports() if it.instance_id == UUID(instance)]
    assert {it.port_id for it in found} == set(known)
    return {it.switch for it in found}


def quota(cloud: SimulatedCloud) -> int:
    used = cloud.customer.http.get("/account").json()["data"]["quotas"]["private_networks"]["used"]
    return int(used)


def test_a_network_is_made_listed_renamed_and_deleted(
    cloud: SimulatedCloud, worker: InProcessWorker
) -> None:
    http = cloud.customer.http
    query = f"/networks/private?name=database&location_id={cloud.location_id}"
    answer = http.post(query)
    assert answer.status_code == 202, answer.text
    assert answer.json()["message"] == "Private Network will be created in a moment"
    first = answer.json()["data"]
    assert set(first) == VIEW
    assert first["status"] == "creating"
    assert (first["cidr"], first["gateway_ip"]) == ("10.20.0.0/24", "10.20.0.1")
    cloud.wait(answer.json()["operation"]["uuid"])
    second = make(cloud, name="backend")
    assert second["cidr"] == "10.20.1.0/24"
    listed = http.get("/networks/private").json()
    assert listed["message"] == "Your Private Network"
    assert [(row["name"], row["status"]) for row in listed["data"]] == [
        ("database", "active"),
        ("backend", "active"),
    ]
    options = http.get(f"/networks/private/options?location_id={cloud.location_id}").json()["data"]
    assert options[0] == {"uuid": first["uuid"], "name": "database", "cidr": "10.20.0.0/24"}
    assert quota(cloud) == 2
    for reference in (first["uuid"], first["id"]):
        ips = http.get(f"/networks/private/{reference}/ips").json()["data"]
        assert ips == {"cidr": "10.20.0.0/24", "used": 0, "free": 252, "ips": []}
    taken = http.put(f"/networks/private/{first['id']}", json={"name": "backend"})
    assert (taken.status_code, list(taken.json()["errors"])) == (422, ["name"])
    renamed = http.put(f"/networks/private/{first['id']}", json={"name": "db"})
    assert renamed.json()["data"]["name"] == "db"
    gone = http.delete(f"/networks/private/{first['uuid']}")
    assert gone.status_code == 202, gone.text
    assert gone.json()["data"]["status"] == "deleting"
    cloud.wait(gone.json()["operation"]["uuid"])
    assert http.get(f"/networks/private/{first['uuid']}").status_code == 404
    assert quota(cloud) == 1
    # Its prefix is free again.
    assert make(cloud)["cidr"] == "10.20.0.0/24"
    assert run_audit() == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"location_id": 2**30}, "location_id"),
        ({"cidr": "8.8.8.0/24"}, "cidr"),
        ({"cidr": "10.0.0.0/8"}, "cidr"),
        ({"cidr": "10.0.0.1/24"}, "cidr"),
        ({"cidr": "10.30.0.128/25"}, "cidr"),
        ({"cidr": "10.0.0.0/29"}, "cidr"),
        ({"cidr": "fd00::/64"}, "cidr"),
        ({"vlan": 7}, "vlan"),
    ],
)
def test_refusals_of_create(
    cloud: SimulatedCloud, worker: InProcessWorker, change: dict[str, Any], field: str
) -> None:
    if "cidr" in change:
        make(cloud, cidr="10.30.0.0/24")
    body = {"name": "x", "location_id": cloud.location_id, **change}
    answer = cloud.customer.http.post("/networks/private", json=body)
    assert (answer.status_code, list(answer.json()["errors"])) == (422, [field])
    if change.get("cidr") == "fd00::/64":
        assert "must be IPv4" in answer.json()["errors"]["cidr"][0]


def test_an_own_network_that_is_not_active_is_named_as_such(cloud: SimulatedCloud) -> None:
    """Without a worker: it stays what its row says."""
    body = {"name": "x", "location_id": cloud.location_id}
    uuid = cloud.customer.http.post("/networks/private", json=body).json()["data"]["uuid"]

    def order(customer: Customer) -> str:
        answer = customer.http.post("/instances", json=cloud.order(vswitch=uuid))
        assert (answer.status_code, list(answer.json()["errors"])) == (422, ["vswitch"])
        return str(answer.json()["errors"]["vswitch"][0])

    assert "still being created" in order(cloud.customer)
    assert order(cloud.new_customer()) == "The selected vswitch is invalid."
    for state, words in (
        ("updating", "being changed"),
        ("deleting", "being deleted"),
        ("error", "status_reason"),
    ):
        with transaction() as session:
            session.execute(update(PrivateNetwork).values(state=state))
        assert words in order(cloud.customer)


def test_ten_networks_and_not_one_more(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    for _ in range(10):
        make(cloud)
    body = {"name": "x", "location_id": cloud.location_id}
    refused = cloud.customer.http.post("/networks/private", json=body)
    assert (refused.status_code, refused.json()["type"]) == (403, "QUOTA_EXCEEDED")
    # Another account begins with the same prefix: the two never meet.
    assert make(cloud, cloud.new_customer())["cidr"] == "10.20.0.0/24"


@pytest.mark.parametrize("power", ["running", "stopped"])
def test_attach_and_detach(cloud: SimulatedCloud, worker: InProcessWorker, power: str) -> None:
    http = cloud.customer.http
    one, two = make(cloud, name="one"), make(cloud, name="two", cidr="192.168.7.0/28")
    instance = cloud.create_running()["uuid"]
    if power == "stopped":
        answer = http.post(f"/instances/{instance}/stop", json={"force": True})
        cloud.wait(answer.json()["operation"]["uuid"])
    answer = attach(cloud, instance, vswitch=one["uuid"])
    assert answer.status_code == 200, answer.text
    assert answer.json()["message"] == "Instance successfully attached to Private Network"
    (card,) = answer.json()["data"]["private_networks"]
    assert {name: card[name] for name in ("uuid", "name", "ip_address")} == {
        "uuid": one["uuid"], "name": "one", "ip_address": "10.20.0.2",
    }  # fmt: skip
    assert attach(cloud, instance, vswitch=str(one["id"])).status_code == 409
    for bad in ("192.168.7.1", "192.168.7.15", "192.168.8.2"):
        refused = attach(cloud, instance, vswitch=two["uuid"], private_ip=bad)
        assert (refused.status_code, list(refused.json()["errors"])) == (422, ["private_ip"])
    answer = attach(cloud, instance, vswitch=str(two["id"]), private_ip="192.168.7.9")
    assert answer.status_code == 200, answer.text
    assert [card["ip_address"] for card in cards(cloud, instance)] == ["10.20.0.2", "192.168.7.9"]
    assert len(ports(cloud, instance)) == 3
    detail = shown(cloud, two["uuid"])
    assert detail["instances_count"] == 1
    (member,) = detail["instances"]
    assert (member["uuid"], member["ip_address"]) == (instance, "192.168.7.9")
    assert member["status"] == power.title()
    assert http.delete(f"/networks/private/{two['uuid']}").status_code == 409
    one_gone = http.delete(f"/instances/{instance}/private-network/{one['uuid']}")
    assert one_gone.status_code == 200, one_gone.text
    assert one_gone.json()["message"] == "Instance successfully detached from Private Network"
    assert [card["name"] for card in cards(cloud, instance)] == ["two"]
    again = http.delete(f"/instances/{instance}/private-network/{one['uuid']}")
    assert (again.status_code, again.json()["message"]) == (
        409,
        "The instance is not attached to this private network.",
    )
    assert len(ports(cloud, instance)) == 2
    assert attach(cloud, instance, vswitch="").status_code == 200
    assert cards(cloud, instance) == []
    assert len(ports(cloud, instance)) == 1
    assert attach(cloud, instance, vswitch=None).status_code == 409
    assert run_audit() == []


def test_a_guest_that_does_not_let_go(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    """It keeps its card; once it is off, the card goes."""
    one = make(cloud)
    instance = cloud.create_running()["uuid"]
    assert attach(cloud, instance, vswitch=one["uuid"]).status_code == 200
    with transaction() as session:
        node = endpoint(session.get_one(Node, session.get_one(Instance, UUID(instance)).node_id))
        hypervisor = engines(session, cloud.location_id).hypervisor
    assert isinstance(hypervisor, FakeHypervisor)
    hypervisor.set_holds_nics(node, UUID(instance), True)
    refused = attach(cloud, instance, vswitch="")
    assert refused.status_code == 409
    assert "does not let go" in refused.json()["message"]
    assert len(cards(cloud, instance)) == 1
    assert len(ports(cloud, instance)) == 2
    http = cloud.customer.http
    stopped = http.post(f"/instances/{instance}/stop", json={"force": True})
    cloud.wait(stopped.json()["operation"]["uuid"])
    assert attach(cloud, instance, vswitch="").status_code == 200
    assert run_audit() == []


def test_an_instance_is_born_in_a_network(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    """Without a public address too; and its deletion gives the private one back."""
    one = make(cloud)
    answer = cloud.create(vswitch=one["uuid"], use_public_ip=False)
    assert answer.get("warnings") is None
    instance = answer["data"]["uuid"]
    assert cloud.wait(answer["operation"]["uuid"])["status"] == "succeeded"
    assert [card["ip_address"] for card in cards(cloud, instance)] == ["10.20.0.2"]
    assert len(ports(cloud, instance)) == 1
    both = cloud.create_running(vswitch=str(one["id"]))
    assert [card["ip_address"] for card in both["private_networks"]] == ["10.20.0.3"]
    assert len(ports(cloud, both["uuid"])) == 2
    free = cloud.customer.http.get(f"/instances/options?location_id={cloud.location_id}").json()[
        "data"
    ]
    assert [row["uuid"] for row in free] == [instance]
    gone = cloud.customer.http.request(
        "DELETE", f"/instances/{instance}", json={"remove_ip": True, "remove_block_storage": False}
    )
    assert cloud.wait(gone.json()["operation"]["uuid"])["status"] == "succeeded"
    ips = cloud.customer.http.get(f"/networks/private/{one['id']}/ips").json()["data"]
    assert [row["ip_address"] for row in ips["ips"]] == ["10.20.0.3"]
    assert (
        cloud.create_running(vswitch=one["uuid"])["private_networks"][0]["ip_address"]
        == "10.20.0.2"
    )
    assert run_audit() == []


def test_the_gateway(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    http = cloud.customer.http
    one, two = make(cloud), make(cloud)
    first, second = take(cloud), take(cloud)
    attached = cloud.create_running()["public_network"]["uuid"]

    def put(network: dict[str, Any], gateway: str | None) -> httpx.Response:
        body = {"public_gateway": gateway}
        return http.put(f"/networks/private/{network['uuid']}/gateway", json=body)

    def fabric() -> list[tuple[str, str | None]]:
        with transaction() as session:
            opened = engines(session, cloud.location_id).fabric
        return [(it.switch, it.public_ip) for it in opened.list_private_networks()]

    assert put(one, "").status_code == 409
    answer = put(one, first["uuid"])
    assert answer.status_code == 200, answer.text
    assert answer.json()["message"] == "Private Network Gateway updated successfully"
    expected = {"uuid": first["uuid"], "ip_address": first["ip_address"]}
    assert answer.json()["data"]["public_gateway"] == expected
    assert answer.json()["data"]["status"] == "active"
    assert (f"private-{one['uuid']}", first["ip_address"]) in fabric()
    listed = http.get("/networks/public").json()["data"]["data"]
    row = next(it for it in listed if it["uuid"] == first["uuid"])
    assert row["status"] == "gateway"
    assert row["vswitch"] == {"uuid": one["uuid"], "name": one["name"]}
    # Whoever has it keeps it.
    for busy in (first["uuid"], attached):
        assert put(two, busy).status_code == 409
    assert put(one, str(uuid4())).status_code == 422
    assert http.delete(f"/networks/public/{first['uuid']}").status_code == 409
    order = cloud.order(public_network=first["uuid"])
    assert list(http.post("/instances", json=order).json()["errors"]) == ["public_network"]
    where = {"location_id": cloud.location_id, "vswitch_uuid": one["uuid"]}
    options = http.get("/networks/private/gateways", params=where).json()
    assert options["message"] == "Your Private Networkes"
    assert [(it["uuid"], it["selected"]) for it in options["data"]] == [
        (first["uuid"], True),
        (second["uuid"], False),
    ]
    assert run_audit() == []
    assert put(one, second["uuid"]).status_code == 200
    assert (f"private-{one['uuid']}", second["ip_address"]) in fabric()
    assert put(two, first["uuid"]).status_code == 200
    assert put(two, None).json()["data"]["public_gateway"] is None
    gone = http.delete(f"/networks/private/{one['uuid']}")
    cloud.wait(gone.json()["operation"]["uuid"])
    free = http.get(f"/networks/public/options?location_id={cloud.location_id}").json()["data"]
    assert {it["uuid"] for it in free} == {first["uuid"], second["uuid"]}
    assert fabric() == [(f"private-{two['uuid']}", None)]
    assert run_audit() == []


def test_the_graph(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    one, address = make(cloud), take(cloud)
    instance = cloud.create_running(vswitch=one["uuid"])
    http = cloud.customer.http
    http.put(f"/networks/private/{one['uuid']}/gateway", json={"public_gateway": address["uuid"]})
    answer = http.get(f"/networks/private/{one['id']}/graph").json()
    assert answer["message"] == "Private Network graph data"
    graph = answer["data"]
    assert [(node["type"], node["label"]) for node in graph["nodes"]] == [
        ("internet", "Internet"),
        ("gateway", address["ip_address"]),
        ("vswitch", one["name"]),
        ("instance", instance["hostname"]),
    ]
    known = {node["id"] for node in graph["nodes"]}
    assert all({edge["from"], edge["to"]} <= known for edge in graph["edges"])
    assert [edge["ip_address"] for edge in graph["edges"]] == [
        address["ip_address"],
        "10.20.0.1",
        "10.20.0.2",
    ]
    assert len(graph["traffic"]) == 48
    assert set(graph["traffic"][0]) == {"time", "netin", "netout"}


def test_strangers_find_nothing(cloud: SimulatedCloud, worker: InProcessWorker) -> None:
    one, address = make(cloud), take(cloud)
    stranger = cloud.new_customer()
    theirs = stranger.http.post("/instances", json=cloud.order(vswitch=one["uuid"]))
    assert (theirs.status_code, list(theirs.json()["errors"])) == (422, ["vswitch"])
    for reference in (one["uuid"], one["id"], str(uuid4()), "x", "9" * 30):
        for method, path in (
            ("GET", ""),
            ("GET", "/ips"),
            ("GET", "/graph"),
            ("DELETE", ""),
        ):
            found = stranger.http.request(method, f"/networks/private/{reference}{path}")
            assert found.status_code == 404, (method, path, reference)
    foreign = make(cloud, stranger)
    taken = stranger.http.put(
        f"/networks/private/{foreign['uuid']}/gateway", json={"public_gateway": address["uuid"]}
    )
    assert taken.status_code == 422
    assert stranger.http.get("/networks/private").json()["data"][0]["uuid"] == foreign["uuid"]


def test_what_is_missing_is_found_and_put_back(
    cloud: SimulatedCloud, worker: InProcessWorker
) -> None:
    one, address = make(cloud), take(cloud)
    instance = cloud.create_running(vswitch=one["uuid"])["uuid"]
    body = {"public_gateway": address["uuid"]}
    cloud.customer.http.put(f"/networks/private/{one['uuid']}/gateway", json=body)
    wait_until_idle()
    switch = f"private-{one['uuid']}"
    with transaction() as session:
        fabric = engines(session, cloud.location_id).fabric
    fabric.ensure_gateway_absent(switch)
    assert [it.kind for it in run_audit()] == ["network.gateway"]
    put_back_private_networks(cloud.location_id)
    assert run_audit() == []
    fabric.ensure_private_network_absent(switch)
    assert {it.kind for it in run_audit()} == {"network.missing", "port.missing"}
    put_back_private_networks(cloud.location_id)
    assert [it.kind for it in run_audit()] == ["port.missing"]
    assert ports_missing(cloud, instance)
    fabric.ensure_private_network(private_spec(uuid4(), IPv4Network("10.99.0.0/24"), ()))
    assert {it.kind for it in run_audit()} == {"port.missing", "network.stray"}


def ports_missing(cloud: SimulatedCloud, instance: str) -> bool:
    with transaction() as session:
        fabric = engines(session, cloud.location_id).fabric
    return len([it for it in fabric.list_ports() if it.instance_id == UUID(instance)]) == 1


def test_a_deletion_that_failed_is_finished_and_not_taken_back(
    cloud: SimulatedCloud, worker: InProcessWorker
) -> None:
    one = make(cloud)
    sim_store().faults.clear()
    sim_store().faults.fail_at(1, EngineRejected)
    answer = cloud.customer.http.delete(f"/networks/private/{one['uuid']}")
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "failed"
    sim_store().faults.clear()
    assert shown(cloud, one["uuid"])["status"] == "deleting"
    check_location(cloud.location_id)
    assert shown(cloud, one["uuid"])["status"] == "deleting", "not every half minute"
    with changed_settings(repair_retry_s="0"):
        check_location(cloud.location_id)
    wait_until_idle()
    assert cloud.customer.http.get(f"/networks/private/{one['uuid']}").status_code == 404
    assert quota(cloud) == 0
    assert run_audit() == []
