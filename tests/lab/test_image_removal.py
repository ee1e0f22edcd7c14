"""Removing a template on real engines: the copy in a node's pool goes, but not from under a disk."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lab.templates import cached
from tests.support.lab_cloud import LabCloud
from tests.support.lab_inspection import files_on, node_of

pytestmark = pytest.mark.lab


def test_a_template_goes_with_its_copies(cloud: LabCloud, tmp_path: Path) -> None:
    template, sha256 = import_own_build(cloud, tmp_path)
    name = f"image-{sha256}.qcow2"
    stored = Path(cloud.plane.environment()["AWAN_IMAGE_DIR"]) / f"{sha256}.qcow2"
    uuid = cloud.create_instance(template_id=template)["uuid"]
    node = node_of(cloud.lab, uuid)
    assert name in files_on(cloud.lab, node)
    assert stored.exists()

    refused = cloud.admin.delete(f"/admin/templates/{template}")
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    assert cloud.delete_instance(uuid)["status"] == "succeeded"
    removed = cloud.admin.delete(f"/admin/templates/{template}")
    assert removed.is_success, removed.text
    assert cloud.wait(removed.json()["operation"]["uuid"])["status"] == "succeeded"
    assert not [file for file in files_on(cloud.lab, node) if file.startswith(name)]
    assert not stored.exists()


def import_own_build(cloud: LabCloud, directory: Path) -> tuple[int, str]:
    """The small guest as a template of its own, with a content that no other template has."""
    path = directory / "own.qcow2"
    shutil.copyfile(cached("tiny-1", lambda _: None).path, path)
    subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", str(path), "+1M"], check=True)
    body = {"name": "Own", "version": "1", "default_username": "awan", "memory_mib_min": 128}
    template = int(cloud.admin.post("/admin/templates", json=body).json()["data"]["id"])
    uploaded = cloud.admin.post(
        f"/admin/templates/{template}/images",
        content=path.read_bytes(),
        headers={"content-type": "application/octet-stream"},
    )
    assert uploaded.status_code == 202, uploaded.text
    assert cloud.wait(uploaded.json()["operation"]["uuid"])["status"] == "succeeded"
    rows = cloud.admin.get("/admin/templates").json()["data"]
    (image,) = next(row["images"] for row in rows if row["id"] == template)
    return template, image["sha256"]
