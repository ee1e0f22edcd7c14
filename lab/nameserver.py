"""The nameserver of a slot: Knot on the host's management address, which takes signed updates and transfers.

Its zones are those of the location's addresses, and one of a customer, in whose name nobody else may write.
"""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass
from pathlib import Path

from lab.layout import LabNameserver
from lab.processes import ProcessTable, run, start_daemon, wait_until

PROCESS = "nameserver"
KEY_BYTES = 32

# One small thread each: a slot has a handful of names, and shares two processors with guests under emulation.
CONFIG = """\
server:
    rundir: "{run_dir}"
    pidfile: "{run_dir}/knot.pid"
    listen: {address}@{port}
    udp-workers: 1
    tcp-workers: 2
    background-workers: 1
database:
    storage: "{state_dir}/db"
    journal-db-max-size: 64M
    timer-db-max-size: 8M
    kasp-db-max-size: 8M
    catalog-db-max-size: 8M
control:
    listen: "{run_dir}/knot.sock"
log:
  - target: "{log}"
    any: info
key:
  - id: {key_name}
    algorithm: {key_algorithm}
    secret: {key_secret}
{remotes}acl:
  - id: awan
    key: {key_name}
    action: [transfer, update]
template:
  - id: default
    storage: "{state_dir}/zones"
    file: "%s.zone"
    acl: awan
    zonefile-sync: -1
    zonefile-load: difference
    journal-content: changes
zone:
{zones}"""
SECONDARY = """\
remote:
  - id: secondary
    address: {address}
    key: {key_name}
"""
ZONE_FILE = """\
$TTL 300
@ SOA ns.{zone}. hostmaster.{zone}. 1 3600 600 86400 60
@ NS ns.{zone}.
ns {kind} {address}
"""


@dataclass(frozen=True)
class NameserverPlace:
    """Where it listens and keeps its files; `secondary` is told of changes of the private zone at once."""

    run_dir: Path
    state_dir: Path
    address: str
    port: int
    secondary: str | None = None


class NameserverProcess:
    """One Knot. `facts` say which zones it has and which key it takes; the key's file is made here, once."""

    def __init__(self, place: NameserverPlace, facts: LabNameserver, table: ProcessTable) -> None:
        self._place = place
        self._facts = facts
        self._table = table

    def ensure(self) -> None:
        """Starts it unless it runs. The address must exist."""
        if self._table.is_alive(PROCESS):
            return
        place, facts = self._place, self._facts
        for folder in (place.run_dir, place.state_dir / "db", place.state_dir / "zones"):
            folder.mkdir(parents=True, exist_ok=True)
        _ensure_key(facts.key_file)
        zones = (
            *(facts.forward_zone, *facts.reverse_zones),
            *(facts.private_zone, facts.customer_zone),
        )
        for zone in zones:
            file = place.state_dir / "zones" / f"{zone}.zone"
            if not file.exists():
                kind = "AAAA" if ":" in place.address else "A"
                file.write_text(ZONE_FILE.format(zone=zone, kind=kind, address=place.address))
        config = place.run_dir / "knot.conf"
        config.touch(mode=0o600)
        config.write_text(
            CONFIG.format(
                run_dir=place.run_dir,
                state_dir=place.state_dir,
                address=place.address,
                port=place.port,
                log=place.state_dir / "knot.log",
                key_name=facts.key_name,
                key_algorithm=facts.key_algorithm,
                key_secret=facts.key_file.read_text().strip(),
                remotes=""
                if place.secondary is None
                else SECONDARY.format(address=place.secondary, key_name=facts.key_name),
                zones="".join(self._zone(zone) for zone in zones),
            )
        )
        pid_file = place.run_dir / "knot.pid"
        pid_file.unlink(missing_ok=True)
        run(["knotc", "-c", str(config), "conf-check"])
        start_daemon(["knotd", "-c", str(config), "-d"], place.state_dir / "knot.start.log")
        wait_until(pid_file.exists, "the nameserver to start")
        self._table.record(PROCESS, int(pid_file.read_text()))

    def _zone(self, zone: str) -> str:
        is_told = self._place.secondary is not None and zone == self._facts.private_zone
        return f"  - domain: {zone}\n" + ("    notify: secondary\n" if is_told else "")

    def stop(self) -> None:
        """Ends it."""
        self._table.stop(PROCESS)


def _ensure_key(file: Path) -> None:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode() + "\n")
