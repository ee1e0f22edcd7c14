"""Every changing call can be repeated under its Idempotency-Key: all routes of the document, so none can be forgotten.

A changing route that is not known here fails the test: say how it is called, and how it is called otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from awan.api import PREFIX, create_app
from awan.fleet import Node, NodeHealth
from awan.kit.database import transaction
from tests.support.database_state import changed, contents
from tests.support.documented import assert_documented
from tests.support.guests import create_ready
from tests.support.images import make_qcow2
from tests.support.in_process_worker import wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.ssh_keys import ED25519_KEYS
from tests.support.webhook_deliveries import first_delivery

REMOVE = {"remove_ip": False, "remove_block_storage": False}
# It refuses whatever it gets: the same path with `_method=DELETE` is the deletion.
REFUSES_ALL = {"POST /instances/{instance_uuid}"}
PASSWORD = {"password": "Brave-Donkey-8", "password_confirmation": "Brave-Donkey-8"}
OTHER_PASSWORD = {"password": "Calm-Badger-9", "password_confirmation": "Calm-Badger-9"}
QUOTAS = ("instances_max", "vcpus_max", "memory_gib_max", "public_ips_max")
OCTETS = {"content-type": "application/octet-stream"}


@dataclass(frozen=True)
class Call:
    """A call of a route: its path below the prefix and what it carries."""

    path: str
    body: dict[str, Any] | None = None
    content: bytes | None = None


class World:
    """A cloud in which calls find whatever they need; each thing is a new one."""

    def __init__(self, cloud: SimulatedCloud, directory: Path) -> None:
        self.cloud = cloud
        self.directory = directory
        self._numbers = count(1)

    def send(self, method: str, call: Call, key: str | None = None) -> httpx.Response:
        """Sends a call as whoever has the route."""
        is_admin = call.path.startswith("/admin/")
        client = self.cloud.admin if is_admin else self.cloud.customer.http
        headers = {"Idempotency-Key": key} if key is not None else {}
        if call.content is not None:
            return client.request(
                method, call.path, content=call.content, headers={**headers, **OCTETS}
            )
        return client.request(method, call.path, json=call.body, headers=headers)

    def make(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Creates a thing and waits for it; its data."""
        answer = self.send("POST", Call(path, body))
        assert answer.is_success, f"{path}: {answer.text}"
        wait_until_idle()
        return dict(answer.json()["data"])

    def name(self) -> str:
        """A name that nothing has."""
        return f"thing-{next(self._numbers)}"

    def instance(self, power: str = "running") -> str:
        """An instance that runs, or is stopped."""
        uuid = str(self.cloud.create_running()["uuid"])
        if power == "stopped":
            self.make(f"/instances/{uuid}/stop", {"force": True})
        return uuid

    def private(self) -> str:
        """An instance without a public address."""
        return str(self.cloud.create_running(use_public_ip=False)["uuid"])

    def ready(self) -> str:
        """An instance whose first boot is over."""
        return create_ready(self.cloud)

    def note(self) -> str:
        """A note about an instance, named below the instances."""
        path = f"{self.ready()}/notes"
        made = self.make(f"/admin/instances/{path}", {"text": self.name()})
        return f"{path}/{made['id']}"

    def address(self) -> str:
        """A free address of the customer."""
        return str(self.make("/networks/public", {"location_id": self.cloud.location_id})["uuid"])

    @cached_property
    def guarded(self) -> str:
        """An instance whose firewall is changed: one is enough."""
        return self.instance()

    def tried(self) -> str:
        """An instance whose firewall is on trial."""
        uuid = self.instance()
        self.make(f"/instances/{uuid}/firewall/trial", {"seconds": 600})
        return uuid

    def rule_body(self) -> dict[str, Any]:
        """A firewall rule to add."""
        return {
            "destination_port": next(self._numbers),
            "protocol": "tcp",
            "action": "ACCEPT",
            "description": "",
            "use_ipset": False,
            "source_ipset": 0,
        }

    def rule(self) -> str:
        """A firewall rule, as a path below that of all instances."""
        path = f"{self.guarded}/firewall/rules"
        return f"{path}/{self.make(f'/instances/{path}', self.rule_body())['uuid']}"

    def group_rule(self) -> dict[str, Any]:
        """A rule of a firewall group."""
        return {"destination_port": next(self._numbers), "protocol": "tcp", "action": "ACCEPT"}

    def ipset_body(self) -> dict[str, Any]:
        """An IPSet to add."""
        return {"name": self.name(), "description": ""}

    def ipset(self) -> str:
        """An IPSet, as a path below that of all instances."""
        path = f"{self.guarded}/firewall/ipsets"
        return f"{path}/{self.make(f'/instances/{path}', self.ipset_body())['id']}"

    def entry(self) -> str:
        """An entry of an IPSet, as a path below that of all instances."""
        path = f"{self.ipset()}/cidrs"
        return f"{path}/{self.make(f'/instances/{path}', _entry('10.0.0.3'))['uuid']}"

    def group(self) -> str:
        """A firewall group."""
        return str(self.make("/firewall-groups", self.network_body())["uuid"])

    def network(self) -> str:
        """A private network."""
        return str(self.make("/networks/private", self.network_body())["uuid"])

    def network_body(self) -> dict[str, Any]:
        """A private network to make, or a firewall group."""
        return {"name": self.name(), "location_id": self.cloud.location_id}

    def member(self) -> str:
        """An instance in a private network, and the network, as a path below the instances."""
        instance, network = self.instance(), self.network()
        call = Call(f"/instances/{instance}/private-network", {"vswitch": network})
        assert self.send("PUT", call).is_success
        wait_until_idle()
        return f"{instance}/private-network/{network}"

    def ssh_key(self, number: int) -> str:
        """An SSH key of the customer."""
        made = self.make("/ssh-keys", {"title": self.name(), "key": ED25519_KEYS[number]})
        return str(made["id"])

    def webhook_body(self) -> dict[str, Any]:
        """A webhook to add."""
        return {"url": f"https://{self.name()}.example/"}

    def webhook(self) -> str:
        """A webhook."""
        return str(self.make("/webhooks", self.webhook_body())["uuid"])

    def delivery(self) -> str:
        """A delivery of a webhook, as a path below that of all webhooks."""
        webhook = self.webhook()
        delivery = first_delivery(self.cloud.customer.http, webhook)
        return f"{webhook}/deliveries/{delivery}"

    def account(self) -> str:
        """An account."""
        return str(self.make("/admin/accounts", {"name": self.name()})["uuid"])

    def node(self) -> str:
        """A node with nothing on it."""
        return str(self.make("/admin/nodes", self.node_body())["uuid"])

    def abandonment(self) -> Call:
        """The giving up of a node that does not answer."""
        made = self.make("/admin/nodes", self.node_body())
        with transaction() as session:
            session.get_one(Node, UUID(made["uuid"])).health = NodeHealth.UNREACHABLE
        return Call(f"/admin/nodes/{made['uuid']}/abandon", {"confirm": made["name"]})

    def node_body(self) -> dict[str, Any]:
        """A node to add."""
        name = self.name()
        return {
            "location_id": self.cloud.location_id,
            "name": name,
            "libvirt_uri": f"fake://{name}/",
            "tier_ids": [self.cloud.tier_id],
        }

    def pool_body(self) -> dict[str, Any]:
        """A prefix to add."""
        prefix = f"198.18.{next(self._numbers)}"
        location = self.cloud.location_id
        return {"location_id": location, "cidr": f"{prefix}.0/28", "gateway": f"{prefix}.1"}

    def prefix_pool_body(self) -> dict[str, Any]:
        """A range of routed prefixes to add."""
        return {
            "location_id": self.cloud.location_id,
            "cidr": f"2001:db8:1:{next(self._numbers):x}::/64",
            "router_address": "2001:db8:0:1::2",
        }

    def without_prefix(self) -> str:
        """An instance that can have a routed prefix."""
        self.make("/admin/prefix-pools", self.prefix_pool_body())
        return self.instance()

    def with_prefix(self) -> str:
        """An instance that has a routed prefix."""
        uuid = self.without_prefix()
        self.make(f"/instances/{uuid}/ipv6/prefix")
        return uuid

    def unnamed(self) -> tuple[Call, Call]:
        """The own IPv6 addresses of two instances, named as they are by default."""
        calls = []
        for uuid in (self.instance(), self.instance()):
            shown = self.cloud.customer.http.get(f"/instances/{uuid}").json()["data"]
            body = {"ip_address": shown["public_network"]["ipv6_address"], "rdns": ""}
            calls.append(Call(f"/instances/{uuid}/ipv6/rdns", body))
        return calls[0], calls[1]

    def size_body(self) -> dict[str, Any]:
        """A size to add."""
        return {"title": self.name(), "cpu": 1, "memory": 1, "storage": 20}

    def template_body(self) -> dict[str, Any]:
        """A template to add."""
        return {"name": self.name(), "version": "1"}

    def template(self) -> str:
        """A template without images."""
        return str(self.make("/admin/templates", self.template_body())["id"])

    def image(self) -> str:
        """An image that nothing is based on."""
        return str(self.cloud.add_image(int(self.template())))

    def upload(self, template: str, size: str) -> Call:
        """An upload of an empty image."""
        content = make_qcow2(self.directory / f"{self.name()}.qcow2", size)
        return Call(f"/admin/templates/{template}/images", content=content)

    def either(self, path: str, body: dict[str, Any], other: dict[str, Any]) -> tuple[Call, Call]:
        """The same path with one body or another."""
        return Call(path, body), Call(path, other)

    def twice(self, path: str, make_body: Callable[[], dict[str, Any]]) -> tuple[Call, Call]:
        """The same path with two new bodies."""
        return self.either(path, make_body(), make_body())

    def both(self, pattern: str, make: Callable[[], str], body: Any = None) -> tuple[Call, Call]:
        """One body for the paths of two things."""
        return Call(pattern.format(make()), body), Call(pattern.format(make()), body)


