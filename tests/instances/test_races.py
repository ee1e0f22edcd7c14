"""Many calls at once, over real sockets: limits hold exactly, and nothing is lost or taken twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, text, update

from awan.api import create_app
from awan.fleet.models import Node, Placement
from awan.instances.models import Instance
from awan.kit.database import get_engine, transaction
from awan.networks.models import Address, AddressState
from awan.volumes import Volume
from tests.support.holdings import assert_counts
from tests.support.live_api import LiveApi
from tests.support.simulated_cloud import SimulatedCloud

CALL_TIMEOUT_S = 60.0
TRIES_MAX = 5
Storm = Callable[[int, Callable[[httpx.Client, int], httpx.Response]], list[httpx.Response]]


@pytest.fixture
def storm(cloud: SimulatedCloud) -> Iterator[Storm]:
    """`storm(200, call)`: so many calls of the customer at the same moment, each on a connection of its own."""
    with LiveApi(create_app()) as live:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        headers = {"x-apikey": cloud.customer.http.headers["x-apikey"]}
        with httpx.Client(
            base_url=live.url,
            headers=headers,
            timeout=CALL_TIMEOUT_S,
            limits=limits,
            trust_env=False,
        ) as client:

            def run(
                count: int, call: Callable[[httpx.Client, int], httpx.Response]
            ) -> list[httpx.Response]:
                together = Barrier(count)

                def one(number: int) -> httpx.Response:
                    together.wait(timeout=30)
                    for _ in range(TRIES_MAX):
                        answer = call(client, number)
                        # On a slow machine the last ones wait for a connection of the database for too long.
                        if answer.status_code != 503 or answer.json()["type"] != "UNAVAILABLE":
                            break
                    return answer

                with ThreadPoolExecutor(count) as pool:
                    return list(pool.map(one, range(count)))

            yield run


def outcomes(answers: list[httpx.Response]) -> Counter[tuple[int, str | None]]:
    """How often each status and error type was answered."""
    return Counter((answer.status_code, answer.json().get("type")) for answer in answers)


def count(model: Any, *conditions: Any) -> int:
    """Rows of a table."""
    with transaction() as session:
        return session.scalar(select(func.count()).select_from(model).where(*conditions)) or 0


def allow_instances(cloud: SimulatedCloud, most: int) -> None:
    """Sets the customer's quota."""
    path = f"/admin/accounts/{cloud.customer.account_id}"
    body = {
        "instances_max": most,
        "vcpus_max": 1000,
        "memory_gib_max": 1000,
        "public_ips_max": 1000,
    }
    assert cloud.admin.patch(path, json=body).is_success


def test_two_hundred_creations_against_a_quota_of_five(cloud: SimulatedCloud, storm: Storm) -> None:
    allow_instances(cloud, 5)
    bodies = [cloud.order() for _ in range(200)]
    answers = storm(200, lambda client, n: client.post("/instances", json=bodies[n]))
    assert outcomes(answers) == {(202, None): 5, (403, "QUOTA_EXCEEDED"): 195}
    assert count(Instance) == count(Volume) == count(Placement) == 5
    assert count(Address, Address.state == AddressState.ATTACHED, Address.family == 4) == 5
    account = cloud.customer.http.get("/account").json()["data"]["quotas"]
    assert (account["instances"]["used"], account["public_ips"]["used"]) == (5, 5)
    addresses = [answer.json()["data"]["ip_address"] for answer in answers if answer.is_success]
    assert len(set(addresses)) == 5


@pytest.mark.usefixtures("worker")
def test_fifty_creations_against_room_for_three(cloud: SimulatedCloud, storm: Storm) -> None:
    """Two nodes of which one takes two more, the other one; afterwards everything is used and nothing lost."""
    allow_instances(cloud, 50)
    with transaction() as session:
        for node, room in zip(
            session.scalars(select(Node).order_by(Node.name)), (2, 1), strict=True
        ):
            node.memory_mib = room * 1024
    bodies = [cloud.order() for _ in range(50)]
    answers = storm(50, lambda client, n: client.post("/instances", json=bodies[n]))
    assert outcomes(answers) == {(202, None): 3, (503, "NO_CAPACITY"): 47}
    for answer in answers:
        if answer.is_success:
            assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    assert_counts(cloud, 3)
    assert count(Volume) == 3
    assert count(Address, Address.state == AddressState.AVAILABLE) == 253 - 3
    assert count(Address, Address.family == 6) == 3


