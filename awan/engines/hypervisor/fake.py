"""Simulated nodes: domains are rows of the schema `sim`, guests obey at once.

A domain has two definitions, as on a real node: the stored one and the one it was started with.
A guest answers as by an agent `boot_s` seconds after its start. What guests do by themselves, and
what happens to nodes, is said by `crash`, `shut_down_from_inside`, `set_guest` and
`set_node_available`. Listeners hear of changes that were made in their own process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, Literal, LiteralString
from uuid import NAMESPACE_URL, UUID, uuid5

from psycopg.types.json import Jsonb

from awan.engines.hypervisor import (
    GIVE_UP_INTERVAL_S,
    DomainEvent,
    DomainFacts,
    DomainSpec,
    GuestSign,
    NodeEndpoint,
    NodeFacts,
    Power,
    StopOutcome,
    Subscription,
    never,
)
from awan.engines.hypervisor.domain_xml import check_spec, domain_name, printable_title
from awan.engines.sim import SimStore
from awan.errors import EngineRejected, EngineUnavailable
from awan.kit.clock import now

ENGINE = "hypervisor"

DOMAIN_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.domain (
        location        text NOT NULL,
        node_id         uuid NOT NULL,
        uuid            uuid NOT NULL,
        power           text NOT NULL DEFAULT 'stopped'
                        CHECK (power IN ('running', 'paused', 'stopped', 'crashed')),
        config          jsonb NOT NULL,
        live            jsonb,
        started_at      timestamptz,
        sign            text NOT NULL DEFAULT 'agent' CHECK (sign IN ('agent', 'traffic', 'none')),
        hears_power     boolean NOT NULL DEFAULT true,
        PRIMARY KEY (location, node_id, uuid)
    )"""
NODE_DDL: LiteralString = """
    CREATE TABLE IF NOT EXISTS sim.hypervisor_node (
        location        text NOT NULL,
        node_id         uuid NOT NULL,
        is_available    boolean NOT NULL,
        PRIMARY KEY (location, node_id)
    )"""

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
        store.ensure_table(NODE_DDL)

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
                " ON CONFLICT (location, node_id, uuid) DO UPDATE SET config = excluded.config",
                [*self._key(node, spec.instance_id), Jsonb(_as_json(spec))],
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
        with self._call(node, "ensure_stopped", instance_id):
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
        if row is not None and row["power"] in (Power.RUNNING, Power.PAUSED):
            self._announce(node, instance_id, Power.STOPPED, "destroyed")

    def find_domain(self, node: NodeEndpoint, instance_id: UUID) -> DomainFacts | None:
        with self._call(node, "find_domain", instance_id):
            row = self._find(node, instance_id)
            return _read_facts(row) if row is not None else None

    def list_domains(self, node: NodeEndpoint) -> list[DomainFacts]:
        with self._call(node, "list_domains", node.name):
            rows = self._store.fetch_all(
                "SELECT * FROM sim.domain WHERE location = %s AND node_id = %s ORDER BY uuid",
                [self._location, node.node_id],
            )
            return [_read_facts(row) for row in rows]

    def guest_sign(self, node: NodeEndpoint, instance_id: UUID) -> GuestSign:
        with self._call(node, "guest_sign", instance_id):
            row = self._store.find_one(
                "SELECT sign FROM sim.domain WHERE location = %s AND node_id = %s AND uuid = %s"
                " AND power = 'running' AND clock_timestamp() >= started_at + %s * interval '1 s'",
                [*self._key(node, instance_id), self._boot_s],
            )
            return GuestSign(row["sign"]) if row is not None else GuestSign.NONE

    def ensure_media(
        self, node: NodeEndpoint, instance_id: UUID, target: int, path: str | None
    ) -> None:
        with self._call(node, "ensure_media", instance_id):
            row = self._require(node, instance_id, "change media")
            config = _with_media(row["config"], target, path)
            live = _with_media(row["live"], target, path) if row["live"] is not None else None
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
        """Nothing to end: the store belongs to whoever made it."""

    # What the outside world does

    def crash(self, node: NodeEndpoint, instance_id: UUID) -> None:
        """The domain's QEMU dies."""
        if self._set_off(node, instance_id, Power.CRASHED):
            self._announce(node, instance_id, Power.CRASHED, "failed")

    def shut_down_from_inside(self, node: NodeEndpoint, instance_id: UUID) -> None:
        """The guest's user shuts it down."""
        if self._set_off(node, instance_id, Power.STOPPED):
            self._announce(node, instance_id, Power.STOPPED, "shutdown")

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
    def _call(self, node: NodeEndpoint, verb: str, target: object) -> Iterator[None]:
        with self._store.call(ENGINE, verb, str(target)):
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
        disks = row["config"]["disks"]
        self._require_files(node, [disk["path"] for disk in disks if disk["path"]], "start")
        changed = self._store.execute(
            "UPDATE sim.domain SET power = 'running', live = config, started_at = clock_timestamp()"
            " WHERE location = %s AND node_id = %s AND uuid = %s AND power <> 'running'",
            self._key(node, instance_id),
        )
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
        if not force and not is_graceful:
            deadline = time.monotonic() + grace_s
            while (left_s := deadline - time.monotonic()) > 0:
                if gives_up():
                    return StopOutcome.GIVEN_UP
                time.sleep(min(left_s, GIVE_UP_INTERVAL_S))
        if not self._set_off(node, instance_id, Power.STOPPED):
            return StopOutcome.ALREADY_STOPPED
        return StopOutcome.GRACEFUL if is_graceful else StopOutcome.FORCED

    def _set_off(self, node: NodeEndpoint, instance_id: UUID, power: Power) -> bool:
        """The domain runs no more; False when it did not run."""
        changed = self._store.execute(
            "UPDATE sim.domain SET power = %s, live = NULL, started_at = NULL"
            " WHERE location = %s AND node_id = %s AND uuid = %s"
            " AND power IN ('running', 'paused')",
            [power.value, *self._key(node, instance_id)],
        )
        return changed > 0

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