Pair = tuple[Call, Call]
# Route -> a call that succeeds, and another call of the same route.
CALLS: dict[str, Callable[[World], Pair]] = {
    "POST /instances": lambda w: w.twice("/instances", w.cloud.order),
    "DELETE /instances/{instance_uuid}": lambda w: w.both("/instances/{}", w.instance, REMOVE),
    "POST /instances/{instance_uuid}/start": lambda w: w.both(
        "/instances/{}/start", lambda: w.instance("stopped")
    ),
    "POST /instances/{instance_uuid}/stop": lambda w: w.either(
        f"/instances/{w.instance()}/stop", {"force": True}, {"force": False}
    ),
    "POST /instances/{instance_uuid}/restart": lambda w: w.either(
        f"/instances/{w.instance()}/restart", {"force": True}, {"force": False}
    ),
    "POST /instances/{instance_uuid}/reset": lambda w: w.both("/instances/{}/reset", w.instance),
    "POST /instances/actions": lambda w: w.either(
        "/instances/actions", *(_action(w.instance(), force) for force in (True, False))
    ),
    "POST /instances/{instance_uuid}/vnc": lambda w: w.both("/instances/{}/vnc", w.instance),
    "PUT /instances/{instance_uuid}/hostname": lambda w: w.twice(
        f"/instances/{w.ready()}/hostname", lambda: {"hostname": w.name()}
    ),
    "PUT /instances/{instance_uuid}/password": lambda w: w.either(
        f"/instances/{w.ready()}/password", PASSWORD, OTHER_PASSWORD
    ),
    "PUT /instances/{instance_uuid}/labels": lambda w: w.twice(
        f"/instances/{w.instance()}/labels", lambda: {"labels": {"env": w.name()}}
    ),
    "PUT /instances/{instance_uuid}/protection": lambda w: w.either(
        f"/instances/{w.instance()}/protection", {"is_protected": True}, {"is_protected": False}
    ),
    "PUT /instances/{instance_uuid}/firewall": lambda w: w.either(
        f"/instances/{w.guarded}/firewall", {"action": "DROP"}, {"action": "REJECT"}
    ),
    "POST /instances/{instance_uuid}/firewall/trial": lambda w: w.either(
        f"/instances/{w.instance()}/firewall/trial", {"seconds": 600}, {"seconds": 601}
    ),
    "POST /instances/{instance_uuid}/firewall/trial/confirm": lambda w: w.both(
        "/instances/{}/firewall/trial/confirm", w.tried
    ),
    "DELETE /instances/{instance_uuid}/firewall/trial": lambda w: w.both(
        "/instances/{}/firewall/trial", w.tried
    ),
    "POST /instances/{instance_uuid}/firewall/rules": lambda w: w.twice(
        f"/instances/{w.guarded}/firewall/rules", w.rule_body
    ),
    "PUT /instances/{instance_uuid}/firewall/rules": lambda w: w.twice(
        f"/instances/{w.guarded}/firewall/rules", lambda: {"rules": [w.rule_body()]}
    ),
    "PUT /instances/{instance_uuid}/firewall/rules/{firewall_rule_id}": lambda w: w.twice(
        f"/instances/{w.rule()}", lambda: _words(w.rule_body())
    ),
    "DELETE /instances/{instance_uuid}/firewall/rules/{firewall_rule_id}": lambda w: w.both(
        "/instances/{}", w.rule
    ),
    "PUT /instances/{instance_uuid}/firewall/rules/{firewall_rule_id}/status": lambda w: w.either(
        f"/instances/{w.rule()}/status", {"action": "disable"}, {"action": "enable"}
    ),
    "PUT /instances/{instance_uuid}/firewall/rules/{firewall_rule_id}/position": lambda w: w.both(
        "/instances/{}/position", w.rule, {"position": 1}
    ),
    "PUT /instances/{instance_uuid}/firewall/groups": lambda w: w.twice(
        f"/instances/{w.guarded}/firewall/groups", lambda: {"groups": [w.group()]}
    ),
    "POST /firewall-groups": lambda w: w.twice("/firewall-groups", w.network_body),
    "PUT /firewall-groups/{group_uuid}": lambda w: w.twice(
        f"/firewall-groups/{w.group()}", lambda: {"name": w.name()}
    ),
    "PUT /firewall-groups/{group_uuid}/rules": lambda w: w.twice(
        f"/firewall-groups/{w.group()}/rules", lambda: {"rules": [w.group_rule()]}
    ),
    "DELETE /firewall-groups/{group_uuid}": lambda w: w.both("/firewall-groups/{}", w.group),
    "POST /instances/{instance_uuid}/firewall/ipsets": lambda w: w.twice(
        f"/instances/{w.guarded}/firewall/ipsets", w.ipset_body
    ),
    "DELETE /instances/{instance_uuid}/firewall/ipsets/{ipset_id}": lambda w: w.both(
        "/instances/{}", w.ipset
    ),
    "POST /instances/{instance_uuid}/firewall/ipsets/{ipset_id}/cidrs": lambda w: w.either(
        f"/instances/{w.ipset()}/cidrs", *map(_entry, ("10.0.0.1", "10.0.0.2"))
    ),
    "DELETE /instances/{instance_uuid}/firewall/ipsets/{ipset_id}/cidrs/{iplist_id}": lambda w: (
        w.both("/instances/{}", w.entry)
    ),
    "POST /instances/{instance_uuid}/public-network": lambda w: w.both(
        "/instances/{}/public-network", w.private
    ),
    "PUT /instances/{instance_uuid}/public-network": lambda w: w.either(
        f"/instances/{w.private()}/public-network",
        *({"public_network": w.address()} for _ in range(2)),
    ),
    "PUT /networks/public/{ip_uuid}/instance": lambda w: w.either(
        f"/networks/public/{w.address()}/instance",
        *({"instance_id": w.private()} for _ in range(2)),
    ),
    "PUT /instances/{instance_uuid}/private-network": lambda w: w.twice(
        f"/instances/{w.instance()}/private-network", lambda: {"vswitch": w.network()}
    ),
    "DELETE /instances/{instance_uuid}/private-network/{vswitch_uuid}": lambda w: w.both(
        "/instances/{}", w.member
    ),
    "POST /instances/{instance_uuid}/ipv6/prefix": lambda w: w.both(
        "/instances/{}/ipv6/prefix", w.without_prefix
    ),
    "DELETE /instances/{instance_uuid}/ipv6/prefix": lambda w: w.both(
        "/instances/{}/ipv6/prefix", w.with_prefix
    ),
    "PUT /instances/{instance_uuid}/ipv6/rdns": lambda w: w.unnamed(),
    "POST /networks/private": lambda w: w.twice("/networks/private", w.network_body),
    "PUT /networks/private/{vswitch_uuid}": lambda w: w.twice(
        f"/networks/private/{w.network()}", lambda: {"name": w.name()}
    ),
    "PUT /networks/private/{vswitch_uuid}/gateway": lambda w: w.twice(
        f"/networks/private/{w.network()}/gateway", lambda: {"public_gateway": w.address()}
    ),
    "DELETE /networks/private/{vswitch_uuid}": lambda w: w.both("/networks/private/{}", w.network),
    "POST /networks/public": lambda w: w.either(
        "/networks/public", {"location_id": w.cloud.location_id}, {"location_id": 2**40}
    ),
    "PUT /networks/public/{ip_uuid}/rdns": lambda w: w.either(
        f"/networks/public/{w.address()}/rdns", {"rdns": ""}, {"rdns": "mail.example.com"}
    ),
    "PUT /instances/ips/{ip_uuid}/rdns": lambda w: w.either(
        f"/instances/ips/{w.address()}/rdns", {"rdns": ""}, {"rdns": "mail.example.com"}
    ),
    "DELETE /networks/public/{ip_uuid}": lambda w: w.both("/networks/public/{}", w.address),
    "POST /ssh-keys": lambda w: w.twice(
        "/ssh-keys", lambda: {"title": w.name(), "key": ED25519_KEYS[0]}
    ),
    "DELETE /ssh-keys/{ssh_id}": lambda w: (
        Call(f"/ssh-keys/{w.ssh_key(1)}"),
        Call(f"/ssh-keys/{w.ssh_key(2)}"),
    ),
    "POST /api-keys": lambda w: w.twice("/api-keys", lambda: {"name": w.name()}),
    "DELETE /api-keys/{key_id}": lambda w: w.both(
        "/api-keys/{}", lambda: str(w.make("/api-keys", {"name": w.name()})["id"])
    ),
    "POST /admin/accounts": lambda w: w.twice("/admin/accounts", lambda: {"name": w.name()}),
    "PATCH /admin/accounts/{account_uuid}": lambda w: w.twice(
        f"/admin/accounts/{w.account()}", lambda: {"name": w.name()}
    ),
    "POST /admin/accounts/{account_uuid}/api-keys": lambda w: w.twice(
        f"/admin/accounts/{w.account()}/api-keys", lambda: {"name": w.name()}
    ),
    "DELETE /admin/accounts/{account_uuid}/api-keys/{key_id}": lambda w: w.both(
        "/admin/accounts/{}", lambda: _key_of(w, w.account())
    ),
    "POST /admin/locations": lambda w: w.twice(
        "/admin/locations",
        lambda: {"name": w.name(), "code": w.name().replace("-", ""), "country": "ID"},
    ),
    "PATCH /admin/locations/{location_id}": lambda w: w.twice(
        f"/admin/locations/{w.cloud.location_id}", lambda: {"name": w.name()}
    ),
    "PUT /admin/locations/{location_id}/engines/{kind}": lambda w: w.either(
        f"/admin/locations/{w.cloud.location_id}/engines/fabric",
        {"driver": "fake", "options": {"boot_s": 0.1}},
        {"driver": "fake", "options": {"boot_s": 0.2}},
    ),
    "POST /admin/tiers": lambda w: w.twice(
        "/admin/tiers", lambda: {"name": w.name(), "cpu_model": "x"}
    ),
    "PATCH /admin/tiers/{tier_id}": lambda w: w.twice(
        f"/admin/tiers/{w.cloud.tier_id}", lambda: {"description": w.name()}
    ),
    "POST /admin/tiers/{tier_id}/prices": lambda w: w.either(
        f"/admin/tiers/{w.cloud.tier_id}/prices",
        {"component": "storage", "monthly_minor": 1},
        {"component": "storage", "monthly_minor": 2},
    ),
    "POST /admin/sizes": lambda w: w.twice("/admin/sizes", w.size_body),
    "DELETE /admin/sizes/{size_id}": lambda w: w.both(
        "/admin/sizes/{}", lambda: str(w.make("/admin/sizes", w.size_body())["id"])
    ),
    "POST /admin/templates": lambda w: w.twice("/admin/templates", w.template_body),
    "PATCH /admin/templates/{template_id}": lambda w: w.either(
        f"/admin/templates/{w.cloud.template_id}",
        {"is_deprecated": True},
        {"is_deprecated": False},
    ),
    "DELETE /admin/templates/{template_id}": lambda w: w.both("/admin/templates/{}", w.template),
    "POST /admin/templates/{template_id}/images": lambda w: (
        w.upload(str(w.cloud.template_id), "1G"),
        w.upload(str(w.cloud.template_id), "2G"),
    ),
    "DELETE /admin/images/{image_uuid}": lambda w: w.both("/admin/images/{}", w.image),
    "POST /admin/nodes": lambda w: w.twice("/admin/nodes", w.node_body),
    "DELETE /admin/nodes/{node_uuid}": lambda w: w.both("/admin/nodes/{}", w.node),
    "POST /admin/nodes/{node_uuid}/probe": lambda w: w.both("/admin/nodes/{}/probe", w.node),
    "POST /admin/nodes/{node_uuid}/cordon": lambda w: w.both("/admin/nodes/{}/cordon", w.node),
    "POST /admin/nodes/{node_uuid}/abandon": lambda w: (w.abandonment(), w.abandonment()),
    "POST /admin/nodes/{node_uuid}/uncordon": lambda w: w.both("/admin/nodes/{}/uncordon", w.node),
    "POST /admin/pools": lambda w: w.twice("/admin/pools", w.pool_body),
    "DELETE /admin/pools/{pool_id}": lambda w: w.both(
        "/admin/pools/{}", lambda: str(w.make("/admin/pools", w.pool_body())["id"])
    ),
    "POST /admin/prefix-pools": lambda w: w.twice("/admin/prefix-pools", w.prefix_pool_body),
    "DELETE /admin/prefix-pools/{prefix_pool_id}": lambda w: w.both(
        "/admin/prefix-pools/{}",
        lambda: str(w.make("/admin/prefix-pools", w.prefix_pool_body())["id"]),
    ),
    "POST /admin/instances/{instance_uuid}/notes": lambda w: w.twice(
        f"/admin/instances/{w.ready()}/notes", lambda: {"text": w.name()}
    ),
    "DELETE /admin/instances/{instance_uuid}/notes/{note_id}": lambda w: w.both(
        "/admin/instances/{}", w.note
    ),
    "POST /webhooks": lambda w: w.twice("/webhooks", w.webhook_body),
    "PATCH /webhooks/{webhook_uuid}": lambda w: w.twice(
        f"/webhooks/{w.webhook()}", lambda: {"description": w.name()}
    ),
    "DELETE /webhooks/{webhook_uuid}": lambda w: w.both("/webhooks/{}", w.webhook),
    "POST /webhooks/{webhook_uuid}/rotate-secret": lambda w: w.both(
        "/webhooks/{}/rotate-secret", w.webhook
    ),
    "POST /webhooks/{webhook_uuid}/test": lambda w: w.both("/webhooks/{}/test", w.webhook),
    "POST /webhooks/{webhook_uuid}/deliveries/{delivery_uuid}/replay": lambda w: w.both(
        "/webhooks/{}/replay", w.delivery
    ),
    # It has no other call of its own: a cordon under the same key is as much another one.
    "POST /admin/audit": lambda w: (
        Call("/admin/audit"),
        Call(f"/admin/nodes/{w.cloud.node_ids[0]}/cordon"),
    ),
}


