"""QEMU has no power over the node, and a customer's secrets are found nowhere."""

from __future__ import annotations

import base64
import os
import pwd
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from awan.runtime.postgres import find_binaries
from awan.runtime.service_user import SERVICE_USER
from tests.support import lab_inspection
from tests.support.lab_cloud import LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

QEMU_USER = "libvirt-qemu"


@contextmanager
def watched_command_lines(secrets: list[bytes]) -> Iterator[set[bytes]]:
    """All arguments with a secret in them that any process of the machine has had inside the block."""
    found: set[bytes] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            for _, argv in lab_inspection.command_lines():
                found.update(word for word in argv for secret in secrets if secret in word)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def test_secrets_are_found_nowhere(cloud: LabCloud) -> None:
    marker = f"Marker-{uuid4().hex}"
    user_marker = f"user-data-{uuid4().hex}"
    user_data = f"#cloud-config\nbootcmd: []\n# {user_marker}\n"
    encoded = [base64.b64encode(text.encode())[:30] for text in (marker, user_data)]
    secrets = [marker.encode(), user_marker.encode(), *encoded]

    with watched_command_lines([*secrets, b"$6$"]) as on_command_lines:
        shown = cloud.create_instance(password=marker, user_data=user_data)
        uuid = shown["uuid"]
        early = everything_written(cloud, uuid)
        cloud.wait_ready(uuid)
        four = shown["ip_address"]
        assert cloud.ssh_when_up(four, "id -un", password=marker) == "budi\n"
        node = lab_inspection.node_of(cloud.lab, uuid)
        old_seed = f"seed-{uuid}-1.iso"
        until(lambda: old_seed not in lab_inspection.files_on(cloud.lab, node), 60, "the old seed")
    # The test's own ssh is given the password in its environment, never as an argument.
    assert not on_command_lines
    written = {**early, **everything_written(cloud, uuid)}
    written["seed"] = lab_inspection.download(cloud.lab, node, f"seed-{uuid}-2.iso")
    for where, content in written.items():
        for secret in (*secrets, b"$6$"):
            assert secret not in content, f"{secret!r} is in {where}"


def everything_written(cloud: LabCloud, uuid: str) -> dict[str, bytes]:
    """Logs, database, definitions and answers: name -> content."""
    node = lab_inspection.node_of(cloud.lab, uuid)
    written = {
        "domain": lab_inspection.virsh(
            cloud.lab, node, "dumpxml", "--security-info", uuid
        ).encode(),
        "northbound": lab_inspection.database_dump(cloud.lab, "OVN_Northbound").encode(),
        "southbound": lab_inspection.database_dump(cloud.lab, "OVN_Southbound").encode(),
        "database": dump_database(cloud),
    }
    logs = [cloud.plane.log_dir, cloud.lab.node_path(node, "/var/log")]
    for folder in logs:
        for path in folder.rglob("*"):
            if path.is_file():
                written[str(path)] = path.read_bytes()
    for route in (
        f"/instances/{uuid}",
        "/instances",
        f"/operations?resource={uuid}",
        "/account/events",
    ):
        written[route] = cloud.client.get(route).content
    written["trace"] = cloud.admin.get(f"/admin/trace/{uuid}").content
    assert b"awan-" in written["domain"]
    assert uuid.encode() in written["database"]
    return written


def dump_database(cloud: LabCloud) -> bytes:
    """All rows of the control plane's database as SQL."""
    url = cloud.plane.environment()["AWAN_DATABASE_URL"]
    dump = [str(find_binaries() / "pg_dump"), "--data-only", f"--dbname={url}"]
    return subprocess.run(dump, capture_output=True, check=True).stdout


def test_api_and_worker_are_powerless(cloud: LabCloud) -> None:
    """They carry out a whole creation as a user that owns nothing but keys and images."""
    user = pwd.getpwnam(SERVICE_USER).pw_uid
    uuid = cloud.create_instance()["uuid"]
    for name in ("api", "worker"):
        pid = cloud.plane.statuses()[name].pid
        for task in os.listdir(f"/proc/{pid}/task"):
            status = lab_inspection.process_status(int(task))
            assert set(status["Uid"].split()) == {str(user)}
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
            assert "0" not in status["Groups"].split()
    assert cloud.delete_instance(uuid)["status"] == "succeeded"


def test_qemu_is_powerless(cloud: LabCloud) -> None:
    shown = cloud.create_instance()
    uuid = shown["uuid"]
    node = lab_inspection.node_of(cloud.lab, uuid)
    pid = lab_inspection.qemu_pid(uuid)
    user = pwd.getpwnam(QEMU_USER).pw_uid
    for task in os.listdir(f"/proc/{pid}/task"):
        status = lab_inspection.process_status(int(task))
        assert status["Seccomp"] == "2"
        assert set(status["Uid"].split()) == {str(user)}
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert words[words.index(b"-sandbox") + 1].startswith(b"on")

    cloud.wait_ready(uuid)
    pool = cloud.lab.node_path(node, lab_inspection.POOL_PATH)
    images = [path for path in pool.iterdir() if path.name.startswith("image-")]
    assert images
    for image in images:
        assert (image.stat().st_uid, image.stat().st_mode & 0o777) == (0, 0o444)
    for path in pool.iterdir():
        if not path.name.startswith("image-"):
            assert path.stat().st_mode & 0o077 == 0
    # QEMU's own user cannot get at the daemon, other secrets, or list the pool.
    as_qemu = ["setpriv", f"--reuid={user}", f"--regid={QEMU_USER}", "--init-groups"]
    for command in (
        ["cat", "/etc/shadow"],
        ["ls", lab_inspection.POOL_PATH],
        ["cat", "/etc/libvirt/qemu/" + f"awan-{uuid}.xml"],
        ["sh", "-c", f": >> {lab_inspection.POOL_PATH}/{images[0].name}"],
    ):
        assert cloud.lab.node_exec(node, [*as_qemu, *command], check=False).returncode, command
