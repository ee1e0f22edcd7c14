"""Fills an empty cloud through the operator's API: location, engines, tiers, prices, sizes, pools, nodes, templates.

Every function is safe to repeat: what is there already, by its natural key, is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.http_api import Api

CPU_MODEL = "AMD Epyc"

# Rupiah a month: for a vCPU, a GiB, an address.
PRICES = {
    "cpu_shared": 30_000,
    "cpu_dedicated": 60_000,
    "memory": 30_000,
    "storage": 1_250,
    "snapshot": 750,
    "backup": 1_000,
    "public_ip": 25_000,
    "license": 0,
}
# Title, vCPUs, memory GiB, storage GiB.
SIZES = (
    ("Starter", 1, 1, 30),
    ("Exploring", 1, 2, 50),
    ("Growing", 2, 4, 80),
    ("Serious", 4, 8, 160),
)
TIERS: tuple[dict[str, Any], ...] = (
    {
        "name": "Cloud Compute AMD Epyc",
        "description": "Shared CPUs for most things",
        "offers_shared": True,
        "offers_dedicated": False,
        "cpu_overcommit_percent": 400,
        "cpu_max": 16,
        "memory_gib_max": 64,
        "storage_gib_max": 1000,
    },
    {
        "name": "Dedicated Compute AMD Epyc",
        "description": "CPUs of your own",
        "offers_shared": False,
        "offers_dedicated": True,
        "cpu_overcommit_percent": 100,
        "cpu_max": 32,
        "memory_gib_max": 128,
        "storage_gib_max": 2000,
    },
)


@dataclass(frozen=True)
class Engine:
    """A driver of a location and its options."""

    driver: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SeedNode:
    """A hypervisor to add. Caps in threads, MiB, GiB; None leaves what the probe finds."""

    name: str
    libvirt_uri: str
    ovn_system_id: str | None = None
    mgmt_ip: str | None = None
    cpu_threads_cap: int | None = None
    memory_mib_cap: int | None = None
    disk_gib_cap: int | None = None


@dataclass(frozen=True)
class SeedPool:
    """A public prefix."""

    cidr: str
    gateway: str
    dns_servers: Sequence[str] = ()


@dataclass(frozen=True)
class SeedPrefixPool:
    """A range of IPv6 prefixes for instances, and the address that the provider's router sends it to."""

    cidr: str
    router_address: str


@dataclass(frozen=True)
class SeedTemplate:
    """A template and the file of its image. `identity` tells one build from another (its digest)."""

    name: str
    version: str
    family: str
    default_username: str
    min_memory_mib: int
    min_storage_gib: int
    has_agent: bool
    path: Path
    identity: str


@dataclass(frozen=True)
class SeedLocation:
    """A location with all that belongs to it. `engines` by kind."""

    name: str
    code: str
    country: str
    engines: Mapping[str, Engine]
    nodes: Sequence[SeedNode]
    pools: Sequence[SeedPool]
    physical_network: str = "public"
    prefix_pools: Sequence[SeedPrefixPool] = ()


def seed_location(api: Api, location: SeedLocation) -> int:
    """The location, its engines, tiers with prices, sizes, pools and nodes; gives its id."""
    location_id = _ensure_location(api, location)
    tier_ids = [_ensure_tier(api, tier, location_id) for tier in TIERS]
    titles = {size["title"] for size in api.get("instances/size-templates")}
    for title, cpu, memory_gib, storage_gib in SIZES:
        if title not in titles:
            size = {"title": title, "cpu": cpu, "memory": memory_gib, "storage": storage_gib}
            api.post("admin/sizes", size)
    cidrs = {pool["cidr"] for pool in api.get("admin/pools") if pool["location_id"] == location_id}
    for pool in location.pools:
        if pool.cidr not in cidrs:
            body = {
                "location_id": location_id,
                "cidr": pool.cidr,
                "gateway": pool.gateway,
                "physical_network": location.physical_network,
                "dns_servers": list(pool.dns_servers),
            }
            api.post("admin/pools", body)
    ranges = {pool["cidr"] for pool in api.get("admin/prefix-pools")}
    for prefixes in location.prefix_pools:
        if prefixes.cidr not in ranges:
            api.post("admin/prefix-pools", {"location_id": location_id, **vars(prefixes)})
    names = {node["name"] for node in api.get("admin/nodes")}
    for node in location.nodes:
        if node.name not in names:
            _add_node(api, node, location_id, tier_ids)
    return location_id