def _action(instance: str, force: bool) -> dict[str, Any]:
    return {"action": "stop", "uuids": [instance], "force": force}


def _words(rule: dict[str, Any]) -> dict[str, Any]:
    """What of a rule can be changed."""
    return {name: rule[name] for name in rule if "ipset" not in name}


def _entry(cidr: str) -> dict[str, Any]:
    return {"cidr": cidr, "description": ""}


def _key_of(world: World, account: str) -> str:
    made = world.make(f"/admin/accounts/{account}/api-keys", {"name": world.name()})
    return f"{account}/api-keys/{made['id']}"


def changing_routes() -> dict[str, dict[str, Any]]:
    """The document's changing operations by method and path without the prefix."""
    return {
        f"{method.upper()} {path.removeprefix(PREFIX)}": operation
        for path, methods in create_app().openapi()["paths"].items()
        for method, operation in methods.items()
        if method != "get"
    }


def ids_of(answer: httpx.Response) -> tuple[Any, ...]:
    """What a repeat has in common with the first answer, whatever became of the thing."""
    said = answer.json()
    data = said.get("data") or {}
    rows = data if isinstance(data, list) else [data]
    # A bulk action has an operation in each of its rows.
    return (
        answer.status_code,
        said.get("message"),
        _operation_of(said),
        *(
            (row.get("id"), row.get("uuid"), _operation_of(row)) if isinstance(row, dict) else row
            for row in rows
        ),
    )


