"""Host threads: a dedicated instance's are its own, whatever arrives, leaves or is made at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from awan.engines.registry import sim_store
from awan.fleet.models import Placement
from awan.fleet.rules import choose_threads
from awan.kit.database import transaction
from tests.support.held_call import held
from tests.support.simulated_cloud import SimulatedCloud

NODE_THREADS = set(range(16))


@pytest.fixture
def one_node(cloud: SimulatedCloud) -> SimulatedCloud:
    """The cloud with a single node in service."""
    assert cloud.admin.post(f"/admin/nodes/{cloud.node_ids[1]}/cordon").is_success
    return cloud


def threads_on_node(uuid: str) -> set[int]:
    """Where the domain runs, as its node has it; all of the node where it was never told."""
    row = sim_store().find_one("SELECT live FROM sim.domain WHERE uuid = %s", [uuid])
    assert row is not None
    return set(row["live"]["threads"]) or NODE_THREADS


def own_threads(uuid: str) -> set[int]:
    """What was reserved for the instance."""
    with transaction() as session:
        found = session.scalar(select(Placement.threads).where(Placement.instance_id == UUID(uuid)))
    return set(found or ())


@given(
    threads=st.lists(st.integers(0, 300), unique=True, max_size=64),
    taken=st.sets(st.integers(0, 300), max_size=64),
    count=st.integers(-1, 70),
)
def test_chosen_threads_are_free_ones(threads: list[int], taken: set[int], count: int) -> None:
    free = set(threads) - taken
    if not 0 < count <= len(free):
        with pytest.raises(ValueError, match="threads wanted"):
            choose_threads(threads, taken, count)
        return
    chosen = choose_threads(threads, taken, count)
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= free
    assert all(number <= min(chosen) for number in free - set(chosen))


@pytest.mark.usefixtures("worker")
def test_instances_made_at_once_get_threads_of_their_own(one_node: SimulatedCloud) -> None:
    shared = one_node.create_running()["uuid"]

    def create(_: int) -> dict[str, Any]:
        return one_node.create(cpu=2, use_dedicated_cpu=True)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(create, range(4)))
    for answer in answers:
        assert one_node.wait(answer["operation"]["uuid"])["status"] == "succeeded"
    owned = [own_threads(answer["data"]["uuid"]) for answer in answers]
    assert [len(own) for own in owned] == [2, 2, 2, 2]
    assert len(set().union(*owned)) == 8
    for answer, own in zip(answers, owned, strict=True):
        assert threads_on_node(answer["data"]["uuid"]) == own
    assert threads_on_node(shared) == NODE_THREADS - set().union(*owned)


@pytest.mark.usefixtures("worker")
def test_shared_instances_make_room_and_get_it_back(one_node: SimulatedCloud) -> None:
    first = one_node.create_running()["uuid"]
    assert threads_on_node(first) == NODE_THREADS
    dedicated = one_node.create_running(cpu=4, use_dedicated_cpu=True)["uuid"]
    own = own_threads(dedicated)
    assert threads_on_node(dedicated) == own == {12, 13, 14, 15}
    second = one_node.create_running()["uuid"]
    restarted = one_node.customer.http.post(f"/instances/{first}/restart")
    assert one_node.wait(restarted.json()["operation"]["uuid"])["status"] == "succeeded"
    assert threads_on_node(first) == threads_on_node(second) == NODE_THREADS - own
    deleted = one_node.customer.http.request(
        "DELETE", f"/instances/{dedicated}", json={"remove_ip": True, "remove_block_storage": False}
    )
    assert one_node.wait(deleted.json()["operation"]["uuid"])["status"] == "succeeded"
    assert threads_on_node(first) == threads_on_node(second) == NODE_THREADS
    assert own_threads(one_node.create(cpu=4, use_dedicated_cpu=True)["data"]["uuid"]) == own


@pytest.mark.usefixtures("worker")
def test_a_creation_that_fails_gives_its_threads_back(one_node: SimulatedCloud) -> None:
    shared = one_node.create_running()["uuid"]
    with sim_store().connection() as connection:
        connection.execute(
            "CREATE FUNCTION sim.refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN IF NEW.config -> 'dedicated' = 'true' AND NEW.power = 'running'"
            " THEN RAISE 'refused'; END IF; RETURN NEW; END $$;"
            " CREATE TRIGGER refuse BEFORE UPDATE ON sim.domain"
            " FOR EACH ROW EXECUTE FUNCTION sim.refuse()"
        )
    try:
        created = one_node.create(cpu=2, use_dedicated_cpu=True)
        assert one_node.wait(created["operation"]["uuid"])["status"] == "failed"
    finally:
        with sim_store().connection() as connection:
            connection.execute("DROP FUNCTION sim.refuse CASCADE")
    assert own_threads(created["data"]["uuid"]) == set()
    assert threads_on_node(shared) == NODE_THREADS


@pytest.mark.usefixtures("worker")
def test_one_that_is_being_defined_hears_of_threads_given_away_meanwhile(
    one_node: SimulatedCloud,
) -> None:
    """It has read the rows already; the dedicated one looks at the domains before it is among them."""
    one_node.create_running()  # the image is on the node
    with held("ensure_defined") as definition:
        slow = one_node.create()
        assert definition.entered.wait(20)
        dedicated = one_node.create_running(cpu=2, use_dedicated_cpu=True)["uuid"]
        ended = one_node.customer.http.get(f"/operations/{slow['operation']['uuid']}").json()[
            "data"
        ]
        assert ended["status"] == "running"
        assert not definition.left.is_set()
    assert one_node.wait(slow["operation"]["uuid"])["status"] == "succeeded"
    assert threads_on_node(slow["data"]["uuid"]) == NODE_THREADS - own_threads(dedicated)
