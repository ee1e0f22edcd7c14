"""Create → SSH login through the API, against bare QEMU booting the same image, seed and network.

Each pair creates an instance through the API and measures from the accepted POST to the first SSH login. Then the same
node boots the same template (a fresh overlay of the same file) with the same seed, machine type, memory, CPU model and
a tap on the same port of the switch, by a QEMU command of our own and nothing else. The order within pairs alternates.

SSH's own attempts to connect, and the router's to resolve an address, are a second and more apart. So the port is
knocked at every KNOCK_S until sshd greets, by a router that has forgotten the guest and asks as often.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from pathlib import Path
from uuid import UUID

from awan.engines.seed import SeedNic, SeedSpec, hash_password, render_seed
from benchmarks.real_cloud import real_cloud
from benchmarks.report import Row, percentile, publish, spread
from tests.support.lab_cloud import PASSWORD, LabCloud

TITLE = "Create to SSH login, against bare QEMU"
PAIRS = 5
KNOCK_S = 0.1
GREETING_S = 10.0
LOGIN_TIMEOUT_S = 600.0
POOL = "/var/lib/libvirt/images/awan"
TAP = "bench0"
PIDFILE = "/run/bench.pid"


def run(*, record: bool) -> None:
    """PAIRS pairs for the small template and for Debian 12, after one uncounted creation of each."""
    with real_cloud() as cloud:
        _ask_quickly(cloud)
        for kind, title in (("tiny-1", "Awan Tiny"), ("debian-12", "Debian 12")):
            _api(cloud, kind)
            pairs = []
            for number in range(PAIRS):
                pairs.append(_pair(cloud, kind, bare_first=bool(number % 2)))
                print(
                    f"{title}: {pairs[-1][0]:.2f} s through the API, {pairs[-1][1]:.2f} s bare",
                    flush=True,
                )
            ratios = [through_api / bare for through_api, bare in pairs]
            rows = [
                Row("through the API", spread([pair[0] for pair in pairs])),
                Row("bare QEMU", spread([pair[1] for pair in pairs])),
                Row(
                    "ratio, median of pairs",
                    f"{percentile(ratios, 50):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f})",
                    "≤ 1.10",
                ),
            ]
            publish(f"{TITLE}: {title}", "python -m benchmarks boot", rows, record=record)


def _pair(cloud: LabCloud, kind: str, *, bare_first: bool) -> tuple[float, float]:
    """Seconds through the API and by bare QEMU. The bare boot borrows the port of an instance that is stopped."""
    if not bare_first:
        return _api(cloud, kind), _bare(cloud, kind)
    bare_s = _bare(cloud, kind)
    return _api(cloud, kind), bare_s


def _api(cloud: LabCloud, kind: str) -> float:
    body = cloud.order(kind)  # type: ignore[arg-type]
    _forget(cloud)
    began_at = time.monotonic()
    answer = cloud.client.post("/instances", json=body)
    assert answer.status_code == 202, answer.text
    shown = answer.json()["data"]
    _log_in(cloud, shown["ip_address"], began_at)
    elapsed_s = time.monotonic() - began_at
    cloud.wait(answer.json()["operation"]["uuid"])
    cloud.delete_instance(shown["uuid"])
    return elapsed_s


def _bare(cloud: LabCloud, kind: str) -> float:
    """Boots a copy of what an instance has, on its node and port, while the instance itself is off."""
    shown = cloud.create_instance(**cloud.order(kind))  # type: ignore[arg-type]
    stopped = cloud.client.post(f"/instances/{shown['uuid']}/stop", json={"force": True})
    cloud.wait(stopped.json()["operation"]["uuid"])
    node, port, mac, backing = _placement(cloud, UUID(shown["uuid"]))
    pool = cloud.lab.node_path(node, POOL)
    disk, seed = pool / "bench.qcow2", pool / "bench.iso"
    seed.write_bytes(_seed(cloud, shown, mac))
    cloud.lab.node_exec(
        node,
        [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            backing,
            f"{POOL}/bench.qcow2",
            "20G",
        ],
    )
    _plug_tap(cloud, node, port)
    _forget(cloud)
    process = subprocess.Popen(
        cloud.lab.machine_argv(node, _qemu(mac)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    began_at = time.monotonic()
    try:
        _log_in(cloud, shown["ip_address"], began_at)
        return time.monotonic() - began_at
    finally:
        # The process that entered the node's namespaces is not QEMU itself.
        cloud.lab.node_exec(node, ["sh", "-c", f"kill -9 $(cat {PIDFILE})"])
        process.wait()
        cloud.lab.node_exec(node, ["ovs-vsctl", "--if-exists", "del-port", "br-int", TAP])
        cloud.lab.node_exec(node, ["ip", "link", "del", TAP], check=False)
        disk.unlink(missing_ok=True)
        seed.unlink(missing_ok=True)
        cloud.delete_instance(shown["uuid"])


def _placement(cloud: LabCloud, instance: UUID) -> tuple[str, str, str, str]:
    """Node, port, MAC and the image's path on the node, from the database."""
    import psycopg

    with psycopg.connect(cloud.plane.environment()["AWAN_DATABASE_URL"]) as connection:
        row = connection.execute(
            "SELECT node.name, nic.nic_id, nic.mac, template_image.sha256 FROM instance"
            " JOIN node USING (node_id) JOIN nic USING (instance_id)"
            " JOIN template_image ON template_image.image_id = instance.image_id"
            " WHERE instance.instance_id = %s",
            [instance],
        ).fetchone()
    assert row is not None
    return row[0], str(row[1]), row[2], f"{POOL}/image-{row[3]}.qcow2"


