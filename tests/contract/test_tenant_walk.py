"""No key reaches what belongs to another account: every route of the document, so that a new one cannot be forgotten.

A parameter that is not known here fails the test: say whose the thing is that it names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx
import pytest

from awan.api import PREFIX, create_app
from awan.kit.http import PATH_SHOWN_MAX
from tests.support.database_state import changed, contents
from tests.support.simulated_cloud import Customer, SimulatedCloud
from tests.support.ssh_keys import ED25519_KEYS
from tests.support.webhook_deliveries import first_delivery

OPEN_PATHS = {"/health"}
UNKNOWN_UUID, UNKNOWN_ID, UNKNOWN_KEY = str(uuid4()), str(2**40), "0" * 16
# Path parameters of customers' routes: the name (of one route, or of all) -> whose things it names.
OWNED_IN_PATH = {
    "instance_uuid": ("instance", UNKNOWN_UUID),
    "ip_uuid": ("address", UNKNOWN_UUID),
    "vswitch_uuid": ("private_network", UNKNOWN_UUID),
    "ssh_id": ("ssh_key", UNKNOWN_ID),
    "key_id": ("api_key", UNKNOWN_KEY),
    "webhook_uuid": ("webhook", UNKNOWN_UUID),
    "delivery_uuid": ("delivery", UNKNOWN_UUID),
    "firewall_rule_id": ("firewall_rule", UNKNOWN_UUID),
    "group_uuid": ("firewall_group", UNKNOWN_UUID),
    "ipset_id": ("ipset", UNKNOWN_ID),
    "iplist_id": ("ipset_entry", UNKNOWN_UUID),
    "/operations/{uuid}": ("operation", UNKNOWN_UUID),
}
SHARED_IN_PATH = {"tier_id"}
INTEGER_IDS = {
    *("ssh_id", "tier_id", "location_id", "size_id", "template_id", "pool_id", "prefix_pool_id"),
    *("note_id", "ipset_id"),
}
# Fields of bodies and queries that name something of an account; a foreign one is refused like an unknown one.
OWNED_IN_FIELDS = {
    "ssh_keys": ("ssh_key", UNKNOWN_ID),
    "public_network": ("address", UNKNOWN_UUID),
    "public_gateway": ("address", UNKNOWN_UUID),
    "vswitch": ("private_network", UNKNOWN_UUID),
    "vswitch_uuid": ("private_network", UNKNOWN_UUID),
    "uuids": ("instance", UNKNOWN_UUID),
    "groups": ("firewall_group", UNKNOWN_UUID),
    "instance_id": ("instance", UNKNOWN_UUID),
}
# Filters and positions: a foreign one finds what an unknown one finds.
FILTERS = {
    "resource": ("instance", UNKNOWN_UUID),
    "resource_uuid": ("instance", UNKNOWN_UUID),
    "before": ("event", "1"),
}
# Names that look like ids and name nothing of an account.
SHARED_FIELDS = {"location_id", "tier_id", "template_id", "location", "kind"}
LOOKS_LIKE_AN_ID = re.compile(
    r"(^|_)(id|ids|uuid|uuids|key|keys|network|networks|resource|before|vswitch)$"
)
NO_IDS = {"key"}  # the text of an SSH key
LISTS = {"groups", "ssh_keys", "uuids"}

# Answers without an end, and how to ask for one.
ENDLESS = {"/events": {"wait_s": 0}}

Route = tuple[str, str, dict[str, Any]]


@dataclass
class Tenants:
    """Two accounts; the first has one of everything."""

    cloud: SimulatedCloud
    owner: Customer
    intruder: Customer
    things: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def tenants(cloud: SimulatedCloud) -> Tenants:
    """The owner with its things, and an intruder with a working key."""
    found = Tenants(cloud, cloud.customer, cloud.new_customer("Intruder"))
    http = found.owner.http
    created = cloud.create(hostname="owners-machine")
    address = http.post("/networks/public", json={"location_id": cloud.location_id})
    network = {"name": "owners-network", "location_id": cloud.location_id}
    private = http.post("/networks/private", json=network)
    group = http.post(
        "/firewall-groups", json={"name": "owners-group", "location_id": cloud.location_id}
    )
    key = http.post("/ssh-keys", json={"title": "owners-laptop", "key": ED25519_KEYS[0]})
    api_key = http.post("/api-keys", json={"name": "owners-script"})
    webhook = http.post("/webhooks", json={"url": "https://owners-receiver.example"})
    firewall = f"/instances/{created['data']['uuid']}/firewall"
    ipset = http.post(f"{firewall}/ipsets", json={"name": "owners-set", "description": ""})
    ipset_id = ipset.json()["data"]["id"]
    entry = http.post(
        f"{firewall}/ipsets/{ipset_id}/cidrs", json={"cidr": "10.0.0.7", "description": ""}
    )
    rule = http.post(
        f"{firewall}/rules",
        json={
            "destination_port": 22,
            "protocol": "tcp",
            "action": "ACCEPT",
            "description": "owners-rule",
            "use_ipset": True,
            "source_ipset": ipset_id,
        },
    )
    found.things = {
        "instance": created["data"]["uuid"],
        "operation": created["operation"]["uuid"],
        "attached_address": created["data"]["public_network"]["uuid"],
        "address": address.json()["data"]["uuid"],
        "private_network": private.json()["data"]["uuid"],
        "ssh_key": str(key.json()["data"]["id"]),
        "api_key": api_key.json()["data"]["id"],
        "webhook": webhook.json()["data"]["uuid"],
        "delivery": first_delivery(http, webhook.json()["data"]["uuid"]),
        "firewall_group": group.json()["data"]["uuid"],
        "firewall_rule": rule.json()["data"]["uuid"],
        "ipset": str(ipset_id),
        "ipset_entry": entry.json()["data"]["uuid"],
        "event": str(http.get("/account/events").json()["data"][0]["id"]),
    }
    return found


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The document of the whole API."""
    return create_app().openapi()


