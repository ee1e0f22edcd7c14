"""The public address of an instance: added, changed, removed, moved to another one, while the guest runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import func, select, text

from awan.engines.registry import sim_store
from awan.events import Event
from awan.instances.models import PublicNetworkChange
from awan.instances.rules import NIC_HELD
from awan.kit.database import transaction
from awan.ledger import spans_of
from awan.networks.names import push_stale_names
from awan.reconcile import run_audit
from awan.reconcile.findings import FindingKind
from awan.reconcile.locations import check_location
from awan.settings import Settings
from tests.support import proofs
from tests.support.changed_settings import changed_settings
from tests.support.guests import wait_until_booted
from tests.support.in_process_worker import wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud
from tests.support.watched_guests import find_guest

REMOVE = {"remove_ip": True, "remove_block_storage": True}


@dataclass
class Owner:
    """A customer's view of its instances and addresses."""

    cloud: SimulatedCloud
    ids: dict[str, str] = field(default_factory=dict)

    @property
    def http(self) -> Any:
        """The customer's client."""
        return self.cloud.customer.http

    def create(self, *, public: bool = True, ready: bool = True) -> dict[str, Any]:
        """A running instance."""
        made = self.cloud.create_running(use_public_ip=public)
        if ready:
            wait_until_booted(made["uuid"])
        return made

    def take(self) -> dict[str, Any]:
        """A free address."""
        made = self.http.post("/networks/public", json={"location_id": self.cloud.location_id})
        assert made.status_code == 201, made.text
        return dict(made.json()["data"])

    def add(self, instance: str) -> httpx.Response:
        """Operation 16."""
        answer: httpx.Response = self.http.post(f"/instances/{instance}/public-network")
        return answer

    def change(self, instance: str, address: str | None) -> httpx.Response:
        """Operation 17."""
        path = f"/instances/{instance}/public-network"
        answer: httpx.Response = self.http.put(path, json={"public_network": address})
        return answer

    def attach(self, address: str, instance: str | None) -> httpx.Response:
        """Operation 60."""
        path = f"/networks/public/{address}/instance"
        answer: httpx.Response = self.http.put(path, json={"instance_id": instance})
        return answer

    def show(self, instance: str) -> dict[str, Any]:
        """The instance."""
        return dict(self.http.get(f"/instances/{instance}").json()["data"])

    def addresses(self) -> dict[str, tuple[str, str | None]]:
        """Uuid -> state, and the uuid of the instance that has it."""
        return {
            row["uuid"]: (row["status"], row["instance"] and row["instance"]["uuid"])
            for row in self.http.get("/networks/public").json()["data"]["data"]
        }


@pytest.fixture
def owner(cloud: SimulatedCloud) -> Owner:
    """The customer of the cloud."""
    return Owner(cloud)


def ports() -> dict[str, str]:
    """Instance -> MAC and addresses of its port."""
    rows = sim_store().fetch_all("SELECT instance_id, address_line FROM sim.fabric_port")
    return {str(row["instance_id"]): row["address_line"] for row in rows}


def cards(instance: str) -> tuple[int, int]:
    """How many cards the running domain and its definition have."""
    row = sim_store().find_one(
        "SELECT jsonb_array_length(live -> 'port_ids') AS live,"
        " jsonb_array_length(config -> 'port_ids') AS config FROM sim.domain WHERE uuid = %s",
        [instance],
    )
    assert row is not None
    return row["live"] or 0, row["config"]


def open_spans(address: str) -> int:
    """Components of an address that are billed now."""
    with transaction() as session:
        return sum(span.closed_at is None for span in spans_of(session, UUID(address)))


def pending() -> int:
    """Rows of changes; none once operations have ended."""
    with transaction() as session:
        return session.scalar(select(func.count()).select_from(PublicNetworkChange)) or 0


