"""The contract about firewall groups, kept by the fake and by OVN alike."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest

from awan.engines.fabric import Fabric
from awan.engines.fabric.acls import firewall_lines, group_lines
from awan.engines.fabric.firewall import (
    GROUPS_MAX,
    Direction,
    FirewallGroupSpec,
    RuleAction,
    RuleProtocol,
)
from tests.engines.fabric_contract.test_firewall_contract import firewall, found, rule


def group(revision: int = 1, *ports: int) -> FirewallGroupSpec:
    """A group that lets these ports in, HTTP when none is given."""
    rules = tuple(rule(port, ports=(port, port)) for port in ports or (80,))
    return FirewallGroupSpec(uuid4(), uuid4(), revision, rules)


def seen(fabric: Fabric) -> dict[tuple[UUID | None, int], tuple[int, tuple[str, ...], set[UUID]]]:
    """Group and place -> revision, lines and ports."""
    return {
        (it.group_id, it.place): (it.revision, it.lines, set(it.port_ids))
        for it in fabric.list_firewall_groups()
    }


def test_groups_come_with_the_firewall_that_has_them(fabric: Fabric, make_port_spec) -> None:
    web, ssh = group(1, 80), group(4, 22)
    spec = firewall(groups=(web, ssh))
    assert fabric.ensure_firewall(spec)
    assert not fabric.ensure_firewall(spec)
    alone = dataclasses.replace(spec, groups=())
    assert found(fabric, spec).lines == firewall_lines(alone)  # type: ignore[union-attr]
    assert seen(fabric) == {
        (web.group_id, 0): (1, group_lines(web, 0), set()),
        (ssh.group_id, 1): (4, group_lines(ssh, 1), set()),
    }
    assert f"21001 to-lport outport == @fwg_{web.group_id.hex}_0 && tcp && tcp.dst == 80" in str(
        group_lines(web, 0)
    )
    port = make_port_spec(60, firewall_id=spec.firewall_id)
    fabric.ensure_port(port)
    assert [ports for *_, ports in seen(fabric).values()] == [{port.port_id}] * 2
    # A port is in one firewall, however many groups there are.
    assert fabric.find_port(port.port_id).firewall_ids == (spec.firewall_id,)  # type: ignore[union-attr]


def test_ports_follow_the_groups_of_their_firewall(fabric: Fabric, make_port_spec) -> None:
    web, ssh = group(1, 80), group(1, 22)
    spec = firewall(groups=(web,))
    fabric.ensure_firewall(spec)
    public = make_port_spec(61, firewall_id=spec.firewall_id)
    private = make_port_spec(62, firewall_id=spec.firewall_id, is_private=True)
    for port in (public, private):
        fabric.ensure_port(port)
    assert seen(fabric)[web.group_id, 0][2] == {public.port_id}
    steps = [
        ({"groups": (ssh, web)}, {public.port_id}),
        ({"groups": (ssh, web), "apply_to_private": True}, {public.port_id, private.port_id}),
        ({"groups": (web, ssh)}, {public.port_id}),
        ({"groups": ()}, set()),
    ]
    for revision, (changes, ports) in enumerate(steps, start=2):
        spec = dataclasses.replace(
            spec, **{"apply_to_private": False, **changes, "revision": revision}
        )
        assert fabric.ensure_firewall(spec)
        inside = {key: value[2] for key, value in seen(fabric).items() if value[2]}
        assert inside == (
            {(it.group_id, place): ports for place, it in enumerate(spec.groups)} if ports else {}
        )
        # Whoever makes a port anew finds it there already.
        for port in (public, private):
            fabric.ensure_port(port)
        assert {key: value[2] for key, value in seen(fabric).items() if value[2]} == inside
    for it in (web, ssh):
        fabric.ensure_firewall_group(it)
    assert seen(fabric) == {}


def test_an_edit_reaches_every_place(fabric: Fabric) -> None:
    web, ssh = group(1, 80), group(1, 22)
    for groups in ((web,), (ssh, web)):
        fabric.ensure_firewall(firewall(groups=groups))
    edited = FirewallGroupSpec(web.group_id, web.account_id, 2, (rule(9, ports=(443, 443)),))
    assert fabric.ensure_firewall_group(edited)
    assert not fabric.ensure_firewall_group(edited)
    for place in (0, 1):
        assert seen(fabric)[web.group_id, place] == (2, group_lines(edited, place), set())
    # What is older undoes nothing, whichever way it comes.
    assert not fabric.ensure_firewall_group(web)
    fabric.ensure_firewall(firewall(groups=(web,)))
    assert seen(fabric)[web.group_id, 0][:2] == (2, group_lines(edited, 0))


def test_a_group_that_no_firewall_has_is_not_there(fabric: Fabric) -> None:
    it = group()
    assert not fabric.ensure_firewall_group(it)
    assert seen(fabric) == {}
    fabric.ensure_firewall(firewall(groups=(it,)))
    other = firewall(groups=(group(),))
    fabric.ensure_firewall(other)
    fabric.ensure_firewall_group_absent(it.group_id)
    fabric.ensure_firewall_group_absent(it.group_id)
    assert [key[0] for key in seen(fabric)] == [other.groups[0].group_id]
    fabric.ensure_firewall_absent(other.firewall_id)
    assert fabric.ensure_firewall_group(other.groups[0])
    assert seen(fabric) == {}


def test_outbound_rules_leave_dhcp_alone(fabric: Fabric) -> None:
    closed = rule(
        1, direction=Direction.OUT, protocol=RuleProtocol.ANY, ports=None, action=RuleAction.DROP
    )
    it = FirewallGroupSpec(uuid4(), uuid4(), 1, (closed,))
    fabric.ensure_firewall(firewall(groups=(it,)))
    lines = seen(fabric)[it.group_id, 0][1]
    assert [line.split()[0] for line in lines] == ["21001", "31002"]


def test_ports_that_come_while_groups_change_are_in_them(fabric: Fabric, make_port_spec) -> None:
    first, second = group(1, 80), group(1, 22)
    spec = firewall(groups=(first,))
    fabric.ensure_firewall(spec)
    ports = [make_port_spec(n, firewall_id=spec.firewall_id) for n in range(64, 80)]
    with ThreadPoolExecutor(max_workers=6) as pool:
        made = [pool.submit(fabric.ensure_port, port) for port in ports]
        change = dataclasses.replace(spec, revision=2, groups=(second, first))
        pool.submit(fabric.ensure_firewall, change).result()
        pool.submit(fabric.ensure_firewall_group, dataclasses.replace(first, revision=2)).result()
        for it in made:
            it.result()
    everyone = {port.port_id for port in ports}
    inside = {key: value[2] for key, value in seen(fabric).items()}
    assert inside == {(second.group_id, 0): everyone, (first.group_id, 1): everyone}


def test_waiting_for_a_group(fabric: Fabric, make_port_spec) -> None:
    it = group()
    assert fabric.wait_firewall_group_applied(it.group_id, timeout_s=0.0)
    spec = firewall(groups=(it,))
    fabric.ensure_firewall(spec)
    fabric.ensure_port(make_port_spec(81, firewall_id=spec.firewall_id))
    assert fabric.wait_firewall_group_applied(it.group_id, timeout_s=0.0)


def test_what_a_group_cannot_be() -> None:
    with pytest.raises(ValueError, match="no sets"):
        FirewallGroupSpec(uuid4(), uuid4(), 1, (rule(1, set_id=5),))
    twice = group()
    for groups in ((twice, twice), tuple(group() for _ in range(GROUPS_MAX + 1))):
        with pytest.raises(ValueError, match="groups"):
            firewall(groups=groups)