def test_the_last_addresses(cloud: SimulatedCloud, storm: Storm) -> None:
    allow_instances(cloud, 50)
    with transaction() as session:
        last = session.scalars(
            select(Address.address_id).where(Address.state == AddressState.AVAILABLE).limit(4)
        ).all()
        session.execute(
            update(Address).where(Address.address_id.not_in(last)).values(state="reserved")
        )
    body = {"location_id": cloud.location_id}
    bodies = [cloud.order() for _ in range(10)]

    def call(client: httpx.Client, number: int) -> httpx.Response:
        if number % 2:
            return client.post("/networks/public", json=body)
        return client.post("/instances", json=bodies[number // 2])

    answers = storm(20, call)
    found = outcomes(answers)
    assert found[(202, None)] + found[(201, None)] == 4
    assert found[(503, "NO_CAPACITY")] == 16
    given = [answer.json()["data"]["ip_address"] for answer in answers if answer.is_success]
    assert len(set(given)) == 4
    used = cloud.customer.http.get("/account").json()["data"]["quotas"]
    assert used["public_ips"]["used"] == 4
    assert used["instances"]["used"] == count(Instance) == count(Placement) == found[(202, None)]


def test_one_address_for_many(cloud: SimulatedCloud, storm: Storm) -> None:
    """An address that is brought, or given back, by many at once goes to one."""
    body = {"location_id": cloud.location_id}
    mine = cloud.customer.http.post("/networks/public", json=body).json()["data"]["uuid"]
    bodies = [cloud.order(public_network=mine) for _ in range(10)]

    def call(client: httpx.Client, number: int) -> httpx.Response:
        if number % 2:
            return client.delete(f"/networks/public/{mine}")
        return client.post("/instances", json=bodies[number // 2])

    answers = storm(20, call)
    assert sum(answer.is_success for answer in answers) == 1
    assert {answer.status_code for answer in answers} <= {200, 202, 404, 409, 422}
    winner = next(answer for answer in answers if answer.is_success)
    used = cloud.customer.http.get("/account").json()["data"]["quotas"]
    assert used["public_ips"]["used"] == (1 if winner.status_code == 202 else 0)
    assert count(Instance) == (1 if winner.status_code == 202 else 0)


def test_one_name_for_many(cloud: SimulatedCloud, storm: Storm) -> None:
    bodies = [cloud.order(hostname="Web-1" if n % 2 else "web-1") for n in range(20)]
    answers = storm(20, lambda client, n: client.post("/instances", json=bodies[n]))
    assert outcomes(answers) == {(202, None): 1, (422, "VALIDATION_ERROR"): 19}
    refusals = {tuple(answer.json()["errors"]) for answer in answers if not answer.is_success}
    assert refusals == {("hostname",)}
    assert cloud.customer.http.get("/account").json()["data"]["quotas"]["vcpus"]["used"] == 1


def test_one_idempotency_key_for_a_hundred(cloud: SimulatedCloud, storm: Storm) -> None:
    body, headers = cloud.order(), {"Idempotency-Key": "order-66"}

    def call(client: httpx.Client, _: int) -> httpx.Response:
        return client.post("/instances", json=body, headers=headers)

    answers = storm(100, call)
    assert set(outcomes(answers)) <= {(202, None), (409, "IDEMPOTENCY_CONFLICT")}
    assert len({answer.json()["data"]["uuid"] for answer in answers if answer.is_success}) == 1
    assert count(Instance) == 1
    repeat = cloud.customer.http.post("/instances", data=body, headers=headers)
    assert repeat.status_code == 202
    assert (
        repeat.json()["operation"] == next(a for a in answers if a.is_success).json()["operation"]
    )
    other = cloud.customer.http.post("/instances", json={**body, "cpu": 2}, headers=headers)
    assert (other.status_code, other.json()["type"]) == (409, "IDEMPOTENCY_CONFLICT")
    assert count(Instance) == 1


def test_many_deletions_of_one_instance(cloud: SimulatedCloud, storm: Storm) -> None:
    uuid = cloud.create()["data"]["uuid"]
    query = {"remove_ip": "true", "remove_block_storage": "true"}
    answers = storm(20, lambda client, _: client.delete(f"/instances/{uuid}", params=query))
    assert outcomes(answers) == {(202, None): 1, (409, "INVALID_OPERATION"): 19}
    with get_engine().connect() as connection:
        query_text = "SELECT count(*) FROM operation WHERE kind = 'instance.delete'"
        assert connection.scalar(text(query_text)) == 1