@pytest.mark.usefixtures("worker")
def test_an_instance_without_address_gets_one_and_gives_it_up_again(owner: Owner) -> None:
    uuid = owner.create(public=False)["uuid"]
    assert (ports(), cards(uuid)) == ({}, (0, 0))
    added = owner.add(uuid)
    assert added.status_code == 200, added.text
    public = added.json()["data"]["public_network"]
    assert public["ip_address"] == "198.51.100.2"
    assert f" {public['ip_address']} {public['ipv6_address']}" in ports()[uuid]
    assert cards(uuid) == (1, 1)
    assert owner.addresses() == {public["uuid"]: ("attached", uuid)}
    assert open_spans(public["uuid"]) == 1
    again = owner.add(uuid)
    assert (again.status_code, again.json()["message"]) == (
        409,
        "The instance has a public network already.",
    )
    removed = owner.change(uuid, None)
    assert (removed.status_code, removed.json()["message"]) == (
        200,
        "Instance's Public Network successfully removed.",
    )
    assert removed.json()["data"]["public_network"] is None
    assert (ports(), cards(uuid)) == ({}, (0, 0))
    assert owner.addresses() == {public["uuid"]: ("free", None)}
    assert owner.change(uuid, None).status_code == 409
    assert owner.change(uuid, public["uuid"]).status_code == 200
    back = owner.show(uuid)["public_network"]
    assert back == public, "the same card has the same IPv6 address"
    with transaction() as session:
        said = session.scalars(
            select(Event.data)
            .where(Event.kind == "instance.public_network_changed")
            .order_by(Event.event_id)
        ).all()
    ip = public["ip_address"]
    assert said == [{"from": None, "to": ip}, {"from": ip, "to": None}, {"from": None, "to": ip}]
    push_stale_names()
    assert (run_audit(), pending()) == ([], 0)


@pytest.mark.usefixtures("worker")
def test_a_running_instance_changes_its_address_and_keeps_its_card(owner: Owner) -> None:
    made = owner.create()
    uuid, old = made["uuid"], made["public_network"]
    mac = ports()[uuid].split()[0]
    free = owner.take()
    changed = owner.change(uuid, free["uuid"])
    assert (changed.status_code, changed.json()["message"]) == (
        200,
        "Instance's Public Network successfully changed.",
    )
    public = changed.json()["data"]["public_network"]
    assert public["ip_address"] == free["ip_address"]
    assert public["ipv6_address"] == old["ipv6_address"]
    assert ports()[uuid] == f"{mac} {free['ip_address']} {old['ipv6_address']}"
    assert owner.addresses() == {free["uuid"]: ("attached", uuid), old["uuid"]: ("free", None)}
    assert [open_spans(it) for it in (old["uuid"], free["uuid"])] == [1, 1]
    taken = [call.verb for call in sim_store().faults.calls][-6:]
    assert taken.count("ensure_nics") == 2, "the guest is made to ask for its address"
    assert owner.change(uuid, free["uuid"]).status_code == 409
    push_stale_names()
    assert (run_audit(), pending()) == ([], 0)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("is_taken", [False, True])
def test_a_guest_that_holds_its_card_keeps_it_and_its_address(owner: Owner, is_taken: bool) -> None:
    made = owner.create()
    uuid, public = made["uuid"], made["public_network"]
    wanted = None if is_taken else owner.take()["uuid"]
    before = (ports(), cards(uuid), owner.addresses())
    guest = find_guest(owner.cloud, uuid)
    guest.hypervisor.set_holds_nics(guest.node, guest.id, True)
    refused = owner.change(uuid, wanted)
    assert (refused.status_code, refused.json()["message"]) == (409, NIC_HELD)
    assert (ports(), cards(uuid), owner.addresses()) == before
    assert owner.show(uuid)["public_network"]["uuid"] == public["uuid"]
    assert pending() == 0
    push_stale_names()
    # The simulated chassis claims a port only when it is waited for.
    assert [it for it in run_audit() if it.kind is not FindingKind.PORT_UNBOUND] == []
    guest.hypervisor.set_holds_nics(guest.node, guest.id, False)
    assert owner.change(uuid, wanted).status_code == 200
    assert cards(uuid) == ((0, 0) if is_taken else (1, 1))