def _operation_of(said: dict[str, Any]) -> Any:
    return (said.get("operation") or {}).get("uuid")


@pytest.fixture
def world(cloud: SimulatedCloud, tmp_path: Path) -> World:
    """The cloud to call; its customer may have as much as the calls need."""
    path = f"/admin/accounts/{cloud.customer.account_id}"
    assert cloud.admin.patch(path, json=dict.fromkeys(QUOTAS, 100)).is_success
    return World(cloud, tmp_path)


def test_every_changing_route_documents_the_header() -> None:
    routes = changing_routes()
    assert set(routes) == set(CALLS) | REFUSES_ALL
    for route, operation in routes.items():
        headers = [one["name"] for one in operation.get("parameters", []) if one["in"] == "header"]
        assert "Idempotency-Key" in headers, route
        assert "409" in operation["responses"], route


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("route", sorted(CALLS))
def test_every_changing_route_honours_the_header(world: World, route: str) -> None:
    method, _, path = route.partition(" ")
    call, other = CALLS[route](world)
    key = str(uuid4())
    first = world.send(method, call, key)
    assert first.is_success, first.text
    wait_until_idle()
    before = contents()
    again = world.send(method, call, key)
    assert ids_of(again) == ids_of(first), again.text
    other_method = "POST" if route == "POST /admin/audit" else method
    refused = world.send(other_method, other, key)
    said = (refused.status_code, refused.json()["type"])
    assert said == (409, "IDEMPOTENCY_CONFLICT"), refused.text
    assert settled(changed(before), is_operator=path.startswith("/admin/")) == {}


