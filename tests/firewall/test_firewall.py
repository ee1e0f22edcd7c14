"""Firewalls through the API, over the simulated fabric."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, update

from awan.engines.registry import sim_store
from awan.events import Event
from awan.firewall import Firewall, service
from awan.firewall.models import FirewallTrial, Ipset, IpsetEntry, Rule
from awan.firewall.trial import end_trials
from awan.fleet import Node, NodeHealth
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.operations import ControlPlane, Operation
from awan.reconcile.audit import run_audit
from awan.reconcile.locations import check_location
from tests.firewall.conftest import SSH, Guarded, fabric_of
from tests.support.in_process_worker import wait_until_idle

ALL_PACKETS_IN = "1000 to-lport outport == @{} && ip drop"


def findings() -> list[str]:
    """Kinds of what an audit finds."""
    return [str(it.kind) for it in run_audit()]


def test_a_new_instance_is_open_and_its_firewall_in_force(guarded: Guarded) -> None:
    assert guarded.do("GET") == {
        "action": "ACCEPT",
        "direction": "in",
        "outbound_action": "ACCEPT",
        "apply_to_private": False,
        "enabled_rules": 0,
        "trial_ends_at": None,
        "sync_status": "applied",
    }
    facts = guarded.in_fabric()
    assert facts is not None
    assert facts.lines == ()
    assert len(facts.port_ids) == 1
    assert findings() == []


def test_a_policy_reaches_the_fabric(guarded: Guarded) -> None:
    answer = guarded.send("PUT", action="drop")
    assert answer.json()["message"] == "Default firewall policy successfully updated"
    assert answer.json()["data"]["action"] == "DROP"
    assert answer.json()["data"]["sync_status"] == "pending"
    assert answer.json()["operation"]["kind"] == "firewall.apply"
    facts = guarded.in_fabric()
    assert facts is not None
    assert facts.lines == (ALL_PACKETS_IN.format(facts.name),)
    assert guarded.do("GET")["sync_status"] == "applied"
    assert findings() == []


def test_a_rule_from_its_creation_to_its_deletion(guarded: Guarded) -> None:
    rule = guarded.add_rule(action="accept", protocol="TCP")
    assert {name: rule[name] for name in rule if name not in ("uuid", "created_at")} == {
        "position": 1,
        "direction": "in",
        "protocol": "tcp",
        "destination_port": 22,
        "destination_ports": "22",
        "icmp_type": None,
        "use_ipset": False,
        "source_ipset": None,
        "source": None,
        "action": "ACCEPT",
        "description": "ssh",
        "status": "enabled",
        "sync_status": "pending",
    }
    facts = guarded.in_fabric()
    assert facts is not None
    group = facts.name
    assert facts.lines == (
        f"31001 to-lport outport == @{group} && tcp && tcp.dst == 22 allow-related",
    )
    below = f"/rules/{rule['uuid']}"
    changed = guarded.do(
        "PUT", below, destination_port=53, protocol="udp", action="DROP", description=""
    )
    assert (changed["destination_port"], changed["description"]) == (53, "")
    facts = guarded.in_fabric()
    assert facts is not None
    assert facts.lines == (f"31001 to-lport outport == @{group} && udp && udp.dst == 53 drop",)
    disabled = guarded.send("PUT", f"{below}/status", action="disable")
    assert disabled.json()["message"] == "Rule successfully disabled"
    assert disabled.json()["data"]["status"] == "disabled"
    facts = guarded.in_fabric()
    assert facts is not None
    assert facts.lines == ()
    again = guarded.send("PUT", f"{below}/status", action="disable")
    assert again.status_code == 200
    assert "operation" not in again.json()
    assert guarded.send("PUT", f"{below}/status", action="enable").json()["message"] == (
        "Rule successfully enabled"
    )
    assert guarded.do("GET")["enabled_rules"] == 1
    assert guarded.do("DELETE", below) is None
    assert guarded.send("DELETE", below).status_code == 404
    assert guarded.do("GET", "/rules") == {
        "data": [],
        "page": {"total": 0, "count": 0, "per_page": 20, "current_page": 1, "total_pages": 1},
    }
    facts = guarded.in_fabric()
    assert facts is not None
    assert facts.lines == ()
    assert findings() == []


BAD_RULES: list[tuple[dict[str, object], list[str]]] = [
    ({"destination_port": 65536}, ["destination_port"]),
    ({"destination_port": "-1"}, ["destination_port"]),
    ({"destination_port": "9-8"}, ["destination_port"]),
    ({"destination_port": "0-9"}, ["destination_port"]),
    ({"destination_port": "http"}, ["destination_port"]),
    ({"protocol": "icmp"}, ["destination_port"]),
    ({"protocol": "any"}, ["destination_port"]),
    ({"protocol": "vrrp"}, ["protocol"]),
    ({"action": "allow"}, ["action"]),
    ({"icmp_type": 8}, ["icmp_type"]),
    ({"protocol": "icmp", "destination_port": 0, "icmp_type": 256}, ["icmp_type"]),
    ({"description": "x" * 256}, ["description"]),
    ({"use_ipset": "true"}, ["request"]),
    ({"source_ipset": 7}, ["request"]),
    ({"use_ipset": "true", "source_ipset": 7}, ["source_ipset"]),
    ({"source": "10.0.0.0/33"}, ["source"]),
    ({"source": "::/0"}, ["source"]),
    ({"source": "::ffff:10.0.0.1"}, ["source"]),
    ({"direction": "sideways"}, ["direction"]),
    ({"position": 2}, ["position"]),
]


def test_a_bad_rule_is_refused_and_changes_nothing(guarded: Guarded) -> None:
    for changes, fields in BAD_RULES:
        assert guarded.refused("POST", "/rules", **{**SSH, **changes}) == fields, changes
    assert guarded.do("GET", "/rules")["page"]["total"] == 0
    assert guarded.do("GET")["sync_status"] == "applied"


def test_every_field_is_required(guarded: Guarded) -> None:
    assert guarded.refused("POST", "/rules") == sorted(SSH)
    rule = guarded.add_rule()
    assert guarded.refused("PUT", f"/rules/{rule['uuid']}") == [
        "action",
        "description",
        "destination_port",
        "protocol",
    ]
    assert guarded.refused("PUT") == ["action"]
    assert guarded.refused("POST", "/ipsets") == ["description", "name"]


def test_the_same_rule_twice_is_one_too_many(guarded: Guarded) -> None:
    first = guarded.add_rule()
    assert guarded.refused("POST", "/rules", **SSH) == ["action"]
    second = guarded.add_rule(destination_port=80)
    same = {name: SSH[name] for name in ("destination_port", "protocol", "action", "description")}
    assert guarded.refused("PUT", f"/rules/{second['uuid']}", **same) == ["action"]
    assert guarded.do("PUT", f"/rules/{first['uuid']}", **same)["uuid"] == first["uuid"]


def test_what_goes_beyond_single_ports(guarded: Guarded) -> None:
    rule = guarded.add_rule(destination_port="8000-8100", source="2001:db8::1/32")
    assert (rule["destination_port"], rule["destination_ports"]) == (8000, "8000-8100")
    assert rule["source"] == "2001:db8::/32"
    guarded.add_rule(protocol="icmp", destination_port=0, icmp_type=8)
    guarded.add_rule(protocol="icmpv6", destination_port=0, action="REJECT")
    guarded.add_rule(protocol="any", destination_port=0, direction="out", source="198.18.1.7")
    guarded.do("PUT", action="ACCEPT", outbound_action="DROP")
    facts = guarded.in_fabric()
    assert facts is not None
    into, out = f"outport == @{facts.name}", f"inport == @{facts.name}"
    dhcp = "udp && ((udp.src == 68 && udp.dst == 67) || (udp.src == 546 && udp.dst == 547))"
    assert set(facts.lines) == {
        f"31002 from-lport {out} && {dhcp} allow-related",
        f"31001 to-lport {into} && tcp && tcp.dst >= 8000 && tcp.dst <= 8100"
        " && ip6.src == {2001:db8::/32} allow-related",
        f"31000 to-lport {into} && icmp4.type == 8 allow-related",
        f"30999 to-lport {into} && icmp6 reject",
        f"30998 from-lport {out} && ip && ip4.dst == {{198.18.1.7/32}} allow-related",
        f"1000 from-lport {out} && ip drop",
    }


def test_the_order_of_rules(guarded: Guarded) -> None:
    rules = [guarded.add_rule(destination_port=port) for port in (1, 2, 3, 4)]
    assert guarded.do("PUT", f"/rules/{rules[3]['uuid']}/position", position=2)["position"] == 2
    assert guarded.positions() == {1: 1, 2: 4, 3: 2, 4: 3}
    guarded.do("PUT", f"/rules/{rules[0]['uuid']}/position", position=4)
    assert guarded.positions() == {1: 4, 2: 2, 3: 3, 4: 1}
    guarded.add_rule(destination_port=5, position=1)
    assert guarded.positions() == {1: 5, 2: 4, 3: 2, 4: 3, 5: 1}
    guarded.do("DELETE", f"/rules/{rules[3]['uuid']}")
    assert guarded.positions() == {1: 5, 2: 2, 3: 3, 4: 1}
    refused = guarded.refused("PUT", f"/rules/{rules[0]['uuid']}/position", position=5)
    assert refused == ["position"]
    facts = guarded.in_fabric()
    assert facts is not None
    ports = [line.split("tcp.dst == ")[1].split()[0] for line in facts.lines[::-1]]
    assert ports == ["5", "2", "3", "1"]


def test_all_rules_are_replaced_at_once(guarded: Guarded) -> None:
    old = guarded.add_rule(destination_port=7)
    ports = [80, 443, 22]
    rules = [{**SSH, "use_ipset": False, "destination_port": port} for port in ports]
    rules[2]["is_enabled"] = False
    http, path = guarded.cloud.customer.http, f"{guarded.path}/rules"
    answer = http.put(path, json={"rules": rules})
    assert answer.status_code == 200, answer.text
    assert [row["destination_port"] for row in answer.json()["data"]["data"]] == ports
    assert guarded.send("GET", f"/rules/{old['uuid']}").status_code in (404, 405)
    facts = guarded.in_fabric()
    assert facts is not None
    assert len(facts.lines) == 2
    twice = http.put(path, json={"rules": [rules[0], rules[0]]})
    assert list(twice.json()["errors"]) == ["rules.1.action"]
    bad = http.put(
        path, json={"rules": [rules[0], {**rules[1], "source_ipset": 9, "use_ipset": True}]}
    )
    assert list(bad.json()["errors"]) == ["rules.1.source_ipset"]
    assert guarded.positions() == {1: 80, 2: 443, 3: 22}
    assert http.put(path, json={"rules": []}).status_code == 200
    assert guarded.positions() == {}


def test_a_set_and_its_rule(guarded: Guarded) -> None:
    made = guarded.do("POST", "/ipsets", name="office", description="us")
    below = f"/ipsets/{made['id']}"
    assert (made["entries"], made["rules_count"]) == ([], 0)
    assert guarded.refused("POST", "/ipsets", name="office", description="") == ["name"]
    assert guarded.refused("POST", "/ipsets", name="o", description="") == ["name"]
    rule = guarded.add_rule(use_ipset="true", source_ipset=made["id"])
    assert rule["source_ipset"] == {"id": made["id"], "name": "office"}
    facts = guarded.in_fabric()
    assert facts is not None
    assert facts.lines == ()  # an empty set matches nothing
    entries = [
        guarded.do("POST", f"{below}/cidrs", cidr=cidr, description="")
        for cidr in ("10.0.0.5/24", "10.0.0.7", "2001:DB8::1")
    ]
    assert [row["cidr"] for row in entries] == ["10.0.0.0/24", "10.0.0.7/32", "2001:db8::1/128"]
    for cidr in ("10.0.0.9/24", "0.0.0.0/0", "10.0.0.0/33", "nowhere"):
        assert guarded.refused("POST", f"{below}/cidrs", cidr=cidr, description="") == ["cidr"]
    facts = guarded.in_fabric()
    assert facts is not None
    names = [f"{facts.name}_{made['id']}_v{version}" for version in (4, 6)]
    # What lies within another entry is left out.
    assert f"{names[0]}: 10.0.0.0/24" in facts.lines
    assert f"{names[1]}: 2001:db8::1/128" in facts.lines
    assert f"(ip4.src == ${names[0]} || ip6.src == ${names[1]})" in str(facts.lines)
    listed = guarded.do("GET", "/ipsets")
    assert listed["page"]["total"] == 1
    assert listed["data"][0]["rules_count"] == 1
    assert [row["uuid"] for row in listed["data"][0]["entries"]] == [row["uuid"] for row in entries]
    assert guarded.send("DELETE", below).status_code == 409
    for entry in entries:
        assert guarded.do("DELETE", f"{below}/cidrs/{entry['uuid']}") is None
    assert guarded.send("DELETE", f"{below}/cidrs/{entries[0]['uuid']}").status_code == 404
    facts = guarded.in_fabric()
    assert facts is not None
    assert facts.lines == ()
    guarded.do("DELETE", f"/rules/{rule['uuid']}")
    assert guarded.do("DELETE", below) is None
    assert guarded.send("DELETE", below).status_code == 404
    assert findings() == []


def test_limits(guarded: Guarded) -> None:
    made = [
        guarded.do("POST", "/ipsets", name=f"set-{number}", description="") for number in range(10)
    ]
    over = guarded.send("POST", "/ipsets", name="set-10", description="")
    assert (over.status_code, over.json()["type"]) == (403, "QUOTA_EXCEEDED")
    with transaction() as session:
        session.add_all(
            IpsetEntry(
                entry_id=uuid4(), ipset_id=made[0]["id"], cidr=f"10.0.0.{number}/32", description=""
            )
            for number in range(100)
        )
    below = f"/ipsets/{made[0]['id']}/cidrs"
    over = guarded.send("POST", below, cidr="10.0.1.1", description="")
    assert (over.status_code, over.json()["type"]) == (403, "QUOTA_EXCEEDED")
    rules = [{**SSH, "use_ipset": False, "destination_port": port} for port in range(1, 1001)]
    http, path = guarded.cloud.customer.http, f"{guarded.path}/rules"
    assert http.put(path, json={"rules": rules}).status_code == 200
    over = guarded.send("POST", "/rules", **{**SSH, "destination_port": 1001})
    assert (over.status_code, over.json()["type"]) == (403, "QUOTA_EXCEEDED")
    facts = guarded.in_fabric()
    assert facts is not None
    assert len(facts.lines) == 1000


def test_what_is_another_instances_is_not_there(guarded: Guarded) -> None:
    other = Guarded(guarded.cloud, guarded.cloud.create_running()["uuid"])
    rule = other.add_rule()
    ipset = other.do("POST", "/ipsets", name="theirs", description="")
    entry = other.do("POST", f"/ipsets/{ipset['id']}/cidrs", cidr="10.0.0.1", description="")
    for method, below in (
        ("PUT", f"/rules/{rule['uuid']}"),
        ("PUT", f"/rules/{rule['uuid']}/status"),
        ("PUT", f"/rules/{rule['uuid']}/position"),
        ("DELETE", f"/rules/{rule['uuid']}"),
        ("DELETE", f"/ipsets/{ipset['id']}"),
        ("POST", f"/ipsets/{ipset['id']}/cidrs"),
        ("DELETE", f"/ipsets/{ipset['id']}/cidrs/{entry['uuid']}"),
    ):
        body = {
            "status": {"action": "disable"},
            "position": {"position": 1},
            "cidrs": {"cidr": "10.0.0.2", "description": ""},
        }.get(below.rpartition("/")[2], {})
        if method == "PUT" and not body:
            body = {
                name: SSH[name]
                for name in ("destination_port", "protocol", "action", "description")
            }
        assert guarded.send(method, below, **body).status_code == 404, (method, below)
    named = {**SSH, "use_ipset": "true", "source_ipset": ipset["id"]}
    assert guarded.refused("POST", "/rules", **named) == ["source_ipset"]


def test_an_edit_does_not_wait_for_the_instance(guarded: Guarded) -> None:
    """A stop that takes its time is under way: the firewall is changed all the same."""
    http = guarded.cloud.customer.http
    sim_store().set_latency(3.0, engine="hypervisor", verb="ensure_stopped")
    stop = http.post(f"/instances/{guarded.uuid}/stop").json()["operation"]["uuid"]
    edit = guarded.send("PUT", action="DROP").json()["operation"]["uuid"]
    assert guarded.cloud.wait(edit)["status"] == "succeeded"
    assert http.get(f"/operations/{stop}").json()["data"]["status"] in ("queued", "running")
    assert guarded.do("GET")["sync_status"] == "applied"
    assert guarded.cloud.wait(stop)["status"] == "succeeded"
    sim_store().set_latency(0.0, engine="hypervisor", verb="ensure_stopped")


def test_ten_quick_edits_cost_few_pushes(guarded: Guarded) -> None:
    wait_until_idle()
    sim_store().faults.clear()
    sim_store().set_latency(2.0, engine="fabric", verb="ensure_firewall")
    operations = {
        guarded.send("POST", "/rules", **{**SSH, "destination_port": port}).json()["operation"][
            "uuid"
        ]
        for port in range(1, 11)
    }
    assert guarded.in_fabric() is not None
    sim_store().set_latency(0.0, engine="fabric", verb="ensure_firewall")
    pushes = [call for call in sim_store().faults.calls if call.verb == "ensure_firewall"]
    assert len(pushes) == len(operations) <= 4
    facts = guarded.in_fabric()
    assert facts is not None
    assert len(facts.lines) == 10
    assert guarded.do("GET")["sync_status"] == "applied"


def test_a_node_that_is_away_leaves_it_pending(guarded: Guarded) -> None:
    fabric = fabric_of(guarded.cloud)
    (port,) = fabric.list_ports()
    assert port.chassis is not None
    fabric.set_chassis_alive(port.chassis, is_alive=False)
    operation = guarded.send("PUT", action="DROP").json()["operation"]["uuid"]
    assert guarded.cloud.wait(operation)["status"] == "succeeded"
    assert guarded.do("GET")["sync_status"] == "pending"
    fabric.set_chassis_alive(port.chassis, is_alive=True)
    check_location(guarded.cloud.location_id)
    wait_until_idle()
    assert guarded.do("GET")["sync_status"] == "applied"
    with transaction() as session:
        kinds = session.scalars(
            select(Event.kind)
            .where(Event.resource_id == UUID(guarded.uuid), Event.kind.startswith("firewall."))
            .order_by(Event.event_id)
        ).all()
    assert kinds == ["firewall.policy_changed", "firewall.pending", "firewall.applied"]


def change_all(guarded: Guarded, rule: str, ipset: int, entry: str) -> None:
    """Everything that a trial takes back is changed."""
    guarded.do("PUT", action="DROP", outbound_action="REJECT")
    guarded.do("DELETE", f"/rules/{rule}")
    guarded.do("DELETE", f"/ipsets/{ipset}/cidrs/{entry}")
    guarded.do("POST", f"/ipsets/{ipset}/cidrs", cidr="10.9.0.0/16", description="")
    guarded.add_rule(destination_port=99)


def test_a_trial_goes_back_by_itself(guarded: Guarded) -> None:
    ipset = guarded.do("POST", "/ipsets", name="office", description="")["id"]
    entry = guarded.do("POST", f"/ipsets/{ipset}/cidrs", cidr="10.0.0.1", description="me")["uuid"]
    rule = guarded.add_rule(use_ipset="true", source_ipset=ipset)["uuid"]
    guarded.add_rule(destination_port="80-90", source="2001:db8::/32")
    before = guarded.in_fabric()
    shown = [guarded.do("GET", below)["data"] for below in ("/rules", "/ipsets")]
    begun = guarded.send("POST", "/trial")
    assert begun.status_code == 201
    assert begun.json()["data"]["trial_ends_at"] is not None
    assert guarded.send("POST", "/trial").status_code == 409
    change_all(guarded, rule, ipset, entry)
    kept = guarded.send("DELETE", f"/ipsets/{ipset}")
    assert kept.status_code == 409
    assert kept.json()["message"].endswith("confirm it or take it back first.")
    changed = guarded.in_fabric()
    assert before is not None
    assert changed is not None
    assert changed.lines != before.lines
    with transaction() as session:
        session.execute(update(FirewallTrial).values(ends_at=now()))
    assert guarded.send("POST", "/trial/confirm").status_code == 409
    end_trials()
    after = guarded.in_fabric()
    assert after is not None
    assert after.lines == before.lines
    assert [guarded.do("GET", below)["data"] for below in ("/rules", "/ipsets")] == shown
    assert guarded.do("GET")["trial_ends_at"] is None
    assert guarded.do("GET")["outbound_action"] == "ACCEPT"
    assert findings() == []


def test_a_trial_that_is_confirmed_stays(guarded: Guarded) -> None:
    assert guarded.send("POST", "/trial/confirm").status_code == 409
    assert guarded.send("DELETE", "/trial").status_code == 409
    assert guarded.refused("POST", "/trial", seconds=9) == ["seconds"]
    guarded.do("POST", "/trial", seconds=3600)
    guarded.do("PUT", action="DROP")
    assert guarded.do("POST", "/trial/confirm")["trial_ends_at"] is None
    end_trials()
    assert guarded.do("GET")["action"] == "DROP"
    guarded.do("POST", "/trial", seconds=3600)
    guarded.do("PUT", action="REJECT")
    assert guarded.do("DELETE", "/trial")["action"] == "DROP"
    facts = guarded.in_fabric()
    assert facts is not None
    assert facts.lines[0].endswith("drop")


def test_it_goes_with_its_instance(guarded: Guarded) -> None:
    ipset = guarded.do("POST", "/ipsets", name="office", description="")
    guarded.do("POST", f"/ipsets/{ipset['id']}/cidrs", cidr="10.0.0.1", description="")
    guarded.add_rule(use_ipset="true", source_ipset=ipset["id"])
    answer = guarded.cloud.customer.http.request(
        "DELETE",
        f"/instances/{guarded.uuid}",
        json={"remove_ip": True, "remove_block_storage": False},
    )
    assert answer.status_code == 202
    assert guarded.in_fabric() is None
    assert guarded.send("GET").status_code == 404
    with transaction() as session:
        assert [session.scalars(select(kind)).all() for kind in (Rule, Ipset, IpsetEntry)] == [
            []
        ] * 3
        assert session.scalars(select(Firewall.deleted_at)).one() is not None
    assert findings() == []


def test_a_push_that_comes_after_the_end_leaves_nothing(guarded: Guarded) -> None:
    """The firewall is pushed while its instance is deleted; the slow push puts back what was removed."""
    guarded.send("PUT", action="DROP")
    guarded.in_fabric()
    sim_store().set_latency(2.0, engine="fabric", verb="ensure_firewall")
    guarded.send("PUT", action="REJECT")
    guarded.cloud.customer.http.request(
        "DELETE",
        f"/instances/{guarded.uuid}",
        json={"remove_ip": True, "remove_block_storage": False},
    )
    assert guarded.in_fabric() is None
    sim_store().set_latency(0.0, engine="fabric", verb="ensure_firewall")
    assert findings() == []


def test_a_firewall_that_vanished_is_put_back(guarded: Guarded) -> None:
    guarded.send("PUT", action="DROP")
    before = guarded.in_fabric()
    assert before is not None
    assert before.firewall_id is not None
    fabric_of(guarded.cloud).ensure_firewall_absent(before.firewall_id)
    check_location(guarded.cloud.location_id)
    assert guarded.in_fabric() == before
    assert findings() == []


def test_rules_that_somebody_changed_are_put_back(guarded: Guarded) -> None:
    guarded.send("PUT", action="DROP")
    before = guarded.in_fabric()
    sim_store().execute("UPDATE sim.fabric_firewall SET lines = '{}'")
    check_location(guarded.cloud.location_id)
    assert guarded.in_fabric() == before
    assert findings() == []


def test_a_firewall_of_nobody_is_reported_and_left_alone(guarded: Guarded) -> None:
    sim_store().execute(
        "INSERT INTO sim.fabric_firewall SELECT location, %s, account_id, 1, false, '{}', '{}'"
        " FROM sim.fabric_firewall",
        [uuid4()],
    )
    assert findings() == ["firewall.stray"]
    check_location(guarded.cloud.location_id)
    wait_until_idle()
    quarantined = guarded.cloud.admin.get("/admin/quarantine")
    assert [row["kind"] for row in quarantined.json()["data"]] == ["firewall"]
    assert findings() == ["firewall.stray"]


def test_what_is_pending_is_asked_for_once(guarded: Guarded) -> None:
    """As after a push that failed: the change is wanted, and nothing is about to bring it there."""
    with transaction() as session:
        session.execute(update(Firewall).values(wanted_revision=2))
    with transaction() as session:
        requester = ControlPlane("system:test")
        operation = service.request_apply(session, requester, UUID(guarded.uuid))
        assert operation is not None
        assert operation.account_id == guarded.cloud.customer.account_id
        assert service.request_apply(session, requester, UUID(guarded.uuid)) is None
    wait_until_idle()
    with transaction() as session:
        assert service.request_apply(session, requester, UUID(guarded.uuid)) is None


def test_a_node_that_stays_away_is_not_asked_again_and_again(guarded: Guarded) -> None:
    fabric = fabric_of(guarded.cloud)
    (port,) = fabric.list_ports()
    assert port.chassis is not None
    fabric.set_chassis_alive(port.chassis, is_alive=False)
    guarded.cloud.wait(guarded.send("PUT", action="DROP").json()["operation"]["uuid"])

    def operations() -> int:
        with transaction() as session:
            return session.scalar(select(func.count()).select_from(Operation)) or 0

    with transaction() as session:
        session.execute(update(Node).values(health=NodeHealth.UNREACHABLE))
    before = operations()
    check_location(guarded.cloud.location_id)
    check_location(guarded.cloud.location_id)
    assert operations() == before
    assert guarded.do("GET")["sync_status"] == "pending"


@pytest.mark.parametrize("cidr", ["fe80::1%eth0", "2001:db8::%1/64"])
def test_an_entry_has_no_zone(guarded: Guarded, cidr: str) -> None:
    ipset = guarded.do("POST", "/ipsets", name="office", description="")
    refused = guarded.send("POST", f"/ipsets/{ipset['id']}/cidrs", cidr=cidr, description="")
    assert (refused.status_code, list(refused.json()["errors"])) == (422, ["cidr"])
