"""What a creation must not accept, field by field: as JSON, form and multipart, and with nothing changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import update

from awan.catalogue.models import Tier
from awan.kit.database import transaction
from awan.settings import Settings
from tests.support.database_server import empty
from tests.support.database_snapshot import Snapshot
from tests.support.database_state import changed, contents
from tests.support.simulated_cloud import Customer, SimulatedCloud
from tests.support.ssh_keys import ED25519_KEYS

MISSING = object()
FORM = "application/x-www-form-urlencoded"
ENCODINGS = ("json", "form", "multipart")


@dataclass
class Shop:
    """A cloud whose catalogue also has what cannot be ordered, and a second tenant with things of its own."""

    cloud: SimulatedCloud
    other: Customer
    ids: dict[str, Any] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)

    def resolve(self, value: Any) -> Any:
        """`"@name"` is the id of that name, also within lists."""
        if isinstance(value, list):
            return [self.resolve(item) for item in value]
        if isinstance(value, str) and value.startswith("@"):
            return self.ids[value[1:]]
        return value

    def order(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """A valid body but for the changes."""
        body = self.cloud.order(hostname="web-1")
        for name, value in changes.items():
            if value is MISSING:
                body.pop(name, None)
            else:
                body[name] = self.resolve(value)
        return body


@pytest.fixture(scope="module")
def shop(_process_settings: Settings, _seeded: tuple[SimulatedCloud, Snapshot]) -> Iterator[Shop]:
    """One shop for all refusals: they change nothing."""
    cloud, snapshot = _seeded
    snapshot.put_back()
    shop = Shop(cloud, cloud.new_customer("Other"))
    mine, theirs, operator = cloud.customer.http, shop.other.http, cloud.admin

    def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
        answer = client.post(path, json=body)
        assert answer.is_success, answer.text
        return dict(answer.json()["data"])

    def switch_off(kind: str, key: int) -> int:
        assert operator.patch(f"/admin/{kind}/{key}", json={"is_enabled": False}).is_success
        return key

    away = post(operator, "/admin/locations", name="Away", code="away", country="ID")["id"]
    priced = {"cpu_shared": 1, "memory": 1, "storage": 1, "public_ip": 1, "cpu_dedicated": 1}

    def tier(name: str, where: list[int], prices: dict[str, int], **more: Any) -> int:
        made = post(operator, "/admin/tiers", name=name, cpu_model="x", location_ids=where, **more)[
            "id"
        ]
        for component, minor in prices.items():
            post(operator, f"/admin/tiers/{made}/prices", component=component, monthly_minor=minor)
        return int(made)

    here = [cloud.location_id]
    plain = post(operator, "/admin/templates", name="Empty", version="1")["id"]
    big = post(
        operator, "/admin/templates", name="Big", version="1", cpu_min=4, memory_mib_min=3000,
        storage_gib_min=60,
    )["id"]  # fmt: skip
    windows = post(operator, "/admin/templates", name="Win", version="1", family="windows")["id"]
    off = post(operator, "/admin/templates", name="Off", version="1")["id"]
    for template_id in (big, windows, off):
        cloud.add_image(template_id)
    shop.ids = {
        "away": away,
        "closed": switch_off(
            "locations",
            post(operator, "/admin/locations", name="Closed", code="closed", country="ID")["id"],
        ),
        "tier_elsewhere": tier("Elsewhere", [away], priced),
        "tier_off": switch_off("tiers", tier("Off", here, priced)),
        "tier_unpriced": tier("Unpriced", here, {"cpu_shared": 1}),
        "tier_shared": tier("Shared", here, priced),
        "tier_dedicated": tier(
            "Dedicated", here, priced, offers_shared=False, offers_dedicated=True
        ),
        "template_empty": plain,
        "template_big": big,
        "template_windows": windows,
        "template_off": switch_off("templates", off),
        "my_key": post(mine, "/ssh-keys", title="a", key=ED25519_KEYS[0])["id"],
        "my_deleted_key": post(mine, "/ssh-keys", title="b", key=ED25519_KEYS[1])["id"],
        "their_key": post(theirs, "/ssh-keys", title="c", key=ED25519_KEYS[2])["id"],
        "their_address": post(theirs, "/networks/public", location_id=cloud.location_id)["uuid"],
        "my_address": post(mine, "/networks/public", location_id=cloud.location_id)["uuid"],
        "unknown_address": str(uuid4()),
    }
    assert mine.delete(f"/ssh-keys/{shop.ids['my_deleted_key']}").is_success
    used = cloud.create(hostname="taken")["data"]
    shop.ids["attached_address"] = used["public_network"]["uuid"]
    shop.before = contents()
    yield shop
    empty(_process_settings.database_url)


def send(client: httpx.Client, encoding: str, body: Mapping[str, Any]) -> httpx.Response:
    """The body in one of the three encodings; in forms null is the empty text, and lists are `name[]`."""
    if encoding == "json":
        return client.post("/instances", json=body)
    pairs: list[tuple[str, str]] = []
    for name, value in body.items():
        if isinstance(value, list):
            pairs += [(f"{name}[]", text_of(item)) for item in value]
        else:
            pairs.append((name, text_of(value)))
    if encoding == "form":
        content = str(httpx.QueryParams(pairs))
        return client.post("/instances", content=content, headers={"content-type": FORM})
    return client.post("/instances", files=[(name, (None, text)) for name, text in pairs])


def text_of(value: Any) -> str:
    """A value as a form writes it."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


