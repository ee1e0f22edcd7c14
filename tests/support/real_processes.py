"""API and worker as the processes that they are in production, with everything they log."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

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
                with (self._log_dir / f"{name}.log").open("wb") as log:
                    self._processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "awan.runtime.process", name],
                            env=self._environment,
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                        )
                    )
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


def _free_port() -> int:
    """A port of the loopback that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
