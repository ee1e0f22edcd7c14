"""A Debian guest as a customer uses it: login by key and by password, user data, addresses, the disk, the seed.

And what its owner changes in it: one guest for both, since it takes a minute or two to boot.
"""

from __future__ import annotations

import base64
import json

import pytest

from tests.support import lab_inspection
from tests.support.guest_changes import logs_in, rename, set_password
from tests.support.lab_cloud import PASSWORD, LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1500)]

MARKER = "wanted-by-the-customer"
USER_DATA = f"""#cloud-config
write_files:
  - path: /etc/marker
    content: "{MARKER}\\n"
runcmd:
  - [sh, -c, "tr a-z A-Z < /etc/marker > /var/lib/marker"]
"""
GIB = 1 << 30
SECOND, THIRD = "Brave-Donkey-8", """Calm'Badger"$(id)\\9"""


def test_a_guest_from_order_to_deletion(cloud: LabCloud) -> None:
    shown = cloud.create_instance(template="debian-12", hostname="web-1", user_data=USER_DATA)
    uuid, four = shown["uuid"], shown["ip_address"]
    six = shown["public_network"]["ipv6_address"]
    cloud.ssh_when_up(four, "true", timeout_s=700)
    assert cloud.ssh(four, "cloud-init status --wait", timeout_s=600).stdout.endswith("done\n")
    assert cloud.wait_ready(uuid)["ready_at"]

    def says(command: str) -> str:
        done = cloud.ssh(four, command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert says("hostname") == "web-1"
    assert says("uname -s -m") == "Linux x86_64"
    assert says("sudo id -un") == "root"
    addresses = {
        address["local"]
        for address in json.loads(says("ip -j address show dev eth0"))[0]["addr_info"]
    }
    assert {four, six} <= addresses
    assert says(". /etc/os-release; echo $ID $VERSION_ID") == "debian 12"
    # growpart and resize2fs: what is missing of 20 GiB are the file system's own tables.
    assert int(says("df --block-size=1 --output=size / | tail -1")) > 19 * GIB
    assert says("cat /etc/marker /var/lib/marker").split() == [MARKER, MARKER.upper()]
    assert cloud.ssh(six, "id -un").stdout == "budi\n"
    assert cloud.ssh(four, "id -un", password=PASSWORD).stdout == "budi\n"
    assert cloud.ssh(four, "id -un", password="Wrong-Horse-7").returncode == 255
    assert cloud.ssh(four, "id -un", user="root").returncode == 255

    check_only_the_scrubbed_seed_is_left(cloud, uuid, four)
    cloud.assert_green()

    check_changes_with_and_without_the_agent(cloud, uuid, four)
    again = cloud.show(uuid)
    assert (again["status"], again["ip_address"]) == ("Running", four)
    assert cloud.ssh(four, "sudo cat /etc/marker", password=THIRD).stdout.strip() == MARKER
    assert cloud.delete_instance(uuid)["status"] == "succeeded"
    assert cloud.is_gone(uuid)


def check_only_the_scrubbed_seed_is_left(cloud: LabCloud, uuid: str, address: str) -> None:
    """After the first boot neither the node nor the guest's CD has login or user data any more."""
    node = lab_inspection.node_of(cloud.lab, uuid)
    scrubbed = f"seed-{uuid}-2.iso"

    def seeds() -> bool:
        files = lab_inspection.files_on(cloud.lab, node)
        return [name for name in files if name.startswith("seed-")] == [scrubbed]

    until(seeds, 60, "the first seed is still there")
    content = lab_inspection.download(cloud.lab, node, scrubbed)
    assert b"web-1" in content
    encoded = base64.b64encode(USER_DATA.encode())[:40]
    for secret in (b"$6$", PASSWORD.encode(), MARKER.encode(), encoded, b"ssh-ed25519", b"budi"):
        assert secret not in content
    for name in lab_inspection.files_on(cloud.lab, node):
        if not name.startswith("image-"):
            path = f"{lab_inspection.POOL_PATH}/{name}"
            as_nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
            assert cloud.lab.node_exec(node, [*as_nobody, "cat", path], check=False).returncode
    read_cd = "sudo mount -o ro /dev/sr0 /mnt && cat /mnt/user-data; sudo umount /mnt"
    done = cloud.ssh(address, read_cd)
    assert (done.returncode, done.stdout) == (0, ""), done


def check_changes_with_and_without_the_agent(cloud: LabCloud, uuid: str, address: str) -> None:
    """Password and name reach the guest at once by its agent, else at its next boot."""
    set_password(cloud, uuid, SECOND)
    assert logs_in(cloud, address, SECOND)
    assert not logs_in(cloud, address, PASSWORD)
    assert rename(cloud, uuid, "web-2") == "now"
    assert cloud.ssh(address, "hostname; hostnamectl --static").stdout == "web-2\nweb-2\n"
    assert cloud.ssh(address, "getent hosts web-2").returncode == 0
    cloud.assert_green()

    # Masked, it does not come back with the next boot either.
    cloud.ssh(address, "sudo systemctl mask --now qemu-guest-agent")
    body = {"password": THIRD, "password_confirmation": THIRD}
    refused = cloud.client.put(f"/instances/{uuid}/password", json=body)
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    assert "stop the instance" in refused.json()["message"]
    assert logs_in(cloud, address, SECOND)
    assert rename(cloud, uuid, "web-3") == "next_boot"
    assert cloud.ssh(address, "hostname").stdout == "web-2\n"

    cloud.change(uuid, "stop")
    assert cloud.show(uuid)["status"] == "Stopped"
    node = lab_inspection.node_of(cloud.lab, uuid)
    assert "(shutdown)" in lab_inspection.virsh(cloud.lab, node, "domstate", "--reason", uuid)
    set_password(cloud, uuid, THIRD)
    cloud.assert_green()
    cloud.change(uuid, "start")
    assert cloud.ssh_when_up(address, "hostname", timeout_s=700, password=THIRD) == "web-3\n"
    assert not logs_in(cloud, address, SECOND)

    def seeds() -> list[str]:
        return [it for it in lab_inspection.files_on(cloud.lab, node) if it.startswith("seed-")]

    def is_scrubbed() -> bool:
        # While the CD is changed there are two, and the first one may go between two looks.
        found = seeds()
        try:
            contents = [lab_inspection.download(cloud.lab, node, it) for it in found]
        except AssertionError:
            return False
        return len(contents) == 1 and b"$6$" not in contents[0]

    until(is_scrubbed, 300, "the password is still in the seed")
    assert b"web-3" in lab_inspection.download(cloud.lab, node, seeds()[0])
    assert logs_in(cloud, address, THIRD)
    cloud.assert_green()