def _seed(cloud: LabCloud, shown: dict[str, object], mac: str) -> bytes:
    return render_seed(
        SeedSpec(
            instance_id=UUID(str(shown["uuid"])),
            hostname=str(shown["hostname"]),
            username="budi",
            password_hash=hash_password(PASSWORD),
            ssh_keys=(cloud.private_key.with_suffix(".pub").read_text().strip(),),
            nics=(SeedNic(mac, True, True),),
        )
    )


def _plug_tap(cloud: LabCloud, node: str, port: str) -> None:
    """A tap on the integration bridge, as libvirt plugs one: OVN binds the port to it."""
    for argv in (
        ["ip", "tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"],
        ["ip", "link", "set", TAP, "up"],
        [
            "ovs-vsctl",
            "add-port",
            "br-int",
            TAP,
            "--",
            "set",
            "Interface",
            TAP,
            f"external_ids:iface-id={port}",
        ],
    ):
        cloud.lab.node_exec(node, argv)


def _qemu(mac: str) -> list[str]:
    """The command; with KVM where the CPU has it, else emulated, as the hypervisor engine decides."""
    flags = Path("/proc/cpuinfo").read_text().split()
    is_kvm = "vmx" in flags or "svm" in flags
    offloads = ",csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off,mrg_rxbuf=off"  # noqa: E501 - one option
    return [
        "qemu-system-x86_64",
        *("-pidfile", PIDFILE),
        *("-accel", "kvm" if is_kvm else "tcg"),
        *("-machine", "q35"),
        *("-cpu", "host" if is_kvm else BARE_CPU),
        *("-m", "1024", "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-device", "virtio-scsi-pci,id=scsi0"),
        *(
            "-drive",
            f"file={POOL}/bench.qcow2,format=qcow2,if=none,id=root,cache=writeback,discard=unmap",
        ),
        *("-device", "scsi-hd,bus=scsi0.0,scsi-id=0,drive=root,bootindex=1"),
        *("-drive", f"file={POOL}/bench.iso,format=raw,if=none,id=seed,readonly=on,media=cdrom"),
        *("-device", "scsi-cd,bus=scsi0.0,scsi-id=1,drive=seed"),
        *("-netdev", f"tap,id=net0,ifname={TAP},script=no,downscript=no,vhost=off"),
        *("-device", f"virtio-net-pci,netdev=net0,mac={mac}{offloads}"),
        *("-device", "virtio-rng-pci", "-device", "virtio-balloon-pci", "-vga", "std"),
        *("-serial", "null", "-device", "virtio-serial-pci"),
        *("-chardev", "socket,id=agent,path=/run/bench-agent.sock,server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]


BARE_CPU = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt"


def _log_in(cloud: LabCloud, address: str, began_at: float) -> None:
    """Returns at the first SSH login that works."""
    while time.monotonic() - began_at < LOGIN_TIMEOUT_S:
        if not _greets(address):
            time.sleep(KNOCK_S)
            continue
        with contextlib.suppress(subprocess.TimeoutExpired):
            if cloud.ssh(address, "true").returncode == 0:
                return
    raise AssertionError(f"no SSH login at {address} within {LOGIN_TIMEOUT_S:.0f} s")


def _greets(address: str) -> bool:
    """Whether an SSH server says its version. Waits longer than KNOCK_S only for one that took the connection."""
    try:
        with socket.create_connection((address, 22), timeout=3 * KNOCK_S) as connection:
            connection.settimeout(GREETING_S)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _ask_quickly(cloud: LabCloud) -> None:
    """Lets the router repeat its questions for an unknown address as often as we knock."""
    for family in ("ipv4", "ipv6"):
        path = f"/proc/sys/net/{family}/neigh/pub/retrans_time_ms"
        cloud.lab.router_exec(["sh", "-c", f"echo {KNOCK_S * 1000:.0f} > {path}"])


def _forget(cloud: LabCloud) -> None:
    """Makes the router ask for every address anew."""
    cloud.lab.router_exec(["ip", "neighbour", "flush", "dev", "pub"])
