"""A supervisord of our own for each state directory, spoken to over its Unix socket.

    supervisor = Supervisor(run_dir, log_dir)
    supervisor.start([Program("api", [...])])    # or brings the running one up to date
    supervisor.statuses()                        # {"api": Status(state="RUNNING", pid=4711, ...)}
    supervisor.stop()                            # ends it and its programs, nothing else

A program that ends, however it ends, is started again at once, for ever, at most once a second.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG_MAX_BYTES = 10 * 1024 * 1024
LOG_BACKUPS = 5
CALL_TIMEOUT_S = 60.0
START_TIMEOUT_S = 15.0
# What a program inherits besides its own environment: nothing else of the shell that called us.
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")
# supervisord sets this in each program's environment: the mark by which we know our own after a crash.
MARK = "SUPERVISOR_SERVER_URL"
NOT_RUNNING = "SHUTDOWN_STATE"


class SupervisorError(Exception):
    """The supervisor did not start, stop or answer; the text says what was attempted."""


@dataclass(frozen=True)
class Program:
    """One process to keep alive.

    `user`: run as this operating-system user (needs root). Programs of low `priority` start first and stop last.
    `stop_wait_s`: how long after the stop signal it is killed. `starts_alone=False`: waits for `start_program`.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path = Path("/")
    user: str | None = None
    priority: int = 100
    stop_signal: str = "TERM"
    stop_wait_s: int = 20
    starts_alone: bool = True


@dataclass(frozen=True)
class Status:
    """What the supervisor says of a program. `started_at` is a Unix time in seconds, 0 if it never ran."""

    name: str
    state: str
    pid: int
    started_at: int
    description: str

    @property
    def is_running(self) -> bool:
        """Whether the process exists."""
        return self.state == "RUNNING"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CALL_TIMEOUT_S)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = _UnixConnection(str(self.path))
        self._connection = host, connection  # what close() closes
        return connection


