"""Charts of a real guest, against what the host accounts to its QEMU and what was really sent and written."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import lab_inspection
from tests.support.lab_cloud import LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200)]

MIB = 1024**2
GIB = 1024**3
SENT_MIB, RECEIVED_MIB, WRITTEN_MIB = 24, 16, 48
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
ROUND_S = 10
LOGIN_S = 5


def points(cloud: LabCloud, uuid: str) -> list[dict[str, Any]]:
    """The chart of the last hour."""
    answer = cloud.client.get(f"/instances/{uuid}/rrd", params={"periode": "hour"})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]["points"]
    return found


def scrape(cloud: LabCloud, uuid: str) -> dict[str, float]:
    """The instance's lines of the customer's scrape."""
    answer = cloud.client.get("/metrics/instances")
    assert answer.status_code == 200, answer.text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.labels["uuid"] == uuid
    }


def host_cpu_s(pid: int) -> float:
    """The processor time that the host has accounted to a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def wanted_cpu_s(pid: int) -> float:
    """The processor time that the threads of a process had or waited for while others had it."""
    found = (thread / "schedstat" for thread in Path(f"/proc/{pid}/task").iterdir())
    return sum(sum(map(int, path.read_text().split()[:2])) for path in found) / 1e9


def wait_for_round(cloud: LabCloud, uuid: str) -> None:
    """Until counters have been read that are younger than now."""
    (began,) = cloud.query("SELECT now()")
    until(
        lambda: cloud.query(
            "SELECT 1 FROM metric_reading WHERE instance_id = %s AND read_at > %s", uuid, began[0]
        ),
        6 * ROUND_S,
        "counters are not read",
    )


@pytest.mark.sampled("story")
def test_a_busy_guest(cloud: LabCloud) -> None:
    shown = cloud.create_instance(hostname="busy")
    uuid, address = shown["uuid"], shown["ip_address"]
    cloud.wait_ready(uuid)
    cloud.ssh_when_up(address, "true")
    wait_for_round(cloud, uuid)
    check_scrape(cloud, uuid)
    check_traffic(cloud, uuid, address)
    check_processor(cloud, uuid, address)
    check_stopped(cloud, uuid)


def check_scrape(cloud: LabCloud, uuid: str) -> None:
    """What the customer scrapes is what libvirt counts."""
    wait_for_round(cloud, uuid)
    scraped = scrape(cloud, uuid)
    node = lab_inspection.node_of(cloud.lab, uuid)
    lines = lab_inspection.virsh(cloud.lab, node, "domstats", "--raw", uuid).splitlines()
    counted = dict(line.strip().split("=", 1) for line in lines if "=" in line)
    assert scraped["awan_instance_up"] == 1
    assert scraped["awan_instance_memory_bytes"] == GIB
    assert 8 * MIB < scraped["awan_instance_memory_used_bytes"] < GIB
    assert scraped["awan_instance_storage_bytes"] == 20 * GIB
    disks = range(int(counted["block.count"]))
    assert scraped["awan_instance_storage_used_bytes"] == pytest.approx(
        sum(int(counted.get(f"block.{number}.physical", 0)) for number in disks), rel=0.2
    )
    for name, counter in (
        ("awan_instance_network_receive_bytes_total", "net.0.rx.bytes"),
        ("awan_instance_network_transmit_bytes_total", "net.0.tx.bytes"),
    ):
        assert 0 < scraped[name] <= int(counted[counter])
    assert 0 < scraped["awan_instance_cpu_seconds_total"] <= int(counted["cpu.time"]) / 1e9