def settled(tables: dict[str, Any], *, is_operator: bool) -> dict[str, Any]:
    """Without what goes on by itself: workflows, and beside customers' calls the first boots of their instances."""
    by_itself: tuple[str, ...] = ("dbos.", "sim.")
    if not is_operator:
        by_itself += ("public.event", "public.instance", "public.usage_span")
    return {name: values for name, values in tables.items() if not name.startswith(by_itself)}


# A creation -> how what it made goes. Paths take the id that the creation answered, and the path of the creation.
ENDS: dict[str, str] = {
    "POST /instances": "/instances/{}",
    "POST /networks/public": "/networks/public/{}",
    "POST /networks/private": "/networks/private/{}",
    "POST /ssh-keys": "/ssh-keys/{}",
    "POST /api-keys": "/api-keys/{}",
    "POST /admin/instances/{instance_uuid}/notes": "{made_at}/{}",
    "POST /admin/sizes": "/admin/sizes/{}",
    "POST /admin/templates": "/admin/templates/{}",
    "POST /admin/templates/{template_id}/images": "/admin/images/{}",
    "POST /admin/nodes": "/admin/nodes/{}",
    "POST /admin/pools": "/admin/pools/{}",
    "POST /admin/prefix-pools": "/admin/prefix-pools/{}",
}


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("route", sorted(ENDS))
def test_a_creation_can_be_repeated_after_the_thing_is_gone(world: World, route: str) -> None:
    call, _ = CALLS[route](world)
    first = world.send("POST", call, "once")
    assert first.is_success, first.text
    wait_until_idle()
    made = first.json()["data"]
    body = REMOVE if route == "POST /instances" else None
    path = ENDS[route].format(made.get("uuid") or made["id"], made_at=call.path)
    gone = world.send("DELETE", Call(path, body))
    assert gone.is_success, gone.text
    wait_until_idle()
    again = world.send("POST", call, "once")
    assert ids_of(again) == ids_of(first), again.text
    assert_documented(again)


