"""What one customer wrote, the next one cannot read: not inside a guest, not in the files of its disk."""

from __future__ import annotations

from uuid import uuid4

import pytest

from tests.support import lab_inspection
from tests.support.lab_cloud import LabCloud

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200)]

WRITTEN_MIB = 64
# The file system puts a first file near its begin; that the marker is found there before it is deleted proves it.
READ_MIB = 384


def find_on_disk(cloud: LabCloud, address: str, marker: str) -> int:
    """How many lines with the marker the first READ_MIB of the guest's raw disk holds."""
    read = f"sudo dd if=/dev/sda bs=1M count={READ_MIB} 2>/dev/null | grep -a -c -F {marker}"
    done = cloud.ssh(address, read, timeout_s=600)
    assert done.returncode in (0, 1), done
    return int(done.stdout)


@pytest.mark.sampled("story")
def test_nothing_of_a_deleted_disk_comes_back(cloud: LabCloud) -> None:
    marker = f"remains-of-{uuid4().hex}"
    nodes = {row["name"]: row["uuid"] for row in cloud.admin.get("/admin/nodes").json()["data"]}
    here, *others = sorted(nodes)
    for other in others:
        assert cloud.admin.post(f"/admin/nodes/{nodes[other]}/cordon").is_success
    try:
        first = cloud.create_instance()
        assert lab_inspection.node_of(cloud.lab, first["uuid"]) == here
        cloud.ssh_when_up(first["ip_address"], "true")
        fill = (
            f"yes {marker} | sudo dd of=/fill bs=1M count={WRITTEN_MIB} iflag=fullblock conv=fsync"
        )
        assert cloud.ssh(first["ip_address"], fill, timeout_s=300).returncode == 0
        assert find_on_disk(cloud, first["ip_address"], marker) > 1000
        assert cloud.delete_instance(first["uuid"])["status"] == "succeeded"

        stranger = cloud.customer("The next customer")
        second = cloud.create_instance(stranger)
        assert lab_inspection.node_of(cloud.lab, second["uuid"]) == here
        cloud.ssh_when_up(second["ip_address"], "true")
        assert find_on_disk(cloud, second["ip_address"], marker) == 0
        for name in lab_inspection.files_on(cloud.lab, here):
            path = cloud.lab.node_path(here, f"{lab_inspection.POOL_PATH}/{name}")
            assert marker.encode() not in path.read_bytes(), name
    finally:
        for other in others:
            assert cloud.admin.post(f"/admin/nodes/{nodes[other]}/uncordon").is_success