def _as_json(spec: DomainSpec) -> dict[str, Any]:
    return {
        "instance_id": str(spec.instance_id),
        "operation_id": str(spec.operation_id),
        "account_id": str(spec.account_id),
        "title": printable_title(spec.title),
        "vcpus": spec.vcpus,
        "memory_mib": spec.memory_mib,
        "dedicated": spec.dedicated,
        "threads": list(spec.threads),
        "disks": [
            {"target": disk.target, "path": disk.path, "device": disk.device} for disk in spec.disks
        ],
        "port_ids": [str(nic.port_id) for nic in spec.nics],
    }


def _with_media(definition: dict[str, Any], target: int, path: str | None) -> dict[str, Any]:
    """The definition with another image in the CD drive at `target`."""
    drives = {disk["target"] for disk in definition["disks"] if disk["device"] == "cdrom"}
    if target not in drives:
        words = f"the domain has no CD drive at target {target}"
        raise EngineRejected(ENGINE, "change media", words)
    disks = [
        {**disk, "path": path} if disk["target"] == target else disk for disk in definition["disks"]
    ]
    return {**definition, "disks": disks}


def _read_facts(row: dict[str, Any]) -> DomainFacts:
    definition = row["live"] if row["live"] is not None else row["config"]
    return DomainFacts(
        domain_uuid=row["uuid"],
        name=domain_name(row["uuid"]),
        power=Power(row["power"]),
        instance_id=UUID(definition["instance_id"]),
        operation_id=UUID(definition["operation_id"]),
        disk_paths=tuple(disk["path"] for disk in definition["disks"] if disk["path"]),
        port_ids=tuple(UUID(port) for port in definition["port_ids"]),
        threads=tuple(definition["threads"]),
    )
