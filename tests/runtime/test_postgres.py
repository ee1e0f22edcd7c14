"""The embedded cluster: who may connect, what survives, what is refused."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from awan.runtime.postgres import EmbeddedPostgres, PostgresError, place_runtime

CONNECT = "import psycopg, sys; psycopg.connect(sys.argv[1]).close()"


def as_nobody(path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    nobody = pwd.getpwnam("nobody")
    return subprocess.run(
        argv,
        cwd=path,
        capture_output=True,
        text=True,
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
        check=False,
        timeout=30,
    )


def test_cluster_holds_data_over_restart_and_has_no_tcp(open_dir: Path) -> None:
    cluster = EmbeddedPostgres(open_dir / "pg", open_dir / "run", is_durable=False)
    cluster.init()
    with cluster.running(), psycopg.connect(cluster.url(), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (n integer)")
        connection.execute("INSERT INTO kept VALUES (7)")
        row = connection.execute(
            "SELECT current_user, current_setting('listen_addresses'), rolsuper"
            " FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
        assert row == ("awan", "", False)
    assert not cluster.is_ready()
    again = EmbeddedPostgres(open_dir / "pg", open_dir / "run", is_durable=False)
    again.init()
    with again.running(), psycopg.connect(again.url()) as connection:
        assert connection.execute("SELECT n FROM kept").fetchone() == (7,)
    assert (open_dir / "pg").stat().st_mode & 0o777 == 0o700


def test_nothing_is_trusted(open_dir: Path) -> None:
    cluster = EmbeddedPostgres(open_dir / "pg", open_dir / "run", is_durable=False)
    cluster.init()
    rules = (open_dir / "pg/pg_hba.conf").read_text().splitlines()
    methods = {line.split()[3] for line in rules if line and not line.startswith("#")}
    assert methods == {"peer", "reject"}
    with cluster.running():
        # A role that nobody maps to, then a database role that exists with an unmapped user.
        with pytest.raises(psycopg.OperationalError, match=r"pg_hba\.conf rejects"):
            psycopg.connect(cluster.url(role="intruder"))
        if os.geteuid() != 0:
            pytest.skip("connecting as another user needs root")
        # The directory's mode is the first wall; taken down, the server itself must refuse.
        refused = as_nobody(open_dir, sys.executable, "-c", CONNECT, cluster.url())
        assert refused.returncode != 0
        assert "ermission denied" in refused.stderr
        (open_dir / "run").chmod(0o755)
        (open_dir / "run/.s.PGSQL.5432").chmod(0o777)
        refused = as_nobody(open_dir, sys.executable, "-c", CONNECT, cluster.url())
        assert refused.returncode != 0
        assert "Peer authentication failed" in refused.stderr


def test_unfinished_initdb_is_done_again(open_dir: Path) -> None:
    half = open_dir / "pg.building"
    half.mkdir()
    (half / "PG_VERSION").write_text("15\n")
    cluster = EmbeddedPostgres(open_dir / "pg", open_dir / "run", is_durable=False)
    cluster.init()
    assert not half.exists()
    with cluster.running():
        assert cluster.is_ready()


def test_data_of_another_version_are_refused(open_dir: Path) -> None:
    cluster = EmbeddedPostgres(open_dir / "pg", open_dir / "run", is_durable=False)
    (open_dir / "pg").mkdir()
    (open_dir / "pg/PG_VERSION").write_text("9.6\n")
    with pytest.raises(PostgresError, match=r"made by PostgreSQL 9\.6"):
        cluster.init()


def test_server_dies_with_its_parent(open_dir: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from awan.runtime.postgres import EmbeddedPostgres
cluster = EmbeddedPostgres(Path({str(open_dir / "pg")!r}), Path({str(open_dir / "run")!r}), is_durable=False)
cluster.init()
cluster.start(dies_with_parent=True)
print(cluster.is_ready(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.stdout == "True\n", result.stderr
    cluster = EmbeddedPostgres(open_dir / "pg", open_dir / "run", is_durable=False)
    deadline = time.monotonic() + 10
    while (open_dir / "pg/postmaster.pid").exists():
        assert time.monotonic() < deadline, "the server outlives its parent"
        time.sleep(0.02)
    cluster.start()
    cluster.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server as another user")
def test_place_is_decided_once(open_dir: Path) -> None:
    inside = open_dir / "checkout/var"
    assert place_runtime(inside).data_dir == inside / "pg"
    closed = open_dir / "closed"
    closed.mkdir(mode=0o700)
    elsewhere = place_runtime(closed / "var").data_dir
    assert elsewhere.is_relative_to("/var/lib/awan")
    closed.chmod(0o755)
    assert place_runtime(closed / "var").data_dir == elsewhere
    # A long path does not fit into a socket's address.
    assert not place_runtime(open_dir / ("x" * 100)).socket_dir.is_relative_to(open_dir)
