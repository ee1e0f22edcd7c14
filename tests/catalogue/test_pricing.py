"""What is on sale, as customers see it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.simulated_cloud import SimulatedCloud


def get(cloud: SimulatedCloud, path: str, **query: Any) -> Any:
    """The data of a customer's reading call."""
    answer = cloud.customer.http.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def test_size_templates(cloud: SimulatedCloud) -> None:
    big = {"title": "Exploring", "cpu": 1, "memory": 2, "storage": 50}
    assert cloud.admin.post("/admin/sizes", json=big).is_success
    huge = {"title": "Huge", "cpu": 32, "memory": 128, "storage": 50}
    assert cloud.admin.post("/admin/sizes", json=huge).is_success
    starter, exploring, too_big = get(cloud, "/instances/size-templates")
    assert set(starter) == {
        "id", "title", "total_cpu", "total_ram", "total_disk", "prices", "created_at", "updated_at",
    }  # fmt: skip
    assert [starter[name] for name in ("title", "total_cpu", "total_ram", "total_disk")] == [
        "Starter", 1, 1, 30,
    ]  # fmt: skip
    monthly = 30000 + 30000 + 30 * 1250
    assert starter["prices"] == [
        {"tier_id": cloud.tier_id, "per_hour": "135.42", "per_month": monthly}
    ]
    assert exploring["prices"][0]["per_month"] == 30000 + 60000 + 50 * 1250
    assert too_big["prices"] == []  # beyond the tier's limits
    assert cloud.admin.delete(f"/admin/sizes/{starter['id']}").is_success
    assert [row["id"] for row in get(cloud, "/instances/size-templates")] == [
        exploring["id"], too_big["id"],
    ]  # fmt: skip


def test_an_order_of_a_size_costs_what_the_size_says(cloud: SimulatedCloud) -> None:
    (size,) = get(cloud, "/instances/size-templates")
    data = cloud.create(
        cpu=size["total_cpu"], memory=size["total_ram"], storage=size["total_disk"]
    )["data"]
    assert data["cost_detail"]["per_month"] == size["prices"][0]["per_month"]
    assert data["cost_detail"]["per_hour"] == size["prices"][0]["per_hour"]


def test_systems_have_versions(cloud: SimulatedCloud) -> None:
    newer = cloud.admin.post(
        "/admin/templates",
        json={"name": "Debian", "version": "13", "memory_mib_min": 1500, "storage_gib_min": 25},
    ).json()["data"]["id"]
    assert [len(system["versions"]) for system in get(cloud, "/pricing/systems")] == [1]
    cloud.add_image(newer)
    (system,) = get(cloud, "/pricing/systems", location=cloud.location_id)
    assert (system["name"], system["family"]) == ("Debian", "linux")
    assert [version["name"] for version in system["versions"]] == ["12", "13"]
    assert system["versions"][1] == {
        "template_id": newer,
        "name": "13",
        "min_cpu": 1,
        "min_memory": 2,
        "min_storage": 25,
        "default_username": "root",
        "license_per_month": 0,
        "deprecated": False,
    }
    assert cloud.admin.patch(f"/admin/templates/{newer}", json={"is_deprecated": True}).is_success
    assert get(cloud, "/pricing/systems")[0]["versions"][1]["deprecated"] is True
    assert cloud.admin.patch(f"/admin/templates/{newer}", json={"is_enabled": False}).is_success
    assert len(get(cloud, "/pricing/systems")[0]["versions"]) == 1


def test_locations(cloud: SimulatedCloud) -> None:
    made = cloud.admin.post(
        "/admin/locations", json={"name": "Bandung 1", "code": "bdg1", "country": "ID"}
    ).json()["data"]
    first, second = get(cloud, "/pricing/locations")
    assert first == {
        "id": cloud.location_id, "name": "Jakarta 1", "code": "jkt1", "country": "ID", "is_default": True,
        "available": True,
    }  # fmt: skip
    assert (second["id"], second["available"]) == (made["id"], False)  # no engines yet
    path = f"/admin/locations/{made['id']}"
    assert cloud.admin.patch(path, json={"is_enabled": False}).is_success
    assert [row["id"] for row in get(cloud, "/pricing/locations")] == [cloud.location_id]
    refused = cloud.customer.http.get("/pricing/tiers", params={"location_id": made["id"]})
    assert set(refused.json()["errors"]) == {"location_id"}


def test_tiers_and_their_limits(cloud: SimulatedCloud) -> None:
    (tier,) = get(cloud, "/pricing/tiers")
    assert tier["limits"] == {
        "cpu": {"min": 1, "max": 16, "step": 1},
        "memory": {"min": 1, "max": 64, "step": 1},
        "storage": {"min": 20, "max": 1000, "step": 10},
    }
    assert (tier["offers_shared"], tier["offers_dedicated"]) == (True, True)
    assert tier["location_ids"] == [cloud.location_id]
    path = f"/admin/tiers/{cloud.tier_id}"
    assert cloud.admin.patch(path, json={"location_ids": []}).is_success
    assert get(cloud, "/pricing/tiers", location_id=cloud.location_id) == []
    assert get(cloud, "/pricing/tiers")[0]["available"] is False
    assert cloud.admin.patch(path, json={"is_enabled": False}).is_success
    assert get(cloud, "/pricing/tiers") == []
    assert cloud.customer.http.get(f"/pricing/tiers/{cloud.tier_id}").status_code == 404


