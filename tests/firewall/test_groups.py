"""Firewall groups through the API, over the simulated fabric."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import func, select, update

from awan.engines.fabric.firewall import GROUPS_MAX
from awan.engines.registry import sim_store
from awan.events import Event
from awan.firewall import firewall_id_of, groups, push_firewall, read_spec
from awan.firewall.models import Firewall, FirewallAttachment, FirewallGroup, FirewallTrial
from awan.firewall.spec import read_specs
from awan.firewall.trial import end_trials
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.operations import Operation
from awan.reconcile.audit import run_audit
from awan.reconcile.locations import check_location
from tests.firewall.conftest import Guarded, fabric_of
from tests.support.guests import create_settled
from tests.support.in_process_worker import wait_until_idle

WEB = {"protocol": "tcp", "destination_port": 80, "action": "accept"}
SSH = {
    "protocol": "tcp",
    "destination_port": "22",
    "action": "ACCEPT",
    "sources": ["198.51.100.7/24", "2001:db8::/32"],
}


class Groups:
    """The customer's groups."""

    def __init__(self, guarded: Guarded) -> None:
        self.guarded, self.cloud = guarded, guarded.cloud

    def send(self, method: str, below: str = "", **body: Any) -> httpx.Response:
        return self.cloud.customer.http.request(method, f"/firewall-groups{below}", json=body)

    def do(self, method: str, below: str = "", **body: Any) -> Any:
        answer = self.send(method, below, **body)
        assert answer.is_success, answer.text
        return answer.json()["data"]

    def make(self, name: str = "web", **changes: Any) -> dict[str, Any]:
        body = {"name": name, "location_id": self.cloud.location_id, "rules": [WEB], **changes}
        return dict(self.do("POST", **body))

    def attach(self, *made: dict[str, Any], uuid: str | None = None) -> httpx.Response:
        """The instance gets these groups."""
        return self.cloud.customer.http.put(
            f"/instances/{uuid or self.guarded.uuid}/firewall/groups",
            json={"groups": [it["uuid"] for it in made]},
        )

    def label(self, **labels: str) -> httpx.Response:
        path = f"/instances/{self.guarded.uuid}/labels"
        return self.cloud.customer.http.put(path, json={"labels": labels})

    def placed(self) -> list[tuple[str, str]]:
        """Name and kind of attachment of the instance's groups."""
        path = f"/instances/{self.guarded.uuid}/firewall/groups"
        rows = self.cloud.customer.http.get(path).json()["data"]
        assert [row["place"] for row in rows] == list(range(1, len(rows) + 1))
        return [(row["name"], row["attached_by"]) for row in rows]

    def in_fabric(self) -> dict[tuple[str, int], tuple[str, int]]:
        """Uuid and place -> the rows in short, and the number of ports, once nothing is under way."""
        wait_until_idle()
        return {
            (str(it.group_id), it.place): (
                "; ".join(line.split(" && ", 1)[1] for line in it.lines),
                len(it.port_ids),
            )
            for it in fabric_of(self.cloud).list_firewall_groups()
        }


@pytest.fixture
def shared(guarded: Guarded) -> Groups:
    return Groups(guarded)


def audit() -> list[str]:
    return [str(it.kind) for it in run_audit()]


def test_a_group_from_its_creation_to_its_deletion(shared: Groups) -> None:
    made = shared.make(description="all web servers", rules=[WEB, SSH])
    assert {key: made[key] for key in ("name", "rules_count", "instances_count", "labels")} == {
        "name": "web",
        "rules_count": 2,
        "instances_count": 0,
        "labels": {},
    }
    assert made["rules"][1]["sources"] == ["198.51.100.0/24", "2001:db8::/32"]
    assert made["sync_status"] == "applied"
    assert shared.in_fabric() == {}
    answer = shared.attach(made)
    assert answer.json()["operation"]["kind"] == "firewall.apply"
    assert answer.json()["data"][0]["name"] == "web"
    assert shared.in_fabric() == {
        (made["uuid"], 0): (
            "tcp && tcp.dst == 22 && (ip4.src == {198.51.100.0/24} || ip6.src == {2001:db8::/32})"
            " allow-related; tcp && tcp.dst == 80 allow-related",
            1,
        )
    }
    assert audit() == []
    assert shared.send("DELETE", f"/{made['uuid']}").status_code == 409
    replaced = shared.send("PUT", f"/{made['uuid']}/rules", rules=[WEB])
    assert replaced.json()["operation"]["kind"] == "firewall_group.apply"
    assert shared.in_fabric() == {(made["uuid"], 0): ("tcp && tcp.dst == 80 allow-related", 1)}
    assert shared.do("GET", f"/{made['uuid']}")["sync_status"] == "applied"
    assert shared.do("GET")["data"][0]["instances_count"] == 1
    (member,) = shared.do("GET", f"/{made['uuid']}/instances")["data"]
    assert (member["uuid"], member["attached_by"]) == (shared.guarded.uuid, "hand")
    assert shared.attach().is_success
    shared.do("DELETE", f"/{made['uuid']}")
    assert shared.in_fabric() == {}
    assert shared.send("GET", f"/{made['uuid']}").status_code == 404
    assert audit() == []