def refuse(table: str, change: str) -> str:
    """Makes the simulated engines unable to do this to a table."""
    return (
        "CREATE OR REPLACE FUNCTION sim.refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'refused'; END $$;"
        f" CREATE TRIGGER refuse BEFORE {change} ON sim.{table}"
        " FOR EACH ROW EXECUTE FUNCTION sim.refuse()"
    )


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("end", ["repair", "delete"])
def test_an_address_whose_port_is_left_over_goes_back_only_when_the_port_is_gone(
    owner: Owner, end: str
) -> None:
    uuid = owner.create(public=False)["uuid"]
    sim_store().execute(refuse("domain", "UPDATE"))  # type: ignore[arg-type]
    sim_store().execute(refuse("fabric_port", "DELETE"))  # type: ignore[arg-type]
    try:
        assert owner.add(uuid).status_code >= 500
    finally:
        sim_store().execute("DROP FUNCTION sim.refuse() CASCADE")
    assert list(ports()) == [uuid], "it is left over"
    assert [state for state, _ in owner.addresses().values()] == ["free"], "and so is kept"
    if end == "repair":
        check_location(owner.cloud.location_id)
    else:
        gone = owner.http.request("DELETE", f"/instances/{uuid}", json=REMOVE)
        owner.cloud.wait(gone.json()["operation"]["uuid"])
    wait_until_idle()
    assert (ports(), owner.addresses(), pending()) == ({}, {}, 0)
    used = owner.http.get("/account").json()["data"]["quotas"]["public_ips"]["used"]
    assert used == 0
    push_stale_names()
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("power", ["running", "stopped"])
def test_an_address_moves_from_one_instance_to_another(owner: Owner, power: str) -> None:
    first, second = owner.create(), owner.create(public=False)
    for it in (first, second) if power == "stopped" else ():
        stopped = owner.http.post(f"/instances/{it['uuid']}/stop", json={"force": True}).json()
        owner.cloud.wait(stopped["operation"]["uuid"])
    address = first["public_network"]["uuid"]
    moved = owner.attach(address, second["uuid"])
    assert (moved.status_code, moved.json()["message"], moved.json()["data"]) == (
        200,
        "Public network instance successfully changed.",
        [],
    )
    assert owner.addresses() == {address: ("attached", second["uuid"])}
    assert list(ports()) == [second["uuid"]]
    is_running = int(power == "running")
    assert cards(first["uuid"]) == (0, 0)
    assert cards(second["uuid"]) == (is_running, 1)
    assert owner.show(first["uuid"])["public_network"] is None
    with transaction() as session:
        spans = list(spans_of(session, UUID(address)))
    assert [(span.closed_at is None) for span in spans] == [True], "billed once, without a gap"
    detached = owner.attach(address, None)
    assert detached.json()["message"] == "Public network instance successfully removed."
    assert owner.addresses() == {address: ("free", None)}
    assert owner.attach(address, None).status_code == 409
    push_stale_names()
    assert (run_audit(), pending()) == ([], 0)


@pytest.mark.usefixtures("worker")
def test_an_address_of_a_guest_that_never_came_up_is_billed_once_it_moves(
    owner: Owner,
) -> None:
    first = owner.create(ready=False)
    address = first["public_network"]["uuid"]
    with transaction() as session:
        session.execute(
            text("UPDATE instance SET ready_at = NULL WHERE instance_id = :id"),
            {"id": first["uuid"]},
        )
    assert owner.attach(address, None).status_code == 200
    assert open_spans(address) == 1
    assert owner.attach(address, first["uuid"]).status_code == 200
    assert open_spans(address) == 1
    about = [it for it in run_audit() if address in (it.subject, it.found)]
    assert [it for it in about if it.kind.startswith("span.")] == []


