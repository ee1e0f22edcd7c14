"""Every route with whatever its document allows and forbids: no fault of ours, and answers as documented.

The seed is pytest-randomly's, printed at the head of the run: `--randomly-seed=<n>` repeats it. A sample of the calls
is made in the ordinary run, all of them with `--full`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from awan.api import PREFIX, create_app
from tests.support.live_api import LiveApi
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.ssh_keys import ED25519_KEYS
from tests.support.webhook_deliveries import fan_out_all

SAMPLE_CALLS, ALL_CALLS = 2_000, 100_000
# How often a route is called before the next one's turn.
ROUND_CALLS = 100
CALL_TIMEOUT_S = 60.0
CHECKS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
# What would end the experiment itself: a driver or a node's uri that makes the worker call foreign hosts.
NEVER_ALLOWED = ("/engines/{kind}",)
# Answers without an end, and the parameter that asks for one.
ENDLESS = {f"{PREFIX}/events": "wait_s"}
# Answers that say "not now" and are right to.
MAY_BE_AWAY = {"NO_CAPACITY"}


@dataclass(repr=False)
class Target:
    """The API under fire: where it is, who calls, and ids that exist, by the name of the parameter."""

    origin: str
    customer_key: str
    operator_key: str
    spare: dict[str, list[Any]]
    real: dict[str, list[Any]]
    session: requests.Session = field(default_factory=requests.Session)
    statuses: Counter[int] = field(default_factory=Counter)


@pytest.fixture
def target(cloud: SimulatedCloud, worker: Any) -> Iterator[Target]:
    """A cloud at work. What the operator's routes may break is set up twice: once to break, once to go on with."""
    http, operator = cloud.customer.http, cloud.admin

    def post(client: Any, path: str, **body: Any) -> dict[str, Any]:
        answer = client.post(path, json=body)
        assert answer.is_success, f"{path}: {answer.text}"
        return dict(answer.json()["data"])

    limits = dict.fromkeys(
        ("instances", "vcpus", "memory_gib", "storage_gib", "public_ips", "ssh_keys"), 10_000
    )
    account = f"/admin/accounts/{cloud.customer.account_id}"
    assert operator.patch(account, json={f"{k}_max": v for k, v in limits.items()}).is_success
    instances = [cloud.create_running()["uuid"] for _ in range(3)]
    victim = post(operator, "/admin/accounts", name="Victim")["uuid"]
    spare = {
        "location_id": [
            post(operator, "/admin/locations", name="S", code="spare", country="ID")["id"]
        ],
        "tier_id": [post(operator, "/admin/tiers", name="S", cpu_model="x")["id"]],
        "template_id": [post(operator, "/admin/templates", name="S", version="1")["id"]],
        "size_id": [post(operator, "/admin/sizes", title="S", cpu=1, memory=1, storage=20)["id"]],
        "pool_id": [
            post(
                operator,
                "/admin/pools",
                location_id=cloud.location_id,
                cidr="198.18.9.0/24",
                gateway="198.18.9.1",
            )["id"]
        ],
        "account_uuid": [victim],
        "key_id": [post(operator, f"/admin/accounts/{victim}/api-keys", name="spare")["id"]],
        "node_uuid": [cloud.node_ids[1]],
        "image_uuid": [str(cloud.add_image(cloud.template_id))],
        "uuid": [instances[0], cloud.node_ids[0]],
    }
    operations = [row["uuid"] for row in http.get("/operations").json()["data"]["data"]]
    webhooks = [
        post(http, "/webhooks", url="https://example.com/", event_types=["*"]) for _ in range(3)
    ]
    fan_out_all()
    deliveries = http.get(f"/webhooks/{webhooks[0]['uuid']}/deliveries").json()["data"]["data"]
    real = {
        "webhook_uuid": [webhook["uuid"] for webhook in webhooks],
        "delivery_uuid": [delivery["uuid"] for delivery in deliveries],
        "location_id": [cloud.location_id],
        "location": [cloud.location_id],
        "tier_id": [cloud.tier_id],
        "template_id": [cloud.template_id],
        "instance_uuid": instances,
        "ip_uuid": [
            post(http, "/networks/public", location_id=cloud.location_id)["uuid"] for _ in range(3)
        ],
        "ssh_id": [
            post(http, "/ssh-keys", title=f"k{n}", key=ED25519_KEYS[n])["id"] for n in range(3)
        ],
        "key_id": [post(http, "/api-keys", name=f"k{n}")["id"] for n in range(3)],
        "uuid": operations,
        "resource": instances,
        "resource_uuid": instances,
    }
    with LiveApi(create_app()) as live:
        yield Target(
            live.origin,
            str(http.headers["x-apikey"]),
            str(operator.headers["x-apikey"]),
            spare,
            real,
        )


def read_document(target: Target) -> BaseSchema:
    """The API's own document, without its word on keys: calls without one are another test's."""
    document = target.session.get(f"{target.origin}/openapi.json").json()
    for methods in document["paths"].values():
        for operation in methods.values():
            operation.pop("security", None)
    return schemathesis.openapi.from_dict(document)


