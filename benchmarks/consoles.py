"""What open consoles cost the API process that relays them: memory, threads, CPU, and the time of other calls."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psycopg

from awan.runtime.control_plane import ControlPlane
from benchmarks.report import Row, percentile, publish, spread
from lab.http_api import Api
from lab.seed_catalogue import (
    Engine,
    SeedLocation,
    SeedNode,
    SeedPool,
    create_customer_key,
    ensure_customer,
    seed_location,
)
from tests.support.console_viewer import Screen, Viewer, ask, open_viewer

TITLE = "Open consoles"
CONSOLES = 100
LIST_CALLS = 200
IDLE_S = 20.0
KEYS_PER_S = 100
BUSY_S = 15.0
FAKE = {"node_threads": 1024, "node_memory_mib": 1024**2, "node_disk_gib": 1024**2}
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def run(*, record: bool) -> None:
    """100 instances with simulated engines, one console each; all processes are real, screens have 320 × 200 pixels."""
    with tempfile.TemporaryDirectory(prefix="awan-bench-") as directory:
        Path(directory).chmod(0o755)
        plane = ControlPlane(Path(directory) / "state")
        settings = {"AWAN_LISTEN_PORT": "18071", "AWAN_CONSOLE_PER_ACCOUNT_MAX": str(CONSOLES)}
        plane.up(lambda step, seconds: None, settings)
        try:
            rows = _measure(plane)
        finally:
            plane.down()
    publish(TITLE, "python -m benchmarks consoles", rows, record=record)


def _measure(plane: ControlPlane) -> list[Row]:
    client, instances = _fill(plane)
    pid = plane.statuses()["api"].pid
    assert pid is not None
    alone_ms = _time_lists(client)
    memory_kib, threads = _memory_kib(pid), _threads(pid)
    viewers: list[tuple[Viewer, Screen]] = []
    opened_ms = []
    with ExitStack() as held:
        for uuid in instances:
            began_at = time.monotonic()
            viewer, screen = open_viewer(ask(client, uuid))
            held.enter_context(viewer)
            viewer.update(screen)
            opened_ms.append((time.monotonic() - began_at) * 1000)
            viewers.append((viewer, screen))
        more_kib, more_threads = _memory_kib(pid) - memory_kib, _threads(pid) - threads
        began_at, ticks = time.monotonic(), _cpu_ticks(pid)
        time.sleep(IDLE_S)
        idle_cpu = (_cpu_ticks(pid) - ticks) / TICKS_PER_S / (time.monotonic() - began_at)
        idle_ms = _time_lists(client)
        with _typing(viewers) as updates:
            busy_ms = _time_lists(client)
            time.sleep(BUSY_S)
    client.close()
    return [
        Row("ticket to first picture, one after the other: median", spread(opened_ms, "ms", 0)),
        Row(f"memory of the API for {CONSOLES} open consoles", f"{more_kib / 1024:.1f} MiB"),
        Row("a console", f"{more_kib / CONSOLES:.0f} KiB"),
        Row("further threads of the API", str(more_threads), "none per console"),
        Row("CPU of the API, nobody types", f"{idle_cpu * 100:.2f} % of a core"),
        Row("GET /instances, no console open: median", spread(alone_ms, "ms", 1)),
        Row(f"GET /instances, {CONSOLES} consoles open: median", spread(idle_ms, "ms", 1)),
        Row("the same, p95", f"{percentile(idle_ms, 95):.1f} ms"),
        Row(
            f"GET /instances, all redrawn ({updates[0] / updates[1]:.0f} MB/s): median",
            spread(busy_ms, "ms", 1),
        ),
        Row("the same, p95", f"{percentile(busy_ms, 95):.1f} ms"),
    ]


def _fill(plane: ControlPlane) -> tuple[httpx.Client, list[str]]:
    """A customer's client and its running instances."""
    admin_key = plane.run_command("init").strip().splitlines()[-1]
    with Api(plane.api_url, admin_key) as api:
        location_id = seed_location(api, _location())
        tier_id = int(api.get("admin/tiers")[0]["id"])
        template = api.post("admin/templates", {"name": "Debian", "version": "12"})
        account = ensure_customer(
            api, "Watcher", instances_max=1000, vcpus_max=1000, public_ips_max=1000
        )
        key = create_customer_key(api, account, "bench")
    with psycopg.connect(plane.environment()["AWAN_DATABASE_URL"], autocommit=True) as connection:
        connection.execute(
            "UPDATE api_key SET reads_per_minute = 1000000, writes_per_minute = 1000000"
        )
        connection.execute(
            "INSERT INTO template_image (image_id, template_id, state, declared_format, format, sha256,"
            " size_bytes, virtual_size_bytes) VALUES (gen_random_uuid(), %s, 'ready', 'qcow2', 'qcow2',"
            " repeat('ab', 32), 1024, 2147483648)",
            [template["id"]],
        )
    client = httpx.Client(
        base_url=plane.api_url, headers={"x-apikey": key}, timeout=60, trust_env=False
    )
    order = {
        "location_id": location_id,
        "tier_id": tier_id,
        "template_id": template["id"],
        "cpu": 1,
        "memory": 1,
        "storage": 20,
        "username": "budi",
        "password": "Correct-Horse-7",
        "use_public_ip": True,
    }
    created = [
        client.post("/instances", json={**order, "hostname": f"vm-{number}"}).json()
        for number in range(CONSOLES)
    ]
    for answer in created:
        _wait(client, answer["operation"]["uuid"])
    return client, [answer["data"]["uuid"] for answer in created]


def _wait(client: httpx.Client, operation: str) -> None:
    while True:
        status = client.get(f"/operations/{operation}").json()["data"]["status"]
        if status in ("succeeded", "failed", "cancelled"):
            assert status == "succeeded"
            return
        time.sleep(0.05)


def _location() -> SeedLocation:
    return SeedLocation(
        name="Bench",
        code="bench",
        country="ID",
        engines={kind: Engine("fake", FAKE) for kind in ("hypervisor", "volumes", "fabric")},
        nodes=[SeedNode(name="n1", libvirt_uri="fake://n1/")],
        pools=[SeedPool("198.18.0.0/22", "198.18.0.1", ("198.18.0.1",))],
        physical_network="public",
    )


def _time_lists(client: httpx.Client) -> list[float]:
    """Milliseconds of a customer's list page, again and again."""
    took_ms = []
    for _ in range(LIST_CALLS):
        began_at = time.monotonic()
        assert client.get("/instances").status_code == 200
        took_ms.append((time.monotonic() - began_at) * 1000)
    return took_ms


@contextmanager
def _typing(viewers: list[tuple[Viewer, Screen]]) -> Iterator[list[float]]:
    """Inside, one key after the other is pressed in all consoles and redraws its screen; then MB and seconds."""
    ended = threading.Event()
    figures = [0.0, 0.0]

    def type_on() -> None:
        began_at = time.monotonic()
        for number in range(10**9):
            if ended.is_set():
                break
            viewer, screen = viewers[number % len(viewers)]
            viewer.press(0x61 + number % 26)
            figures[0] += len(viewer.update(screen, incremental=True)) / 1e6
            time.sleep(max(0.0, began_at + number / KEYS_PER_S - time.monotonic()))
        figures[1] = time.monotonic() - began_at

    typist = threading.Thread(target=type_on)
    typist.start()
    try:
        yield figures
    finally:
        ended.set()
        typist.join()


def _status(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def _memory_kib(pid: int) -> int:
    return _status(pid, "VmRSS")


def _threads(pid: int) -> int:
    return _status(pid, "Threads")


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
