"""The generic proofs of giving an instance an IPv6 prefix, and of taking it away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import pytest

from awan.engines.registry import sim_store
from awan.kit.database import transaction
from awan.reconcile.row_checks import check_rows
from awan.settings import Settings
from tests.networks.test_ipv6_prefixes import RANGE, ROUTER, delete, routes, security
from tests.support import proofs
from tests.support.changed_settings import changed_settings
from tests.support.in_process_worker import wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud


@dataclass
class World:
    """A cloud and the instance that is under proof."""

    cloud: SimulatedCloud
    instance: str


def without_prefix(cloud: SimulatedCloud) -> World:
    """An instance; nothing is left of the case before."""
    if not cloud.admin.get("/admin/prefix-pools").json()["data"]:
        body = {"location_id": cloud.location_id, "cidr": RANGE, "router_address": ROUTER}
        assert cloud.admin.post("/admin/prefix-pools", json=body).status_code == 201
    for row in cloud.customer.http.get("/instances").json()["data"]["data"]:
        delete(cloud, row["uuid"])
    assert routes() == {}
    world = World(cloud, cloud.create_running()["uuid"])
    wait_until_idle()
    return world


def with_prefix(cloud: SimulatedCloud) -> World:
    world = without_prefix(cloud)
    answer = cloud.customer.http.post(f"/instances/{world.instance}/ipv6/prefix")
    assert answer.status_code == 200, answer.text
    wait_until_idle()
    return world


def begin(method: str) -> Callable[[World], UUID]:
    def call(world: World) -> UUID:
        with changed_settings(operation_wait_s="0"):
            path = f"/instances/{world.instance}/ipv6/prefix"
            answer = world.cloud.customer.http.request(method, path)
        assert answer.is_success, answer.text
        return UUID(answer.json()["operation"]["uuid"])

    return call


def has_prefix(world: World) -> None:
    shown = world.cloud.customer.http.get(f"/instances/{world.instance}").json()["data"]
    prefix = shown["ipv6_prefix"]
    assert routes() == {prefix: shown["public_network"]["ipv6_address"]}
    assert [line.rpartition(" ")[2] for line in security()] == [prefix]
    is_sound()


def has_none(world: World) -> None:
    shown = world.cloud.customer.http.get(f"/instances/{world.instance}").json()["data"]
    assert shown["ipv6_prefix"] is None
    assert routes() == {}
    assert not any(line.endswith("/64") for line in security())
    is_sound()


def is_sound() -> None:
    with transaction() as session:
        assert list(check_rows(session)) == []


CASES = {
    "add": (without_prefix, begin("POST"), has_prefix, has_none),
    "remove": (with_prefix, begin("DELETE"), has_none, has_prefix),
}


@pytest.fixture(params=sorted(CASES))
def case(
    request: pytest.FixtureRequest, settings: Settings, cloud: SimulatedCloud
) -> proofs.Case[World]:
    prepare, begins, succeeded, undone = CASES[request.param]
    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=lambda: prepare(cloud),
        begin=begins,
        succeeded=succeeded,
        undone=undone,
    )


def calls_of(request: pytest.FixtureRequest) -> proofs.Calls:
    return None if request.config.getoption("--full") else proofs.first_middle_last


def whens_of(request: pytest.FixtureRequest) -> tuple[proofs.When, ...]:
    return ("before", "after") if request.config.getoption("--full") else ("after",)


def test_steps_run_twice_are_one(case: proofs.Case[World]) -> None:
    proofs.runs_twice_once(case)


def test_a_failure_is_undone(case: proofs.Case[World], request: pytest.FixtureRequest) -> None:
    proofs.unwinds_from_failure_at_each_call(case, calls_of(request))


def test_death_changes_nothing(case: proofs.Case[World], request: pytest.FixtureRequest) -> None:
    proofs.survives_death_at_each_call(case, calls_of(request), whens_of(request))


def test_death_while_undoing(case: proofs.Case[World], request: pytest.FixtureRequest) -> None:
    proofs.survives_death_while_undoing(case, calls_of(request), whens_of(request))