def routes(document: dict[str, Any]) -> Iterator[Route]:
    """Method, path and operation of every route below the prefix, and those at the root."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def customer_routes(document: dict[str, Any]) -> Iterator[Route]:
    """The routes that customers have, their paths without the prefix."""
    for method, path, operation in routes(document):
        if path not in OPEN_PATHS and not path.startswith(f"{PREFIX}/admin/"):
            yield method, path.removeprefix(PREFIX), operation


def path_names(path: str) -> list[str]:
    """The names of a path's parameters."""
    return re.findall(r"{(\w+)}", path)


def filled(path: str) -> str:
    """The path with ids that nobody has."""
    values = {"ssh_id": "1", "tier_id": "1", "key_id": UNKNOWN_KEY, "kind": "fabric"}
    values |= dict.fromkeys(INTEGER_IDS, "1")
    return re.sub(r"{(\w+)}", lambda match: values.get(match[1], UNKNOWN_UUID), path)


def fields_of(document: dict[str, Any], operation: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Field -> (where, schema) of a route's query and body."""
    found = {
        parameter["name"]: ("query", parameter["schema"])
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "query"
    }
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        reference = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        properties = document["components"]["schemas"][reference]["properties"]
        found |= {name: ("body", schema) for name, schema in properties.items()}
    return found


def test_without_a_key_every_route_is_401(cloud: SimulatedCloud, document: dict[str, Any]) -> None:
    client = cloud.customer.http
    bodies = set()
    for method, path, operation in routes(document):
        if path in OPEN_PATHS:
            assert "security" not in operation
            continue
        for key in ("", "awan_0000000000000000_x", "x"):
            answer = client.request(
                method, f"http://testserver{filled(path)}", headers={"x-apikey": key}
            )
            assert answer.status_code == 401, f"{method} {path}: {answer.text}"
            bodies.add(answer.content)
    assert len(bodies) == 1


def test_customers_find_nothing_below_admin(tenants: Tenants, document: dict[str, Any]) -> None:
    before, http = contents(), tenants.intruder.http
    unknown = http.get("/admin/no-such-thing")
    words = "There is no such route: {} {}"
    assert unknown.status_code == 404
    assert unknown.json()["message"] == words.format("GET", f"{PREFIX}/admin/no-such-thing")
    walked = 0
    for method, path, _ in routes(document):
        if path.startswith(f"{PREFIX}/admin/"):
            for there in (filled(path), re.sub(r"{\w+}", "no-id", path)):
                answer = http.request(method, there.removeprefix(PREFIX), json={})
                message = words.format(method, there[:PATH_SHOWN_MAX])
                assert answer.json() == {"type": "NOT_FOUND", "message": message}, (method, path)
                assert answer.status_code == 404
            walked += 1
    assert walked > 20
    assert changed(before) == {}


@pytest.mark.parametrize("malformed", ["no-id", "0", "9" * 40, "9" * 5000, "%00"])
def test_an_id_that_cannot_be_read_is_as_unknown_as_any(
    cloud: SimulatedCloud, document: dict[str, Any], malformed: str
) -> None:
    """Of customers and operator: in words that name the thing, and only for who has a key."""
    walked = 0
    for method, path, operation in routes(document):
        body = dict.fromkeys(fields_of(document, operation), True) if method == "DELETE" else {}
        for name in path_names(path):
            if name == "kind":
                continue
            unknown = UNKNOWN_KEY if name == "key_id" else UNKNOWN_UUID
            if name in INTEGER_IDS:
                unknown = UNKNOWN_ID
            others = re.sub(rf"{{(?!{name}}})\w+}}", lambda match: filled(match[0]), path)
            answers = [
                cloud.admin.request(
                    method, f"http://testserver{others.replace(f'{{{name}}}', value)}", json=body
                )
                for value in (unknown, malformed)
            ]
            assert answers[1].json() == answers[0].json(), f"{method} {path} {name}"
            assert answers[1].status_code == answers[0].status_code
            bare = f"http://testserver{others.replace(f'{{{name}}}', malformed)}"
            anonymous = cloud.admin.request(method, bare, headers={"x-apikey": ""})
            assert anonymous.status_code == 401, f"{method} {path}"
            walked += 1
    assert walked > 80


def test_a_foreign_id_in_the_path_is_as_unknown_as_any(
    tenants: Tenants, document: dict[str, Any]
) -> None:
    before, walked = contents(), set()
    for method, path, operation in customer_routes(document):
        body = dict.fromkeys(fields_of(document, operation), True) if method == "DELETE" else {}
        for name in path_names(path):
            if name in SHARED_IN_PATH:
                continue
            key = name if name in OWNED_IN_PATH else path
            assert key in OWNED_IN_PATH, f"{method} {path}: whose is {{{name}}}?"
            kind, unknown = OWNED_IN_PATH[key]
            foreign = tenants.things[kind]
            answers = [
                tenants.intruder.http.request(method, path.replace(f"{{{name}}}", value), json=body)
                for value in (foreign, unknown)
            ]
            assert answers[0].status_code == 404, f"{method} {path}: {answers[0].text}"
            assert answers[0].content == answers[1].content, f"{method} {path}"
            walked.add((method, path))
    assert len(walked) >= 10
    assert changed(before) == {}


def test_attached_addresses_are_as_foreign_as_free_ones(tenants: Tenants) -> None:
    http = tenants.intruder.http
    foreign = http.delete(f"/networks/public/{tenants.things['attached_address']}")
    unknown = http.delete(f"/networks/public/{UNKNOWN_UUID}")
    assert foreign.status_code == 404
    assert foreign.content == unknown.content


def test_a_foreign_id_in_a_field_is_as_unknown_as_any(
    tenants: Tenants, document: dict[str, Any]
) -> None:
    own = intruders_own(tenants)
    before, walked = contents(), set()
    for method, path, operation in customer_routes(document):
        url = path
        for name, uuid in own.items():
            url = url.replace(f"{{{name}}}", uuid)
        for name, (where, schema) in fields_of(document, operation).items():
            if not is_an_id(name, schema) or name in SHARED_FIELDS | NO_IDS:
                continue
            known = {**OWNED_IN_FIELDS, **FILTERS}
            assert name in known, f"{method} {path}: whose does {name} name?"
            kind, unknown = known[name]
            values = (tenants.things[kind], unknown)
            if where == "query":
                answers = [
                    tenants.intruder.http.request(
                        method,
                        url,
                        params={**ENDLESS.get(path, {}), **where_of(tenants, path), name: value},
                    )
                    for value in values
                ]
            else:
                bodies = [body_with(tenants, path, name, value) for value in values]
                answers = [tenants.intruder.http.request(method, url, json=body) for body in bodies]
            expected = 422 if name in OWNED_IN_FIELDS else 200
            assert answers[0].status_code == expected, f"{method} {path} {name}: {answers[0].text}"
            if (
                name == "before"
            ):  # the intruder's own older events, and none before the first of all
                assert not_leaking(tenants, answers[0])
            else:
                assert answers[0].content == answers[1].content, f"{method} {path} {name}"
            walked.add(name)
    assert walked == {*OWNED_IN_FIELDS, *FILTERS}
    assert changed(before) == {}


def where_of(tenants: Tenants, path: str) -> dict[str, int]:
    """What a query must say besides."""
    return {"location_id": tenants.cloud.location_id} if path.endswith("/gateways") else {}


def intruders_own(tenants: Tenants) -> dict[str, str]:
    """Things of the intruder, by the names that paths have for them."""
    body = {"name": "intruders-network", "location_id": tenants.cloud.location_id}
    network = tenants.intruder.http.post("/networks/private", json=body)
    address = tenants.intruder.http.post(
        "/networks/public", json={"location_id": tenants.cloud.location_id}
    )
    return {
        "ip_uuid": address.json()["data"]["uuid"],
        "vswitch_uuid": network.json()["data"]["uuid"],
        "instance_uuid": tenants.cloud.create(tenants.intruder, use_public_ip=False)["data"][
            "uuid"
        ],
    }


def body_with(tenants: Tenants, path: str, name: str, value: str) -> dict[str, Any]:
    """A body that is right but for the id in one of its fields."""
    given = [value] if name in LISTS else value
    if path == "/instances/actions":
        return {"action": "stop", name: given}
    if path in (
        "/networks/private/{vswitch_uuid}/gateway",
        "/instances/{instance_uuid}/firewall/groups",
        "/instances/{instance_uuid}/private-network",
        "/instances/{instance_uuid}/public-network",
        "/networks/public/{ip_uuid}/instance",
    ):
        return {name: given}
    assert path == "/instances", f"{path}: how is {name} given?"
    return tenants.cloud.order(hostname="x", **{name: given})


def is_an_id(name: str, schema: dict[str, Any]) -> bool:
    """Whether the field may name a thing: by its name, or because it wants a uuid."""
    return bool(LOOKS_LIKE_AN_ID.search(name)) or '"uuid"' in str(schema).replace("'", '"')


def test_lists_show_nothing_of_others(tenants: Tenants, document: dict[str, Any]) -> None:
    walked = 0
    own = intruders_own(tenants)
    for method, path, operation in customer_routes(document):
        if method != "GET" or (path_names(path) and path_names(path) != ["tier_id"]):
            continue
        query = {
            parameter["name"]: own.get(parameter["name"], tenants.cloud.location_id)
            for parameter in operation.get("parameters", [])
            if parameter["in"] == "query" and parameter["required"]
        }
        query |= ENDLESS.get(path, {})
        answer = tenants.intruder.http.get(
            path.replace("{tier_id}", str(tenants.cloud.tier_id)), params=query
        )
        assert answer.status_code == 200, f"{path}: {answer.text}"
        assert not_leaking(tenants, answer), f"{path}: {answer.text}"
        walked += 1
    assert walked >= 12


def not_leaking(tenants: Tenants, answer: httpx.Response) -> bool:
    """Whether the answer holds no id, name or address of the owner."""
    http = tenants.owner.http
    addresses = [row["ip_address"] for row in http.get("/networks/public").json()["data"]["data"]]
    assert len(addresses) == 2
    secrets = ["owners-", str(tenants.owner.account_id), *addresses]
    secrets += [
        value for kind, value in tenants.things.items() if kind not in ("ssh_key", "ipset", "event")
    ]
    return not any(secret in answer.text for secret in secrets)