# fmt: off
ID_CASES: list[Any] = [MISSING, "abc", "1 ", "", None, 0, -1, 2**31, 2**63, 2**80, "1.0", "١"]
CASES: list[tuple[str, Any, str]] = [
    *((name, value, name) for name in ("location_id", "tier_id", "template_id") for value in ID_CASES),
    ("location_id", "@closed", "location_id"),
    ("location_id", "@away", "tier_id"),
    ("tier_id", "@tier_elsewhere", "tier_id"),
    ("tier_id", "@tier_off", "tier_id"),
    ("tier_id", "@tier_unpriced", "tier_id"),
    ("template_id", "@template_empty", "template_id"),
    ("template_id", "@template_off", "template_id"),
    *(
        ("hostname", value, "hostname")
        for value in (
            MISSING, "", None, "-a", "a-", "a..b", ".a", "a.", "1234", "12.34", "a b", "a_b", "ä",
            "a" * 64, "a." * 32 + "b", "a\n", "a\x00", "taken", "TAKEN", "../x", "a/b",
        )
    ),
    *(("cpu", value, "cpu") for value in (MISSING, "", None, 0, -1, 17, "2.0", "1e1", "+1", 10**30)),
    *(("memory", value, "memory") for value in (MISSING, "", None, 0, -1, 65, 2048, "1.5", 10**30)),
    *(
        ("storage", value, "storage")
        for value in (MISSING, "", None, 0, 10, 19, 25, 1010, 1001, "20GB", 10**30)
    ),
    *(
        ("username", value, "username")
        for value in (
            MISSING, "", None, "Root", "1a", "-a", "a" * 31, "daemon", "www-data", "nobody", "sshd",
            "systemd-network", "a b", "a:b", "ü", "a\n", "$(id)",
        )
    ),
    *(
        ("password", value, "password")
        for value in (
            MISSING, "", None, "Short-7", "a" * 62 + "A1x", "all-lower-7", "ALL-UPPER-7", "No-Digits-",
            "With:Colon-7", "Ünicode-Aa7", "Control\x07-Aa7", "Newline-\nAa7", "Nul-\x00Aa77",
        )
    ),
    *(
        ("use_public_ip", value, "use_public_ip")
        for value in (MISSING, "", None, "yes", "2", 2, "tru")
    ),
    *(
        (name, value, name)
        for name in ("use_shared_cpu", "use_dedicated_cpu")
        for value in ("maybe", "2")
    ),
    ("vswitch", str(uuid4()), "vswitch"),
    ("vswitch", "x", "vswitch"),
    ("include_backup", True, "include_backup"),
    ("include_backup", "x", "include_backup"),
    ("public_network", "x", "public_network"),
    ("public_network", "@unknown_address", "public_network"),
    ("public_network", "@their_address", "public_network"),
    ("public_network", "@attached_address", "public_network"),
    ("ssh_keys", ["abc"], "ssh_keys.0"),
    ("ssh_keys", [0], "ssh_keys.0"),
    ("ssh_keys", ["@my_key", 2**63], "ssh_keys.1"),
    ("ssh_keys", [2**62], "ssh_keys"),
    ("ssh_keys", ["@their_key"], "ssh_keys"),
    ("ssh_keys", ["@my_deleted_key"], "ssh_keys"),
    ("ssh_keys", ["@my_key", "@their_key"], "ssh_keys"),
    ("ssh_keys", list(range(1, 12)), "ssh_keys"),
    ("user_data", "no header", "user_data"),
    ("user_data", "#cloud-config\n[1, 2]", "user_data"),
    ("user_data", "#cloud-config\na: [", "user_data"),
    ("user_data", "#!/bin/sh\n" + "x" * 16384, "user_data"),
    ("user_data", "#!/bin/sh\n# " + "é" * 8190, "user_data"),
    ("user_data", "#!/bin/sh\n\x1b[0m", "user_data"),
    ("flavour", "vanilla", "flavour"),
    ("lock", None, "lock"),
    ("instance_id", "x", "instance_id"),
]
# What only JSON can say.
JSON_CASES: list[tuple[str, Any, str]] = [
    *((name, value, name) for name in ("location_id", "tier_id", "template_id", "cpu", "memory", "storage")
      for value in (True, 1.0, 1.5, {"a": 1}, [1])),
    *((name, value, name) for name in ("hostname", "username", "password", "user_data", "vswitch")
      for value in (5, True, {"a": 1}, ["x"])),
    ("use_public_ip", 1.0, "use_public_ip"),
    ("use_public_ip", {}, "use_public_ip"),
    ("use_public_ip", [True], "use_public_ip"),
    ("use_shared_cpu", [True], "use_shared_cpu"),
    ("include_backup", [], "include_backup"),
    ("public_network", 5, "public_network"),
    ("public_network", ["x"], "public_network"),
    ("ssh_keys", "1", "ssh_keys"),
    ("ssh_keys", {"0": 1}, "ssh_keys"),
    ("ssh_keys", [None], "ssh_keys.0"),
    ("ssh_keys", [[1]], "ssh_keys.0"),
    ("ssh_keys", [True], "ssh_keys.0"),
    ("hostname", "a\ud800", "hostname"),
]
# fmt: on
COMBINATIONS: list[tuple[dict[str, Any], str]] = [
    ({"use_public_ip": False, "public_network": "@my_address"}, "public_network"),
    ({"use_shared_cpu": True, "use_dedicated_cpu": True}, "use_shared_cpu"),
    ({"use_shared_cpu": False, "use_dedicated_cpu": False}, "use_shared_cpu"),
    ({"tier_id": "@tier_shared", "use_dedicated_cpu": True}, "use_dedicated_cpu"),
    ({"tier_id": "@tier_shared", "use_shared_cpu": False}, "use_shared_cpu"),
    ({"tier_id": "@tier_dedicated", "use_shared_cpu": True}, "use_shared_cpu"),
    ({"tier_id": "@tier_dedicated", "use_dedicated_cpu": False}, "use_dedicated_cpu"),
    ({"username": "budi1234x", "password": "Budi1234X"}, "password"),
    ({"hostname": "Web-Server-9", "password": "Web-Server-9"}, "password"),
    ({"template_id": "@template_big", "memory": 4, "storage": 60}, "cpu"),
    ({"template_id": "@template_big", "cpu": 4, "memory": 2, "storage": 60}, "memory"),
    ({"template_id": "@template_big", "cpu": 4, "memory": 3, "storage": 50}, "storage"),
    ({"template_id": "@template_windows", "user_data": "#!/bin/sh"}, "user_data"),
]
REFUSALS = [({name: value}, wrong) for name, value, wrong in CASES] + COMBINATIONS


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_field_is_checked(shop: Shop, encoding: str) -> None:
    """The field that is wrong is named and no other, the password is not repeated, and nothing is changed."""
    wrongly: list[str] = []
    for changes, wrong in REFUSALS:
        body = shop.order(changes)
        answer = send(shop.cloud.customer.http, encoding, body)
        if problem := judge(answer, body, wrong):
            wrongly.append(f"{changes}: {problem}")
    assert not wrongly, "\n".join(wrongly)
    assert changed(shop.before) == {}


