"""The supervisor: a killed program is back at once, and only its own processes are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from awan.runtime.supervisor import Program, Supervisor, is_alive

SLEEPER = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"]


@pytest.fixture
def supervisor(open_dir: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(open_dir / "run", open_dir / "log")
    yield supervisor
    supervisor.stop()


def eventually(question: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not question():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def pid_of(supervisor: Supervisor, name: str) -> int:
    return supervisor.statuses()[name].pid


def test_killed_program_is_back_within_two_seconds(supervisor: Supervisor) -> None:
    supervisor.start([Program("sleeper", SLEEPER)])
    for _ in range(3):  # also when it dies young and often
        first = pid_of(supervisor, "sleeper")
        os.kill(first, signal.SIGKILL)
        eventually(lambda first=first: pid_of(supervisor, "sleeper") not in {0, first}, 2.0)
    assert supervisor.statuses()["sleeper"].is_running


def test_only_changed_programs_are_restarted(supervisor: Supervisor) -> None:
    supervisor.start(
        [Program("kept", SLEEPER), Program("changed", SLEEPER), Program("gone", SLEEPER)]
    )
    before = {name: row.pid for name, row in supervisor.statuses().items()}
    supervisor.start(
        [
            Program("kept", SLEEPER),
            Program("changed", SLEEPER, {"A": "50% \\ b"}),
            Program("new", SLEEPER),
        ]
    )
    after = {name: row.pid for name, row in supervisor.statuses().items()}
    assert set(after) == {"kept", "changed", "new"}
    assert after["kept"] == before["kept"]
    assert after["changed"] != before["changed"]
    assert not is_alive(before["gone"])
    environ = Path(f"/proc/{after['changed']}/environ")
    # A process that was only just forked still shows its parent's environment.
    eventually(lambda: b"A=50% \\ b" in environ.read_bytes().split(b"\0"), 5.0)


def test_stop_ends_its_own_and_nothing_else(supervisor: Supervisor, open_dir: Path) -> None:
    other = Supervisor(open_dir / "other", open_dir / "other-log")
    with subprocess.Popen(SLEEPER, stdout=subprocess.DEVNULL) as stranger:
        try:
            other.start([Program("sleeper", SLEEPER)])
            supervisor.start([Program("sleeper", SLEEPER), Program("second", SLEEPER)])
            mine = [row.pid for row in supervisor.statuses().values()]
            assert supervisor.stop()
            assert not any(is_alive(pid) for pid in mine)
            assert not supervisor.is_up()
            assert stranger.poll() is None
            assert other.statuses()["sleeper"].is_running
            assert not supervisor.stop()
        finally:
            stranger.kill()
            other.stop()


def test_start_after_a_killed_supervisor_ends_what_it_left(supervisor: Supervisor) -> None:
    supervisor.start([Program("sleeper", SLEEPER)])
    orphan = pid_of(supervisor, "sleeper")
    os.kill(int(supervisor.pid_path.read_text()), signal.SIGKILL)
    eventually(lambda: not supervisor.is_up(), 2.0)
    assert is_alive(orphan)
    assert supervisor.socket_path.exists()
    supervisor.start([Program("sleeper", SLEEPER)])
    assert not is_alive(orphan)
    assert supervisor.statuses()["sleeper"].is_running


def test_programs_do_not_inherit_the_callers_environment(
    supervisor: Supervisor, open_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_CREDENTIAL", "do-not-pass-on")
    supervisor.start([Program("sleeper", SLEEPER)])
    eventually(lambda: "ready" in (open_dir / "log/sleeper.log").read_text(), 30.0)
    environ = Path(f"/proc/{pid_of(supervisor, 'sleeper')}/environ").read_bytes()
    assert b"do-not-pass-on" not in environ
