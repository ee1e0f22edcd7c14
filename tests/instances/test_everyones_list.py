"""The operator's list: every account's instances, with their owners and nodes, and how few queries it takes."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from awan.instances.models import ObservedState
from tests.instances.test_list import ROW_TYPES, settle
from tests.support.simulated_cloud import Customer, SimulatedCloud
from tests.support.statements import recorded


@pytest.fixture
def other(cloud: SimulatedCloud) -> Customer:
    """Another customer with an instance, younger than the first customer's two."""
    cloud.create(hostname="web-1")
    cloud.create(hostname="db-1", use_public_ip=False)
    customer = cloud.new_customer("PT [/x]")
    cloud.create(customer, hostname="web-1")
    return customer


def listed(cloud: SimulatedCloud, **query: Any) -> list[tuple[str, str]]:
    """Owner and hostname of the rows of a page, in its order."""
    answer = cloud.admin.get("/admin/instances", params=query)
    assert answer.status_code == 200, answer.text
    return [(row["account"], row["hostname"]) for row in answer.json()["data"]["data"]]


def test_a_row_also_says_whose_and_where(cloud: SimulatedCloud, other: Customer) -> None:
    data = cloud.admin.get("/admin/instances").json()["data"]
    assert data["page"] == {
        "total": 3, "count": 3, "per_page": 20, "current_page": 1, "total_pages": 1,
    }  # fmt: skip
    row = data["data"][0]
    added = {"account_uuid", "account", "node_uuid", "node", "labels"}
    assert set(row) == set(ROW_TYPES) | added
    assert (row["account"], row["account_uuid"]) == ("PT [/x]", str(other.account_id))
    node = cloud.admin.get(f"/admin/nodes/{row['node_uuid']}").json()["data"]
    assert row["node"] == node["name"]
    (own,) = other.http.get("/instances").json()["data"]["data"]
    assert {name: row[name] for name in ROW_TYPES} == own


def test_filters(cloud: SimulatedCloud, other: Customer) -> None:
    mine, theirs = "Demo", "PT [/x]"
    everyone = [(theirs, "web-1"), (mine, "db-1"), (mine, "web-1")]
    assert listed(cloud) == everyone
    assert listed(cloud, sort="created_at") == everyone[::-1]
    assert listed(cloud, account_uuid=str(other.account_id)) == everyone[:1]
    assert listed(cloud, account_uuid=str(uuid4())) == []
    assert listed(cloud, search="WEB") == [everyone[0], everyone[2]]
    assert listed(cloud, search="%") == []
    assert listed(cloud, location_id=cloud.location_id) == everyone
    assert listed(cloud, location_id=cloud.location_id + 1) == []
    shown = [listed(cloud, node_uuid=node, sort="created_at") for node in cloud.node_ids]
    assert sorted(shown[0] + shown[1]) == sorted(everyone)
    assert listed(cloud, node_uuid=str(uuid4())) == []
    rows = cloud.admin.get("/admin/instances").json()["data"]["data"]
    settle(rows[1]["uuid"], ObservedState.ERROR)
    assert listed(cloud, statuses="error,stopped") == everyone[1:2]
    labels = {"labels": {"env": "prod"}}
    assert other.http.put(f"/instances/{rows[0]['uuid']}/labels", json=labels).is_success
    assert listed(cloud, label="env:prod") == listed(cloud, label="env") == everyone[:1]
    assert (
        cloud.admin.get("/admin/instances").json()["data"]["data"][0]["labels"] == labels["labels"]
    )


def test_pages(cloud: SimulatedCloud, other: Customer) -> None:
    seen = [listed(cloud, limit=2, page=page) for page in (1, 2, 3)]
    assert [len(page) for page in seen] == [2, 1, 0]
    past = cloud.admin.get("/admin/instances?limit=2&page=3").json()["data"]["page"]
    assert (past["total"], past["total_pages"]) == (3, 2)


@pytest.mark.parametrize(
    "query",
    [
        {"statuses": "asleep"},
        {"account_uuid": "x"},
        {"node_uuid": "hv1"},
        {"location_id": "0"},
        {"sort": "hostname"},
        {"order": "up"},
    ],
)
def test_wrong_queries_are_refused(cloud: SimulatedCloud, query: dict[str, str]) -> None:
    answer = cloud.admin.get("/admin/instances", params=query)
    assert answer.status_code == 422, answer.text
    assert set(answer.json()["errors"]) == set(query)


def test_customers_do_not_have_it(cloud: SimulatedCloud, other: Customer) -> None:
    assert other.http.get("/admin/instances").status_code == 404


def test_a_page_takes_three_queries_however_many_rows(
    cloud: SimulatedCloud, other: Customer
) -> None:
    """The key, the rows with their number, the addresses."""
    for query in (
        "",
        "?limit=1",
        "?search=web&statuses=running",
        f"?node_uuid={cloud.node_ids[0]}",
    ):
        with recorded() as sent:
            assert cloud.admin.get(f"/admin/instances{query}").status_code == 200
        assert len(sent) <= 4, "\n".join(sent)