class Supervisor:
    """The supervisord whose socket is `run_dir/supervisor.sock`; programs log to `log_dir/<name>.log`."""

    def __init__(self, run_dir: Path, log_dir: Path) -> None:
        self.run_dir = run_dir.resolve()
        self.log_dir = log_dir.resolve()
        self.socket_path = self.run_dir / "supervisor.sock"
        self.pid_path = self.run_dir / "supervisord.pid"
        self.config_path = self.run_dir / "supervisord.conf"

    def is_up(self) -> bool:
        """Whether supervisord answers."""
        try:
            return bool(self._call("supervisor.getState")["statename"] == "RUNNING")
        except (OSError, http.client.HTTPException):
            return False

    def start(self, programs: Iterable[Program]) -> None:
        """supervisord runs with exactly these programs; those whose definition has not changed go on undisturbed.

        What a killed supervisord left running is ended first. Raises: SupervisorError when it does not come up.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._write_config(list(programs))
        if self.is_up():
            self._update()
            return
        self.end_strays()
        result = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.config_path)],
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
            env={name: os.environ[name] for name in INHERITED if name in os.environ},
        )
        if result.returncode != 0:
            raise SupervisorError(f"supervisord did not start: {result.stderr or result.stdout}")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_up():
            if time.monotonic() > deadline:
                raise SupervisorError(f"supervisord does not answer on {self.socket_path}")
            time.sleep(0.02)

    def stop(self, *, timeout_s: float = 90.0) -> bool:
        """Ends all programs in order, then supervisord. Whether there was anything to end."""
        pid = self._supervisord_pid()
        if pid is None:
            return self.end_strays() > 0
        _signal_all([pid], signal.SIGTERM)
        if not _wait_gone([pid], timeout_s):
            raise SupervisorError(f"supervisord (pid {pid}) did not end within {timeout_s:.0f} s")
        self.end_strays()
        for path in (self.socket_path, self.pid_path):
            path.unlink(missing_ok=True)
        return True

    def statuses(self) -> dict[str, Status]:
        """The programs by name; empty when supervisord does not run."""
        try:
            rows = self._call("supervisor.getAllProcessInfo")
        except (OSError, http.client.HTTPException):
            return {}
        return {
            row["name"]: Status(
                row["name"], row["statename"], row["pid"], row["start"], row["description"]
            )
            for row in rows
        }

    def start_program(self, name: str) -> None:
        """The program runs. Running already: no effect."""
        with contextlib.suppress(_AlreadyStarted):
            self._call("supervisor.startProcess", name, False)

    def stop_program(self, name: str) -> None:
        """The program does not run; waits for its end."""
        with contextlib.suppress(_NotRunning):
            self._call("supervisor.stopProcess", name, True)

    def end_strays(self) -> int:
        """Ends processes that a supervisord of this socket started and that outlived it; how many.

        They are known by the mark in their environment, so nothing else can be hit.
        """
        strays = self._stray_pids()
        if not strays:
            return 0
        # INT is the clean end for PostgreSQL (no new work, no waiting) and for our own processes.
        _signal_all(strays, signal.SIGINT)
        if not _wait_gone(strays, 20.0):
            _signal_all(strays, signal.SIGKILL)
            _wait_gone(strays, 5.0)
        return len(strays)

    def _stray_pids(self) -> list[int]:
        """Marked processes whose parent is not marked: children are their parents' business."""
        mark = f"{MARK}=unix://{self.socket_path}".encode()
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    # The name in parentheses may hold anything, so count from its end.
                    after_name = (entry / "stat").read_text().rpartition(")")[2].split()
                    parents[int(entry.name)] = int(after_name[1])
        return [pid for pid, parent in parents.items() if parent not in parents]

    def _supervisord_pid(self) -> int | None:
        """The pid of the running supervisord of this configuration, whatever state it is in."""
        try:
            pid = int(self.pid_path.read_text())
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if os.fsencode(self.config_path) in argv else None

    def _update(self) -> None:
        """The running supervisord takes over the configuration file: added, removed and changed programs."""
        ((added, changed, removed),) = self._call("supervisor.reloadConfig")
        for group in [*removed, *changed]:
            self._call("supervisor.stopProcessGroup", group)
            self._call("supervisor.removeProcessGroup", group)
        for group in [*changed, *added]:
            self._call("supervisor.addProcessGroup", group)

    def _call(self, method: str, *arguments: Any) -> Any:
        proxy = xmlrpc.client.ServerProxy("http://localhost/RPC2", _UnixTransport(self.socket_path))
        with proxy:
            try:
                return getattr(proxy, method)(*arguments)
            except xmlrpc.client.Fault as fault:
                raise _FAULTS.get(fault.faultCode, SupervisorError)(
                    f"{method}{arguments}: {fault.faultString}"
                ) from fault

    def _write_config(self, programs: Sequence[Program]) -> None:
        user = ["user=root"] if os.geteuid() == 0 else []
        lines = [
            "[unix_http_server]",
            f"file={_escaped(self.socket_path)}",
            "chmod=0600",
            "[supervisord]",
            f"pidfile={_escaped(self.pid_path)}",
            f"logfile={_escaped(self.log_dir / 'supervisord.log')}",
            f"logfile_maxbytes={LOG_MAX_BYTES}",
            "logfile_backups=1",
            "directory=/",
            f"childlogdir={_escaped(self.log_dir)}",
            "umask=022",
            *user,
            "[rpcinterface:supervisor]",
            "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
            *(line for program in programs for line in self._program_lines(program)),
        ]
        fresh = self.config_path.with_suffix(".conf.new")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write("\n".join(lines) + "\n")
        fresh.replace(self.config_path)

    def _program_lines(self, program: Program) -> list[str]:
        environment = ",".join(
            f"{name}={_quoted(value)}" for name, value in program.environment.items()
        )
        return [
            f"[program:{program.name}]",
            f"command={_escaped(shlex.join(program.argv))}",
            f"environment={environment}",
            f"directory={_escaped(program.directory)}",
            *([f"user={program.user}"] if program.user else []),
            f"priority={program.priority}",
            f"autostart={str(program.starts_alone).lower()}",
            "autorestart=true",
            # With 0, a start always counts as one: no growing pause between starts, no giving up.
            "startsecs=0",
            f"stopsignal={program.stop_signal}",
            f"stopwaitsecs={program.stop_wait_s}",
            "redirect_stderr=true",
            f"stdout_logfile={_escaped(self.log_dir / f'{program.name}.log')}",
            f"stdout_logfile_maxbytes={LOG_MAX_BYTES}",
            f"stdout_logfile_backups={LOG_BACKUPS}",
        ]


class _AlreadyStarted(SupervisorError):
    pass


class _NotRunning(SupervisorError):
    pass


# Fault codes of supervisor's XML-RPC interface (supervisor.xmlrpc.Faults).
_FAULTS: dict[int, type[SupervisorError]] = {60: _AlreadyStarted, 70: _NotRunning}


def _escaped(value: object) -> str:
    """A value for supervisord's configuration, where `%` expands and ` ;` and ` #` begin a comment."""
    text = str(value).replace("%", "%%")
    if any(mark in text for mark in ("\n", " ;", " #")):
        raise SupervisorError(f"supervisord's configuration cannot hold {text!r}")
    return text


def _quoted(value: str) -> str:
    """A value of its `environment=`, in quotes that do not occur in it; it loses quotes at either end of the value."""
    mark = "'" if '"' in value else '"'
    if mark in value or value != value.strip("\"'"):
        raise SupervisorError(f"supervisord's configuration cannot hold {value!r}")
    return f"{mark}{_escaped(value)}{mark}"


def _signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie that nobody has fetched yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}


def _wait_gone(pids: Iterable[int], timeout_s: float) -> bool:
    """Waits until none of the processes exists; whether that happened in time."""
    deadline = time.monotonic() + timeout_s
    remaining = list(pids)
    while remaining := [pid for pid in remaining if is_alive(pid)]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