@pytest.mark.usefixtures("worker")
def test_what_a_deletion_leaves_is_told_before(owner: Owner) -> None:
    made = owner.create(ready=False)
    path = f"/instances/{made['uuid']}/left-over"
    public = made["public_network"]
    (told,) = owner.http.get(path).json()["data"]
    assert (told["kind"], told["uuid"], told["name"]) == (
        "public_ip",
        public["uuid"],
        public["ip_address"],
    )
    assert (told["price_per_month"], told["price_per_hour"]) == (15000, "20.83")
    assert owner.http.get(path, params={"remove_ip": "true"}).json()["data"] == []
    assert owner.cloud.new_customer().http.get(path).status_code == 404
    kept = {"remove_ip": False, "remove_block_storage": False}
    gone = owner.http.request("DELETE", f"/instances/{made['uuid']}", json=kept).json()
    owner.cloud.wait(gone["operation"]["uuid"])
    assert list(owner.addresses()) == [told["uuid"]]


@pytest.mark.usefixtures("worker")
def test_what_cannot_be_done_is_refused(owner: Owner) -> None:
    made, other = owner.create(), owner.create()
    lone = owner.create(public=False)
    used, free = made["public_network"]["uuid"], owner.take()["uuid"]
    stranger = Owner(owner.cloud)
    theirs = owner.cloud.new_customer()
    foreign = theirs.http.post(
        "/networks/public", json={"location_id": owner.cloud.location_id}
    ).json()["data"]["uuid"]
    unknown = str(uuid4())
    for address in (foreign, unknown):
        refused = stranger.change(made["uuid"], address)
        assert (refused.status_code, refused.json()["errors"]) == (
            422,
            {"public_network": ["The selected public network is invalid."]},
        )
        assert stranger.attach(address, lone["uuid"]).status_code == 404
    assert owner.change(lone["uuid"], used).status_code == 422
    for instance in (unknown, "x"):
        assert owner.attach(free, instance).status_code == 422
    busy = owner.attach(free, other["uuid"])
    assert (busy.status_code, busy.json()["message"]) == (
        409,
        "The instance has a public network already.",
    )
    assert owner.attach(used, made["uuid"]).status_code == 409
    for path in ("/instances/{}/public-network",):
        for method in ("POST", "PUT"):
            answer = theirs.http.request(method, path.format(made["uuid"]), json={})
            assert answer.status_code == 404
    assert (
        theirs.http.put(
            f"/networks/public/{free}/instance", json={"instance_id": lone["uuid"]}
        ).status_code
        == 404
    )
    push_stale_names()
    assert (run_audit(), pending()) == ([], 0)


def test_while_an_address_moves_nothing_else_takes_or_ends_what_it_holds(
    cloud: SimulatedCloud, settings: Settings
) -> None:
    from tests.support.in_process_worker import InProcessWorker

    owner = Owner(cloud)
    with InProcessWorker(settings):
        first, second = owner.create(), owner.create(public=False)
    address = first["public_network"]["uuid"]
    with changed_settings(operation_wait_s="0"):
        moving = owner.attach(address, second["uuid"])
    assert moving.status_code == 202
    assert owner.http.delete(f"/networks/public/{address}").status_code == 409
    assert owner.http.put(f"/networks/public/{address}/rdns", json={"rdns": ""}).status_code == 409
    assert owner.attach(address, None).status_code == 409
    gone = owner.http.request("DELETE", f"/instances/{first['uuid']}", json=REMOVE)
    assert (gone.status_code, gone.headers["retry-after"]) == (409, "5")
    # The one that gets it may be deleted: the move is asked to stop, and comes first.
    going = owner.http.request("DELETE", f"/instances/{second['uuid']}", json=REMOVE)
    assert going.status_code == 202
    with InProcessWorker(settings):
        ended = cloud.wait(moving.json()["operation"]["uuid"])
        assert ended["status"] == "cancelled"
        assert cloud.wait(going.json()["operation"]["uuid"])["status"] == "succeeded"
        assert owner.addresses() == {address: ("attached", first["uuid"])}
        assert owner.attach(address, None).status_code == 200
    push_stale_names()
    assert (run_audit(), pending()) == ([], 0)


