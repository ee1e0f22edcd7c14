"""The control plane of one state directory: PostgreSQL, API and worker under the supervisor.

plane = ControlPlane(Path("var"))
plane.up(report)       # database, migration, processes; returns when GET /health says ok
plane.down()           # ends exactly these
"""

from __future__ import annotations

import compileall
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from awan.kit.secrets import create_key_file
from awan.runtime.environment import (
    KEYS_FILE,
    RUNTIME_FILE,
    read_env_file,
    settings_of,
    write_env_file,
)
from awan.runtime.postgres import EmbeddedPostgres, place_runtime
from awan.runtime.service_user import ServiceUser, ensure_service_user, unreachable
from awan.runtime.supervisor import Program, Status, Supervisor

DATABASE_TIMEOUT_S = 60.0
HEALTH_TIMEOUT_S = 60.0
# Says whether the database URL in runtime.env is ours to derive or the operator's.
EMBEDDED_MARK = "AWAN_RUNTIME_DATABASE"
CODE_DIR = Path(__file__).resolve().parent.parent

Report = Callable[[str, float], None]


class ControlPlaneError(Exception):
    """A part did not come up; the text ends with where to look."""


class ControlPlane:
    """Starts and ends the processes of one state directory. Blocking; safe to call twice."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir.resolve()
        self.place = place_runtime(self.state_dir)
        self.log_dir = self.state_dir / "log"
        self.runtime_file = self.state_dir / RUNTIME_FILE
        self.keys_file = self.state_dir / KEYS_FILE
        self.supervisor = Supervisor(self.place.run_dir, self.log_dir)

    def environment(self) -> dict[str, str]:
        """The settings that the control plane was last started with; empty before the first start."""
        return read_env_file(self.runtime_file)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the API; a wildcard address is spoken to over loopback."""
        environment = self.environment()
        host = environment.get("AWAN_LISTEN_HOST", "127.0.0.1")
        port = int(environment.get("AWAN_LISTEN_PORT", "8080"))
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port  # noqa: S104 compared, not bound

    @property
    def api_url(self) -> str:
        """Base of the API's paths, ending in /api/v1."""
        host, port = self.address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/api/v1"

    def up(self, report: Report, overrides: Mapping[str, str] | None = None) -> None:
        """Database, migration, API and worker run; processes older than the code are started anew.

        `overrides` and this process's own `AWAN_...` settings are remembered for the next time.
        `report` gets each step's name and its seconds.
        Raises: ControlPlaneError, PostgresError, ServiceUserError, SupervisorError.
        """
        is_first = not self.supervisor.is_up()
        user = self._service_user(report)
        environment, postgres = self._prepare(overrides or {}, user)
        with _step(report, "database"):
            self.supervisor.start(self._programs(postgres, environment, user))
            if postgres is not None:
                self._wait_for_database(postgres)
        if not is_first and self._is_current():
            self._wait_until_healthy()
            return
        with _step(report, "migration"):
            self.run_command("migrate")
        with _step(report, "API and worker"):
            for name in ("worker", "api"):
                self.supervisor.stop_program(name)
                self.supervisor.start_program(name)
            self._wait_until_healthy()

    def down(self) -> bool:
        """Ends what up() started, data kept. Whether anything ran."""
        return self.supervisor.stop()

    def statuses(self) -> dict[str, Status]:
        """The processes by name; empty when the control plane is down."""
        return self.supervisor.statuses()

    def health(self, *, timeout_s: float = 3.0) -> str | None:
        """What GET /health says: `ok`, `degraded` (no worker alive), `unavailable`; None when nothing answers."""
        host, port = self.address
        connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return json.loads(body)["data"]["status"] if response.status == 200 else "unavailable"

    def run_command(self, *arguments: str) -> str:
        """Runs `awan ...` with the control plane's environment and gives what it printed.

        Raises: ControlPlaneError with its words when it fails.
        """
        environment = {**os.environ, **self.environment(), "AWAN_ENV_FILE": str(self.runtime_file)}
        result = subprocess.run(
            [sys.executable, "-m", "awan.cli", *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        if result.returncode != 0:
            words = (result.stderr.strip() or result.stdout.strip())[-4000:]
            raise ControlPlaneError(f"awan {' '.join(arguments)} failed:\n{words}")
        return result.stdout

    def _service_user(self, report: Report) -> ServiceUser | None:
        """Who API and worker run as: a user of their own where root starts them, else whoever starts them.

        Root itself, which is reported, when that user cannot get at the code or the state: a checkout in a home.
        """
        user = ensure_service_user()
        self.state_dir.mkdir(parents=True, exist_ok=True)
        if user is None:
            return None
        # That user may not write beside the code, and each start of a killed process would compile it again.
        compileall.compile_dir(CODE_DIR, quiet=2)
        hidden = unreachable(user, CODE_DIR, [self.state_dir, self.place.base])
        if hidden is None:
            return user
        report(f"API and worker run as root: {hidden} is closed to others", 0.0)
        return None

    def _prepare(
        self, overrides: Mapping[str, str], user: ServiceUser | None
    ) -> tuple[dict[str, str], EmbeddedPostgres | None]:
        """The environment of the processes, written to its file, and the embedded cluster, made if absent.

        Key file and images belong to `user` afterwards.
        """
        stored = self.environment()
        environment = {**stored, **settings_of(os.environ), **overrides}
        is_embedded = (
            "AWAN_DATABASE_URL" not in environment or stored.get(EMBEDDED_MARK) == "embedded"
        ) and "AWAN_DATABASE_URL" not in overrides
        postgres = None
        if is_embedded:
            client = user.name if user is not None else None
            postgres = EmbeddedPostgres(self.place.data_dir, self.place.socket_dir, client=client)
            postgres.init()
            environment["AWAN_DATABASE_URL"] = postgres.url()
        environment[EMBEDDED_MARK] = "embedded" if is_embedded else "external"
        environment["AWAN_STATE_DIR"] = str(self.state_dir)
        environment.setdefault("AWAN_SECRET_KEY_FILE", str(self.state_dir / "secret.key"))
        environment.setdefault("AWAN_IMAGE_DIR", str(self.state_dir / "images"))
        create_key_file(Path(environment["AWAN_SECRET_KEY_FILE"]))
        Path(environment["AWAN_IMAGE_DIR"]).mkdir(mode=0o700, parents=True, exist_ok=True)
        if user is not None:
            user.own(Path(environment["AWAN_SECRET_KEY_FILE"]))
            user.own(Path(environment["AWAN_IMAGE_DIR"]))
        environment.setdefault("AWAN_LISTEN_HOST", "127.0.0.1")
        if "AWAN_LISTEN_PORT" not in environment:
            environment["AWAN_LISTEN_PORT"] = str(free_port(environment["AWAN_LISTEN_HOST"]))
        if environment != stored:
            write_env_file(self.runtime_file, environment)
        return environment, postgres

    def _programs(
        self,
        postgres: EmbeddedPostgres | None,
        environment: Mapping[str, str],
        user: ServiceUser | None,
    ) -> list[Program]:
        programs = []
        if postgres is not None:
            programs.append(
                Program(
                    "postgres",
                    postgres.argv(),
                    user=postgres.user if os.geteuid() == 0 else None,
                    priority=1,
                    stop_signal="INT",
                    stop_wait_s=60,
                )
            )
        # The whole environment is in the configuration, so that a changed setting restarts the process. The file of
        # settings is root's alone.
        given = {**environment, "AWAN_ENV_FILE": os.devnull, "PYTHONUNBUFFERED": "1"}
        if user is not None:
            given["HOME"] = user.home
        programs += [
            Program(
                name,
                [sys.executable, "-m", "awan.runtime.process", name],
                given,
                user=user.name if user is not None else None,
                starts_alone=False,
                stop_wait_s=20,
            )
            for name in ("api", "worker")
        ]
        return programs

    def _is_current(self) -> bool:
        """Whether API and worker run and are younger than every file of the code."""
        newest = max(path.stat().st_mtime for path in CODE_DIR.rglob("*.py"))
        statuses = self.supervisor.statuses()
        return all(
            name in statuses and statuses[name].is_running and statuses[name].started_at > newest
            for name in ("api", "worker")
        )

    def _wait_for_database(self, postgres: EmbeddedPostgres) -> None:
        deadline = time.monotonic() + DATABASE_TIMEOUT_S
        while not postgres.is_ready():
            if time.monotonic() > deadline:
                raise ControlPlaneError(
                    f"PostgreSQL does not answer, see {self.log_dir}/postgres.log"
                )
            time.sleep(0.05)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + HEALTH_TIMEOUT_S
        while (health := self.health()) != "ok":
            if time.monotonic() > deadline:
                host, port = self.address
                raise ControlPlaneError(
                    f"GET http://{host}:{port}/health: {health or 'no answer'},"
                    f" see {self.log_dir}/api.log and worker.log"
                )
            time.sleep(0.05)


@contextmanager
def _step(report: Report, name: str) -> Iterator[None]:
    began_at = time.monotonic()
    yield
    report(name, time.monotonic() - began_at)


def free_port(host: str, first: int = 8080) -> int:
    """The first port from `first` on that nothing listens on, out of a hundred; remembered afterwards."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, first + 100):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise ControlPlaneError(f"no free port from {first} to {first + 99} on {host}")
