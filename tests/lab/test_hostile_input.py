"""Hostile texts and hostile images stop at the API, with a reason, and leave nothing behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.lab_cloud import LabCloud

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

VMDK = """# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="monolithicFlat"
RW 20480 FLAT "/etc/passwd" 0
"""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hostname", "a</name><devices><hostdev/></devices>"),
        ("hostname", "a\n<hostdev/>"),
        ("hostname", "$(touch /tmp/owned)"),
        ("hostname", "a'; DROP TABLE instance; --"),
        ("hostname", "&xxe;"),
        ("username", "root\nsudo: ALL"),
        ("username", "`id`"),
        ("username", "../../root"),
        ("username", "-rf"),
        ("password", 'Abcdefg1"\nssh_pwauth: true'),
        ("password", "Abcdefg1\x00"),
        ("user_data", "<script>alert(1)</script>"),
    ],
)
def test_hostile_text_is_refused(cloud: LabCloud, field: str, value: str) -> None:
    answer = cloud.client.post("/instances", json=cloud.order() | {field: value})
    assert (answer.status_code, answer.json()["type"]) == (422, "VALIDATION_ERROR")
    assert field in answer.json()["errors"]
    assert cloud.client.get("/instances").json()["data"]["data"] == []


def test_hostile_password_that_is_allowed_stays_text(cloud: LabCloud) -> None:
    password = """Aa1 '"$(id)`id`\\n#{}</x>&&;|"""
    shown = cloud.create_instance(password=password)
    four = shown["ip_address"]
    assert cloud.ssh_when_up(four, "id -un", password=password) == "budi\n"
    accounts = cloud.ssh(four, "grep -c bash /etc/passwd").stdout
    assert accounts == "2\n", "root and the one that was ordered"


def qcow2(path: Path, *options: str, size: str = "64M") -> Path:
    """An image made by QEMU itself."""
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size]
    subprocess.run(argv, check=True, capture_output=True)
    return path


def backed_by(backing: str) -> Callable[[Path], Path]:
    """Makes an image whose backing file is `backing`; QEMU is not asked to open it."""
    return lambda path: qcow2(path, "-u", "-F", "raw", "-b", backing)


def with_external_data(path: Path) -> Path:
    """An image whose data lie in a file of the host."""
    return qcow2(path, "-o", f"data_file={path.with_suffix('.data')},data_file_raw=on")


def with_unknown_feature(path: Path) -> Path:
    """A version 3 image with an incompatible feature that nobody knows (bit 30)."""
    qcow2(path)
    with path.open("r+b") as file:
        file.seek(72)
        file.write((1 << 30).to_bytes(8, "big"))
    return path


def vmdk(path: Path) -> Path:
    """A text that QEMU takes for a disk which lies in another file."""
    path.write_text(VMDK.ljust(4096))
    return path


HOSTILE_IMAGES: list[tuple[str, str, Callable[[Path], Path], str]] = [
    ("absolute backing file", "qcow2", backed_by("/etc/passwd"), "backing"),
    ("relative backing file", "qcow2", backed_by("../../etc/passwd"), "backing"),
    (
        "json backing file",
        "qcow2",
        backed_by(f"json:{json.dumps({'driver': 'file', 'filename': '/etc/passwd'})}"),
        "backing",
    ),
    ("nbd backing file", "qcow2", backed_by("nbd://127.0.0.1:10809/x"), "backing"),
    ("external data file", "qcow2", with_external_data, "external"),
    ("unknown feature", "qcow2", with_unknown_feature, "feature"),
    ("vmdk as raw", "raw", vmdk, "vmdk"),
    ("vmdk as qcow2", "qcow2", vmdk, "vmdk"),
    ("qcow2 as raw", "raw", qcow2, "qcow"),
    ("absurd size", "qcow2", lambda path: qcow2(path, size="32T"), "large"),
]


@pytest.mark.parametrize(
    ("declared", "make", "word"),
    [pytest.param(*case[1:], id=case[0]) for case in HOSTILE_IMAGES],
)
def test_hostile_image_is_refused(
    cloud: LabCloud, tmp_path: Path, declared: str, make: Callable[[Path], Path], word: str
) -> None:
    template = cloud.admin.post(
        "/admin/templates",
        json={
            "name": f"Hostile {uuid4().hex[:12]}",
            "version": "1",
            "family": "linux",
            "default_username": "root",
        },
    )
    assert template.status_code == 201, template.text
    template_id = template.json()["data"]["id"]
    answer = cloud.admin.post(
        f"/admin/templates/{template_id}/images?format={declared}",
        content=make(tmp_path / "image").read_bytes(),
        headers={"content-type": "application/octet-stream"},
    )
    assert answer.status_code == 202, answer.text
    ended = cloud.wait(answer.json()["operation"]["uuid"])
    assert ended["status"] == "failed"
    assert ended["error"]["type"] == "VALIDATION_ERROR"
    assert word in ended["error"]["message"].lower(), ended

    listed = cloud.admin.get("/admin/templates").json()["data"]
    (image,) = next(row for row in listed if row["id"] == template_id)["images"]
    assert image["state"] == "refused"
    assert image["refusal"] == ended["error"]["message"]
    incoming = Path(cloud.plane.environment()["AWAN_IMAGE_DIR"]) / "incoming"
    assert list(incoming.iterdir()) == []
    order = cloud.order() | {"template_id": template_id}
    refused = cloud.client.post("/instances", json=order)
    assert (refused.status_code, list(refused.json()["errors"])) == (422, ["template_id"])
