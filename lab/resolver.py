"""Where members of private networks ask for names: a second Knot, on the upstream router.

It holds the zone of private names alone, which it transfers from the slot's nameserver and is told of at once when it
changes. Only addresses of the services network are answered, so no instance asks it by way of its public card.
"""

from __future__ import annotations

from lab.layout import NAMESERVER_PORT, SlotLayout
from lab.machine import Machine

PORT = 53
RUN = "/run/resolver"
CONFIG = """\
server:
    rundir: "{run}"
    pidfile: "{run}/knot.pid"
    listen: [{resolver}@{port}, {told_at}@{port}]
    udp-workers: 1
    tcp-workers: 2
    background-workers: 1
database:
    storage: "{run}/db"
    journal-db-max-size: 64M
    timer-db-max-size: 8M
    kasp-db-max-size: 8M
    catalog-db-max-size: 8M
control:
    listen: "{run}/knot.sock"
log:
  - target: "{run}/knot.log"
    any: info
key:
  - id: {key_name}
    algorithm: {key_algorithm}
    secret: {key_secret}
remote:
  - id: primary
    address: {primary}
    key: {key_name}
acl:
  - id: primary
    key: {key_name}
    action: notify
zone:
  - domain: {zone}
    storage: "{run}/zones"
    master: primary
    acl: primary
    zonefile-sync: -1
    zonefile-load: none
    journal-content: none
"""


def ensure_resolver(layout: SlotLayout, machine: Machine) -> None:
    """Starts it in the upstream router unless it runs. The router's addresses must exist."""
    facts = layout.nameserver
    folder = machine.run_dir / RUN.removeprefix("/run/")
    for part in ("db", "zones"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    config = folder / "knot.conf"
    config.touch(mode=0o600)
    config.write_text(
        CONFIG.format(
            run=RUN,
            port=PORT,
            resolver=facts.resolver,
            told_at=layout.uplink_router_v4,
            key_name=facts.key_name,
            key_algorithm=facts.key_algorithm,
            key_secret=facts.key_file.read_text().strip(),
            primary=f"{layout.mgmt_ip}@{NAMESERVER_PORT}",
            zone=facts.private_zone,
        )
    )
    machine.ensure_daemon("resolver", ["knotd", "-c", f"{RUN}/knot.conf", "-d"], f"{RUN}/knot.pid")
