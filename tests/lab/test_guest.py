"""What owners change inside a small guest: password and name by its agent; reset and screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from awan.engines.hypervisor.pixmap import PNG_SIGNATURE
from tests.support import lab_inspection
from tests.support.guest_changes import logs_in, rename, set_password
from tests.support.lab_cloud import PASSWORD, LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(2400)]

SECOND = "Brave-Donkey-8"


def test_a_small_guest(cloud: LabCloud, tmp_path: Path) -> None:
    shown = cloud.create_instance(hostname="lamp")
    uuid, four = shown["uuid"], shown["ip_address"]
    cloud.wait_ready(uuid)
    assert cloud.ssh_when_up(four, "hostname") == "lamp\n"

    assert rename(cloud, uuid, "lamp-2.example.com") == "now"
    assert cloud.ssh(four, "hostname").stdout == "lamp-2\n"
    assert cloud.ssh(four, "cat /etc/hostname").stdout == "lamp-2\n"
    assert "lamp-2.example.com lamp-2" in cloud.ssh(four, "cat /etc/hosts").stdout

    assert logs_in(cloud, four, PASSWORD)
    set_password(cloud, uuid, SECOND)
    assert logs_in(cloud, four, SECOND)
    assert not logs_in(cloud, four, PASSWORD)
    cloud.assert_green()

    boot_id = "cat /proc/sys/kernel/random/boot_id"
    before, qemu = cloud.ssh(four, boot_id).stdout, lab_inspection.qemu_pid(uuid)
    # A reset is a reset: what the guest has not written yet is lost.
    assert cloud.ssh(four, "sync").returncode == 0
    cloud.change(uuid, "reset")
    assert cloud.show(uuid)["status"] == "Running"

    def is_another_boot() -> bool:
        done = cloud.ssh(four, boot_id)
        return done.returncode == 0 and done.stdout != before

    until(is_another_boot, 300, "the guest did not boot again")
    assert lab_inspection.qemu_pid(uuid) == qemu, "the same machine"
    assert cloud.ssh(four, "hostname").stdout == "lamp-2\n", "the name outlives a boot"
    assert logs_in(cloud, four, SECOND)

    picture = cloud.client.get(f"/instances/{uuid}/screenshot")
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
    assert picture.content.startswith(PNG_SIGNATURE)
    (tmp_path / "screen.png").write_bytes(picture.content)
    printed = cloud.client.get(f"/instances/{uuid}/console/log", params={"kib": 256})
    assert (printed.status_code, printed.headers["content-type"]) == (
        200,
        "text/plain; charset=utf-8",
    )
    assert "login:" in printed.text
    assert PASSWORD not in printed.text
    assert "$6$" not in printed.text
    cloud.assert_green()
