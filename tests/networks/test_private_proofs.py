"""The generic proofs of durable work on private networks, their gateways, and the cards in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

import pytest

from awan.engines.registry import sim_store
from awan.kit.database import transaction
from awan.reconcile.row_checks import check_rows
from awan.settings import Settings
from tests.networks.test_private_networks import cards
from tests.support import proofs
from tests.support.changed_settings import changed_settings
from tests.support.in_process_worker import wait_until_idle
from tests.support.private_names import told, turn_on, ways
from tests.support.simulated_cloud import SimulatedCloud


@dataclass
class World:
    """A cloud and what is under proof."""

    cloud: SimulatedCloud
    network: str = ""
    instance: str = ""
    addresses: list[str] = field(default_factory=list)

    def send(self, method: str, path: str, **body: object) -> dict[str, object]:
        answer = self.cloud.customer.http.request(method, path, json=body)
        assert answer.is_success, answer.text
        return dict(answer.json())

    def fabric(self) -> list[tuple[str, str | None]]:
        """Read beside the engine: proofs count its calls."""
        rows = sim_store().fetch_all(
            "SELECT network.switch, gateway.spec ->> 'public_ip' AS public_ip"
            " FROM sim.fabric_network AS network"
            " LEFT JOIN sim.fabric_gateway AS gateway USING (location, switch)"
            " WHERE network.spec ->> 'is_private' = 'true' ORDER BY network.switch"
        )
        return [(row["switch"], row["public_ip"]) for row in rows]

    def address_states(self) -> dict[str, str]:
        rows = self.send("GET", "/networks/public")["data"]["data"]  # type: ignore[call-overload,index]
        return {row["uuid"]: row["status"] for row in rows}

    def shown(self) -> dict[str, object]:
        return dict(self.send("GET", f"/networks/private/{self.network}")["data"])  # type: ignore[call-overload]


def is_sound(world: World) -> None:
    """All rows agree."""
    with transaction() as session:
        assert list(check_rows(session)) == []


def uuid_of(answer: dict[str, object]) -> UUID:
    return UUID(answer["operation"]["uuid"])  # type: ignore[index]


def begin_create(world: World) -> UUID:
    count = len(world.cloud.customer.http.get("/networks/private").json()["data"])
    answer = world.send(
        "POST", "/networks/private", name=f"n{count}", location_id=world.cloud.location_id
    )
    world.network = answer["data"]["uuid"]  # type: ignore[index]
    return uuid_of(answer)


def is_created(world: World) -> None:
    assert world.shown()["status"] == "active"
    assert (f"private-{world.network}", None) in world.fabric()
    is_sound(world)


def is_not_created(world: World) -> None:
    assert world.shown()["status"] == "error"
    assert world.shown()["status_reason"]
    assert f"private-{world.network}" not in [switch for switch, _ in world.fabric()]
    is_sound(world)


def fresh(cloud: SimulatedCloud) -> World:
    """No networks are left of the case before."""
    world = World(cloud)
    for row in cloud.customer.http.get("/instances").json()["data"]["data"]:
        gone = {"remove_ip": True, "remove_block_storage": False}
        world.send("DELETE", f"/instances/{row['uuid']}", **gone)
    wait_until_idle()
    for row in cloud.customer.http.get("/networks/private").json()["data"]:
        world.send("DELETE", f"/networks/private/{row['uuid']}")
    wait_until_idle()
    for row in cloud.customer.http.get("/networks/public").json()["data"]["data"]:
        world.send("DELETE", f"/networks/public/{row['uuid']}")
    assert world.fabric() == []
    return world


def fresh_with_names(cloud: SimulatedCloud) -> World:
    """As `fresh`, where networks have names."""
    turn_on(cloud)
    return fresh(cloud)


def is_created_with_names(world: World) -> None:
    is_created(world)
    assert told(world.network) is not None
    assert f"private-{world.network}" in ways()


def is_not_created_with_names(world: World) -> None:
    is_not_created(world)
    assert f"private-{world.network}" not in ways()


def with_network(cloud: SimulatedCloud) -> World:
    world = fresh(cloud)
    operation = begin_create(world)
    assert cloud.wait(str(operation))["status"] == "succeeded"
    return world


def with_gateway(cloud: SimulatedCloud) -> World:
    """A network with a gateway, and another address to be the next."""
    world = with_network(cloud)
    for _ in range(2):
        made = world.send("POST", "/networks/public", location_id=cloud.location_id)
        world.addresses.append(made["data"]["uuid"])  # type: ignore[index]
    world.send(
        "PUT", f"/networks/private/{world.network}/gateway", public_gateway=world.addresses[0]
    )
    wait_until_idle()
    return world


def begin_quick(world: World, path: str, **body: object) -> UUID:
    """Begins a change whose call would wait for its end."""
    with changed_settings(operation_wait_s="0"):
        return uuid_of(world.send("PUT", path, **body))


def begin_gateway(world: World) -> UUID:
    path = f"/networks/private/{world.network}/gateway"
    return begin_quick(world, path, public_gateway=world.addresses[1])


def has_gateway(number: int) -> Callable[[World], None]:
    def check(world: World) -> None:
        shown = world.shown()
        assert shown["status"] == "active", shown
        gateway = shown["public_gateway"]
        assert gateway["uuid"] == world.addresses[number]  # type: ignore[index]
        assert world.fabric() == [(f"private-{world.network}", gateway["ip_address"])]  # type: ignore[index]
        is_sound(world)

    return check


def with_instance(cloud: SimulatedCloud) -> World:
    world = with_network(cloud)
    world.instance = cloud.create_running()["uuid"]
    wait_until_idle()
    return world


def with_member(cloud: SimulatedCloud) -> World:
    world = with_network(cloud)
    world.instance = cloud.create_running(vswitch=world.network)["uuid"]
    wait_until_idle()
    return world


def begin_attach(world: World) -> UUID:
    path = f"/instances/{world.instance}/private-network"
    return begin_quick(world, path, vswitch=world.network)


def begin_detach(world: World) -> UUID:
    return begin_quick(world, f"/instances/{world.instance}/private-network", vswitch="")


def has_cards(number: int) -> Callable[[World], None]:
    def check(world: World) -> None:
        assert len(cards(world.cloud, world.instance)) == number
        stored = sim_store().fetch_all("SELECT name FROM sim.fabric_port ORDER BY name")
        (domain,) = sim_store().fetch_all("SELECT config, live FROM sim.domain")
        names = [row["name"] for row in stored]
        assert len(names) == number + 1
        assert sorted(domain["config"]["port_ids"]) == sorted(domain["live"]["port_ids"]) == names
        is_sound(world)

    return check


def begin_delete(world: World) -> UUID:
    return uuid_of(world.send("DELETE", f"/networks/private/{world.network}"))


def is_deleted(world: World) -> None:
    """Nothing of it is left; the addresses of its gateways are the account's, and free."""
    answer = world.cloud.customer.http.get(f"/networks/private/{world.network}")
    assert answer.status_code == 404
    assert world.fabric() == []
    assert world.address_states() == {world.addresses[0]: "free", world.addresses[1]: "free"}
    is_sound(world)