def test_an_address_that_is_being_attached_is_not_given_to_a_new_instance(
    cloud: SimulatedCloud, settings: Settings
) -> None:
    from tests.support.in_process_worker import InProcessWorker

    owner = Owner(cloud)
    with InProcessWorker(settings):
        lone = owner.create(public=False)
    free = owner.take()["uuid"]
    with changed_settings(operation_wait_s="0"):
        moving = owner.attach(free, lone["uuid"])
    order = cloud.order(public_network=free)
    assert owner.http.post("/instances", json=order).status_code == 409
    with InProcessWorker(settings):
        assert cloud.wait(moving.json()["operation"]["uuid"])["status"] == "succeeded"


# --- proofs ---


@dataclass
class World:
    """The instances under proof, and what they had."""

    owner: Owner
    source: str = ""
    target: str = ""
    address: str = ""
    before: tuple[Any, ...] = ()


def state(world: World) -> tuple[Any, ...]:
    """Ports, cards and addresses of the two."""
    held = [it for it in (world.source, world.target) if it]
    return ports(), [cards(it) for it in held], world.owner.addresses()


def fresh(cloud: SimulatedCloud) -> World:
    """No instance and no address is left of the case before."""
    owner = Owner(cloud)
    for row in owner.http.get("/instances").json()["data"]["data"]:
        gone = owner.http.request("DELETE", f"/instances/{row['uuid']}", json=REMOVE).json()
        cloud.wait(gone["operation"]["uuid"])
    for uuid in owner.addresses():
        assert owner.http.delete(f"/networks/public/{uuid}").is_success
    return World(owner)


