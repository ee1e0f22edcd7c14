"""Routed IPv6 prefixes shown by packets: to the guest that has one and back, from nobody else, and past a dead node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv6Address, IPv6Network

import pytest
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from awan.engines.fabric import PrefixRoute, PrefixRouterSpec
from lab.processes import run
from tests.engines.fabric_contract.conftest import Location, Tenant
from tests.engines.fabric_contract.test_packets import MARK
from tests.engines.fabric_contract.test_private_packets import gap_of

pytestmark = pytest.mark.lab

SETTLE_S = 0.5
NAME = "prefixes-lab"


@dataclass
class Routed:
    """Prefixes of a lab location: the n-th tenant has the n-th of its range."""

    location: Location
    tenants: list[Tenant]

    @property
    def range(self) -> IPv6Network:
        return IPv6Network(self.location.lab.info.routed_v6_cidr)

    def prefix(self, number: int) -> IPv6Network:
        return list(self.range.subnets(new_prefix=64))[number]

    def inside(self, number: int) -> IPv6Address:
        """The address of its prefix that a tenant answers at."""
        return self.prefix(number).network_address + 0x25

    def add_tenant(self, node: int, host: int) -> Tenant:
        """A tenant with an address of its prefix beside its own, and the provider's router as its way out."""
        number = len(self.tenants)
        tenant = self.location.add_tenant(node, host)
        tenant.configure()
        gateway = str(self.location.network.ipv6_gateway)
        # The one that router advertisements announce may be there already.
        tenant.run("ip", "-6", "route", "replace", "default", "via", gateway)
        tenant.run("ip", "-6", "address", "add", f"{self.inside(number)}/128", "dev", "lo")
        tenant.spec = replace(tenant.spec, ipv6_prefix=self.prefix(number))
        self.location.fabric.ensure_port(tenant.spec)
        self.tenants.append(tenant)
        return tenant

    def spec(self, first_node: int = 1, *, only: bool = False) -> PrefixRouterSpec:
        """The router of all tenants' prefixes, on both nodes or on one."""
        nodes = [node.system_id for node in self.location.lab.info.nodes]
        order = nodes if first_node == 1 else nodes[::-1]
        assert self.location.network.ipv6_cidr is not None
        return PrefixRouterSpec(
            name=NAME,
            public_switch=self.location.network.switch,
            address=IPv6Address(self.location.lab.info.routed_v6_router),
            on_link=self.location.network.ipv6_cidr,
            routes=tuple(
                PrefixRoute(self.prefix(number), tenant.spec.ipv6)
                for number, tenant in enumerate(self.tenants)
                if tenant.spec.ipv6 is not None
            ),
            chassis=tuple(order[:1] if only else order),
        )

    def push(self, spec: PrefixRouterSpec) -> None:
        fabric = self.location.fabric
        fabric.ensure_prefix_router(spec)
        assert fabric.wait_prefix_router_carried(spec.name, timeout_s=15)
        for node in self.location.lab.info.nodes:
            assert fabric.wait_applied(node.system_id)

    def answers(self, tenant: Tenant, source: IPv6Address) -> bool:
        """Whether the provider's router answers an address of the tenant."""
        gateway = str(self.location.network.ipv6_gateway)
        ping = ["ping", "-6", "-c", "2", "-i", "0.2", "-W", "2", "-I", str(source), gateway]
        return ", 0% packet loss" in tenant.run(*ping, check=False)

    def outside_reaches(self, target: IPv6Address) -> bool:
        """Whether an address answers somebody beyond the provider's router, within ten seconds."""
        return until(partial(self.ping_from_outside, target))

    def ping_from_outside(self, target: IPv6Address) -> bool:
        """Whether it answers now. This host stands beyond the provider's router."""
        done = run(["ping", "-6", "-c", "2", "-i", "0.2", "-W", "1", str(target)], check=False)
        return ", 0% packet loss" in done.stdout


