"""A location with simulated engines, set up through the operator's API as an operator would.

Only the template's image is a row: there is no file behind it, because the simulated nodes copy none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from uuid import UUID, uuid4

from fastapi import FastAPI
from fastapi.testclient import TestClient

from awan.accounts import KeyScope, create_account, create_key, init_operator
from awan.api import create_app
from awan.catalogue.models import TemplateImage
from awan.kit.database import transaction
from awan.networks.names import push_stale_names
from awan.operations import wait_for_end

PASSWORD = "Correct-Horse-7"
PREFIX = "/api/v1"
ZONE = "jkt1.awan.example"
REVERSE_ZONES = ["100.51.198.in-addr.arpa", "18.198.in-addr.arpa", "8.b.d.0.1.0.0.2.ip6.arpa"]
COMMON_SHA256 = "ab" * 32
PRICES = {
    "cpu_shared": 30000,
    "cpu_dedicated": 60000,
    "memory": 30000,
    "storage": 1250,
    "public_ip": 15000,
}


@dataclass
class Customer:
    """An account's key and a client that uses it."""

    account_id: UUID
    http: TestClient


@dataclass
class SimulatedCloud:
    """The API in this process over one simulated location. `admin` is the operator's client."""

    admin: TestClient
    location_id: int
    tier_id: int
    template_id: int
    node_ids: list[str]
    pool_id: int
    customer: Customer
    extras: dict[str, Any] = field(default_factory=dict)

    def new_customer(self, name: str = "Tenant", **limits: Any) -> Customer:
        """Another account with a read-write key; `limits` are columns of the key."""
        return make_customer(name, **limits)

    def add_image(
        self, template_id: int, *, has_agent: bool = True, sha256: str = COMMON_SHA256
    ) -> UUID:
        """A ready image of a template, from now on its newest."""
        return _make_image(template_id, has_agent=has_agent, sha256=sha256)

    def order(self, **changes: Any) -> dict[str, Any]:
        """A valid body of create, with `changes`; None removes a field."""
        body: dict[str, Any] = {
            "location_id": self.location_id,
            "tier_id": self.tier_id,
            "template_id": self.template_id,
            "hostname": f"web-{uuid4().hex[:8]}",
            "cpu": 1,
            "memory": 1,
            "storage": 20,
            "username": "budi",
            "password": PASSWORD,
            "use_public_ip": True,
        }
        body.update(changes)
        return {name: value for name, value in body.items() if value is not None}

    def create(self, customer: Customer | None = None, **changes: Any) -> dict[str, Any]:
        """Creates an instance through the API and returns the answer. The operation is not waited for."""
        owner = customer or self.customer
        answer = owner.http.post("/instances", json=self.order(**changes))
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def wait(self, operation: str, timeout_s: float = 15.0) -> dict[str, Any]:
        """The operation when it has ended, as the API shows it."""
        # Woken by its end: asking again and again would take the processor from the worker in this process.
        wait_for_end(UUID(operation), timeout_s)
        shown = self.admin.get(f"/operations/{operation}").json()["data"]
        assert shown["status"] in ("succeeded", "failed", "cancelled"), f"not finished: {shown}"
        return dict(shown)

    def create_running(self, customer: Customer | None = None, **changes: Any) -> dict[str, Any]:
        """Creates an instance and returns its detail once it runs."""
        owner = customer or self.customer
        answer = self.create(owner, **changes)
        ended = self.wait(answer["operation"]["uuid"])
        assert ended["status"] == "succeeded", ended
        return dict(owner.http.get(f"/instances/{answer['data']['uuid']}").json()["data"])


def make_customer(name: str = "Tenant", **limits: Any) -> Customer:
    """An account with a read-write key whose rate limits do not get in a test's way."""
    with transaction() as session:
        account = create_account(session, name=name)
        key, text = create_key(session, account.account_id, name="test", scope=KeyScope.READ_WRITE)
        key.reads_per_minute = limits.get("reads_per_minute", 1_000_000)
        key.writes_per_minute = limits.get("writes_per_minute", 1_000_000)
    return Customer(account.account_id, _client(text))


