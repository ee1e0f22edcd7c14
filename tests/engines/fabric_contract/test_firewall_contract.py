"""The contract about firewalls, kept by the fake and by OVN alike."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network
from uuid import UUID, uuid4

import pytest

from awan.engines.fabric import Fabric
from awan.engines.fabric.acls import firewall_lines
from awan.engines.fabric.firewall import (
    AddressSetSpec,
    Direction,
    FirewallFacts,
    FirewallSpec,
    RuleAction,
    RuleProtocol,
    RuleSpec,
)
from awan.errors import EngineRejected


def rule(number: int = 1, **changes: object) -> RuleSpec:
    """A rule whose uuid is derived from `number`: SSH is accepted, unless `changes` say otherwise."""
    fields: dict[str, object] = {
        "rule_id": UUID(int=number),
        "direction": Direction.IN,
        "protocol": RuleProtocol.TCP,
        "action": RuleAction.ACCEPT,
        "ports": (22, 22),
    }
    return RuleSpec(**{**fields, **changes})  # type: ignore[arg-type]


def firewall(revision: int = 1, **changes: object) -> FirewallSpec:
    """A closed firewall with one rule and one set of both families."""
    networks = tuple(ip_network(text) for text in ("198.18.7.0/24", "2001:db8:7::/48"))
    fields: dict[str, object] = {
        "firewall_id": uuid4(),
        "account_id": uuid4(),
        "revision": revision,
        "policy": RuleAction.DROP,
        "rules": (rule(1), rule(2, ports=(80, 443), set_id=5)),
        "sets": (AddressSetSpec(5, networks),),
    }
    return FirewallSpec(**{**fields, **changes})  # type: ignore[arg-type]


def found(fabric: Fabric, spec: FirewallSpec) -> FirewallFacts | None:
    """The firewall as the fabric has it."""
    return next((it for it in fabric.list_firewalls() if it.firewall_id == spec.firewall_id), None)


def test_new_firewall_is_whole(fabric: Fabric) -> None:
    spec = firewall()
    assert fabric.ensure_firewall(spec)
    facts = found(fabric, spec)
    assert facts is not None
    assert facts.revision == 1
    assert facts.lines == firewall_lines(spec)
    assert facts.port_ids == ()
    name = f"fw_{spec.firewall_id.hex}"
    assert f"31000 to-lport outport == @{name} && tcp && tcp.dst >= 80 && tcp.dst <= 443" in str(
        facts.lines
    )
    assert f"{name}_5_v4: 198.18.7.0/24" in facts.lines
    assert f"1000 to-lport outport == @{name} && ip drop" in facts.lines


def test_the_same_again_changes_nothing(fabric: Fabric) -> None:
    spec = firewall()
    assert fabric.ensure_firewall(spec)
    assert not fabric.ensure_firewall(spec)


def test_a_change_leaves_nothing_of_before(fabric: Fabric) -> None:
    spec = firewall()
    fabric.ensure_firewall(spec)
    changed = dataclasses.replace(
        spec,
        revision=2,
        policy=RuleAction.ACCEPT,
        outbound_policy=RuleAction.REJECT,
        rules=(rule(3, direction=Direction.OUT, protocol=RuleProtocol.ANY, ports=None),),
        sets=(),
    )
    assert fabric.ensure_firewall(changed)
    facts = found(fabric, spec)
    assert facts is not None
    assert facts.lines == firewall_lines(changed)
    assert facts.revision == 2


def test_what_is_older_does_not_undo_what_is_newer(fabric: Fabric) -> None:
    spec = firewall(revision=7)
    fabric.ensure_firewall(spec)
    assert not fabric.ensure_firewall(dataclasses.replace(spec, revision=6, rules=()))
    facts = found(fabric, spec)
    assert facts is not None
    assert (facts.revision, facts.lines) == (7, firewall_lines(spec))


def test_the_newest_of_many_at_once_stays(fabric: Fabric) -> None:
    spec = firewall()
    revisions = [
        dataclasses.replace(spec, revision=n, rules=(rule(n, ports=(n, n)),)) for n in range(1, 25)
    ]
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(fabric.ensure_firewall, revisions))
    facts = found(fabric, spec)
    assert facts is not None
    assert (facts.revision, facts.lines) == (24, firewall_lines(revisions[-1]))


def test_a_port_is_in_its_firewall_from_its_first_instant(fabric: Fabric, make_port_spec) -> None:
    spec = firewall()
    port = make_port_spec(30, firewall_id=spec.firewall_id)
    with pytest.raises(EngineRejected, match="no firewall"):
        fabric.ensure_port(port)
    assert fabric.find_port(port.port_id) is None
    fabric.ensure_firewall(spec)
    fabric.ensure_port(port)
    seen = fabric.find_port(port.port_id)
    assert seen is not None
    assert seen.firewall_ids == (spec.firewall_id,)
    assert fabric.list_ports()[0].firewall_ids == (spec.firewall_id,)
    assert found(fabric, spec).port_ids == (port.port_id,)  # type: ignore[union-attr]
    fabric.ensure_firewall(dataclasses.replace(spec, revision=2, rules=()))
    assert found(fabric, spec).port_ids == (port.port_id,)  # type: ignore[union-attr]


def test_a_port_moves_from_firewall_to_firewall(fabric: Fabric, make_port_spec) -> None:
    first, second = firewall(), firewall()
    port = make_port_spec(31, firewall_id=first.firewall_id)
    for spec in (first, second):
        fabric.ensure_firewall(spec)
    fabric.ensure_port(port)
    fabric.ensure_port(dataclasses.replace(port, firewall_id=second.firewall_id))
    seen = fabric.find_port(port.port_id)
    assert seen is not None
    assert seen.firewall_ids == (second.firewall_id,)
    fabric.ensure_port(dataclasses.replace(port, firewall_id=None))
    seen = fabric.find_port(port.port_id)
    assert seen is not None
    assert seen.firewall_ids == ()


def test_absent_firewall(fabric: Fabric, make_port_spec) -> None:
    spec, other = firewall(), firewall()
    port = make_port_spec(32, firewall_id=spec.firewall_id)
    for it in (spec, other):
        fabric.ensure_firewall(it)
    fabric.ensure_port(port)
    fabric.ensure_firewall_absent(spec.firewall_id)
    fabric.ensure_firewall_absent(spec.firewall_id)
    fabric.ensure_firewall_absent(uuid4())
    assert [it.firewall_id for it in fabric.list_firewalls()] == [other.firewall_id]
    seen = fabric.find_port(port.port_id)
    assert seen is not None
    assert seen.firewall_ids == ()


def test_wait_without_a_bound_port_is_over_at_once(fabric: Fabric, make_port_spec) -> None:
    spec = firewall()
    fabric.ensure_firewall(spec)
    assert fabric.wait_firewall_applied(spec.firewall_id, timeout_s=0.0)
    fabric.ensure_port(make_port_spec(33, firewall_id=spec.firewall_id))
    assert fabric.wait_firewall_applied(spec.firewall_id, timeout_s=0.0)
    assert fabric.wait_firewall_applied(uuid4(), timeout_s=0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"ports": (0, 5)},
        {"ports": (9, 8)},
        {"ports": (1, 65536)},
        {"protocol": RuleProtocol.ICMP},
        {"icmp_type": 8},
        {"protocol": RuleProtocol.ICMP, "ports": None, "icmp_type": 256},
    ],
)
def test_what_no_packet_can_be_cannot_be_named(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="rule"):
        rule(1, **changes)


def test_a_set_that_is_not_there_cannot_be_named() -> None:
    with pytest.raises(ValueError, match="no set 5"):
        firewall(sets=())


def test_private_ports_are_in_only_while_the_firewall_applies_to_them(
    fabric: Fabric, make_port_spec
) -> None:
    spec = firewall()
    fabric.ensure_firewall(spec)
    public, first, later = (
        make_port_spec(n, firewall_id=spec.firewall_id, is_private=n > 34) for n in (34, 35, 36)
    )
    foreign = make_port_spec(37, is_private=True)
    for port in (public, first, foreign):
        fabric.ensure_port(port)
    assert found(fabric, spec).port_ids == (public.port_id,)  # type: ignore[union-attr]

    both = dataclasses.replace(spec, revision=2, apply_to_private=True)
    assert fabric.ensure_firewall(both)
    assert not fabric.ensure_firewall(both)
    fabric.ensure_port(later)
    facts = found(fabric, spec)
    assert facts is not None
    assert set(facts.port_ids) == {public.port_id, first.port_id, later.port_id}
    assert facts.lines == firewall_lines(both)
    assert f"1 from-lport inport == @{facts.name} && ip allow-related" in facts.lines
    for port in (first, later):
        seen = fabric.find_port(port.port_id)
        assert seen is not None
        assert seen.firewall_ids == (spec.firewall_id,)

    fabric.ensure_firewall(dataclasses.replace(spec, revision=3))
    fabric.ensure_port(later)
    assert found(fabric, spec).port_ids == (public.port_id,)  # type: ignore[union-attr]


def test_private_ports_that_come_during_a_change_obey_it(fabric: Fabric, make_port_spec) -> None:
    spec = firewall(apply_to_private=True)
    ports = [
        make_port_spec(n, firewall_id=spec.firewall_id, is_private=True) for n in range(40, 64)
    ]
    fabric.ensure_firewall(dataclasses.replace(spec, apply_to_private=False))
    with ThreadPoolExecutor(max_workers=6) as pool:
        made = [pool.submit(fabric.ensure_port, port) for port in ports]
        pool.submit(fabric.ensure_firewall, dataclasses.replace(spec, revision=2)).result()
        for it in made:
            it.result()
    facts = found(fabric, spec)
    assert facts is not None
    assert set(facts.port_ids) == {port.port_id for port in ports}
