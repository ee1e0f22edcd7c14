"""Consoles of real guests: their screens seen and typed at, in the clear and over TLS, and what ends them."""

from __future__ import annotations

import hmac
import os
from base64 import urlsafe_b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from websockets.exceptions import InvalidStatus

from tests.support import lab_inspection
from tests.support.browser import Browser, is_installed
from tests.support.console_viewer import (
    DirectViewer,
    Screen,
    Viewer,
    ask,
    open_viewer,
)
from tests.support.lab_cloud import LabCloud, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200)]

RETURN = 0xFF0D
STATUS = "(document.getElementById('status')?.textContent ?? '')"
LIT_PIXELS = """
(() => {
  const canvas = document.querySelector("#screen canvas");
  if (!canvas) return 0;
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let lit = 0;
  for (let at = 0; at < data.length; at += 4) if (data[at] + data[at + 1] + data[at + 2] > 200) lit += 1;
  return lit;
})()
"""


def refusal(url: str, origin: str | None = None) -> int:
    """The status with which a websocket is refused."""
    with pytest.raises(InvalidStatus) as caught:
        Viewer(url, origin)
    return caught.value.response.status_code


def node_password(cloud: LabCloud, console: UUID) -> str:
    """What the node's screen was unlocked with, as the control plane derives it."""
    key_file = Path(cloud.plane.environment()["AWAN_SECRET_KEY_FILE"])
    key = bytes.fromhex(key_file.read_text().split()[1])
    digest = hmac.digest(key, b"console.node\0" + console.bytes, "sha256")
    return urlsafe_b64encode(digest).decode()[:8]


def lit(pixels: bytes) -> int:
    """How many pixels are not dark."""
    return sum(1 for at in range(0, len(pixels), 4) if max(pixels[at : at + 3]) > 100)


def wait_for_text(viewer: Viewer, screen: Screen, more_than: int) -> int:
    """The number of lit pixels once there are more than so many of them."""
    return until(lambda: max(0, lit(viewer.update(screen)) - more_than), 60, "no text") + more_than


def test_screens_of_both_nodes(cloud: LabCloud) -> None:
    """One guest on a node that speaks in the clear, one on a node that wants certificates."""
    created = [cloud.create_instance(hostname=name) for name in ("plain", "sealed")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cloud.wait_ready, [row["uuid"] for row in created]))
    nodes = {lab_inspection.node_of(cloud.lab, row["uuid"]) for row in created}
    assert nodes == {node.name for node in cloud.info.nodes}
    rows = dict(cloud.query("SELECT name, libvirt_uri FROM node WHERE state = 'active'"))
    assert sorted(uri.partition("://")[0] for uri in rows.values()) == ["qemu+tcp", "qemu+tls"]
    for row in created:
        check_screen(cloud, row["uuid"])
    cloud.assert_green()


def check_screen(cloud: LabCloud, uuid: str) -> None:
    given = ask(cloud.client, uuid)
    console = UUID(given["token"].partition(".")[0])
    viewer, screen = open_viewer(given, cloud.plane.api_url.removesuffix("/api/v1"))
    with viewer:
        assert screen.name == f"QEMU (awan-{uuid})"
        before = wait_for_text(viewer, screen, 20)
        for symbol in b"console":
            viewer.press(symbol)
        wait_for_text(viewer, screen, before)
        check_ticket_is_used_up(cloud, given)
        until(lambda: is_locked_again(cloud), 30, "the screen is still unlocked")
        check_node_is_locked(cloud, console, given["password"])
        viewer.update(screen)
    assert not tokens_in_logs(cloud, given["token"])


def check_ticket_is_used_up(cloud: LabCloud, given: dict[str, Any]) -> None:
    assert refusal(given["url"]) == 401
    waiting = cloud.query("SELECT count(*) FROM console WHERE state = 'open' AND closed_at IS NULL")
    assert waiting == [(1,)]


def is_locked_again(cloud: LabCloud) -> bool:
    """Whether the worker has done its part of the latest opening."""
    query = (
        "SELECT status FROM operation WHERE kind = 'console.open' ORDER BY created_at DESC LIMIT 1"
    )
    return cloud.query(query) == [("succeeded",)]