@lru_cache(maxsize=1)
def _app() -> FastAPI:
    """One application for all clients of this process: building it takes longer than most tests."""
    return create_app()


def _client(key: str) -> TestClient:
    client = TestClient(
        _app(), base_url=f"http://testserver{PREFIX}", raise_server_exceptions=False
    )
    client.headers["x-apikey"] = key
    return client


def make_operator_client() -> TestClient:
    """A client with the operator's first key, its rate limits lifted."""
    from sqlalchemy import update

    from awan.accounts.models import ApiKey

    with transaction() as session:
        text = init_operator(session)
        session.flush()
        session.execute(
            update(ApiKey).values(reads_per_minute=1_000_000, writes_per_minute=1_000_000)
        )
    return _client(text)


def make_cloud(
    *, nodes: int = 2, pool: str = "198.51.100.0/24", gateway: str = "198.51.100.1", **fake: Any
) -> SimulatedCloud:
    """Location, engines, tier with prices, pools, template, nodes. A worker must be running: it probes the nodes."""
    admin = make_operator_client()

    def post(path: str, **body: Any) -> dict[str, Any]:
        answer = admin.post(path, json=body)
        assert answer.status_code in (200, 201), f"{path}: {answer.text}"
        return dict(answer.json()["data"])

    location = post(
        "/admin/locations", name="Jakarta 1", code="jkt1", country="ID", is_default=True
    )
    for kind in ("hypervisor", "volumes", "fabric"):
        answer = admin.put(
            f"/admin/locations/{location['id']}/engines/{kind}",
            json={"driver": "fake", "options": {"boot_s": 0.1, **fake}},
        )
        assert answer.status_code == 200, answer.text
    answer = admin.put(
        f"/admin/locations/{location['id']}/engines/nameserver",
        json={"driver": "fake", "options": {"forward_zone": ZONE, "reverse_zones": REVERSE_ZONES}},
    )
    assert answer.status_code == 200, answer.text
    tier = post(
        "/admin/tiers",
        name="Cloud Compute",
        cpu_model="EPYC",
        offers_dedicated=True,
        location_ids=[location["id"]],
    )
    for component, monthly in PRICES.items():
        post(f"/admin/tiers/{tier['id']}/prices", component=component, monthly_minor=monthly)
    post("/admin/sizes", title="Starter", cpu=1, memory=1, storage=30)
    pool_row = post("/admin/pools", location_id=location["id"], cidr=pool, gateway=gateway)
    post(
        "/admin/pools",
        location_id=location["id"],
        cidr="2001:db8:0:1::/64",
        gateway="2001:db8:0:1::1",
    )
    push_stale_names()
    template = post("/admin/templates", name="Debian", version="12", memory_mib_min=512)
    _make_image(template["id"])
    node_ids = [
        post(
            "/admin/nodes",
            location_id=location["id"],
            name=f"n{number}",
            libvirt_uri=f"fake://n{number}/",
            tier_ids=[tier["id"]],
        )["uuid"]
        for number in range(1, nodes + 1)
    ]
    return SimulatedCloud(
        admin=admin,
        location_id=location["id"],
        tier_id=tier["id"],
        template_id=template["id"],
        node_ids=node_ids,
        pool_id=pool_row["id"],
        customer=make_customer("Demo"),
    )


def _make_image(template_id: int, *, has_agent: bool = True, sha256: str = COMMON_SHA256) -> UUID:
    image_id = uuid4()
    with transaction() as session:
        session.add(
            TemplateImage(
                image_id=image_id,
                template_id=template_id,
                state="ready",
                declared_format="qcow2",
                format="qcow2",
                sha256=sha256,
                size_bytes=1024,
                virtual_size_bytes=2 * 1024**3,
                has_agent=has_agent,
            )
        )
    return image_id
