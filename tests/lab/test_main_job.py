"""The main job on real engines: create, log in over SSH, stop, start, delete, nothing left."""

from __future__ import annotations

import pytest

from tests.support.lab_cloud import LabCloud

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]


def test_create_log_in_and_delete(cloud: LabCloud) -> None:
    shown = cloud.create_instance(hostname="first")
    assert shown["status"] == "Running"
    assert "first" in cloud.ssh_when_up(shown["ip_address"], "uname -a; hostname")
    assert cloud.wait_ready(shown["uuid"])["ready_at"]
    six = shown["public_network"]["ipv6_address"]
    assert cloud.ssh(six, "true").returncode == 0
    assert cloud.delete_instance(shown["uuid"])["status"] == "succeeded"
    assert cloud.client.get(f"/instances/{shown['uuid']}").status_code == 404