def is_to_be_deleted(world: World) -> None:
    """The deletion stays wanted, the gateway's address is not free before it is gone; asked again it goes."""
    assert world.shown()["status"] == "deleting"
    assert world.shown()["status_reason"]
    assert world.address_states() == {world.addresses[0]: "gateway", world.addresses[1]: "free"}
    is_sound(world)
    wait_until_idle()
    assert world.cloud.wait(str(begin_delete(world)))["status"] == "succeeded"
    is_deleted(world)


CASES = {
    "create": (fresh, begin_create, is_created, is_not_created),
    "create_with_names": (
        *(fresh_with_names, begin_create),
        *(is_created_with_names, is_not_created_with_names),
    ),
    "gateway": (with_gateway, begin_gateway, has_gateway(1), has_gateway(0)),
    "attach": (with_instance, begin_attach, has_cards(1), has_cards(0)),
    "detach": (with_member, begin_detach, has_cards(0), has_cards(1)),
    "delete": (with_gateway, begin_delete, is_deleted, is_to_be_deleted),
}
# A deletion only goes forward.
UNDONE = sorted(CASES.keys() - {"delete"})


@pytest.fixture(params=sorted(CASES))
def case(
    request: pytest.FixtureRequest, settings: Settings, cloud: SimulatedCloud
) -> proofs.Case[World]:
    prepare, begin, succeeded, undone = CASES[request.param]
    return proofs.Case(
        settings=settings,
        faults=sim_store().faults,
        prepare=lambda: prepare(cloud),
        begin=begin,
        succeeded=succeeded,
        undone=undone,
    )


def calls_of(request: pytest.FixtureRequest) -> proofs.Calls:
    return None if request.config.getoption("--full") else proofs.first_middle_last


def test_steps_run_twice_are_one(case: proofs.Case[World]) -> None:
    proofs.runs_twice_once(case)


def test_a_failure_is_undone(case: proofs.Case[World], request: pytest.FixtureRequest) -> None:
    proofs.unwinds_from_failure_at_each_call(case, calls_of(request))


def test_death_changes_nothing(case: proofs.Case[World], request: pytest.FixtureRequest) -> None:
    is_full = request.config.getoption("--full")
    whens: tuple[proofs.When, ...] = ("before", "after") if is_full else ("after",)
    proofs.survives_death_at_each_call(case, calls_of(request), whens)


@pytest.mark.parametrize("case", UNDONE, indirect=True)
def test_death_while_undoing(case: proofs.Case[World], request: pytest.FixtureRequest) -> None:
    is_full = request.config.getoption("--full")
    whens: tuple[proofs.When, ...] = ("before", "after") if is_full else ("after",)
    proofs.survives_death_while_undoing(case, calls_of(request), whens)
