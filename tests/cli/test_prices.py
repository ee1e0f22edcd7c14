"""An operator sees which prices a tier lacks to be sold."""

from __future__ import annotations

from tests.cli.conftest import Run
from tests.support.simulated_cloud import SimulatedCloud


def test_what_a_tier_lacks(cloud: SimulatedCloud, awan: Run) -> None:
    tier = awan("tier", "add", "GPU", "--cpu-model", "x", "--location", str(cloud.location_id))
    number = tier.split()[-1]
    order = {"tier_id": int(number), "hostname": "web-1"}

    def refusal() -> str:
        answer = cloud.customer.http.post("/instances", json=cloud.order(**order))
        assert answer.status_code == 422, answer.text
        return str(answer.json()["errors"]["tier_id"])

    assert awan("tier", "list").endswith("none")
    for component, still in (
        ("cpu_shared", "memory, storage, public_ip"),
        ("memory", "storage, public_ip"),
        ("storage", "public_ip"),
    ):
        said = awan("tier", "price", number, component, "100")
        assert said.endswith(f"still without a price in IDR: {still}")
        assert awan("tier", "list").endswith(f"IDR without {still}")
        assert "public_ip" not in refusal()
    assert "without" not in awan("tier", "price", number, "public_ip", "100")
    assert awan("tier", "list").endswith("IDR")
    assert awan("tier", "price", number, "memory", "1", "--currency", "USD").endswith(
        "without a price in USD: cpu_shared, storage, public_ip"
    )
    unpriced = cloud.admin.get("/admin/tiers").json()["data"][-1]["unpriced"]
    assert unpriced == {"IDR": [], "USD": ["cpu_shared", "storage", "public_ip"]}
    assert "unpriced" not in cloud.customer.http.get("/pricing/tiers").text