@pytest.mark.usefixtures("worker")
def test_changes_can_be_repeated_after_the_instance_is_gone(world: World) -> None:
    uuid = world.ready()
    changes: list[tuple[str, str, dict[str, Any] | None]] = [
        ("POST", f"/instances/{uuid}/vnc", None),
        ("PUT", f"/instances/{uuid}/hostname", {"hostname": world.name()}),
        ("PUT", f"/instances/{uuid}/password", PASSWORD),
        ("PUT", f"/instances/{uuid}/labels", {"labels": {"env": "prod"}}),
        ("PUT", f"/instances/{uuid}/protection", {"is_protected": False}),
        ("POST", f"/instances/{uuid}/reset", None),
        ("POST", f"/instances/{uuid}/restart", {"force": True}),
        ("POST", "/instances/actions", _action(uuid, force=True)),
        ("POST", f"/instances/{uuid}/start", None),
        ("POST", f"/instances/{uuid}/stop", {"force": True}),
        ("PUT", f"/instances/{uuid}/firewall", {"action": "DROP"}),
        ("POST", f"/instances/{uuid}/firewall/rules", world.rule_body()),
        ("POST", f"/instances/{uuid}/firewall/trial", {"seconds": 60}),
        ("DELETE", f"/instances/{uuid}/firewall/trial", None),
        ("DELETE", f"/instances/{uuid}", REMOVE),
    ]
    first = []
    for method, path, body in changes:
        answer = world.send(method, Call(path, body), f"{method} {path}")
        assert answer.is_success, f"{method} {path}: {answer.text}"
        first.append(ids_of(answer))
        wait_until_idle()
    before = contents()
    for (method, path, body), ids in zip(changes, first, strict=True):
        again = world.send(method, Call(path, body), f"{method} {path}")
        assert ids_of(again) == ids, f"{method} {path}: {again.text}"
        assert_documented(again)
    assert settled(changed(before), is_operator=True) == {}