def check_traffic(cloud: LabCloud, uuid: str, address: str) -> None:
    """Counters grow by what was sent and written, and the chart's rates add up to the same."""
    wait_for_round(cloud, uuid)
    before = scrape(cloud, uuid)
    began = int(time.time()) // 60 * 60
    sent = cloud.ssh(address, "cat >/dev/null", stdin="x" * SENT_MIB * MIB, timeout_s=300)
    assert sent.returncode == 0, sent
    received = cloud.ssh(address, f"head -c {RECEIVED_MIB * MIB} /dev/zero", timeout_s=300)
    assert len(received.stdout) == RECEIVED_MIB * MIB
    # Not zeros: those need not be written.
    written = cloud.ssh(
        address,
        f"sudo dd if=/dev/urandom of=/big bs=1M count={WRITTEN_MIB} 2>/dev/null && sync",
        timeout_s=300,
    )
    assert written.returncode == 0, written
    wait_for_round(cloud, uuid)
    after = scrape(cloud, uuid)

    def grown(name: str) -> float:
        return (after[name] - before[name]) / MIB

    # Frames, acknowledgements and SSH's own bytes come on top; of what goes out, those of the other direction.
    assert SENT_MIB <= grown("awan_instance_network_receive_bytes_total") < 1.25 * SENT_MIB + 2
    assert (
        RECEIVED_MIB
        <= grown("awan_instance_network_transmit_bytes_total")
        < 1.25 * RECEIVED_MIB + 3
    )
    assert WRITTEN_MIB <= grown("awan_instance_disk_written_bytes_total") < 1.25 * WRITTEN_MIB + 8
    charted = {
        name: sum(
            point[name] * 60
            for point in points(cloud, uuid)
            if point["time"] >= began and point[name] is not None
        )
        for name in ("netin", "netout", "diskwrite")
    }
    # The minute that goes on has a rate over what was measured of it so far: it counts for less than a minute.
    assert charted["netin"] >= SENT_MIB * MIB
    assert charted["netout"] >= RECEIVED_MIB * MIB
    assert charted["diskwrite"] >= WRITTEN_MIB * MIB


def check_processor(cloud: LabCloud, uuid: str, address: str) -> None:
    """A guest that works all the time shows a busy processor, in each whole minute as the host accounts it."""
    # It need not work long before the whole minute that is looked at.
    time.sleep((60 - LOGIN_S - time.time()) % 60)
    started = cloud.ssh(
        address, "sudo sh -c 'while :; do :; done' >/dev/null 2>&1 </dev/null & true"
    )
    assert started.returncode == 0, started
    pid = lab_inspection.qemu_pid(uuid)
    time.sleep(60 - time.time() % 60)
    minute, used_before, wanted_before = (
        int(time.time()) // 60 * 60,
        host_cpu_s(pid),
        wanted_cpu_s(pid),
    )
    time.sleep(60 - (time.time() - minute))
    used_s, wanted_s = host_cpu_s(pid) - used_before, wanted_cpu_s(pid) - wanted_before
    wait_for_round(cloud, uuid)
    (point,) = [point for point in points(cloud, uuid) if point["time"] == minute]
    # The guest wanted all it could get; how much that was depends on what else the machine had to do.
    assert wanted_s > 0.9 * 60
    assert point["cpu"] == pytest.approx(min(1.0, used_s / 60), abs=0.1)
    assert point["cpu"] > 0.5 * used_s / wanted_s
    assert point["maxcpu"] == 1.0
    assert (point["maxmem"], point["maxdisk"]) == (GIB, 20 * GIB)
    assert 0 < point["mem"] < GIB
    assert 0 < point["disk"] < 20 * GIB


def check_stopped(cloud: LabCloud, uuid: str) -> None:
    """An instance that is off is not measured: null, and no value of it is negative or a jump when it comes back."""
    cloud.change(uuid, "stop", force=True)
    until(
        lambda: not cloud.query("SELECT 1 FROM metric_reading WHERE instance_id = %s", uuid),
        6 * ROUND_S,
        "the reading of a stopped instance stays",
    )
    assert scrape(cloud, uuid)["awan_instance_up"] == 0
    assert "awan_instance_cpu_seconds_total" not in scrape(cloud, uuid)
    cloud.change(uuid, "start")
    wait_for_round(cloud, uuid)
    wait_for_round(cloud, uuid)
    for point in points(cloud, uuid):
        for name in ("cpu", "netin", "netout", "diskread", "diskwrite"):
            assert point[name] is None or 0 <= point[name] < 200 * MIB, point
