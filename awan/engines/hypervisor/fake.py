"""Simulated nodes: domains are rows of the schema `sim`, guests obey at once.

A domain has two definitions, as on a real node: the stored one and the one it was started with.
A guest answers as by an agent `boot_s` seconds after its start, and uses a little of everything from
then on. What guests do by themselves, and what happens to nodes, is said by `crash`, `pause`,
`shut_down_from_inside`, `set_guest`, `print_serial`, `set_counters`, `set_card_counters`, `set_qemu_answers`,
`set_clock`, `undefine`, `lose_power` and `set_node_available`. Listeners hear of changes that were made in their own
process. The screen of a guest is served over TCP by the process that unlocked its console.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, Literal, LiteralString
from uuid import NAMESPACE_URL, UUID, uuid5

from psycopg.types.json import Jsonb

from awan.engines.hypervisor import (
    GIVE_UP_INTERVAL_S,
    NODE_CALL_TIMEOUT_S,
    UNEXPLAINED,
    AgentAnswer,
    CardHeld,
    ConsoleEndpoint,
    DomainEvent,
    DomainFacts,
    DomainSpec,
    GuestSign,
    NicSpec,
    NodeCounters,
    NodeEndpoint,
    NodeFacts,
    Power,
    StopOutcome,
    Subscription,
    never,
)
from awan.engines.hypervisor.domain_xml import (
    check_console_password,
    check_nics,
    check_spec,
)
from awan.engines.hypervisor.fake_rows import ENGINE, as_json, counters_of, facts_of, with_media
from awan.engines.hypervisor.fake_screen import FakeScreens, Guest
from awan.engines.hypervisor.fake_serial import BOOT_LINES, FakeSerialLogs
from awan.engines.hypervisor.fake_tables import (
    CLOCK_DDL,
    CONSOLE_DDL,
    COUNTERS_DDL,
    DOMAIN_DDL,
    FACTS_QUERY,
    GUEST_DDL,
    NODE_DDL,
)
from awan.engines.hypervisor.pixmap import encode_png
from awan.engines.sim import SimStore
from awan.errors import EngineRejected, EngineUnavailable
from awan.kit.clock import now

SCREEN_WIDTH, SCREEN_HEIGHT = 64, 48


_listeners_lock = threading.Lock()
_listeners: dict[tuple[str, UUID], list[Callable[[DomainEvent], None]]] = {}


class FakeHypervisor:
    """The contract `Hypervisor` on `SimStore`. `location` is the store's unless given.

    Each node has the given threads, memory and disk. `boot_s`: from start to the first guest sign.
    """

    def __init__(
        self,
        store: SimStore,
        *,
        location: str | None = None,
        boot_s: float = 0.5,
        threads: int = 16,
        memory_mib: int = 65536,
        disk_gib: int = 2000,
        on_probe: Callable[[NodeEndpoint], None] | None = None,
    ) -> None:
        self._store = store
        self._location = store.location if location is None else location
        self._boot_s = boot_s
        self._on_probe = on_probe
        self._threads = threads
        self._memory_mib = memory_mib
        self._disk_gib = disk_gib
        store.ensure_table(DOMAIN_DDL)
        store.ensure_table(GUEST_DDL)
        store.ensure_table(NODE_DDL)
        store.ensure_table(CLOCK_DDL)
        store.ensure_table(COUNTERS_DDL)
        store.ensure_table(CONSOLE_DDL)
        self._screens = FakeScreens()
        self._serial = FakeSerialLogs(store, self._location)

    def probe(self, node: NodeEndpoint) -> NodeFacts:
        with self._call(node, "probe", node.name):
            host_uuid = uuid5(NAMESPACE_URL, node.uri)
            if node.host_uuid not in (None, host_uuid):
                words = f"the host's uuid is {host_uuid}, expected {node.host_uuid}"
                raise EngineRejected(ENGINE, f"probe {node.name}", words)
            if self._on_probe is not None:
                self._on_probe(node)
            return NodeFacts(
                hostname=node.name,
                host_uuid=host_uuid,
                libvirt_version="9.0.0",
                qemu_version="7.2.0",
                cpu_model="simulated",
                cpu_threads=tuple(range(self._threads)),
                memory_mib=self._memory_mib,
                kvm=True,
                pool_name="awan",
                pool_capacity_gib=self._disk_gib,
                pool_available_gib=self._disk_gib,
            )

    def ensure_defined(self, node: NodeEndpoint, spec: DomainSpec) -> None:
        with self._call(node, "ensure_defined", spec.instance_id):
            check_spec(spec)
            self._store.execute(
                "INSERT INTO sim.domain (location, node_id, uuid, config) VALUES (%s, %s, %s, %s)"
                " ON CONFLICT (location, node_id, uuid)"
                " DO UPDATE SET config = excluded.config, is_persistent = true",
                [*self._key(node, spec.instance_id), Jsonb(as_json(spec))],
            )

    def ensure_shared_threads(self, node: NodeEndpoint, threads: tuple[int, ...]) -> None:
        with self._call(node, "ensure_shared_threads", node.name):
            self._store.execute(
                "UPDATE sim.domain SET config = jsonb_set(config, '{threads}', %(threads)s),"
                " live = jsonb_set(live, '{threads}', %(threads)s)"
                " WHERE location = %(location)s AND node_id = %(node)s"
                " AND config -> 'dedicated' = 'false'",
                {
                    "threads": Jsonb(list(threads)),
                    "location": self._location,
                    "node": node.node_id,
                },
            )

    def ensure_running(self, node: NodeEndpoint, instance_id: UUID) -> None:
        with self._call(node, "ensure_running", instance_id):
            is_change = self._start(node, instance_id)
        if is_change:
            self._announce(node, instance_id, Power.RUNNING, "started")

    def ensure_stopped(
        self,
        node: NodeEndpoint,
        instance_id: UUID,
        *,
        grace_s: float,
        force: bool = False,
        gives_up: Callable[[], bool] = never,
    ) -> StopOutcome:
        with self._call(node, "ensure_stopped", instance_id, is_long=True):
            outcome = self._stop(node, instance_id, grace_s=grace_s, force=force, gives_up=gives_up)
        self._announce_stop(node, instance_id, outcome)
        return outcome

    def ensure_absent(self, node: NodeEndpoint, instance_id: UUID) -> None:
        with self._call(node, "ensure_absent", instance_id):
            row = self._store.find_one(
                "DELETE FROM sim.domain WHERE location = %s AND node_id = %s AND uuid = %s"
                " RETURNING power",
                self._key(node, instance_id),
            )
            self._store.execute(
                "DELETE FROM sim.guest WHERE location = %s AND node_id = %s AND uuid = %s",
                self._key(node, instance_id),
            )
        if row is not None and row["power"] in (Power.RUNNING, Power.PAUSED):
            self._announce(node, instance_id, Power.STOPPED, "destroyed")

    def find_domain(self, node: NodeEndpoint, instance_id: UUID) -> DomainFacts | None:
        with self._call(node, "find_domain", instance_id):
            row = self._store.find_one(
                FACTS_QUERY + " AND domain.uuid = %s",
                [self._location, node.node_id, instance_id],
            )
            return facts_of(row) if row is not None else None

    def list_domains(
        self, node: NodeEndpoint, *, timeout_s: float = NODE_CALL_TIMEOUT_S
    ) -> list[DomainFacts]:
        with self._call(node, "list_domains", node.name):
            rows = self._store.fetch_all(
                FACTS_QUERY + " ORDER BY domain.uuid", [self._location, node.node_id]
            )
            return [facts_of(row) for row in rows]

    def read_counters(self, node: NodeEndpoint) -> NodeCounters:
        with self._call(node, "read_counters", node.name):
            rows = self._store.fetch_all(
                "SELECT uuid, started_at, live, coalesce(stands_at, clock_timestamp()) AS read_at,"
                " coalesce(counters, '{}') AS counters, coalesce(qemu_answers, true) AS qemu_answers"
                " FROM sim.domain LEFT JOIN sim.domain_counters USING (location, node_id, uuid)"
                " LEFT JOIN sim.hypervisor_clock USING (location, node_id)"
                " WHERE location = %s AND node_id = %s AND power = 'running' ORDER BY uuid",
                [self._location, node.node_id],
            )
            read_at = rows[0]["read_at"] if rows else now()
            return NodeCounters(read_at, tuple(counters_of(row, read_at) for row in rows))

    def guest_sign(self, node: NodeEndpoint, instance_id: UUID) -> GuestSign:
        with self._call(node, "guest_sign", instance_id):
            return self._sign(node, instance_id)

    def set_password(
        self, node: NodeEndpoint, instance_id: UUID, username: str, password_hash: str
    ) -> AgentAnswer:
        with self._call(node, "set_password", instance_id):
            answer = self._agent_answer(node, instance_id)
            if answer == AgentAnswer.DONE:
                digest = hashlib.sha256(password_hash.encode()).hexdigest()
                self._store.execute(
                    "INSERT INTO sim.guest (location, node_id, uuid, username, password_digest)"
                    " VALUES (%s, %s, %s, %s, %s) ON CONFLICT (location, node_id, uuid) DO UPDATE"
                    " SET username = excluded.username, password_digest = excluded.password_digest",
                    [*self._key(node, instance_id), username, digest],
                )
            return answer

    def set_hostname(self, node: NodeEndpoint, instance_id: UUID, hostname: str) -> AgentAnswer:
        with self._call(node, "set_hostname", instance_id):
            answer = self._agent_answer(node, instance_id)
            if answer == AgentAnswer.DONE:
                self._store.execute(
                    "INSERT INTO sim.guest (location, node_id, uuid, hostname)"
                    " VALUES (%s, %s, %s, %s) ON CONFLICT (location, node_id, uuid) DO UPDATE"
                    " SET hostname = excluded.hostname",
                    [*self._key(node, instance_id), hostname],
                )
            return answer

    def reset(self, node: NodeEndpoint, instance_id: UUID) -> None:
        with self._call(node, "reset", instance_id):
            self._require_running(node, instance_id, "reset")
            self._store.execute(
                "UPDATE sim.domain SET started_at = clock_timestamp()"
                " WHERE location = %s AND node_id = %s AND uuid = %s",
                self._key(node, instance_id),
            )
            self._store.execute(
                "INSERT INTO sim.guest (location, node_id, uuid, resets) VALUES (%s, %s, %s, 1)"
                " ON CONFLICT (location, node_id, uuid) DO UPDATE SET resets = guest.resets + 1",
                self._key(node, instance_id),
            )

    def screenshot(self, node: NodeEndpoint, instance_id: UUID) -> bytes:
        with self._call(node, "screenshot", instance_id):
            self._require_running(node, instance_id, "take a screenshot")
            # A screen in one colour, another for each domain.
            pixels = instance_id.bytes[:3] * (SCREEN_WIDTH * SCREEN_HEIGHT)
            return encode_png(SCREEN_WIDTH, SCREEN_HEIGHT, pixels)

    def read_serial_log(self, node: NodeEndpoint, instance_id: UUID, *, bytes_max: int) -> bytes:
        with self._call(node, "read_serial_log", instance_id):
            self._require(node, instance_id, "read a serial log")
            return self._serial.read(instance_id, bytes_max)

    def ensure_media(
        self, node: NodeEndpoint, instance_id: UUID, target: int, path: str | None
    ) -> None:
        with self._call(node, "ensure_media", instance_id):
            row = self._require(node, instance_id, "change media")
            config = with_media(row["config"], target, path)
            live = with_media(row["live"], target, path) if row["live"] is not None else None
            if path is not None:
                self._require_files(node, [path], "change media")
            self._store.execute(
                "UPDATE sim.domain SET config = %s, live = %s"
                " WHERE location = %s AND node_id = %s AND uuid = %s",
                [
                    Jsonb(config),
                    Jsonb(live) if live is not None else None,
                    *self._key(node, instance_id),
                ],
            )

    def ensure_nics(self, node: NodeEndpoint, instance_id: UUID, nics: tuple[NicSpec, ...]) -> None:
        """See `Hypervisor`. Never sleeps: a guest that holds on to its cards does so until it is off."""
        with self._call(node, "ensure_nics", instance_id):
            check_nics(nics)
            row = self._require(node, instance_id, "change network cards")
            wanted = [str(nic.port_id) for nic in nics]
            is_live = row["live"] is not None
            present = row["live"]["port_ids"] if is_live else []
            held = [port for port in present if port not in wanted] if row["holds_nics"] else []
            kept = [port for port in present if port in wanted or port in held]
            live = kept + [port for port in wanted if port not in kept]
            self._store.execute(
                "UPDATE sim.domain SET config = jsonb_set(config, '{port_ids}', %s),"
                " live = jsonb_set(live, '{port_ids}', %s)"
                " WHERE location = %s AND node_id = %s AND uuid = %s",
                [Jsonb(wanted), Jsonb(live), *self._key(node, instance_id)],
            )
            if held:
                what = f"take network cards from {instance_id} on {node.name}"
                raise CardHeld(ENGINE, what, f"the guest does not let go of {held}")

    def unlock_console(
        self, node: NodeEndpoint, instance_id: UUID, *, password: str, valid_s: float
    ) -> ConsoleEndpoint:
        with self._call(node, "unlock_console", instance_id):
            check_console_password(password)
            key = self._key(node, instance_id)
            changed = self._store.execute(
                "INSERT INTO sim.console (location, node_id, uuid, started_at, password, valid_until)"
                " SELECT location, node_id, uuid, started_at, %s, clock_timestamp() + %s * interval '1 s'"
                " FROM sim.domain"
                " WHERE location = %s AND node_id = %s AND uuid = %s AND power = 'running'"
                " ON CONFLICT (location, node_id, uuid) DO UPDATE SET started_at = excluded.started_at,"
                " password = excluded.password, valid_until = excluded.valid_until",
                [password, valid_s, *key],
            )
            if not changed:
                words = "the domain does not run"
                raise EngineRejected(ENGINE, f"unlock the console of {instance_id}", words)
            guest = Guest(
                is_on=lambda: self._is_running(key), find_password=lambda: self._find_password(key)
            )
            host, port = self._screens.serve(instance_id, guest)
            return ConsoleEndpoint(host, port, requires_tls=False)

    def lock_console(self, node: NodeEndpoint, instance_id: UUID) -> None:
        with self._call(node, "lock_console", instance_id):
            self._store.execute(
                "UPDATE sim.console SET password = NULL"
                " WHERE location = %s AND node_id = %s AND uuid = %s",
                self._key(node, instance_id),
            )

    def subscribe(
        self, node: NodeEndpoint, listener: Callable[[DomainEvent], None]
    ) -> Subscription:
        key = (self._location, node.node_id)
        with _listeners_lock:
            _listeners.setdefault(key, []).append(listener)

        def cancel() -> None:
            with _listeners_lock:
                if listener in _listeners.get(key, []):
                    _listeners[key].remove(listener)

        return Subscription(cancel)

    def close(self) -> None:
        """Ends the screens. The store belongs to whoever made it."""
        self._screens.close()

    # What the outside world does

    def crash(self, node: NodeEndpoint, instance_id: UUID) -> None:
        """The domain's QEMU dies."""
        if self._set_off(node, instance_id, Power.CRASHED, "failed"):
            self._announce(node, instance_id, Power.CRASHED, "failed")

    def shut_down_from_inside(self, node: NodeEndpoint, instance_id: UUID) -> None:
        """The guest's user shuts it down."""
        if self._set_off(node, instance_id, Power.STOPPED, "shutdown"):
            self._announce(node, instance_id, Power.STOPPED, "shutdown")

    def pause(self, node: NodeEndpoint, instance_id: UUID, detail: str) -> None:
        """The running domain is paused, by hand or (`PAUSED_IO_ERROR`) by its QEMU."""
        changed = self._store.execute(
            "UPDATE sim.domain SET power = 'paused', detail = %s"
            " WHERE location = %s AND node_id = %s AND uuid = %s AND power = 'running'",
            [detail, *self._key(node, instance_id)],
        )
        if changed:
            self._announce(node, instance_id, Power.PAUSED, "paused")

    def undefine(self, node: NodeEndpoint, instance_id: UUID) -> None:
        """Somebody removes the definition by hand; a domain that runs goes on without one."""
        self._store.execute(
            "UPDATE sim.domain SET is_persistent = false"
            " WHERE location = %s AND node_id = %s AND uuid = %s",
            self._key(node, instance_id),
        )
        self._forget_transient(node)

    def lose_power(self, node: NodeEndpoint) -> None:
        """The node is reset: no domain runs any more, nobody is told, and the node does not know why."""
        self._store.execute(
            "UPDATE sim.domain SET power = 'stopped', detail = %s, live = NULL, started_at = NULL"
            " WHERE location = %s AND node_id = %s",
            [UNEXPLAINED, self._location, node.node_id],
        )
        self._forget_transient(node)

    def set_guest(
        self,
        node: NodeEndpoint,
        instance_id: UUID,
        *,
        sign: Literal["agent", "traffic", "none"] = "agent",
        hears_power: bool = True,
    ) -> None:
        """What sign the guest gives once it has booted, and whether the power button shuts it down."""
        self._store.execute(
            "UPDATE sim.domain SET sign = %s, hears_power = %s"
            " WHERE location = %s AND node_id = %s AND uuid = %s",
            [sign, hears_power, *self._key(node, instance_id)],
        )

    def set_holds_nics(self, node: NodeEndpoint, instance_id: UUID, holds: bool) -> None:
        """Whether the running guest keeps the network cards that it is asked for."""
        self._store.execute(
            "UPDATE sim.domain SET holds_nics = %s"
            " WHERE location = %s AND node_id = %s AND uuid = %s",
            [holds, *self._key(node, instance_id)],
        )

    def print_serial(self, instance_id: UUID, content: bytes) -> None:
        """The guest prints on its serial console."""
        self._serial.append(instance_id, content)

    def set_counters(
        self, node: NodeEndpoint, instance_id: UUID, **counters: int | list[int]
    ) -> None:
        """The running domain's counters stand at these values until they are set again or it starts anew.

        Names are those of `fake_rows.STEADY_LOAD`, also `disk_used_bytes` and `memory_used_bytes`.
        """
        self._store.execute(
            "INSERT INTO sim.domain_counters (location, node_id, uuid, counters)"
            " VALUES (%s, %s, %s, %s) ON CONFLICT (location, node_id, uuid)"
            " DO UPDATE SET counters = domain_counters.counters || excluded.counters",
            [*self._key(node, instance_id), Jsonb(counters)],
        )

    def set_card_counters(
        self, node: NodeEndpoint, instance_id: UUID, port_id: UUID, *, in_bytes: int, out_bytes: int
    ) -> None:
        """As `set_counters`, of one card."""
        self.set_counters(node, instance_id, **{str(port_id): [in_bytes, out_bytes]})

    def set_qemu_answers(self, node: NodeEndpoint, instance_id: UUID, answers: bool) -> None:
        """A QEMU that does not answer keeps its counters of disks and memory to itself."""
        self._store.execute(
            "INSERT INTO sim.domain_counters (location, node_id, uuid, qemu_answers)"
            " VALUES (%s, %s, %s, %s) ON CONFLICT (location, node_id, uuid)"
            " DO UPDATE SET qemu_answers = excluded.qemu_answers",
            [*self._key(node, instance_id), answers],
        )

    def set_clock(self, node: NodeEndpoint, stands_at: datetime) -> None:
        """Counters are read as at this moment from now on."""
        self._store.execute(
            "INSERT INTO sim.hypervisor_clock (location, node_id, stands_at) VALUES (%s, %s, %s)"
            " ON CONFLICT (location, node_id) DO UPDATE SET stands_at = excluded.stands_at",
            [self._location, node.node_id, stands_at],
        )

    def set_guest_obedient(self, node: NodeEndpoint, instance_id: UUID, is_obedient: bool) -> None:
        """A guest that is not obedient has an agent that answers and cannot do what it is asked."""
        self._store.execute(
            "INSERT INTO sim.guest (location, node_id, uuid, is_obedient) VALUES (%s, %s, %s, %s)"
            " ON CONFLICT (location, node_id, uuid) DO UPDATE"
            " SET is_obedient = excluded.is_obedient",
            [*self._key(node, instance_id), is_obedient],
        )

    def set_node_available(self, node: NodeEndpoint, is_available: bool) -> None:
        """A node that is not available answers no call; its domains stay as they are."""
        self._store.execute(
            "INSERT INTO sim.hypervisor_node (location, node_id, is_available) VALUES (%s, %s, %s)"
            " ON CONFLICT (location, node_id) DO UPDATE SET is_available = excluded.is_available",
            [self._location, node.node_id, is_available],
        )

    def _key(self, node: NodeEndpoint, instance_id: UUID) -> list[Any]:
        return [self._location, node.node_id, instance_id]

    @contextmanager
    def _call(
        self, node: NodeEndpoint, verb: str, target: object, *, is_long: bool = False
    ) -> Iterator[None]:
        with self._store.call(ENGINE, verb, str(target), is_long=is_long):
            row = self._store.find_one(
                "SELECT is_available FROM sim.hypervisor_node"
                " WHERE location = %s AND node_id = %s AND NOT is_available",
                [self._location, node.node_id],
            )
            if row is not None:
                raise EngineUnavailable(
                    ENGINE, f"{verb} on {node.name}", "the node does not answer"
                )
            yield

    def _is_running(self, key: list[Any]) -> bool:
        query: LiteralString = (
            "SELECT 1 FROM sim.domain"
            " WHERE location = %s AND node_id = %s AND uuid = %s AND power = 'running'"
        )
        return self._store.find_one(query, key) is not None

    def _find_password(self, key: list[Any]) -> str | None:
        """What opens the screen of the running domain now. A domain that was started anew is locked again."""
        row = self._store.find_one(
            "SELECT password FROM sim.console JOIN sim.domain USING (location, node_id, uuid, started_at)"
            " WHERE location = %s AND node_id = %s AND uuid = %s AND power = 'running'"
            " AND valid_until > clock_timestamp()",
            key,
        )
        return row["password"] if row is not None else None

    def _find(self, node: NodeEndpoint, instance_id: UUID) -> dict[str, Any] | None:
        return self._store.find_one(
            "SELECT * FROM sim.domain WHERE location = %s AND node_id = %s AND uuid = %s",
            self._key(node, instance_id),
        )

    def _require(self, node: NodeEndpoint, instance_id: UUID, what: str) -> dict[str, Any]:
        row = self._find(node, instance_id)
        if row is None:
            raise EngineRejected(
                ENGINE, f"{what} on {node.name}", f"no domain with uuid {instance_id}"
            )
        return row

    def _require_running(self, node: NodeEndpoint, instance_id: UUID, what: str) -> None:
        if self._require(node, instance_id, what)["power"] != Power.RUNNING:
            words = f"the domain {instance_id} does not run"
            raise EngineRejected(ENGINE, f"{what} on {node.name}", words)

    def _sign(self, node: NodeEndpoint, instance_id: UUID) -> GuestSign:
        row = self._store.find_one(
            "SELECT sign FROM sim.domain WHERE location = %s AND node_id = %s AND uuid = %s"
            " AND power = 'running' AND clock_timestamp() >= started_at + %s * interval '1 s'",
            [*self._key(node, instance_id), self._boot_s],
        )
        return GuestSign(row["sign"]) if row is not None else GuestSign.NONE

    def _agent_answer(self, node: NodeEndpoint, instance_id: UUID) -> AgentAnswer:
        if self._sign(node, instance_id) != GuestSign.AGENT:
            return AgentAnswer.SILENT
        row = self._store.find_one(
            "SELECT is_obedient FROM sim.guest WHERE location = %s AND node_id = %s AND uuid = %s",
            self._key(node, instance_id),
        )
        is_obedient = row is None or row["is_obedient"]
        return AgentAnswer.DONE if is_obedient else AgentAnswer.REFUSED

    def _require_files(self, node: NodeEndpoint, paths: list[str], what: str) -> None:
        """A real QEMU does not start without its files: neither does ours, if volumes are simulated."""
        known = self._store.find_one("SELECT to_regclass('sim.volume') IS NOT NULL AS known")
        if known is None or not known["known"]:
            return
        rows = self._store.fetch_all(
            "SELECT name FROM sim.volume WHERE location = %s AND node_id = %s",
            [self._location, node.node_id],
        )
        present = {row["name"] for row in rows}
        for path in paths:
            if PurePosixPath(path).name not in present:
                raise EngineRejected(ENGINE, f"{what} on {node.name}", f"no file {path}")

    def _start(self, node: NodeEndpoint, instance_id: UUID) -> bool:
        """Starts the domain; False when it runs already."""
        row = self._require(node, instance_id, "start")
        if row["power"] == Power.RUNNING:
            return False
        if row["power"] == Power.PAUSED:
            resumed = self._store.execute(
                "UPDATE sim.domain SET power = 'running'"
                " WHERE location = %s AND node_id = %s AND uuid = %s AND power = 'paused'",
                self._key(node, instance_id),
            )
            return resumed > 0
        disks = row["config"]["disks"]
        self._require_files(node, [disk["path"] for disk in disks if disk["path"]], "start")
        changed = self._store.execute(
            "UPDATE sim.domain SET power = 'running', live = config, started_at = clock_timestamp()"
            " WHERE location = %s AND node_id = %s AND uuid = %s AND power <> 'running'",
            self._key(node, instance_id),
        )
        self._store.execute(
            "DELETE FROM sim.domain_counters WHERE location = %s AND node_id = %s AND uuid = %s",
            self._key(node, instance_id),
        )
        self._serial.append(instance_id, BOOT_LINES)
        return changed > 0

    def _stop(
        self,
        node: NodeEndpoint,
        instance_id: UUID,
        *,
        grace_s: float,
        force: bool,
        gives_up: Callable[[], bool],
    ) -> StopOutcome:
        row = self._find(node, instance_id)
        if row is None or row["power"] in (Power.STOPPED, Power.CRASHED):
            return StopOutcome.ALREADY_STOPPED
        is_graceful = not force and row["hears_power"] and row["power"] == Power.RUNNING
        # A paused guest cannot hear the power button.
        if not force and not is_graceful and row["power"] == Power.RUNNING:
            deadline = time.monotonic() + grace_s
            while (left_s := deadline - time.monotonic()) > 0:
                if gives_up():
                    return StopOutcome.GIVEN_UP
                time.sleep(min(left_s, GIVE_UP_INTERVAL_S))
        detail = "shutdown" if is_graceful else "destroyed"
        if not self._set_off(node, instance_id, Power.STOPPED, detail):
            return StopOutcome.ALREADY_STOPPED
        return StopOutcome.GRACEFUL if is_graceful else StopOutcome.FORCED

    def _set_off(self, node: NodeEndpoint, instance_id: UUID, power: Power, detail: str) -> bool:
        """The domain runs no more; False when it did not run."""
        changed = self._store.execute(
            "UPDATE sim.domain SET power = %s, detail = %s, live = NULL, started_at = NULL"
            " WHERE location = %s AND node_id = %s AND uuid = %s"
            " AND power IN ('running', 'paused')",
            [power.value, detail, *self._key(node, instance_id)],
        )
        self._forget_transient(node)
        return changed > 0

    def _forget_transient(self, node: NodeEndpoint) -> None:
        """What has no definition is gone once it is off."""
        self._store.execute(
            "DELETE FROM sim.domain WHERE location = %s AND node_id = %s"
            " AND NOT is_persistent AND power IN ('stopped', 'crashed')",
            [self._location, node.node_id],
        )

    def _announce_stop(self, node: NodeEndpoint, instance_id: UUID, outcome: StopOutcome) -> None:
        if outcome in (StopOutcome.GRACEFUL, StopOutcome.FORCED):
            detail = "shutdown" if outcome == StopOutcome.GRACEFUL else "destroyed"
            self._announce(node, instance_id, Power.STOPPED, detail)

    def _announce(self, node: NodeEndpoint, instance_id: UUID, power: Power, detail: str) -> None:
        with _listeners_lock:
            listeners = list(_listeners.get((self._location, node.node_id), []))
        event = DomainEvent(node.node_id, instance_id, power, detail, now())
        for listener in listeners:
            listener(event)
