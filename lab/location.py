"""A lab location as a whole: brought up, healed and ended as one thing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from lab import slots
from lab.central import Central
from lab.certificates import ensure_authority
from lab.errors import LabError
from lab.hypervisor import Hypervisor
from lab.layout import NAMESERVER_PORT, SLOT_MAX, STATE_ROOT, LabInfo, SlotLayout
from lab.links import ensure_mgmt_bridge, remove_host_links
from lab.machine import Machine
from lab.nameserver import PROCESS as NAMESERVER
from lab.nameserver import NameserverPlace, NameserverProcess
from lab.processes import ProcessStatus, ProcessTable, wait_until
from lab.requirements import check_requirements, require_root
from lab.resolver import PORT as RESOLVER_PORT
from lab.router import Router

Progress = Callable[[str, float], None]
"""Told of each finished step and the seconds it took; calls never overlap."""

GUEST_SHUTDOWN_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class LabStatus:
    """owner: the checkout that has the slot, None if nobody has. missing: what should run but
    was never started or has no record."""

    slot: int
    owner: str | None
    processes: tuple[ProcessStatus, ...]
    missing: tuple[str, ...]

    @property
    def is_up(self) -> bool:
        return not self.missing and all(process.alive for process in self.processes)


class Lab:
    """The lab location of one slot. Needs root."""

    def __init__(self, slot: int) -> None:
        if not 0 <= slot <= SLOT_MAX:
            raise LabError(f"there are slots 0 to {SLOT_MAX}, not {slot}")
        self.layout = SlotLayout(slot)
        self._table = ProcessTable(self.layout.run_dir / "pids")
        self._central = Central(self.layout, self._table)
        self._nameserver = NameserverProcess(
            NameserverPlace(
                self.layout.run_dir / NAMESERVER,
                self.layout.state_dir / NAMESERVER,
                self.layout.mgmt_ip,
                NAMESERVER_PORT,
                secondary=f"{self.layout.uplink_router_v4}@{RESOLVER_PORT}",
            ),
            self.layout.nameserver,
            self._table,
        )
        self._router = Router(self.layout, self._table)
        self._nodes = {
            node.name: Hypervisor(self.layout, node, self._router, self._table)
            for node in self.layout.nodes
        }

    @property
    def info(self) -> LabInfo:
        return self.layout.info()

    def up(self, progress: Progress | None = None) -> LabInfo:
        """Bring the location up, or start again what of it has died; then say where it is.
        Safe to repeat; what runs is left alone, guests included.
        Raises: SlotTaken if another checkout has the slot; LabError if a part does not start."""
        check_requirements()
        steps = _Steps(progress)
        with slots.change_mutex(self.layout):
            owner = slots.find_owner(self.layout)
            if owner is not None and not owner.is_us and owner.is_gone:
                self._end()
            slots.claim(self.layout, self._table)
            ensure_authority(self.layout)
            with steps.timed("OVN central"):
                ensure_mgmt_bridge(self.layout)
                self._central.ensure()
            with steps.timed("nameserver"):
                self._nameserver.ensure()
            with steps.timed("upstream router"):
                self._router.ensure()
            with ThreadPoolExecutor(max_workers=len(self._nodes)) as pool:
                ended = [pool.submit(self._ensure_node, n, steps) for n in self._nodes.values()]
            for future in ended:
                future.result()
            with steps.timed("chassis registration"):
                wanted = {node.system_id for node in self.layout.nodes}
                wait_until(
                    lambda: wanted <= self._central.chassis_names(),
                    "both nodes to register with OVN central",
                )
        return self.info

    def down(self, *, keep: bool = False) -> None:
        """End the location and remove everything of it; safe to repeat.
        keep: guests are asked to shut down first, and disks, libvirt definitions and the OVN
        databases stay for a later `up`.
        Raises: SlotTaken if another checkout has the slot."""
        require_root()
        if not self.layout.run_dir.exists() and not self.layout.state_dir.exists():
            return
        with slots.change_mutex(self.layout):
            slots.check_owner(self.layout)
            if keep:
                self._shut_down_guests()
            self._end(keep=keep)
        for folder in (self.layout.run_dir.parent, STATE_ROOT, STATE_ROOT.parent):
            # Others' slots, or files that are not the lab's, keep the folder.
            with contextlib.suppress(OSError):
                folder.rmdir()

    def status(self) -> LabStatus:
        owner = slots.find_owner(self.layout)
        processes = tuple(self._table.all())
        recorded = {process.name for process in processes}
        missing = tuple(name for name in self._expected() if name not in recorded)
        return LabStatus(
            self.layout.slot, None if owner is None else owner.checkout, processes, missing
        )

    def node_exec(
        self,
        node_name: str,
        argv: Sequence[str],
        *,
        stdin: str | None = None,
        check: bool = True,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside a node, with the node's own files, processes and network.
        Raises: CommandFailed if it fails (unless check is False) or outlasts timeout_s."""
        machine = self._node(node_name).machine
        return machine.exec(argv, stdin=stdin, check=check, timeout_s=timeout_s)

    def router_exec(
        self,
        argv: Sequence[str],
        *,
        stdin: str | None = None,
        check: bool = True,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the upstream router. Raises: as node_exec."""
        return self._router.machine.exec(argv, stdin=stdin, check=check, timeout_s=timeout_s)

    def machine_argv(self, name: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` inside a node or the router (`aw<k>-up`), for callers
        that start it themselves."""
        for machine in self._machines():
            if machine.name == name:
                return machine.argv(argv)
        raise LabError(f"there is no machine {name} in slot {self.layout.slot}")

    def end_if_abandoned(self) -> None:
        """End the location if this checkout has it for a process that ended without `down`."""
        if not slots.is_abandoned_by_us(self.layout):
            return
        with slots.change_mutex(self.layout):
            # Another caller may have ended it, and taken the slot, while we waited.
            if slots.is_abandoned_by_us(self.layout):
                self._end()

    def try_claim(self, *, tied_to_pid: int | None) -> bool:
        """Take the slot for this checkout if nobody has it and nothing is kept in it.
        tied_to_pid: the process whose end makes the slot abandoned, None for no such process."""
        return slots.try_claim_free(self.layout, self._table, tied_to_pid=tied_to_pid)

    def node_path(self, node_name: str, path: str) -> Path:
        """Where a node's private file (under /run, /tmp, /var/lib/libvirt, ...) lies on the host."""
        return self._node(node_name).host_path(path)

    def kill_node_processes(self, node_name: str) -> None:
        """Cut a node's power: every process of it ends at once, guests included. `up` repairs it."""
        with slots.change_mutex(self.layout):
            slots.check_owner(self.layout)
            self._node(node_name).machine.kill()

    def _node(self, name: str) -> Hypervisor:
        try:
            return self._nodes[name]
        except KeyError:
            raise LabError(f"there is no node {name}, only {', '.join(self._nodes)}") from None

    def _machines(self) -> list[Machine]:
        return [*(node.machine for node in self._nodes.values()), self._router.machine]

    def _ensure_node(self, node: Hypervisor, steps: _Steps) -> None:
        with steps.timed(f"node {node.layout.name}"):
            node.ensure()

    def _shut_down_guests(self) -> None:
        with ThreadPoolExecutor(max_workers=len(self._nodes)) as pool:
            for node in self._nodes.values():
                pool.submit(node.shut_down_guests, timeout_s=GUEST_SHUTDOWN_TIMEOUT_S)

    def _end(self, *, keep: bool = False) -> None:
        for machine in self._machines():
            machine.kill()
        self._central.stop()
        self._nameserver.stop()
        remove_host_links(self.layout)
        if not keep:
            shutil.rmtree(self.layout.state_dir, ignore_errors=True)
        slots.release(self.layout, self._table)
        shutil.rmtree(self.layout.run_dir, ignore_errors=True)

    def _expected(self) -> Iterator[str]:
        yield slots.HOLDER
        yield from ("central.nb", "central.sb", "central.northd", NAMESERVER)
        router = self.layout.router_name
        yield from (f"{router}.init", f"{router}.radvd", f"{router}.resolver")
        for name in self._nodes:
            for part in (
                *("init", "ovsdb-server", "ovs-vswitchd", "conntrack-limits", "datapath-flows"),
                *("userspace-tracking", "ovn-controller", "virtlogd", "libvirtd"),
            ):
                yield f"{name}.{part}"


def acquire_free_slot(first: int = 1, *, outlives_caller: bool = False) -> int:
    """Take the first free slot >= first for this checkout and give its number.

    The slot stays taken until `Lab(slot).down()`. A slot whose process ended without `down` is
    ended and used again by the next caller from this checkout; outlives_caller: it is not.
    Raises: LabError if none is free."""
    require_root()
    for slot in slots.slots_from(first):
        lab = Lab(slot)
        lab.end_if_abandoned()
        if lab.try_claim(tied_to_pid=None if outlives_caller else os.getpid()):
            return slot
    raise LabError(f"all slots from {first} to {SLOT_MAX} are taken")


class _Steps:
    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = Lock()

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        if self._progress is not None:
            with self._lock:
                self._progress(step, time.monotonic() - started)
