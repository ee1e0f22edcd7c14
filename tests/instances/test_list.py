"""The list: what a row holds, searching, sorting, filtering, paging, and how few queries it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event, update

from awan.instances.models import DesiredState, Instance, ObservedState
from awan.instances.rules import STATUSES
from awan.kit.clock import now
from awan.kit.database import get_engine, transaction
from awan.networks.models import PrivateNetwork, PrivateNetworkState
from awan.operations import Operation
from awan.resources import Resource
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.ssh_keys import ED25519_KEYS

ROW_TYPES: dict[str, tuple[type, ...]] = {
    "uuid": (str,),
    "hostname": (str,),
    "ip_address": (str, type(None)),
    "cpu": (int,),
    "memory": (str,),
    "memory_mib": (int,),
    "storage": (str,),
    "storage_gib": (int,),
    "status": (str,),
    "state": (str,),
    "location": (str,),
    "tier": (str,),
    "price_per_hour": (int,),
    "estimated_monthly_cost": (int,),
    "cost": (str, type(None)),
    "operation_flag": (int,),
    "active_operation": (dict, type(None)),
    "created_at": (str,),
    "created_at_iso": (str,),
}
DETAIL_ONLY = {
    "username", "cpu_type", "status_reason", "lock", "location_detail", "tier_detail", "template_detail",
    "cost_detail", "public_network", "private_networks", "ipv6_prefix", "ssh_keys", "labels", "is_protected",
    "hostname_applied", "ready_at", "updated_at",
}  # fmt: skip
ORDERS = [
    {"hostname": "web-1", "cpu": 1, "memory": 1},
    {"hostname": "WEB-2", "cpu": 4, "memory": 8},
    {"hostname": "db-1", "cpu": 2, "memory": 4, "use_public_ip": False},
    {"hostname": "cache.example.com", "cpu": 1, "memory": 2},
]


def settle(
    uuid: str, observed: ObservedState, desired: DesiredState = DesiredState.RUNNING
) -> None:
    """The instance is idle in a state, as after an operation of long ago."""
    key = UUID(uuid)
    with transaction() as session:
        session.execute(
            update(Instance)
            .where(Instance.instance_id == key)
            .values(observed_state=observed, desired_state=desired)
        )
        session.execute(
            update(Operation)
            .where(Operation.resource_id == key)
            .values(status="succeeded", finished_at=now())
        )
        session.execute(
            update(Resource).where(Resource.resource_id == key).values(active_operation_id=None)
        )


@pytest.fixture
def uuids(cloud: SimulatedCloud) -> list[str]:
    """Four instances, the oldest first, a day apart: running, stopped, in error, and one being created."""
    made = [cloud.create(**order)["data"]["uuid"] for order in ORDERS]
    for age, uuid in enumerate(reversed(made)):
        with transaction() as session:
            session.execute(
                update(Resource)
                .where(Resource.resource_id == UUID(uuid))
                .values(created_at=now() - timedelta(days=age))
            )
    settle(made[0], ObservedState.RUNNING)
    settle(made[1], ObservedState.STOPPED, DesiredState.STOPPED)
    settle(made[2], ObservedState.ERROR)
    return made


def names(cloud: SimulatedCloud, **query: Any) -> list[str]:
    """The host names of a page, in its order."""
    answer = cloud.customer.http.get("/instances", params=query)
    assert answer.status_code == 200, answer.text
    return [row["hostname"] for row in answer.json()["data"]["data"]]


def test_a_row_has_the_known_keys_and_the_detail_the_same_ones(
    cloud: SimulatedCloud, uuids: list[str]
) -> None:
    listed = cloud.customer.http.get("/instances").json()["data"]
    assert set(listed) == {"data", "active_operation", "page"}
    assert listed["page"] == {
        "total": 4, "count": 4, "per_page": 20, "current_page": 1, "total_pages": 1,
    }  # fmt: skip
    assert listed["active_operation"]["kind"] == "instance.create"
    for row in listed["data"]:
        detail = cloud.customer.http.get(f"/instances/{row['uuid']}").json()["data"]
        assert set(row) == set(ROW_TYPES)
        assert set(detail) == set(ROW_TYPES) | DETAIL_ONLY
        assert {name: detail[name] for name in ROW_TYPES} == row
        for name, types in ROW_TYPES.items():
            assert type(row[name]) in types, name
    newest = listed["data"][0]
    assert newest["operation_flag"] == 1
    assert set(newest["active_operation"]) == {"uuid", "kind", "status"}
    assert (newest["status"], newest["state"]) == ("Provisioning", "provisioning")
    assert (newest["memory"], newest["memory_mib"]) == ("2 GB", 2048)
    assert (newest["storage"], newest["storage_gib"]) == ("20GB", 20)
    assert (newest["location"], newest["tier"]) == ("Jakarta 1", "Cloud Compute")
    assert newest["estimated_monthly_cost"] == 30000 + 2 * 30000 + 20 * 1250
    assert newest["price_per_hour"] == 160  # 115000 / 720 = 159.7
    assert newest["created_at_iso"].endswith("Z")
    idle = listed["data"][-1]
    assert (idle["operation_flag"], idle["active_operation"]) == (0, None)


def test_details(cloud: SimulatedCloud, uuids: list[str]) -> None:
    detail = cloud.customer.http.get(f"/instances/{uuids[1]}").json()["data"]
    assert detail["username"] == "budi"
    assert detail["cpu_type"] == "shared"
    assert detail["location_detail"] == {
        "id": cloud.location_id, "name": "Jakarta 1", "code": "jkt1",
    }  # fmt: skip
    assert detail["tier_detail"]["id"] == cloud.tier_id
    assert detail["template_detail"]["os_family"] == "linux"
    assert detail["cost_detail"]["per_month"] == 4 * 30000 + 8 * 30000 + 20 * 1250
    assert (
        sum(item["price_per_month"] for item in detail["cost_detail"]["items"])
        == (detail["cost_detail"]["per_month"])
    )
    assert detail["cost_detail"]["per_hour"] == "534.72"
    assert detail["public_network"]["ip_address"] == detail["ip_address"]
    assert "password" not in str(detail).lower()
    offline = cloud.customer.http.get(f"/instances/{uuids[2]}").json()["data"]
    assert offline["public_network"] is None
    assert offline["ip_address"] is None


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ("web", ["web-2", "web-1"]),
        ("WEB-", ["web-2", "web-1"]),
        ("example.com", ["cache.example.com"]),
        ("-1", ["db-1", "web-1"]),
        ("%", []),
        ("_", []),
        ("\\", []),
        ("'", []),
        ("nothing", []),
    ],
)
def test_search(cloud: SimulatedCloud, uuids: list[str], search: str, expected: list[str]) -> None:
    assert names(cloud, search=search) == expected


def test_sort(cloud: SimulatedCloud, uuids: list[str]) -> None:
    by_age = ["web-1", "web-2", "db-1", "cache.example.com"]
    by_cost = ["web-1", "cache.example.com", "db-1", "web-2"]
    assert names(cloud) == by_age[::-1]
    assert names(cloud, sort="created_at") == by_age
    assert names(cloud, sort="-created_at") == by_age[::-1]
    assert names(cloud, sort="cost") == by_cost
    assert names(cloud, sort="-cost") == by_cost[::-1]


def test_statuses(cloud: SimulatedCloud, uuids: list[str]) -> None:
    assert names(cloud, statuses="running") == ["web-1"]
    assert names(cloud, statuses="Running,STOPPED", sort="created_at") == ["web-1", "web-2"]
    assert names(cloud, statuses=" error , provisioning ") == ["cache.example.com", "db-1"]
    assert names(cloud, statuses="terminating") == []
    assert len(names(cloud, statuses=",".join(STATUSES))) == 4
    assert names(cloud, statuses="running", search="web-2") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"statuses": "running,asleep"}, "statuses"),
        ({"statuses": "terminated"}, "statuses"),
        ({"statuses": ","}, "statuses"),
        ({"sort": "hostname"}, "sort"),
        ({"sort": "cost;drop"}, "sort"),
        ({"page": "0"}, "page"),
        ({"page": "x"}, "page"),
        ({"page": "-1"}, "page"),
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"search": "x" * 65}, "search"),
        ({"search": "a\x00"}, "search"),
        ({"order": "up"}, "order"),
    ],
)
def test_wrong_queries_are_refused(
    cloud: SimulatedCloud, query: dict[str, str], field: str
) -> None:
    answer = cloud.customer.http.get("/instances", params=query)
    assert answer.status_code == 422, answer.text
    assert set(answer.json()["errors"]) == {field}


def test_pages(cloud: SimulatedCloud, uuids: list[str]) -> None:
    seen = [names(cloud, limit=3, page=page) for page in (1, 2, 3)]
    assert [len(page) for page in seen] == [3, 1, 0]
    assert sorted(seen[0] + seen[1]) == sorted(names(cloud))
    past = cloud.customer.http.get("/instances?limit=3&page=3").json()["data"]
    assert past["data"] == []
    assert past["page"] == {
        "total": 4, "count": 0, "per_page": 3, "current_page": 3, "total_pages": 2,
    }  # fmt: skip
    empty = cloud.new_customer().http.get("/instances").json()["data"]
    assert empty["page"] == {
        "total": 0, "count": 0, "per_page": 20, "current_page": 1, "total_pages": 1,
    }  # fmt: skip
    assert empty["active_operation"] is None


@contextmanager
def statements() -> Iterator[list[str]]:
    """What the engine of this process is asked meanwhile."""
    asked: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        asked.append(statement)

    event.listen(get_engine(), "before_cursor_execute", note)
    yield asked
    event.remove(get_engine(), "before_cursor_execute", note)


def test_a_page_takes_four_queries_however_many_rows(
    cloud: SimulatedCloud, uuids: list[str]
) -> None:
    """The key, the rows with their number, the running operation, the addresses."""
    for query in ("", "?limit=1", "?search=web&sort=-cost&statuses=running,stopped", "?page=9"):
        with statements() as asked:
            assert cloud.customer.http.get(f"/instances{query}").status_code == 200
        assert len(asked) <= 4, "\n".join(asked)


def test_options_are_instances_without_an_address(cloud: SimulatedCloud, uuids: list[str]) -> None:
    http = cloud.customer.http
    answer = http.get("/instances/options", params={"location_id": cloud.location_id})
    assert answer.json()["data"] == [{"uuid": uuids[2], "hostname": "db-1", "status": "Error"}]
    unknown = http.get("/instances/options", params={"location_id": 2**40})
    assert set(unknown.json()["errors"]) == {"location_id"}
    assert http.get("/instances/options").status_code == 422


def test_installed_keys_stay_listed(cloud: SimulatedCloud) -> None:
    http = cloud.customer.http
    keys = [
        http.post("/ssh-keys", json={"title": f"k{n}", "key": ED25519_KEYS[n]}).json()["data"]
        for n in range(3)
    ]
    wanted = [keys[2]["id"], keys[0]["id"], keys[2]["id"]]
    uuid = cloud.create(ssh_keys=wanted)["data"]["uuid"]
    assert http.delete(f"/ssh-keys/{keys[0]['id']}").is_success
    shown = http.get(f"/instances/{uuid}/ssh-keys").json()["data"]
    assert [(row["id"], row["title"], row["deleted"]) for row in shown] == [
        (keys[2]["id"], "k2", False),
        (keys[0]["id"], "k0", True),
    ]
    assert all(row["fingerprint"].startswith("SHA256:") for row in shown)
    assert http.get(f"/instances/{uuid}").json()["data"]["ssh_keys"] == shown


def test_the_answer_of_a_creation_is_the_detail(cloud: SimulatedCloud) -> None:
    """It is made of what was written, not read again: nobody carries the creation out meanwhile."""
    http = cloud.customer.http
    keys = [
        http.post("/ssh-keys", json={"title": f"key {number}", "key": key}).json()["data"]["id"]
        for number, key in enumerate(ED25519_KEYS[:2])
    ]
    network = http.post(
        "/networks/private", json={"name": "inner", "location_id": cloud.location_id}
    ).json()["data"]
    with transaction() as session:
        session.execute(update(PrivateNetwork).values(state=PrivateNetworkState.ACTIVE.value))
    own = http.post("/networks/public", json={"location_id": cloud.location_id}).json()["data"]
    licensed = cloud.admin.post(
        "/admin/templates", json={"name": "Licensed", "version": "1", "license_monthly_minor": 7000}
    ).json()["data"]["id"]
    cloud.add_image(licensed)
    orders: list[dict[str, Any]] = [
        {"ssh_keys": keys[::-1], "vswitch": network["uuid"]},
        {"use_public_ip": False},
        {"use_dedicated_cpu": True, "template_id": licensed},
        {"public_network": own["uuid"]},
    ]
    for order in orders:
        answered = cloud.create(**order)["data"]
        assert answered == http.get(f"/instances/{answered['uuid']}").json()["data"]
        assert bool(answered["public_network"]) == order.get("use_public_ip", True)
        assert [key["id"] for key in answered["ssh_keys"]] == order.get("ssh_keys", [])
        assert [one["name"] for one in answered["private_networks"]] == (
            ["inner"] if "vswitch" in order else []
        )
