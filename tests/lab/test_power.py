"""Start, stop and restart on real guests: graceful, forced after the grace, forced at once."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tests.support import lab_inspection
from tests.support.lab_cloud import STOP_GRACE_S, LabCloud

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200)]


def seconds_of(operation: dict[str, Any]) -> float:
    """How long an operation took."""
    began, ended = (
        datetime.fromisoformat(operation[name]) for name in ("started_at", "finished_at")
    )
    return (ended - began).total_seconds()


def why_off(cloud: LabCloud, uuid: str) -> str:
    """libvirt's reason for a domain being off."""
    node = lab_inspection.node_of(cloud.lab, uuid)
    state = lab_inspection.virsh(cloud.lab, node, "domstate", "--reason", uuid).strip()
    assert state.startswith("shut off")
    return state.removeprefix("shut off").strip(" ()")


@pytest.mark.sampled("story")
def test_graceful_and_forced(cloud: LabCloud) -> None:
    shown = cloud.create_instance(hostname="lamp")
    uuid, address = shown["uuid"], shown["ip_address"]
    cloud.wait_ready(uuid)
    assert cloud.ssh_when_up(address, "hostname") == "lamp\n"

    assert seconds_of(cloud.change(uuid, "stop")) < STOP_GRACE_S
    assert why_off(cloud, uuid) == "shutdown"
    assert cloud.show(uuid)["status"] == "Stopped"
    refused = cloud.client.post(f"/instances/{uuid}/stop", json={})
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    refused = cloud.client.post(f"/instances/{uuid}/restart", json={})
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")

    cloud.change(uuid, "start")
    cloud.ssh_when_up(address, "true")
    first = lab_inspection.qemu_pid(uuid)
    cloud.change(uuid, "restart")
    assert lab_inspection.qemu_pid(uuid) != first
    assert cloud.show(uuid)["ip_address"] == address
    assert cloud.ssh_when_up(address, "hostname") == "lamp\n"
    cloud.assert_green()

    # A stopped init starts nothing again: from now on the guest does not hear the power button.
    cloud.ssh(address, "sudo kill -TSTP 1; sudo killall acpid")
    operation = cloud.change(uuid, "stop")
    assert seconds_of(operation) >= STOP_GRACE_S
    assert why_off(cloud, uuid) == "destroyed"

    cloud.change(uuid, "start")
    cloud.ssh_when_up(address, "sudo kill -TSTP 1; sudo killall acpid")
    operation = cloud.change(uuid, "stop", force=True)
    assert seconds_of(operation) < STOP_GRACE_S / 2
    assert why_off(cloud, uuid) == "destroyed"
    cloud.assert_green()
