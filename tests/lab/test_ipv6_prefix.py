"""A routed IPv6 prefix as a customer uses it: asked for, reached from outside, named, taken away."""

from __future__ import annotations

import dns.name
import dns.query
import dns.tsig
import dns.update
import pytest

from lab.processes import run
from tests.lab.test_moving_addresses import reverse
from tests.support.lab_cloud import LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def reaches(address: str) -> bool:
    """Whether an address answers this host, which stands beyond the provider's router."""
    ping = ["ping", "-6", "-c", "2", "-i", "0.3", "-W", "2", address]
    return ", 0% packet loss" in run(ping, check=False).stdout


def add_customers_record(cloud: LabCloud, name: str, address: str) -> None:
    """What a customer does in a zone of its own."""
    facts = cloud.info.nameserver
    key = dns.tsig.Key(facts.key_name, facts.options["key_secret"], f"{facts.key_algorithm}.")
    update = dns.update.UpdateMessage(f"{facts.customer_zone}.", keyring=key)
    update.replace(dns.name.from_text(f"{name}."), 60, "AAAA", address)
    host, port = facts.server.split(":")
    assert dns.query.tcp(update, host, port=int(port), timeout=5).rcode() == 0


@pytest.mark.sampled("story")
def test_a_prefix_is_used_and_named(cloud: LabCloud) -> None:
    made = cloud.create_instance(hostname="six")
    uuid, ip = made["uuid"], made["ip_address"]
    cloud.ssh_when_up(ip)
    path = f"/instances/{uuid}/ipv6"
    answer = cloud.client.post(f"{path}/prefix")
    assert answer.status_code in (200, 202), answer.text
    assert cloud.wait(answer.json()["operation"]["uuid"])["status"] == "succeeded"
    prefix = cloud.show(uuid)["ipv6_prefix"]
    inside = prefix.replace("::/64", "::25")
    assert not reaches(inside)
    assert cloud.ssh(ip, f"sudo ip -6 address add {inside}/128 dev lo").returncode == 0
    until(lambda: reaches(inside), 20, "the prefix is not reached")
    gateway = cloud.info.public_v6_gateway
    said = cloud.ssh(ip, f"ping -c 2 -i 0.3 -W 5 -I {inside} {gateway}")
    assert said.returncode == 0, said

    name = f"six.{cloud.info.nameserver.customer_zone}"
    for address in (inside, made["public_network"]["ipv6_address"]):
        body = {"ip_address": address, "rdns": name}
        assert cloud.client.put(f"{path}/rdns", json=body).status_code == 422
        add_customers_record(cloud, name, address)
        named = cloud.client.put(f"{path}/rdns", json=body)
        assert (named.status_code, named.json()["data"]) == (200, name), named.text
        until(lambda asked=address: reverse(cloud, asked) == name, 30, "no such name")
    cloud.assert_green()

    gone = cloud.client.delete(f"{path}/prefix")
    assert cloud.wait(gone.json()["operation"]["uuid"])["status"] == "succeeded"
    until(lambda: not reaches(inside), 10, "the prefix is reached")
    until(lambda: reverse(cloud, inside) == "", 30, "the name is still there")
    cloud.assert_green()