@pytest.mark.usefixtures("worker")
def test_what_a_repeat_shows_of_a_thing_that_is_gone(world: World) -> None:
    """A deleted instance as it was, but terminated; of an address whose prefix is gone, its id alone."""
    order = Call("/instances", world.cloud.order(hostname="gone"))
    ip = Call("/networks/public", {"location_id": world.cloud.location_id})
    instance = world.send("POST", order, "instance").json()["data"]
    address = world.send("POST", ip, "address").json()["data"]
    wait_until_idle()
    for path in (f"/instances/{instance['uuid']}", f"/networks/public/{address['uuid']}"):
        body = {**REMOVE, "remove_ip": True} if path.startswith("/instances") else None
        assert world.send("DELETE", Call(path, body)).is_success, path
        wait_until_idle()
    shown = world.send("POST", order, "instance").json()["data"]
    assert (shown["hostname"], shown["state"], shown["ip_address"]) == ("gone", "terminated", None)
    assert shown["price_per_hour"] == instance["price_per_hour"]
    released = world.send("POST", ip, "address").json()["data"]
    assert (released["ip_address"], released["status"]) == (address["ip_address"], "releasing")
    assert world.send("DELETE", Call(f"/admin/pools/{world.cloud.pool_id}")).is_success
    again = world.send("POST", ip, "address")
    assert (again.status_code, again.json()["data"]) == (201, {"uuid": address["uuid"]})
    assert_documented(again)
