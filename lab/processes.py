"""Running commands, and remembering exactly which processes the lab started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import CommandFailed, LabError

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
}


def run(
    argv: Sequence[str],
    *,
    stdin: str | None = None,
    check: bool = True,
    timeout_s: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and give its text output.
    Raises: CommandFailed when it takes longer than timeout_s or, if `check`, exits non-zero."""
    try:
        done = subprocess.run(
            list(argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=ENVIRONMENT,
        )
    except subprocess.TimeoutExpired as err:
        raise CommandFailed(f"`{' '.join(argv)}` did not end within {timeout_s:g} s") from err
    except FileNotFoundError as err:
        raise CommandFailed(f"the command `{argv[0]}` is not installed") from err
    if check and done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise CommandFailed(f"`{' '.join(argv)}` failed ({done.returncode}): {words}")
    return done


def start_daemon(argv: Sequence[str], log_file: Path, *, timeout_s: float = 60) -> None:
    """Run a command that puts itself into the background.
    Its output goes to a file: a pipe would stay open for as long as the daemon lives."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as log:
        try:
            done = subprocess.run(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=timeout_s,
                env=ENVIRONMENT,
                cwd="/",
            )
        except subprocess.TimeoutExpired as err:
            raise CommandFailed(f"`{' '.join(argv)}` did not detach in {timeout_s:g} s") from err
    if done.returncode != 0:
        words = log_file.read_text(errors="replace").strip()[-2000:]
        raise CommandFailed(f"`{' '.join(argv)}` failed ({done.returncode}): {words}")


def wait_until(
    question: Callable[[], bool], what: str, *, timeout_s: float = 30, interval_s: float = 0.05
) -> None:
    """Ask until the answer is yes. Raises: LabError naming `what` after timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not question():
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(interval_s)


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it does not run.
    A zombie does not run: its parent may reap it late, or never."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def find_host_pid(namespace_init: int, inner_pid: int) -> int | None:
    """The pid by which the host knows process `inner_pid` of a pid namespace.
    None if there is no such process.   namespace_init: host pid of the namespace's first process."""
    namespace = Path(f"/proc/{namespace_init}/ns/pid").readlink()
    for entry in list(os.scandir("/proc")):
        if not entry.name.isdigit():
            continue
        # Processes come and go while we look.
        with contextlib.suppress(OSError):
            if Path(f"/proc/{entry.name}/ns/pid").readlink() != namespace:
                continue
            for line in Path(f"/proc/{entry.name}/status").read_text().splitlines():
                if line.startswith("NSpid:") and int(line.split()[-1]) == inner_pid:
                    return int(entry.name)
    return None


def parent_pid(pid: int) -> int:
    """The parent of a process. Raises: OSError if there is no such process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("PPid:"):
            return int(line.split()[1])
    raise ProcessLookupError(f"no parent of {pid}")


@dataclass(frozen=True)
class ProcessStatus:
    name: str
    pid: int
    alive: bool


class ProcessTable:
    """The processes a slot started, one file each: `<pid> <start in clock ticks>`.
    The start time tells our process from a later one that was given the same pid."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def record(self, name: str, pid: int) -> None:
        """Raises: LabError if the process has already ended."""
        ticks = start_ticks(pid)
        if ticks is None:
            raise LabError(f"{name} ended as soon as it was started")
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / name).write_text(f"{pid} {ticks}\n")

    def find(self, name: str) -> int | None:
        """The pid of a recorded process that still runs, else None."""
        recorded = self._read(name)
        if recorded is None or start_ticks(recorded[0]) != recorded[1]:
            return None
        return recorded[0]

    def is_alive(self, name: str) -> bool:
        return self.find(name) is not None

    def all(self) -> list[ProcessStatus]:
        if not self._folder.is_dir():
            return []
        found = []
        for name in sorted(file.name for file in self._folder.iterdir()):
            recorded = self._read(name)
            if recorded is not None:
                found.append(ProcessStatus(name, recorded[0], self.is_alive(name)))
        return found

    def stop(self, name: str, *, grace_s: float = 5) -> None:
        """End a recorded process: SIGTERM, after grace_s SIGKILL; grace 0 kills at once.
        Safe when it has ended already. Returns when it is gone."""
        pid = self.find(name)
        if pid is not None:
            if grace_s > 0:
                _signal(pid, signal.SIGTERM)
                with contextlib.suppress(LabError):
                    wait_until(lambda: not self.is_alive(name), name, timeout_s=grace_s)
            if self.is_alive(name):
                _signal(pid, signal.SIGKILL)
                wait_until(lambda: not self.is_alive(name), f"{name} to end", timeout_s=15)
            # Our own child would stay a zombie for as long as this interpreter runs.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        (self._folder / name).unlink(missing_ok=True)

    def forget(self, prefix: str) -> None:
        """Drop the records of processes that are known to be gone."""
        if self._folder.is_dir():
            for file in self._folder.glob(f"{prefix}*"):
                file.unlink(missing_ok=True)

    def _read(self, name: str) -> tuple[int, int] | None:
        try:
            pid, ticks = (self._folder / name).read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return int(pid), int(ticks)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