def moving(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[World]:
    """An address moves between two running instances."""

    def prepare() -> World:
        world = fresh(cloud)
        first = world.owner.create(ready=False)
        world.source, world.address = first["uuid"], first["public_network"]["uuid"]
        world.target = world.owner.create(public=False, ready=False)["uuid"]
        world.before = state(world)
        return world

    def begin(world: World) -> UUID:
        with changed_settings(operation_wait_s="0"):
            answer = world.owner.attach(world.address, world.target)
        assert answer.status_code == 202, answer.text
        return UUID(answer.json()["operation"]["uuid"])

    def is_moved(world: World) -> None:
        found, held, addresses = state(world)
        assert (list(found), held) == ([world.target], [(0, 0), (1, 1)])
        assert addresses == {world.address: ("attached", world.target)}
        assert pending() == 0

    def is_as_before(world: World) -> None:
        assert state(world) == world.before
        assert pending() == 0

    return proofs.Case(settings, sim_store().faults, prepare, begin, is_moved, is_as_before)


def adding(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[World]:
    """A running instance gets a new address; of a failure neither address nor quota is left."""

    def prepare() -> World:
        world = fresh(cloud)
        world.target = world.owner.create(public=False, ready=False)["uuid"]
        world.before = state(world)
        return world

    def begin(world: World) -> UUID:
        with changed_settings(operation_wait_s="0"):
            answer = world.owner.add(world.target)
        assert answer.status_code == 202, answer.text
        return UUID(answer.json()["operation"]["uuid"])

    def has_one(world: World) -> None:
        _, held, addresses = state(world)
        assert held == [(1, 1)]
        assert list(addresses.values()) == [("attached", world.target)]
        assert used(world) == 1

    def has_none(world: World) -> None:
        assert state(world) == world.before
        assert (used(world), pending()) == (0, 0)

    def used(world: World) -> int:
        quotas = world.owner.http.get("/account").json()["data"]["quotas"]
        return int(quotas["public_ips"]["used"])

    return proofs.Case(settings, sim_store().faults, prepare, begin, has_one, has_none)


def changing(settings: Settings, cloud: SimulatedCloud) -> proofs.Case[World]:
    """A running instance changes its address."""

    def prepare() -> World:
        world = fresh(cloud)
        world.target = world.owner.create(ready=False)["uuid"]
        world.address = world.owner.take()["uuid"]
        world.before = state(world)
        return world

    def begin(world: World) -> UUID:
        with changed_settings(operation_wait_s="0"):
            answer = world.owner.change(world.target, world.address)
        assert answer.status_code == 202, answer.text
        return UUID(answer.json()["operation"]["uuid"])

    def has_other(world: World) -> None:
        _, held, addresses = state(world)
        assert held == [(1, 1)]
        assert addresses[world.address] == ("attached", world.target)
        assert len(addresses) == 2

    return proofs.Case(
        settings,
        sim_store().faults,
        prepare,
        begin,
        has_other,
        lambda world: _same(state(world), world.before),
    )


def _same(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    assert found == wanted


@pytest.mark.parametrize("case", [moving, adding, changing])
@pytest.mark.parametrize(
    "proof",
    [
        proofs.unwinds_from_failure_at_each_call,
        proofs.survives_death_at_each_call,
        proofs.runs_twice_once,
    ],
)
def test_the_change_is_durable(
    proof: Callable[..., None],
    case: Callable[[Settings, SimulatedCloud], proofs.Case[World]],
    settings: Settings,
    cloud: SimulatedCloud,
    request: pytest.FixtureRequest,
) -> None:
    if proof is proofs.runs_twice_once:
        proof(case(settings, cloud))
        return
    is_full = bool(request.config.getoption("--full"))
    if proof is proofs.survives_death_at_each_call and case is not moving and not is_full:
        pytest.skip("the longest of the three is proved; the others with --full")
    if proof is proofs.survives_death_at_each_call and not is_full:
        proofs.survives_death_at_each_call(
            case(settings, cloud), proofs.first_middle_last, whens=("after",)
        )
        return
    proof(case(settings, cloud), None if is_full else proofs.first_middle_last)


@pytest.mark.usefixtures("worker")
def test_an_operator_acts_for_the_owner(cloud: SimulatedCloud) -> None:
    owner = Owner(cloud)
    instance, address = owner.create(public=False)["uuid"], owner.take()
    path = f"/instances/{instance}/public-network"
    assert cloud.admin.post(path).status_code == 200
    fresh = owner.show(instance)["public_network"]["uuid"]
    listed = owner.http.get("/networks/public").json()["data"]["data"]
    assert fresh in [row["uuid"] for row in listed], "it is the owner's"
    assert owner.http.get("/account").json()["data"]["quotas"]["public_ips"]["used"] == 2
    changed = cloud.admin.put(path, json={"public_network": address["uuid"]})
    assert changed.status_code == 200, changed.text
    stranger = cloud.new_customer("Stranger")
    other = cloud.create_running(stranger, use_public_ip=False)["uuid"]
    wait_until_booted(other)
    moved = cloud.admin.put(f"/networks/public/{fresh}/instance", json={"instance_id": other})
    assert (moved.status_code, list(moved.json()["errors"])) == (422, ["instance_id"])
    assert run_audit() == []


@pytest.mark.usefixtures("worker")
def test_an_address_that_was_left_over_and_used_since_is_not_taken_away(owner: Owner) -> None:
    uuid = owner.create(public=False)["uuid"]
    sim_store().execute(refuse("domain", "UPDATE"))  # type: ignore[arg-type]
    sim_store().execute(refuse("fabric_port", "DELETE"))  # type: ignore[arg-type]
    try:
        assert owner.add(uuid).status_code >= 500
    finally:
        sim_store().execute("DROP FUNCTION sim.refuse() CASCADE")
    ((address, (state, _)),) = owner.addresses().items()
    assert state == "free"
    other = owner.cloud.create_running(public_network=address)["uuid"]
    gone = owner.http.request("DELETE", f"/instances/{other}", json={**REMOVE, "remove_ip": False})
    assert owner.cloud.wait(gone.json()["operation"]["uuid"])["status"] == "succeeded"
    check_location(owner.cloud.location_id)
    wait_until_idle()
    assert owner.addresses() == {address: ("free", None)}
