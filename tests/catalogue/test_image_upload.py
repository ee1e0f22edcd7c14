"""Uploading a template's image: a worker checks it before it may be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from awan.settings import Settings
from tests.support.images import make_qcow2
from tests.support.simulated_cloud import SimulatedCloud

OCTETS = {"content-type": "application/octet-stream"}

pytestmark = pytest.mark.usefixtures("worker")


def upload(
    cloud: SimulatedCloud, content: bytes, image_format: str = "qcow2"
) -> tuple[str, str, str]:
    """Operation's status, image's state and refusal."""
    answer = cloud.admin.post(
        f"/admin/templates/{cloud.template_id}/images",
        content=content,
        params={"format": image_format},
        headers=OCTETS,
    )
    assert answer.status_code == 202, answer.text
    ended = cloud.wait(answer.json()["operation"]["uuid"], 30)
    (template,) = cloud.admin.get("/admin/templates").json()["data"]
    image = next(i for i in template["images"] if i["uuid"] == answer.json()["data"]["uuid"])
    return ended["status"], image["state"], image["refusal"] or ""


def test_a_good_image_becomes_the_newest(
    cloud: SimulatedCloud, settings: Settings, tmp_path: Path
) -> None:
    assert upload(cloud, make_qcow2(tmp_path / "a.qcow2")) == ("succeeded", "ready", "")
    (template,) = cloud.admin.get("/admin/templates").json()["data"]
    newest = template["images"][0]
    assert newest["virtual_size_bytes"] == 1024**3
    assert (settings.image_dir / f"{newest['sha256']}.qcow2").exists()
    assert list((settings.image_dir / "incoming").iterdir()) == []
    assert cloud.create_running()["status"] == "Running"


def test_images_that_lie_are_refused(
    cloud: SimulatedCloud, settings: Settings, tmp_path: Path
) -> None:
    base = tmp_path / "base.qcow2"
    make_qcow2(base)
    backed = make_qcow2(tmp_path / "backed.qcow2", "1G", "-F", "qcow2", "-b", str(base))
    for content, image_format in (
        (backed, "qcow2"),
        (b"not an image", "qcow2"),
        (make_qcow2(tmp_path / "b.qcow2"), "raw"),
    ):
        status, state, refusal = upload(cloud, content, image_format)
        assert (status, state) == ("failed", "refused"), image_format
        assert refusal.endswith(".")
    assert list((settings.image_dir / "incoming").iterdir()) == []


def test_an_upload_to_nothing_is_forgotten(cloud: SimulatedCloud, settings: Settings) -> None:
    answer = cloud.admin.post("/admin/templates/999999/images", content=b"x", headers=OCTETS)
    assert answer.status_code == 404
    incoming = settings.image_dir / "incoming"
    assert not incoming.exists() or list(incoming.iterdir()) == []
    wrong = cloud.admin.post(
        f"/admin/templates/{cloud.template_id}/images", content=b"x", params={"format": "vmdk"},
        headers=OCTETS,
    )  # fmt: skip
    assert set(wrong.json()["errors"]) == {"format"}
