"""OVN central of a slot: northbound and southbound database and northd, on the host's management
address, so that the control plane reaches it as it would in a data centre."""

from __future__ import annotations

from pathlib import Path

from lab.layout import SlotLayout
from lab.processes import ProcessTable, run, start_daemon, wait_until

# (short name, schema, port)
DATABASES = (("nb", "OVN_Northbound", 6641), ("sb", "OVN_Southbound", 6642))
SCHEMA_DIR = Path("/usr/share/ovn")
# Under emulation a busy host may leave a daemon without CPU for longer than the default of 5 s.
INACTIVITY_PROBE_MS = 60_000


class Central:
    def __init__(self, layout: SlotLayout, table: ProcessTable) -> None:
        self._layout = layout
        self._table = table
        self._run_dir = layout.run_dir / "ovn"
        self._state_dir = layout.state_dir / "ovn"

    def ensure(self) -> None:
        """Start what does not run. The management address must exist."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._state_dir.mkdir(parents=True, exist_ok=True)
        for name, schema, port in DATABASES:
            if not self._table.is_alive(f"central.{name}"):
                self._start_database(name, schema, port)
        if not self._table.is_alive("central.northd"):
            self._start(
                "northd",
                [
                    "ovn-northd",
                    f"--ovnnb-db={self.socket('nb')}",
                    f"--ovnsb-db={self.socket('sb')}",
                ],
            )

    def chassis_names(self) -> set[str]:
        listed = run(
            [
                *("ovn-sbctl", "--no-leader-only", f"--db={self.socket('sb')}", "--bare"),
                *("--columns=name", "list", "chassis"),
            ]
        )
        return set(listed.stdout.split())

    def stop(self) -> None:
        for name in ("northd", "nb", "sb"):
            self._table.stop(f"central.{name}")

    def socket(self, database: str) -> str:
        return f"unix:{self._run_dir}/ovn{database}.sock"

    def _start_database(self, name: str, schema: str, port: int) -> None:
        file = self._state_dir / f"ovn{name}.db"
        if not file.exists():
            run(["ovsdb-tool", "create", str(file), f"{SCHEMA_DIR}/ovn-{name}.ovsschema"])
        remotes = [
            f"--remote=punix:{self._run_dir}/ovn{name}.sock",
            f"--remote=db:{schema},{name.upper()}_Global,connections",
        ]
        self._start(name, ["ovsdb-server", *remotes, str(file)])
        control = [f"ovn-{name}ctl", "--no-leader-only", f"--db={self.socket(name)}"]
        listen = f"ptcp:{port}:{self._layout.mgmt_ip}"
        run([*control, "init"])
        run(
            [
                *(*control, "--id=@c", "create", "connection", f'target="{listen}"'),
                *(f"inactivity_probe={INACTIVITY_PROBE_MS}", "--"),
                *("set", f"{name.upper()}_Global", ".", "connections=@c"),
            ]
        )

    def _start(self, name: str, argv: list[str]) -> None:
        pid_file = self._run_dir / f"{name}.pid"
        pid_file.unlink(missing_ok=True)
        log_dir = self._state_dir / "log"
        start_daemon(
            [
                *(argv[0], "--detach", "--no-chdir", "-vconsole:off"),
                *(f"--pidfile={pid_file}", f"--log-file={log_dir}/{name}.log"),
                *(f"--unixctl={self._run_dir}/{name}.ctl", *argv[1:]),
            ],
            log_dir / f"{name}.start.log",
        )
        wait_until(pid_file.exists, f"{name} of OVN central to start")
        self._table.record(f"central.{name}", int(pid_file.read_text()))