def test_prices_of_a_tier(cloud: SimulatedCloud) -> None:
    rows = {row["component"]: row for row in get(cloud, f"/pricing/tiers/{cloud.tier_id}")}
    assert set(rows) == {"cpu_shared", "cpu_dedicated", "memory", "storage", "public_ip"}
    assert rows["storage"] == {
        "component": "storage", "unit": "GiB", "price_per_month": 1250, "price_per_hour": "1.74",
    }  # fmt: skip
    path = f"/admin/tiers/{cloud.tier_id}/prices"
    for minor in (1, 2):
        body = {"component": "storage", "monthly_minor": minor}
        assert cloud.admin.post(path, json=body).is_success
    foreign = {"component": "storage", "monthly_minor": 5, "currency": "USD"}
    assert cloud.admin.post(path, json=foreign).is_success
    rows = {row["component"]: row for row in get(cloud, f"/pricing/tiers/{cloud.tier_id}")}
    assert rows["storage"]["price_per_month"] == 2


def test_prices_may_be_cached_by_the_customer(cloud: SimulatedCloud) -> None:
    for path in ("systems", "locations", "tiers", f"tiers/{cloud.tier_id}"):
        answer = cloud.customer.http.get(f"/pricing/{path}")
        assert answer.headers["cache-control"] == "private, max-age=60"


@pytest.mark.parametrize(
    ("method", "path", "body", "fields"),
    [
        ("POST", "/admin/locations", {"name": "X", "code": "X!", "country": "ID"}, {"code"}),
        ("POST", "/admin/locations", {"name": "X", "code": "x1", "country": "Id"}, {"country"}),
        (
            "POST",
            "/admin/tiers",
            {"name": "T", "cpu_model": "x", "cpu_min": 4, "cpu_max": 2},
            {"cpu_min"},
        ),
        (
            "POST",
            "/admin/tiers",
            {"name": "T", "cpu_model": "x", "offers_shared": False},
            {"offers_shared"},
        ),
        (
            "POST",
            "/admin/tiers",
            {"name": "T", "cpu_model": "x", "location_ids": [999]},
            {"location_ids"},
        ),
        ("POST", "/admin/tiers/1/prices", {"component": "gold", "monthly_minor": 1}, {"component"}),
        (
            "POST",
            "/admin/tiers/1/prices",
            {"component": "memory", "monthly_minor": -1},
            {"monthly_minor"},
        ),
        (
            "POST",
            "/admin/tiers/1/prices",
            {"component": "memory", "monthly_minor": 1, "currency": "XXX"},
            {"currency"},
        ),
        ("POST", "/admin/templates", {"name": "T", "version": "1", "family": "beos"}, {"family"}),
        ("PUT", "/admin/locations/1/engines/fabric", {"driver": "magic"}, {"driver"}),
        (
            "PUT",
            "/admin/locations/1/engines/fabric",
            {"driver": "fake", "options": {"x": 1}},
            {"options.x"},
        ),
        (
            "PUT",
            "/admin/locations/1/engines/fabric",
            {"driver": "ovn", "options": {"northbound": "http://x", "southbound": "tcp:x:1"}},
            {"options.northbound"},
        ),
    ],
)
def test_the_operators_mistakes_are_named(
    cloud: SimulatedCloud, method: str, path: str, body: dict[str, Any], fields: set[str]
) -> None:
    path = path.replace("/1/", f"/{cloud.tier_id if 'tiers' in path else cloud.location_id}/")
    answer = cloud.admin.request(method, path, json=body)
    assert answer.status_code == 422, answer.text
    assert set(answer.json()["errors"]) == fields


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/admin/locations", {"name": "Jakarta 1", "code": "other", "country": "ID"}),
        ("/admin/locations", {"name": "Other", "code": "jkt1", "country": "ID"}),
        ("/admin/tiers", {"name": "Cloud Compute", "cpu_model": "x"}),
        ("/admin/templates", {"name": "Debian", "version": "12"}),
        ("/admin/sizes", {"title": "Starter", "cpu": 1, "memory": 1, "storage": 20}),
    ],
)
def test_names_are_unique(cloud: SimulatedCloud, path: str, body: dict[str, Any]) -> None:
    answer = cloud.admin.post(path, json=body)
    assert (answer.status_code, answer.json()["type"]) == (409, "INVALID_OPERATION")


def test_the_default_location_moves(cloud: SimulatedCloud) -> None:
    body = {"name": "New", "code": "new1", "country": "ID", "is_default": True}
    assert cloud.admin.post("/admin/locations", json=body).is_success
    assert [row["is_default"] for row in get(cloud, "/pricing/locations")] == [False, True]