def test_order_and_places(shared: Groups) -> None:
    """Groups are tried in the order in which they are named; the same one may be first here and second there."""
    web, ssh = shared.make(), shared.make("ssh", rules=[SSH])
    other = shared.cloud.create_running()["uuid"]
    assert shared.attach(web, ssh).is_success
    assert shared.attach(ssh, web, uuid=other).is_success
    assert {key: ports for key, (_, ports) in shared.in_fabric().items()} == {
        (group["uuid"], place): 1 for group in (web, ssh) for place in (0, 1)
    }
    assert shared.placed() == [("web", "hand"), ("ssh", "hand")]
    shared.do("PUT", f"/{web['uuid']}/rules", rules=[])
    shown = shared.in_fabric()
    assert [shown[web["uuid"], place] for place in (0, 1)] == [("", 1)] * 2
    assert shared.attach(ssh, web).json()["operation"] is not None
    assert shared.attach(ssh, web).json().get("operation") is None
    assert {key: ports for key, (_, ports) in shared.in_fabric().items() if ports} == {
        (ssh["uuid"], 0): 2,
        (web["uuid"], 1): 2,
    }
    assert audit() == []


def test_who_has_the_labels_is_behind_it(shared: Groups) -> None:
    by_hand = shared.make("hand")
    web = shared.make(labels={"role": "web", "env": "prod"})
    shared.attach(by_hand)
    assert shared.label(role="web").is_success
    assert shared.placed() == [("hand", "hand")]
    shared.label(role="web", env="prod", more="x")
    assert shared.placed() == [("hand", "hand"), ("web", "label")]
    assert {key: ports for key, (_, ports) in shared.in_fabric().items()} == {
        (by_hand["uuid"], 0): 1,
        (web["uuid"], 1): 1,
    }
    assert audit() == []
    assert shared.send("DELETE", f"/{web['uuid']}").status_code == 409
    shared.attach(by_hand, web)
    empty = shared.make("empty")
    counts = {row["uuid"]: row["instances_count"] for row in shared.do("GET")["data"]}
    assert counts == {by_hand["uuid"]: 1, web["uuid"]: 1, empty["uuid"]: 0}
    shared.attach(by_hand)
    late = shared.make("late", labels={"more": "x"})
    assert late["instances_count"] == 1
    assert shared.in_fabric()[late["uuid"], 2][1] == 1
    shared.do("PUT", f"/{web['uuid']}", labels={})
    assert shared.placed() == [("hand", "hand"), ("late", "label")]
    shared.label()
    assert shared.placed() == [("hand", "hand")]
    assert {key: ports for key, (_, ports) in shared.in_fabric().items() if ports} == {
        (by_hand["uuid"], 0): 1
    }
    assert audit() == []


def test_edits_that_come_fast_are_pushed_together(shared: Groups) -> None:
    made = shared.make()
    shared.attach(made)
    wait_until_idle()
    sim_store().set_latency(2.0, engine="fabric", verb="ensure_firewall_group")
    for number in range(8):
        rules = [{**WEB, "destination_port": 1 + number}]
        shared.do("PUT", f"/{made['uuid']}/rules", rules=rules)
    assert shared.in_fabric()[made["uuid"], 0][0] == "tcp && tcp.dst == 8 allow-related"
    sim_store().set_latency(0.0, engine="fabric", verb="ensure_firewall_group")
    with transaction() as session:
        count = select(func.count()).where(Operation.kind == "firewall_group.apply")
        assert (session.scalar(count) or 0) <= 4
    assert shared.do("GET", f"/{made['uuid']}")["sync_status"] == "applied"


