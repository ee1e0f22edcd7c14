"""What owners change inside real guests: password and name, by the agent or at the next boot; reset and screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from awan.engines.hypervisor.pixmap import PNG_SIGNATURE
from tests.support import lab_inspection
from tests.support.lab_cloud import PASSWORD, LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(2400)]

SECOND, THIRD = "Brave-Donkey-8", """Calm'Badger"$(id)\\9"""


def put(cloud: LabCloud, uuid: str, what: str, **body: Any) -> dict[str, Any]:
    """The answer of a change that has succeeded; on a busy machine it may be a 202, and is waited for."""
    answer = cloud.client.put(f"/instances/{uuid}/{what}", json=body)
    assert answer.status_code in (200, 202), answer.text
    ended = cloud.wait(answer.json()["operation"]["uuid"])
    assert ended["status"] == "succeeded", ended
    return dict(answer.json())


def rename(cloud: LabCloud, uuid: str, hostname: str) -> str:
    """Another name; when the guest has it."""
    put(cloud, uuid, "hostname", hostname=hostname)
    shown = cloud.show(uuid)
    assert shown["hostname"] == hostname
    return str(shown["hostname_applied"])


def set_password(cloud: LabCloud, uuid: str, password: str) -> dict[str, Any]:
    """Another password."""
    return put(cloud, uuid, "password", password=password, password_confirmation=password)


def logs_in(cloud: LabCloud, address: str, password: str) -> bool:
    """Whether the account can log in with this password alone."""
    return cloud.ssh(address, "id -un", password=password).stdout == "budi\n"


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


def test_a_debian_guest_with_and_without_its_agent(cloud: LabCloud) -> None:
    shown = cloud.create_instance(template="debian-12", hostname="web-1")
    uuid, four = shown["uuid"], shown["ip_address"]
    cloud.ssh_when_up(four, "true", timeout_s=700)
    cloud.ssh(four, "cloud-init status --wait", timeout_s=600)
    cloud.wait_ready(uuid)

    set_password(cloud, uuid, SECOND)
    assert logs_in(cloud, four, SECOND)
    assert not logs_in(cloud, four, PASSWORD)
    assert rename(cloud, uuid, "web-2") == "now"
    assert cloud.ssh(four, "hostname; hostnamectl --static").stdout == "web-2\nweb-2\n"
    assert cloud.ssh(four, "getent hosts web-2").returncode == 0
    cloud.assert_green()

    # Masked, it does not come back with the next boot either.
    cloud.ssh(four, "sudo systemctl mask --now qemu-guest-agent")
    body = {"password": THIRD, "password_confirmation": THIRD}
    refused = cloud.client.put(f"/instances/{uuid}/password", json=body)
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    assert "stop the instance" in refused.json()["message"]
    assert logs_in(cloud, four, SECOND)
    assert rename(cloud, uuid, "web-3") == "next_boot"
    assert cloud.ssh(four, "hostname").stdout == "web-2\n"

    cloud.change(uuid, "stop")
    set_password(cloud, uuid, THIRD)
    cloud.assert_green()
    cloud.change(uuid, "start")
    assert cloud.ssh_when_up(four, "hostname", timeout_s=700, password=THIRD) == "web-3\n"
    assert not logs_in(cloud, four, SECOND)
    node = lab_inspection.node_of(cloud.lab, uuid)

    def seeds() -> list[str]:
        return [it for it in lab_inspection.files_on(cloud.lab, node) if it.startswith("seed-")]

    def is_scrubbed() -> bool:
        # While the CD is changed there are two.
        found = seeds()
        return len(found) == 1 and b"$6$" not in lab_inspection.download(cloud.lab, node, found[0])

    until(is_scrubbed, 300, "the password is still in the seed")
    assert b"web-3" in lab_inspection.download(cloud.lab, node, seeds()[0])
    assert logs_in(cloud, four, THIRD)
    cloud.assert_green()
