"""A lab machine: a hypervisor or router made of Linux namespaces instead of hardware.

It has its own network, hostname, processes and mounts. Its `/run` lies in the slot's run directory,
other private folders in its state directory; both are bound over the usual paths only inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.errors import CommandFailed, LabError
from lab.layout import CHECKOUT
from lab.processes import (
    ENVIRONMENT,
    ProcessTable,
    find_host_pid,
    parent_pid,
    run,
    start_daemon,
    wait_until,
)


@dataclass(frozen=True)
class MachineSpec:
    """What `lab.machine_init` is told. Binds are (source, target); hidden folders appear empty."""

    name: str
    binds: tuple[tuple[str, str], ...] = ()
    hidden: tuple[str, ...] = ()
    sysctls: dict[str, str] = field(default_factory=dict)
    wants_cgroups: bool = False


class Machine:
    """Handle on one machine; the machine itself outlives this object and this interpreter."""

    def __init__(self, name: str, run_dir: Path, state_dir: Path, table: ProcessTable) -> None:
        self.name = name
        self.run_dir = run_dir
        self.state_dir = state_dir
        self.table = table

    @property
    def init_pid(self) -> int:
        """Host pid of the machine's first process. Raises: LabError if the machine is not up."""
        pid = self.find_init_pid()
        if pid is None:
            raise LabError(f"{self.name} is not running")
        return pid

    def find_init_pid(self) -> int | None:
        return self.table.find(f"{self.name}.init")

    def start(self, spec: MachineSpec) -> list[str]:
        """Make the namespaces. Gives the cgroup controllers the machine has of its own."""
        self.table.forget(f"{self.name}.")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.state_dir.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "lab.machine_init"],
            input=json.dumps(dataclasses.asdict(spec)),
            capture_output=True,
            text=True,
            cwd=CHECKOUT,
            env=ENVIRONMENT,
            timeout=30,
        )
        if done.returncode != 0:
            raise CommandFailed(f"machine {self.name} could not be made: {done.stderr.strip()}")
        answer = json.loads(done.stdout)
        self.table.record(f"{self.name}.init", answer["pid"])
        controllers: list[str] = answer["cgroup_controllers"]
        return controllers

    def argv(self, argv: Sequence[str]) -> list[str]:
        """The same command, to be run from the host inside the machine."""
        enter = ["nsenter", "--target", str(self.init_pid)]
        return [*enter, "--mount", "--uts", "--ipc", "--net", "--pid", "--", *argv]

    def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: str | None = None,
        check: bool = True,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside. Raises: as `lab.processes.run`; LabError if the machine is down."""
        return run(self.argv(argv), stdin=stdin, check=check, timeout_s=timeout_s)

    def ensure_daemon(
        self, name: str, argv: Sequence[str], pid_file: str, *, is_monitored: bool = False
    ) -> bool:
        """Start a self-detaching daemon unless it runs. True if it was started.
        pid_file: its path inside the machine, below /run.
        is_monitored: its parent stays and starts it again when it crashes, so the parent is what runs."""
        record = f"{self.name}.{name}"
        if self.table.is_alive(record):
            return False
        outer_pid_file = self.run_dir / pid_file.removeprefix("/run/")
        outer_pid_file.unlink(missing_ok=True)
        start_daemon(self.argv(argv), self.state_dir / "var/log/start" / f"{name}.log")
        wait_until(
            lambda: outer_pid_file.exists() and outer_pid_file.read_text().strip().isdigit(),
            f"{name} of {self.name} to start",
        )
        pid = find_host_pid(self.init_pid, int(outer_pid_file.read_text()))
        if pid is None:
            raise LabError(f"{name} of {self.name} ended as soon as it was started")
        self.table.record(record, parent_pid(pid) if is_monitored else pid)
        return True

    def links(self) -> dict[str, dict[str, object]]:
        """The network devices inside, by name, as `ip -json address` describes them."""
        return {d["ifname"]: d for d in json.loads(self.exec(["ip", "-j", "address"]).stdout)}

    def kill(self) -> None:
        """Cut the power: every process inside ends at once. Safe when the machine is down."""
        self.table.stop(f"{self.name}.init", grace_s=0)
        self.table.forget(f"{self.name}.")
        remove_cgroups(self.name)


def remove_cgroups(name: str) -> None:
    """Remove the machine's cgroup subtrees. Their processes must have ended."""
    base = Path("/sys/fs/cgroup")
    roots = [base / name, *(child / name for child in base.iterdir() if child.is_dir())]
    for root in roots:
        for folder, _, _ in os.walk(root, topdown=False):
            _remove_cgroup(Path(folder))


def _remove_cgroup(folder: Path) -> None:
    # The kernel keeps a group busy for a moment after its last process ended.
    for _ in range(50):
        with contextlib.suppress(FileNotFoundError):
            try:
                folder.rmdir()
            except OSError as err:
                if isinstance(err, FileNotFoundError):
                    raise
                time.sleep(0.02)
                continue
        return