def check_node_is_locked(cloud: LabCloud, console: UUID, viewers_password: str) -> None:
    """Who could reach the node's port would not get in, with whatever was once said."""
    ((host, port, requires_tls),) = cloud.query(
        "SELECT host, port, requires_tls FROM console WHERE console_id = %s", console
    )
    assert host in [node.mgmt_ip for node in cloud.info.nodes]
    if requires_tls:
        with DirectViewer(host, port) as viewer:
            assert viewer.security_types() == bytes([19]), "nothing but TLS is offered"
        return
    for password in (node_password(cloud, console), viewers_password, ""):
        with DirectViewer(host, port) as viewer:
            assert not viewer.authenticate(password)


def tokens_in_logs(cloud: LabCloud, token: str) -> list[Path]:
    """Log files that hold a ticket."""
    wanted = token.encode()
    return [path for path in cloud.plane.log_dir.iterdir() if wanted in path.read_bytes()]


def test_what_opens_and_ends_a_console(cloud: LabCloud) -> None:
    """Refusals, and everything that ends an open console, on a guest without a system that could hear."""
    uuid = cloud.create_instance()["uuid"]
    check_expiry_and_origin(cloud, uuid)
    check_revocation(cloud, uuid)

    def stop() -> None:
        cloud.change(uuid, "stop", force=True)

    ends_with(cloud, uuid, stop)
    refused = cloud.client.post(f"/instances/{uuid}/vnc")
    assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    cloud.change(uuid, "start")
    ends_with(cloud, uuid, lambda: os.kill(lab_inspection.qemu_pid(uuid), 9))
    cloud.change(uuid, "restart", force=True)
    ends_with(cloud, uuid, lambda: cloud.delete_instance(uuid))
    states = cloud.query("SELECT DISTINCT state FROM console WHERE instance_id = %s", UUID(uuid))
    assert set(states) <= {("closed",), ("issued",)}


def check_expiry_and_origin(cloud: LabCloud, uuid: str) -> None:
    given = ask(cloud.client, uuid)
    for origin in ("https://evil.example", "null"):
        assert refusal(given["url"], origin) == 403
    with cloud.connect() as connection:
        connection.execute("UPDATE console SET ticket_expires_at = now()")
    assert refusal(given["url"]) == 401


def check_revocation(cloud: LabCloud, uuid: str) -> None:
    made = cloud.client.post("/api-keys", json={"name": "console"}).json()["data"]
    answer = cloud.client.post(f"/instances/{uuid}/vnc", headers={"x-apikey": made["key"]})
    viewer, screen = open_viewer(answer.json()["data"])
    with viewer:
        viewer.update(screen)
        assert cloud.client.delete(f"/api-keys/{made['id']}").status_code == 200
        assert viewer.closed() == (1008, "the API key that opened it is not valid any more")


def ends_with(cloud: LabCloud, uuid: str, act: Callable[[], object]) -> None:
    viewer, screen = open_viewer(ask(cloud.client, uuid))
    with viewer:
        viewer.update(screen)
        act()
        assert viewer.closed()[0] in (1000, 1008)


@pytest.mark.skipif(not is_installed(), reason="there is no chromium")
def test_a_browser_shows_the_login_prompt_and_logs_in(cloud: LabCloud) -> None:
    """The page of `page_url`; the pictures lie in the directory `AWAN_SCREENSHOT_DIR` when that is set."""
    password = "Console7login"
    shown = cloud.create_instance(hostname="screen", password=password)
    cloud.wait_ready(shown["uuid"])
    with Browser() as page:
        page.open(ask(cloud.client, shown["uuid"])["page_url"])
        page.until(f"{STATUS} === 'Connected'", timeout_s=60)
        page.until(f"{LIT_PIXELS} > 20", timeout_s=60)
        keep(page, "console-login-prompt.png")
        # Typed at the screen, arrived in the guest.
        # The guest takes what is typed only once it has asked: for the name's echo and the next question, then a shell.
        for text, pixels in (("budi\n", 200), (f"{password}\n", 30)):
            before = page.evaluate(LIT_PIXELS)
            page.type(text)
            page.until(f"{LIT_PIXELS} > {before + pixels}", timeout_s=60)
        keep(page, "console-shell.png")
        page.type("touch typed\n")
        until(lambda: cloud.ssh(shown["ip_address"], "ls typed").returncode == 0, 60, "no file")
        keep(page, "console-logged-in.png")
        assert page.complaints == []


def keep(page: Browser, name: str) -> None:
    folder = os.environ.get("AWAN_SCREENSHOT_DIR")
    if folder:
        (Path(folder) / name).write_bytes(page.screenshot())