@st.composite
def calls(draw: st.DrawFn, operation: APIOperation[Any, Any, Any], target: Target) -> Case:
    """A call as the document allows it, or (one in three) not; two in three with ids that exist."""
    mode = draw(st.sampled_from([GenerationMode.POSITIVE] * 2 + [GenerationMode.NEGATIVE]))
    try:
        case = draw(operation.as_strategy(generation_mode=mode))
    except schemathesis.errors.SchemathesisError:
        case = draw(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    is_operators = operation.path.startswith(f"{PREFIX}/admin/")
    known = target.spare if is_operators else target.real
    takes_known = draw(st.integers(0, 2)) > 0 and not operation.path.endswith(NEVER_ALLOWED)
    for name, value in (case.path_parameters or {}).items():
        if takes_known and name in known:
            case.path_parameters[name] = draw(st.sampled_from(known[name]))
        elif is_operators and str(value).strip("0").isdigit():
            case.path_parameters[name] = 2**40  # small numbers are the things we go on with
    if takes_known and not is_operators:
        for container in (case.query, case.body):
            if isinstance(container, dict):
                for name in [*container]:
                    if name in target.real:
                        container[name] = draw(st.sampled_from(target.real[name]))
    if case.operation.path in ENDLESS:
        name = ENDLESS[case.operation.path]
        case.query = {**(case.query or {}), name: draw(st.sampled_from(["0", "1", "-1", "x"]))}
    if isinstance(case.body, dict) and operation.path == f"{PREFIX}/instances" and takes_known:
        case.body.update(draw(orders(target)))
    return case


def orders(target: Target) -> st.SearchStrategy[dict[str, Any]]:
    """Parts of a good order, so that some calls get as far as an instance."""
    return st.fixed_dictionaries(
        {
            "location_id": st.sampled_from(target.real["location_id"]),
            "tier_id": st.sampled_from(target.real["tier_id"]),
            "template_id": st.sampled_from(target.real["template_id"]),
            "hostname": st.uuids().map(lambda uuid: f"h-{uuid}"),
            "password": st.just("Correct-Horse-7"),
            "username": st.sampled_from(["root", "budi"]),
        },
        optional={
            "cpu": st.integers(1, 4),
            "memory": st.integers(1, 4),
            "storage": st.sampled_from([20, 30]),
            "public_network": st.sampled_from(target.real["ip_uuid"]),
            "ssh_keys": st.lists(st.sampled_from(target.real["ssh_id"]), max_size=2),
        },
    )


def fire(target: Target, case: Case) -> None:
    """Makes the call. Raises: what is wrong with the answer."""
    is_operators = case.operation.path.startswith(f"{PREFIX}/admin/")
    key = target.operator_key if is_operators else target.customer_key
    headers = {"x-apikey": key}
    response = case.call(
        base_url=target.origin, session=target.session, headers=headers, timeout=CALL_TIMEOUT_S
    )
    target.statuses[response.status_code] += 1
    if response.status_code >= 500:
        kind = response.json().get("type")
        assert response.status_code == 503, response.text
        assert kind in MAY_BE_AWAY, response.text
    case.validate_response(response, checks=CHECKS)


@pytest.mark.fuzz
@pytest.mark.timeout(0)
# Hypothesis sees other threads, the server's among them, use the random numbers of the process.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
def test_every_route_bears_whatever_is_sent(
    target: Target, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goes round all routes until the calls are made, and reports what each of them could not bear."""
    seed = int(request.config.getoption("randomly_seed", 0))
    total = ALL_CALLS if request.config.getoption("full") else SAMPLE_CALLS
    operations = [found.ok() for found in read_document(target).get_all_operations()]
    failures: dict[str, str] = {}
    while (left := total - target.statuses.total()) > 0:
        each = min(ROUND_CALLS, max(1, left // len(operations)))
        for operation in operations:
            for name, words in bombard(
                target, operation, each, seed + target.statuses.total()
            ).items():
                if name not in failures:
                    failures[name] = words
                    with capsys.disabled():
                        print(f"\nfuzz: {words}")
    with capsys.disabled():
        answers = dict(sorted(target.statuses.items()))
        print(f"\nfuzz: {target.statuses.total()} calls, seed {seed}, answers {answers}")
    assert not failures, "\n\n".join(f"{name}\n{words}" for name, words in failures.items())


def bombard(
    target: Target, operation: APIOperation[Any, Any, Any], count: int, seed: int
) -> dict[str, str]:
    """Calls a route at most so many times (less when there are not so many ways). Name of a trouble -> its words."""
    failures: dict[str, str] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=calls(operation, target))
    def bear(case: Case) -> None:
        try:
            fire(target, case)
        except (AssertionError, FailureGroup, requests.RequestException) as err:
            # Noted, not raised: the next calls may find another trouble.
            words = f"{case.operation.label}: {err}"
            failures.setdefault(words[:160], words)

    bear()
    return failures