def _ensure_location(api: Api, location: SeedLocation) -> int:
    rows = api.get("admin/locations")
    found = next((row for row in rows if row["code"] == location.code), None)
    if found is None:
        found = api.post(
            "admin/locations",
            {
                "name": location.name,
                "code": location.code,
                "country": location.country,
                "is_default": not rows,
            },
        )
    location_id = int(found["id"])
    present = {row["kind"]: row for row in found["engines"]}
    for kind, engine in location.engines.items():
        row = present.get(kind)
        # The API fills in defaults, so only what we ask for is compared.
        is_same = (
            row is not None
            and row["driver"] == engine.driver
            and all(row["options"].get(name) == value for name, value in engine.options.items())
        )
        if not is_same:
            body = {"driver": engine.driver, "options": dict(engine.options)}
            api.put(f"admin/locations/{location_id}/engines/{kind}", body)
    return location_id


def _ensure_tier(api: Api, tier: Mapping[str, Any], location_id: int) -> int:
    rows = api.get("admin/tiers")
    found = next((row for row in rows if row["name"] == tier["name"]), None)
    if found is None:
        found = api.post(
            "admin/tiers", {**tier, "cpu_model": CPU_MODEL, "location_ids": [location_id]}
        )
        for component, monthly_minor in PRICES.items():
            price = {
                "component": component,
                "currency": "IDR",
                "monthly_minor": monthly_minor,
            }
            api.post(f"admin/tiers/{found['id']}/prices", price)
    elif location_id not in found["location_ids"]:
        body = {"location_ids": [*found["location_ids"], location_id]}
        api.call("PATCH", f"admin/tiers/{found['id']}", body)
    return int(found["id"])


def _add_node(api: Api, node: SeedNode, location_id: int, tier_ids: Sequence[int]) -> None:
    body = {
        "location_id": location_id,
        "tier_ids": list(tier_ids),
        **{name: value for name, value in vars(node).items() if value is not None},
    }
    answer = api.call("POST", "admin/nodes", body)
    if answer.get("operation"):
        api.follow(answer["operation"], timeout_s=120)


def seed_template(api: Api, template: SeedTemplate, record: Path) -> int:
    """The template with this build as a ready image; gives its id.

    The API keeps a digest of the image as it stores it, so which file became which image is kept in `record`.
    """
    rows = api.get("admin/templates")
    key = (template.name, template.version)
    found = next((row for row in rows if (row["name"], row["version"]) == key), None)
    if found is None:
        found = api.post(
            "admin/templates",
            {
                "name": template.name,
                "version": template.version,
                "family": template.family,
                "default_username": template.default_username,
                "memory_mib_min": template.min_memory_mib,
                "storage_gib_min": template.min_storage_gib,
            },
        )
    uploaded: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    ready = {image["uuid"] for image in found["images"] if image["state"] == "ready"}
    if uploaded.get(template.identity) not in ready:
        flag = str(template.has_agent).lower()
        path = f"admin/templates/{found['id']}/images?format=qcow2&has_agent={flag}"
        answer = api.upload(path, template.path)
        api.follow(answer["operation"], timeout_s=600)
        uploaded[template.identity] = answer["data"]["uuid"]
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(uploaded, indent=2))
    return int(found["id"])


def ensure_customer(api: Api, name: str, **quotas: int) -> str:
    """The uuid of the customer's account of this name, made when absent."""
    rows = api.get(f"admin/accounts?search={name}&limit=100")["data"]
    found = next((row for row in rows if row["name"] == name), None)
    if found is None:
        found = api.post("admin/accounts", {"name": name, "currency": "IDR", **quotas})
    return str(found["uuid"])


def create_customer_key(api: Api, account_uuid: str, name: str) -> str:
    """A new API key of the customer, its text."""
    key = api.post(f"admin/accounts/{account_uuid}/api-keys", {"name": name})["key"]
    return str(key)