def test_rules_that_cannot_be(shared: Groups) -> None:
    for changes, field in (
        ({"protocol": "icmp"}, "rules.0"),
        ({"destination_port": "9-1"}, "rules.0.destination_port"),
        ({"sources": ["0.0.0.0/0"]}, "rules.0.sources.0"),
        ({"sources": ["nobody"]}, "rules.0.sources.0"),
        ({"icmp_type": 8}, "rules.0"),
    ):
        rules = [{**WEB, **changes}]
        body = {"name": "web", "location_id": shared.cloud.location_id, "rules": rules}
        answer = shared.send("POST", **body)
        assert answer.status_code == 422
        assert list(answer.json()["errors"]) == [field]


def test_what_is_refused(shared: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    made = shared.make()
    assert list(
        shared.send("POST", name="web", location_id=shared.cloud.location_id).json()["errors"]
    ) == ["name"]
    assert list(shared.send("POST", name="two", location_id=99).json()["errors"]) == ["location_id"]
    two = shared.make("two")
    taken = shared.send("PUT", f"/{two['uuid']}", name="web")
    assert list(taken.json()["errors"]) == ["name"]
    for wrong, words in (
        ({"uuid": str(uuid4())}, "The selected groups is invalid."),
        (made, "A firewall group is named twice."),
    ):
        answer = shared.attach(made, wrong)
        assert (answer.status_code, answer.json()["errors"]) == (422, {"groups": [words]})
    stranger = shared.cloud.new_customer()
    assert stranger.http.get(f"/firewall-groups/{made['uuid']}").status_code == 404
    assert stranger.http.get("/firewall-groups").json()["data"]["data"] == []
    monkeypatch.setattr(groups, "GROUPS_PER_ACCOUNT_MAX", 2)
    assert (
        shared.send("POST", name="three", location_id=shared.cloud.location_id).status_code == 403
    )
    monkeypatch.setattr(groups, "GROUPS_MAX", 1)
    assert shared.attach(made, two).status_code == 403
    assert shared.attach(made).is_success
    # Neither way of labels gets around it.
    assert shared.label(role="web").is_success
    assert shared.send("PUT", f"/{two['uuid']}", labels={"role": "web"}).status_code == 403
    shared.label()
    shared.do("PUT", f"/{two['uuid']}", labels={"role": "web"})
    assert shared.label(role="web").status_code == 403
    assert shared.placed() == [("web", "hand")]


def test_a_trial_takes_groups_back(shared: Groups) -> None:
    first, second, gone = (shared.make(name) for name in ("first", "second", "gone"))
    shared.attach(first, gone)
    shared.guarded.do("POST", "/trial")
    shared.attach(second)
    shared.do("DELETE", f"/{gone['uuid']}")
    with transaction() as session:
        session.execute(update(FirewallTrial).values(ends_at=now()))
    end_trials()
    assert shared.placed() == [("first", "hand")]
    assert {key: ports for key, (_, ports) in shared.in_fabric().items() if ports} == {
        (first["uuid"], 0): 1
    }
    assert audit() == []


def test_it_ends_with_its_instance(shared: Groups) -> None:
    made = shared.make()
    shared.attach(made)
    shared.cloud.customer.http.request(
        "DELETE",
        f"/instances/{shared.guarded.uuid}",
        json={"remove_ip": True, "remove_block_storage": False},
    )
    wait_until_idle()
    with transaction() as session:
        assert session.scalars(select(FirewallAttachment)).all() == []
    assert audit() == []
    shared.do("DELETE", f"/{made['uuid']}")
    assert shared.in_fabric() == {}
    assert audit() == []


def test_what_somebody_changed_is_put_back(shared: Groups) -> None:
    shared.attach(shared.make())
    before = shared.in_fabric()
    for statement, kind in (
        ("UPDATE sim.fabric_firewall_group SET lines = '{}'", "firewall.wrong"),
        ("DELETE FROM sim.fabric_firewall_group", "firewall.missing"),
        ("UPDATE sim.fabric_firewall SET group_ids = '{}'", "port.wrong"),
    ):
        sim_store().execute(statement)
        assert audit() == [kind]
        check_location(shared.cloud.location_id)
        assert shared.in_fabric() == before
        assert audit() == []


def test_a_group_of_nobody_is_reported_and_left_alone(shared: Groups) -> None:
    sim_store().execute(
        "INSERT INTO sim.fabric_firewall_group SELECT location, %s, 0, 1, '{}'"
        " FROM sim.fabric_firewall",
        [uuid4()],
    )
    assert audit() == ["firewall.stray"]
    check_location(shared.cloud.location_id)
    wait_until_idle()
    quarantined = shared.cloud.admin.get("/admin/quarantine").json()["data"]
    assert [row["kind"] for row in quarantined] == ["firewall"]


def test_what_is_pending_is_asked_for_again(shared: Groups) -> None:
    """As after a push that failed: the change is wanted, and nothing is about to bring it there."""
    made = shared.make()
    shared.attach(made)
    wait_until_idle()
    with transaction() as session:
        session.execute(update(FirewallGroup).values(wanted_revision=2, rules=[]))
    assert shared.do("GET", f"/{made['uuid']}")["sync_status"] == "pending"
    check_location(shared.cloud.location_id)
    assert shared.in_fabric() == {(made["uuid"], 0): ("", 1)}
    assert shared.do("GET", f"/{made['uuid']}")["sync_status"] == "applied"
    with transaction() as session:
        assert session.scalars(select(Firewall.instance_id)).one() == UUID(shared.guarded.uuid)


def test_a_push_that_read_a_group_before_its_edit_brings_the_edit(shared: Groups) -> None:
    """The group was nowhere yet when it was edited: its own push had nothing to do."""
    made = shared.make()
    shared.attach(made)
    wait_until_idle()
    firewall_id = firewall_id_of(UUID(shared.guarded.uuid))
    with transaction() as session:
        stale = read_spec(session, firewall_id)
    assert stale is not None
    fabric = fabric_of(shared.cloud)
    fabric.ensure_firewall_group_absent(UUID(made["uuid"]))
    shared.do("PUT", f"/{made['uuid']}/rules", rules=[])
    wait_until_idle()
    pushed = push_firewall(fabric, stale)
    assert pushed.groups[0].rules == ()
    assert shared.in_fabric() == {(made["uuid"], 0): ("", 1)}
    assert audit() == []


def test_firewalls_that_share_a_group_share_what_was_read_of_it(shared: Groups) -> None:
    other = create_settled(shared.cloud)
    made = shared.make(rules=[SSH])
    for uuid in (shared.guarded.uuid, other):
        shared.attach(made, uuid=uuid)
    with transaction() as session:
        one, two = read_specs(session, session.scalars(select(Firewall)).all())
    assert one.groups == two.groups
    assert one.groups[0] is two.groups[0]


def test_a_group_is_applied_where_the_firewall_is(shared: Groups) -> None:
    fabric = fabric_of(shared.cloud)
    (port,) = fabric.list_ports()
    assert port.chassis is not None
    made = shared.make()
    fabric.set_chassis_alive(port.chassis, is_alive=False)
    shared.attach(made)
    wait_until_idle()
    path = f"/instances/{shared.guarded.uuid}/firewall/groups"
    (row,) = shared.cloud.customer.http.get(path).json()["data"]
    assert row["sync_status"] == "pending", "no node has confirmed it"


def test_groups_that_a_trial_would_bring_back_keep_their_places(shared: Groups) -> None:
    former = [shared.make(f"former-{number}") for number in range(GROUPS_MAX)]
    shared.attach(*former)
    shared.guarded.do("POST", "/trial")
    assert shared.attach().is_success
    refused = shared.attach(shared.make("late"))
    assert (refused.status_code, refused.json()["type"]) == (403, "QUOTA_EXCEEDED")
    shared.do("DELETE", f"/{former[0]['uuid']}")
    with transaction() as session:
        session.execute(update(FirewallTrial).values(ends_at=now()))
    end_trials()
    assert [name for name, _ in shared.placed()] == [it["name"] for it in former[1:]]
    again = [*former[1:], shared.make("more")]
    assert shared.attach(*again).is_success, "the one that is gone does not count"


def test_the_event_of_a_group_tells_its_labels(shared: Groups) -> None:
    made = shared.make(labels={"role": "web"})
    shared.do("PUT", f"/{made['uuid']}", labels={})
    with transaction() as session:
        query = select(Event.data).where(Event.kind == "firewall_group.changed")
        assert session.scalars(query).one()["labels"] == {}
