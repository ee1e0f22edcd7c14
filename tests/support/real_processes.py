"""API and workers as the processes that they are in production, with everything they log."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from sqlalchemy import text

from awan.kit.database import get_engine

START_S = 60.0
STOP_S = 20.0


class RealProcesses:
    """`with RealProcesses(tmp_path, AWAN_LOG_LEVEL="DEBUG") as plane: ...`; the settings are this process's own.

    `url` ends in `/api/v1`; `log()` is what both have written so far.
    """

    def __init__(self, log_dir: Path, **settings: str) -> None:
        self._log_dir = log_dir
        self._port = _free_port()
        self._environment = {
            **os.environ,
            "AWAN_LISTEN_HOST": "127.0.0.1",
            "AWAN_LISTEN_PORT": str(self._port),
            "AWAN_LOG_JSON": "true",
            # No file of settings may come in between.
            "AWAN_ENV_FILE": os.devnull,
            **settings,
        }
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        """Where the API's paths begin."""
        return f"http://127.0.0.1:{self._port}/api/v1"

    def log(self) -> str:
        """Everything that was logged."""
        return "".join(path.read_text() for path in sorted(self._log_dir.glob("*.log")))

    def __enter__(self) -> Self:
        try:
            for name in ("api", "worker"):
                log = self._log_dir / f"{name}.log"
                self._processes.append(_start(name, self._environment, log))
            self._wait_until_healthy()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            assert all(process.poll() is None for process in self._processes), self.log()
            assert time.monotonic() < deadline, self.log()
            try:
                health = httpx.get(
                    self.url.removesuffix("/api/v1") + "/health", trust_env=False
                ).json()
            except httpx.TransportError:
                health = {}
            if health.get("data", {}).get("status") == "ok":
                return
            time.sleep(0.1)

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class WorkerProcesses:
    """Several workers on this process's own settings and database: `with WorkerProcesses(tmp_path, 2) as workers: ...`.

    Their names are `worker-1`, `worker-2`, ...
    """

    def __init__(self, log_dir: Path, count: int, **settings: str) -> None:
        self._log_dir = log_dir
        self._settings = settings
        self._names = [f"worker-{number}" for number in range(1, count + 1)]
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        for name in self._names:
            environment = {
                **os.environ,
                "AWAN_LOG_JSON": "true",
                "AWAN_ENV_FILE": os.devnull,
                **self._settings,
                "AWAN_WORKER_ID": name,
            }
            self._processes[name] = _start("worker", environment, self._log_dir / f"{name}.log")
        try:
            deadline = time.monotonic() + START_S
            while not set(self._names) <= self.alive():
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.05)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._kill()

    def alive(self) -> set[str]:
        """Workers whose heart has beaten in the last second."""
        seen = "SELECT executor_id FROM worker WHERE seen_at > now() - interval '1 s'"
        with get_engine().connect() as connection:
            return set(connection.scalars(text(seen)))

    def freeze(self, name: str) -> None:
        """SIGSTOP."""
        self._processes[name].send_signal(signal.SIGSTOP)

    def wake(self, name: str) -> None:
        """SIGCONT."""
        self._processes[name].send_signal(signal.SIGCONT)

    def log(self, name: str | None = None) -> str:
        """What one has logged, or all."""
        return "".join(
            (self._log_dir / f"{one}.log").read_text() for one in self._names if name in (None, one)
        )

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


def _start(name: str, environment: dict[str, str], log_file: Path) -> subprocess.Popen[bytes]:
    """The process `api` or `worker`, writing to its own log."""
    with log_file.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "awan.runtime.process", name],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _free_port() -> int:
    """A port of the loopback that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
