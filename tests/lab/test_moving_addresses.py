"""Names and moves of addresses on real engines: a nameserver, two nodes, guests that go on running."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import dns.name
import dns.query
import dns.resolver
import dns.tsig
import dns.update
import pytest

from tests.support.lab_cloud import LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200)]

PING_INTERVAL_S = 0.2
# Of a move between two guests under emulation, on a busy machine: a bound, not a promise.
GAP_MAX_S = 60.0


def resolver_of(cloud: LabCloud) -> dns.resolver.Resolver:
    """Asks the location's nameserver and nobody else."""
    host, port = cloud.info.nameserver.server.split(":")
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = [host], int(port)
    return resolver


def reverse(cloud: LabCloud, address: str) -> str:
    """The name that a reverse lookup gives."""
    try:
        answer = resolver_of(cloud).resolve_address(address, lifetime=5)
    except dns.resolver.NXDOMAIN:
        return ""
    return str(answer[0]).rstrip(".")


def add_customers_record(cloud: LabCloud, name: str, address: str) -> None:
    """What a customer does in a zone of its own."""
    facts = cloud.info.nameserver
    key = dns.tsig.Key(facts.key_name, facts.options["key_secret"], f"{facts.key_algorithm}.")
    update = dns.update.UpdateMessage(f"{facts.customer_zone}.", keyring=key)
    update.replace(dns.name.from_text(f"{name}."), 60, "A", address)
    host, port = facts.server.split(":")
    assert dns.query.tcp(update, host, port=int(port), timeout=5).rcode() == 0


@contextmanager
def pinged(address: str) -> Iterator[list[float]]:
    """Pings the address from outside all the while; at the end, the times of the answers."""
    answers: list[float] = []
    with TemporaryDirectory() as folder:
        log = Path(folder) / "ping"
        with log.open("w") as file:
            process = subprocess.Popen(
                ["ping", "-D", "-O", "-n", "-i", str(PING_INTERVAL_S), address], stdout=file
            )
        try:
            yield answers
        finally:
            process.terminate()
            process.wait()
            for line in log.read_text().splitlines():
                if "bytes from" in line:
                    answers.append(float(line.partition("]")[0].removeprefix("[")))


def longest_gap_s(answers: list[float]) -> float:
    """The longest time between two answers."""
    return max(later - earlier for earlier, later in pairwise(answers))


@pytest.mark.sampled("story")
def test_an_address_with_a_name_moves_between_running_guests(cloud: LabCloud) -> None:
    first = cloud.create_instance(hostname="from")
    second = cloud.create_instance(hostname="to")
    address, uuid = first["ip_address"], first["public_network"]["uuid"]
    spare = second["public_network"]["uuid"]
    for row in (first, second):
        cloud.ssh_when_up(row["ip_address"])

    default = first["public_network"]["rdns"]
    assert default.endswith(f".{cloud.info.nameserver.forward_zone}")
    until(lambda: reverse(cloud, address) == default, 30, "no default name")
    six = first["public_network"]["ipv6_address"]
    until(
        lambda: reverse(cloud, six) == first["public_network"]["ipv6_rdns"], 30, "no name of IPv6"
    )
    name = f"mail.{cloud.info.nameserver.customer_zone}"
    refused = cloud.client.put(f"/instances/ips/{uuid}/rdns", json={"rdns": name})
    assert refused.status_code == 422, refused.text
    add_customers_record(cloud, name, address)
    named = cloud.client.put(f"/instances/ips/{uuid}/rdns", json={"rdns": name})
    assert (named.status_code, named.json()["data"]) == (200, name)
    assert reverse(cloud, address) == name

    detached = cloud.client.put(f"/networks/public/{spare}/instance", json={"instance_id": ""})
    _follow(cloud, detached)
    assert cloud.show(second["uuid"])["public_network"] is None
    with pinged(address) as answers:
        time.sleep(3)
        began = time.monotonic()
        moved = cloud.client.put(
            f"/networks/public/{uuid}/instance", json={"instance_id": second["uuid"]}
        )
        _follow(cloud, moved)
        ended_s = time.monotonic() - began
        hostname = cloud.ssh_when_up(address, "hostname").strip()
        time.sleep(2)
    assert hostname == "to"
    gap_s = longest_gap_s(answers)
    print(f"\naddress moved between guests: operation {ended_s:.1f} s, gap {gap_s:.1f} s")
    assert gap_s < GAP_MAX_S
    assert reverse(cloud, address) == name, "the name stays with the address"
    until(
        lambda: reverse(cloud, six) == "", 30, "the IPv6 address of a card that is gone has a name"
    )

    began = time.monotonic()
    swapped = cloud.client.put(
        f"/instances/{second['uuid']}/public-network", json={"public_network": spare}
    )
    _follow(cloud, swapped)
    other = cloud.show(second["uuid"])["ip_address"]
    assert cloud.ssh_when_up(other, "hostname").strip() == "to"
    print(f"address of a running guest changed, reachable after {time.monotonic() - began:.1f} s")
    assert cloud.client.delete(f"/networks/public/{uuid}").status_code == 200
    until(lambda: reverse(cloud, address) == default, 30, "the default name is not back")
    cloud.assert_green()


def _follow(cloud: LabCloud, answer: object) -> None:
    """The change has succeeded, at once or later."""
    assert getattr(answer, "status_code", 0) in (200, 202), getattr(answer, "text", "")
    ended = cloud.wait(answer.json()["operation"]["uuid"])  # type: ignore[attr-defined]
    assert ended["status"] == "succeeded", ended