@pytest.fixture
def routed(location: Location) -> Iterator[Routed]:
    found = Routed(location, [])
    yield found
    location.fabric.ensure_prefix_router_absent(NAME)


def until(is_so: Callable[[], bool]) -> bool:
    """Whether it becomes true within ten seconds: paths are learned by the first packets, which may be lost."""
    deadline = time.monotonic() + 10
    while not is_so():
        if time.monotonic() > deadline:
            return False
    return True


def test_a_prefix_is_reached_and_answers_on_both_nodes(routed: Routed) -> None:
    a, b = routed.add_tenant(1, 40), routed.add_tenant(2, 41)
    routed.push(routed.spec())
    for number, tenant in enumerate((a, b)):
        assert routed.outside_reaches(routed.inside(number))
        assert until(partial(routed.answers, tenant, routed.inside(number)))
    # From one prefix into the other, by way of the provider's router.
    assert until(lambda: a.ping(routed.inside(1), count=1))
    assert until(lambda: b.ping(routed.inside(0), count=1))
    # An address of the prefix that nobody has configured is the guest's own business; one without a route is nobody's.
    unused = routed.prefix(7).network_address + 1
    with a.listen() as first, b.listen() as second:
        assert not routed.ping_from_outside(unused)
        time.sleep(SETTLE_S)
        assert not [f for f in (*first.frames, *second.frames) if unused.packed in f]


def test_a_neighbour_cannot_use_a_prefix(routed: Routed) -> None:
    """Forged from another's prefix: zero. The same frame from one's own arrives."""
    routed.add_tenant(1, 42)
    liar = routed.add_tenant(1, 43)
    routed.push(routed.spec())
    listener = routed.location.add_tenant(2, 44)
    listener.configure()
    payload = UDP(sport=999, dport=999) / MARK

    def frame(source: IPv6Address) -> bytes:
        return bytes(
            Ether(src=liar.spec.mac, dst=listener.spec.mac)
            / IPv6(src=str(source), dst=str(listener.spec.ipv6))
            / payload
        )

    own, forged = frame(routed.inside(1)), frame(routed.inside(0))
    other = frame(routed.prefix(5).network_address + 1)
    with listener.listen() as capture:
        for sent in (own, forged, other, own):
            liar.send(sent)
        assert capture.wait_for(own)
        time.sleep(SETTLE_S)
        assert not capture.has(forged)
        assert not capture.has(other)
    # Once it is taken away, the port may not use it either.
    liar.spec = replace(liar.spec, ipv6_prefix=None)
    routed.location.fabric.ensure_port(liar.spec)
    assert routed.location.fabric.wait_applied(liar.node)
    plain = frame(liar.spec.ipv6)  # type: ignore[arg-type]
    with listener.listen() as capture:
        for sent in (own, plain):
            liar.send(sent)
        assert capture.wait_for(plain)
        time.sleep(SETTLE_S)
        assert not capture.has(own)
    assert routed.outside_reaches(routed.inside(0))


def test_the_routers_node_dies(routed: Routed, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints for how long a prefix on the other node was not reached, from the push on."""
    routed.add_tenant(2, 45)
    routed.push(routed.spec(1))
    lab = routed.location.lab
    assert routed.outside_reaches(routed.inside(0))
    watcher = routed.location.add_tenant(2, 46)
    watcher.configure()
    gateway = str(routed.location.network.ipv6_gateway)
    watcher.run("ip", "-6", "route", "add", "default", "via", gateway)
    assert until(lambda: watcher.ping(routed.inside(0), count=1))
    try:

        def lose_node() -> None:
            lab.kill_node_processes(lab.info.nodes[0].name)
            routed.location.fabric.ensure_prefix_router(routed.spec(2, only=True))

        gap_s = gap_of(watcher, routed.inside(0), lose_node)  # type: ignore[arg-type]
    finally:
        lab.up()
    with capsys.disabled():
        print(f"\nrouter of prefixes: its node dead, {gap_s:.1f} s without a way", end="")
    assert gap_s < 8
