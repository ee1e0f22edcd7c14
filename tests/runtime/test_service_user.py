"""What root starts does not run as root: API and worker have a user of their own, with what they need and no more."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from awan.runtime.control_plane import CODE_DIR, ControlPlane
from awan.runtime.postgres import EmbeddedPostgres
from awan.runtime.service_user import (
    SERVICE_USER,
    ServiceUser,
    ensure_service_user,
    unreachable,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run others")

CONNECT = "import psycopg, sys; psycopg.connect(sys.argv[1]).close()"


@pytest.fixture
def nobody() -> ServiceUser:
    entry = pwd.getpwnam("nobody")
    return ServiceUser(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


@pytest.fixture
def plane(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ControlPlane]:
    """A control plane of its own, not started."""
    for name in [name for name in os.environ if name.startswith("AWAN_")]:
        monkeypatch.delenv(name)
    found = ControlPlane(open_dir / "var")
    yield found
    found.down()


def connect_as(name: str, url: str) -> subprocess.CompletedProcess[str]:
    entry = pwd.getpwnam(name)
    return subprocess.run(
        [sys.executable, "-c", CONNECT, url],
        cwd="/",
        capture_output=True,
        text=True,
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=[],
        check=False,
        timeout=30,
    )


def uids_of(pid: int) -> set[int]:
    """Real, effective, saved and file-system uid."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("Uid:"))
    return {int(word) for word in line.split()[1:]}


def groups_of(pid: int) -> set[int]:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("Groups:"))
    return {int(word) for word in line.split()[1:]}


def test_api_and_worker_are_not_root(plane: ControlPlane) -> None:
    reports: list[str] = []
    # An earlier version ran as root and left files of its own.
    images = plane.state_dir / "images"
    (images / "incoming").mkdir(parents=True)
    (images / "old.qcow2").write_bytes(b"")
    plane.up(lambda name, _: reports.append(name))
    user = ensure_service_user()
    assert user is not None
    assert user.name == SERVICE_USER
    assert not [name for name in reports if "root" in name]
    statuses = plane.statuses()
    for name in ("api", "worker"):
        assert uids_of(statuses[name].pid) == {user.uid}
        assert 0 not in groups_of(statuses[name].pid)
        environ = Path(f"/proc/{statuses[name].pid}/environ").read_bytes().split(b"\0")
        assert f"HOME={user.home}".encode() in environ
    # `ok` says that the API reaches the database, and that a worker does.
    assert plane.health() == "ok"
    for path in (plane.state_dir / "secret.key", images, images / "incoming", images / "old.qcow2"):
        assert path.stat().st_uid == user.uid, path
    assert (plane.state_dir / "secret.key").stat().st_mode & 0o777 == 0o600
    for path in (plane.state_dir, plane.runtime_file, plane.place.run_dir, CODE_DIR):
        assert path.stat().st_uid == 0, path
    # Started again, what runs goes on.
    plane.up(lambda name, _: None)
    assert plane.statuses()["api"].pid == statuses["api"].pid


def test_the_socket_is_for_the_client_alone(open_dir: Path, nobody: ServiceUser) -> None:
    cluster = EmbeddedPostgres(
        open_dir / "pg", open_dir / "run", is_durable=False, client=nobody.name
    )
    cluster.init()
    with cluster.running():
        assert connect_as("nobody", cluster.url()).returncode == 0
        superuser = connect_as("nobody", cluster.url(role="postgres"))
        assert "Peer authentication failed" in superuser.stderr
        stranger = connect_as("daemon", cluster.url())
        assert "ermission denied" in stranger.stderr
        (open_dir / "run").chmod(0o755)
        stranger = connect_as("daemon", cluster.url())
        assert "Peer authentication failed" in stranger.stderr


def test_what_is_handed_over(open_dir: Path, nobody: ServiceUser) -> None:
    precious = open_dir / "precious"
    precious.write_text("root's")
    images = open_dir / "images"
    (images / "incoming").mkdir(parents=True)
    (images / "incoming" / "link").symlink_to(precious)
    nobody.own(images)
    assert (images / "incoming").stat().st_uid == nobody.uid
    assert precious.stat().st_uid == 0
    # Whose it is already may have put anything there since.
    (images / "later").write_text("")
    nobody.own(images)
    assert (images / "later").stat().st_uid == 0


def test_a_closed_checkout_is_noticed(open_dir: Path, nobody: ServiceUser) -> None:
    assert unreachable(nobody, CODE_DIR, [open_dir]) is None
    closed = open_dir / "closed"
    closed.mkdir(mode=0o700)
    (closed / "__init__.py").write_text("")
    assert unreachable(nobody, closed, [open_dir]) == closed / "__init__.py"
    assert unreachable(nobody, CODE_DIR, [open_dir, closed]) == closed


def test_where_the_user_cannot_get_at_the_state_root_goes_on(
    open_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout in root's home works, and says what that costs."""
    for name in [name for name in os.environ if name.startswith("AWAN_")]:
        monkeypatch.delenv(name)
    closed = open_dir / "closed"
    closed.mkdir(mode=0o700)
    reports: list[str] = []
    found = ControlPlane(closed / "var")
    assert found._service_user(lambda name, _: reports.append(name)) is None
    assert len(reports) == 1
    assert "as root" in reports[0]