def judge(answer: httpx.Response, body: Mapping[str, Any], wrong: str) -> str | None:
    """What is not as it should be with the refusal of a body in which the field `wrong` is wrong; None if all is."""
    if answer.status_code != 422:
        return f"{answer.status_code} {answer.text}"
    refusal = answer.json()
    if set(refusal) != {"type", "message", "errors"} or refusal["type"] != "VALIDATION_ERROR":
        return f"not the error shape: {answer.text}"
    if set(refusal["errors"]) != {wrong} or not all(refusal["errors"][wrong]):
        return f"expected {wrong} alone: {refusal['errors']}"
    password = body.get("password")
    if isinstance(password, str) and password and password in answer.text:
        return "the password is repeated"
    return None


def test_types_that_only_json_has(shop: Shop) -> None:
    wrongly: list[str] = []
    for name, value, wrong in JSON_CASES:
        body = shop.order({name: value})
        answer = shop.cloud.customer.http.post(
            "/instances", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        if problem := judge(answer, body, wrong):
            wrongly.append(f"{name}={value!r}: {problem}")
    assert not wrongly, "\n".join(wrongly)
    assert changed(shop.before) == {}


def test_foreign_ids_are_refused_in_the_words_of_unknown_ones(shop: Shop) -> None:
    http = shop.cloud.customer.http
    for name, foreign, unknown in (
        ("public_network", "@their_address", "@unknown_address"),
        ("ssh_keys", ["@their_key"], [2**40]),
    ):
        bodies = [
            http.post("/instances", json=shop.order({name: value})) for value in (foreign, unknown)
        ]
        assert bodies[0].content == bodies[1].content
        assert bodies[0].status_code == bodies[1].status_code == 422


def test_everything_wrong_is_named_at_once(shop: Shop) -> None:
    answer = shop.cloud.customer.http.post(
        "/instances", json=shop.order({"cpu": 99, "memory": 99, "storage": 5, "hostname": "taken"})
    )
    assert set(answer.json()["errors"]) == {"cpu", "memory", "storage", "hostname"}


def test_memory_in_mib_gets_a_hint(shop: Shop) -> None:
    for given, hint in ((2048, ": 1 means 1 GiB"), (99999999999, ": 1 means 1 GiB"), (65, "")):
        answer = shop.cloud.customer.http.post("/instances", json=shop.order({"memory": given}))
        assert answer.json()["errors"]["memory"] == [
            f"The memory must be between 1 and 64 GiB{hint}."
        ]


@pytest.mark.parametrize(
    ("content", "content_type", "status", "kind"),
    [
        (b"{", "application/json", 400, "BAD_REQUEST"),
        (b'{"cpu": NaN}', "application/json", 400, "BAD_REQUEST"),
        (b"\xff\xfe", "application/json", 400, "BAD_REQUEST"),
        (b"[1]", "application/json", 422, "VALIDATION_ERROR"),
        (b'{"cpu": 1, "cpu": 2}', "application/json", 422, "VALIDATION_ERROR"),
        (b"cpu=1&cpu=2", FORM, 422, "VALIDATION_ERROR"),
        (b"cpu=%ff", FORM, 400, "BAD_REQUEST"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 400, "BAD_REQUEST"),
        (b"{}", "multipart/form-data", 400, "BAD_REQUEST"),
        (b"cpu: 1", "application/yaml", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (b"x" * (1024 * 1024 + 1), "application/json", 413, "PAYLOAD_TOO_LARGE"),
        (b"", "application/json", 422, "VALIDATION_ERROR"),
    ],
)
def test_bodies_that_cannot_be_read(
    shop: Shop, content: bytes, content_type: str, status: int, kind: str
) -> None:
    answer = shop.cloud.customer.http.post(
        "/instances", content=content, headers={"content-type": content_type}
    )
    assert (answer.status_code, answer.json()["type"]) == (status, kind)
    assert changed(shop.before) == {}


def test_unknown_query_parameters_are_refused(shop: Shop) -> None:
    answer = shop.cloud.customer.http.post("/instances?dry_run=1", json=shop.order({}))
    assert answer.status_code == 422
    assert set(answer.json()["errors"]) == {"dry_run"}
    assert changed(shop.before) == {}


def test_no_capacity_says_why_coarsely_and_changes_nothing(shop: Shop) -> None:
    """The customer learns which limit, the operator's figures stay in the log."""
    http = shop.cloud.customer.http
    with transaction() as session:
        session.execute(update(Tier).values(storage_gib_max=10_000))
    before = contents()
    answer = http.post("/instances", json=shop.order({"storage": 3000}))
    assert answer.status_code == 503, answer.text
    assert answer.json()["type"] == "NO_CAPACITY"
    assert "disk" in answer.json()["message"]
    assert not any(figure in answer.text for figure in ("2000", "3000", "n1"))
    assert int(answer.headers["retry-after"]) > 0
    assert changed(before) == {}
    with transaction() as session:
        session.execute(update(Tier).values(storage_gib_max=1000))


def test_quota_names_the_limit_and_changes_nothing(shop: Shop) -> None:
    with quota(shop, "vcpus_max", 3):
        before = contents()
        answer = shop.other.http.post("/instances", json=shop.order({"cpu": 4}))
        assert (answer.status_code, answer.json()["type"]) == (403, "QUOTA_EXCEEDED")
        assert "vCPU" in answer.json()["message"]
        assert changed(before) == {}


def test_refusals_come_in_their_order(shop: Shop) -> None:
    """401 before 422 before 403 (quota) before 503."""
    body = shop.order({"cpu": 0})
    anonymous = shop.cloud.customer.http.post("/instances", json=body, headers={"x-apikey": ""})
    assert anonymous.status_code == 401
    with quota(shop, "instances_max", 0):
        assert shop.other.http.post("/instances", json=body).status_code == 422
        full = shop.order({"storage": 1000, "memory": 64, "cpu": 16})
        assert shop.other.http.post("/instances", json=full).status_code == 403


@contextmanager
def quota(shop: Shop, name: str, limit: int) -> Iterator[None]:
    """A limit of the other customer for the time of the block; the shop counts as unchanged after it."""
    operator, url = shop.cloud.admin, f"/admin/accounts/{shop.other.account_id}"
    usual = operator.get(url).json()["data"]["quotas"][name.removesuffix("_max")]["max"]
    assert operator.patch(url, json={name: limit}).is_success
    try:
        yield
    finally:
        assert operator.patch(url, json={name: usual}).is_success
        shop.before = contents()
