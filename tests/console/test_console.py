"""Consoles over the API's own socket and a real RFB server of a simulated guest."""

from __future__ import annotations

import json
import logging
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text, update
from websockets.exceptions import InvalidStatus

from awan.console.models import Console
from awan.console.service import end_lost
from awan.fleet import Node
from awan.instances.rules import NODE_UNREACHABLE
from awan.kit.database import transaction
from tests.console.conftest import ConsoleRig
from tests.support.changed_settings import changed_settings
from tests.support.console_viewer import Viewer, ask, open_viewer

RETURN, KEY_A = 0xFF0D, 0x61
DELETE = {"remove_ip": True, "remove_block_storage": True}


def refusal(url: str, origin: str | None = None) -> tuple[int, str]:
    """Status and type with which a websocket is refused."""
    with pytest.raises(InvalidStatus) as caught:
        Viewer(url, origin)
    response = caught.value.response
    assert response.body is not None
    return response.status_code, json.loads(response.body)["type"]


def until(found: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def setting(settings: object) -> Iterator[Callable[[str, object], None]]:
    """Changes a setting of this process for one test."""
    with ExitStack() as changes:

        def change(name: str, value: object) -> None:
            changes.enter_context(changed_settings(**{name.lower(): str(value)}))

        yield change


def test_the_answer_has_the_contracts_fields(rig: ConsoleRig, http: httpx.Client) -> None:
    answer = http.post(f"/instances/{rig.uuid}/vnc")
    assert (answer.status_code, answer.json()["message"]) == (200, "VNC connection")
    given = answer.json()["data"]
    assert given["protocol"] == "rfb"
    url = urlsplit(given["url"])
    assert f"http://{url.netloc}" == rig.live.origin
    assert (url.scheme, parse_qs(url.query)["token"]) == ("ws", [given["token"]])
    assert len(given["password"]) == 8
    page, _, fragment = given["page_url"].partition("#")
    assert page == f"{rig.live.origin}/console"
    assert parse_qs(fragment) == {"token": [given["token"]], "password": [given["password"]]}
    other = ask(http, rig.uuid)
    assert {given[name] for name in ("token", "password")}.isdisjoint(other.values())


def test_a_repeat_with_the_same_key_shows_no_ticket(rig: ConsoleRig, http: httpx.Client) -> None:
    headers = {"Idempotency-Key": uuid4().hex}
    path = f"/instances/{rig.uuid}/vnc"
    first, again = http.post(path, headers=headers), http.post(path, headers=headers)
    given, shown = first.json()["data"], again.json()["data"]
    assert (again.status_code, again.json()["message"]) == (200, first.json()["message"])
    hidden = dict.fromkeys(("url", "token", "password", "page_url"))
    assert shown == {**given, **hidden}
    assert len(again.json()["warnings"]) == 1
    assert "warnings" not in first.json()
    assert not [given[name] for name in hidden if given[name] in again.text]
    assert states(rig) == ["issued"]
    # The first answer's ticket is as good as before.
    viewer, _ = open_viewer(given)
    viewer.close()


def test_a_viewer_sees_the_screen_and_its_keys_arrive(rig: ConsoleRig, http: httpx.Client) -> None:
    viewer, screen = open_viewer(ask(http, rig.uuid), rig.live.origin)
    with viewer:
        assert (screen.width, screen.height) == (320, 200)
        before = viewer.update(screen)
        assert len(before) == 320 * 200 * 4
        viewer.press(KEY_A)
        after = viewer.update(screen, incremental=True)
        assert after != before
        assert after[1] == KEY_A
    until(lambda: states(rig) == ["closed"])
    kinds = [row["kind"] for row in http.get("/account/events").json()["data"]]
    for kind in ("console.requested", "console.opened", "console.closed"):
        assert kinds.count(kind) == 1, kind


def states(rig: ConsoleRig) -> list[str]:
    with transaction() as session:
        return list(session.scalars(text("SELECT state FROM console ORDER BY created_at")))


def test_the_node_is_locked_again_once_the_relay_is_through(
    rig: ConsoleRig, http: httpx.Client
) -> None:
    given = ask(http, rig.uuid)
    assert rig.password_on_node() is None
    viewer, screen = open_viewer(given)
    with viewer:
        until(lambda: rig.operation("console.open")["status"] == "succeeded")
        assert rig.password_on_node() is None
        viewer.update(screen)
        second, _ = open_viewer(ask(http, rig.uuid))
        second.close()
        viewer.update(screen)


def test_a_ticket_is_good_for_one_use(rig: ConsoleRig, http: httpx.Client) -> None:
    given = ask(http, rig.uuid)
    viewer, screen = open_viewer(given)
    with viewer:
        assert refusal(given["url"]) == (401, "UNAUTHENTICATED")
        # The refused one has not disturbed the open one.
        viewer.update(screen)
    until(lambda: states(rig) == ["closed"])
    assert refusal(given["url"]) == (401, "UNAUTHENTICATED")


def test_an_expired_ticket_is_refused(
    rig: ConsoleRig, http: httpx.Client, setting: Callable[[str, object], None]
) -> None:
    setting("CONSOLE_TICKET_S", 0.05)
    given = ask(http, rig.uuid)
    time.sleep(0.1)
    assert refusal(given["url"]) == (401, "UNAUTHENTICATED")
    assert states(rig) == ["issued"]


def test_forged_tickets_are_refused(rig: ConsoleRig, http: httpx.Client) -> None:
    given = ask(http, rig.uuid)
    name, _, proof = given["token"].partition(".")
    other = ask(http, rig.uuid)["token"].partition(".")[2]
    base = given["url"].partition("?")[0]
    for forged in ("", "x", f"{name}.", f"{name}.{other}", f"{uuid4().hex}.{proof}", "%ff.%00"):
        assert refusal(f"{base}?token={forged}") == (401, "UNAUTHENTICATED"), forged
    viewer, _ = open_viewer(given)
    viewer.close()


def test_pages_of_other_origins_are_refused(
    rig: ConsoleRig, http: httpx.Client, setting: Callable[[str, object], None]
) -> None:
    given = ask(http, rig.uuid)
    for origin in ("https://evil.example", "null", f"{rig.live.origin}.evil.example"):
        assert refusal(given["url"], origin) == (403, "FORBIDDEN"), origin
    setting("CONSOLE_ORIGINS", '["https://panel.example"]')
    viewer, _ = open_viewer(given, "https://panel.example")
    viewer.close()


def test_refusals_are_no_errors(
    rig: ConsoleRig, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody needs a key to be refused: the log of errors must not fill with them."""
    given = http.post(f"/instances/{rig.uuid}/vnc").json()["data"]
    base = given["url"].partition("?")[0]
    assert refusal(base) == (401, "UNAUTHENTICATED")
    assert refusal(f"{base}?token=x.y") == (401, "UNAUTHENTICATED")
    assert refusal(given["url"], "https://evil.example") == (403, "FORBIDDEN")
    with pytest.raises(InvalidStatus, match="403"):
        Viewer(f"{base}/elsewhere")
    leave_during_the_handshake(base)
    with Viewer(given["url"]) as viewer:
        assert viewer.authenticate(given["password"])
    until(lambda: rig.live_consoles() == 0)
    found = [(it.name, it.getMessage()) for it in caplog.records if it.levelno >= logging.ERROR]
    assert found == []


def leave_during_the_handshake(url: str) -> None:
    """Asks for a websocket and is gone before there is an answer."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    with socket.create_connection((parts.hostname, parts.port or 80)) as connection:
        lines = [
            f"GET {parts.path} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: SGVsbG8sIHdvcmxkIQ==",
        ]
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall("\r\n".join([*lines, "", ""]).encode())


def test_a_wrong_password_is_told_and_ends(rig: ConsoleRig, http: httpx.Client) -> None:
    with Viewer(ask(http, rig.uuid)["url"]) as viewer:
        assert not viewer.authenticate("wrong")
        assert viewer.closed()[0] == 1008
    until(lambda: states(rig) == ["closed"])


def test_what_is_no_rfb_ends(rig: ConsoleRig, http: httpx.Client) -> None:
    with Viewer(ask(http, rig.uuid)["url"]) as viewer:
        viewer.receive(12)
        viewer.socket.send("GET / HTTP/1.1")
        assert viewer.closed()[0] == 1002


def test_only_running_instances_have_a_console(rig: ConsoleRig, http: httpx.Client) -> None:
    given = ask(http, rig.uuid)
    stop = http.post(f"/instances/{rig.uuid}/stop").json()["operation"]["uuid"]
    rig.cloud.wait(stop)
    for refused in (http.post(f"/instances/{rig.uuid}/vnc"),):
        assert (refused.status_code, refused.json()["type"]) == (409, "INVALID_OPERATION")
    assert refusal(given["url"]) == (409, "INVALID_OPERATION")


def test_others_find_no_instance(rig: ConsoleRig) -> None:
    with rig.client(rig.cloud.new_customer()) as stranger:
        foreign = stranger.post(f"/instances/{rig.uuid}/vnc")
        unknown = stranger.post(f"/instances/{uuid4()}/vnc")
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.content == unknown.content


def test_stop_closes(rig: ConsoleRig, http: httpx.Client) -> None:
    viewer, _ = open_viewer(ask(http, rig.uuid))
    with viewer:
        rig.cloud.wait(http.post(f"/instances/{rig.uuid}/stop").json()["operation"]["uuid"])
        code, reason = viewer.closed()
    assert code in (1000, 1008)
    assert "ended" in reason or "stopped" in reason


def test_delete_closes(rig: ConsoleRig, http: httpx.Client) -> None:
    viewer, _ = open_viewer(ask(http, rig.uuid))
    with viewer:
        answer = http.request("DELETE", f"/instances/{rig.uuid}", json=DELETE)
        assert answer.status_code == 202
        assert viewer.closed()[0] in (1000, 1008)


def test_revocation_of_the_key_closes(rig: ConsoleRig, http: httpx.Client) -> None:
    made = http.post("/api-keys", json={"name": "for the console"}).json()["data"]
    viewer, _ = open_viewer(ask(http, rig.uuid))
    with httpx.Client(
        base_url=rig.live.url, headers={"x-apikey": made["key"]}, trust_env=False
    ) as second:
        own, _ = open_viewer(ask(second, rig.uuid))
        given = second.post(f"/instances/{rig.uuid}/vnc")
        assert given.status_code == 409, "the instance has as many consoles as it may"
        own.close()
        until(lambda: states(rig).count("closed") == 1)
        waiting = ask(second, rig.uuid)
        own, screen = open_viewer(ask(second, rig.uuid))
    with viewer, own:
        own.update(screen)
        assert http.delete(f"/api-keys/{made['id']}").status_code == 200
        assert own.closed() == (1008, "the API key that opened it is not valid any more")
        viewer.press(RETURN)
        assert refusal(waiting["url"]) == (401, "UNAUTHENTICATED")
        with pytest.raises(TimeoutError):
            viewer.closed(timeout_s=0.5)


def test_suspension_closes(rig: ConsoleRig, http: httpx.Client) -> None:
    viewer, _ = open_viewer(ask(http, rig.uuid))
    with viewer:
        path = f"/admin/accounts/{rig.owner.account_id}"
        answer = rig.cloud.admin.patch(path, json={"state": "suspended"})
        assert answer.status_code == 200, answer.text
        assert viewer.closed() == (1008, "the account is not active any more")


def test_a_silent_node_closes(rig: ConsoleRig, http: httpx.Client) -> None:
    waiting = ask(http, rig.uuid)
    viewer, _ = open_viewer(ask(http, rig.uuid))
    with viewer:
        with transaction() as session:
            session.execute(update(Node).values(health="unreachable", health_reason="silence"))
        assert viewer.closed() == (1008, "the server of the instance does not answer")
    refused = http.post(f"/instances/{rig.uuid}/vnc")
    assert (refused.status_code, refused.json()["message"]) == (409, NODE_UNREACHABLE)
    assert refusal(waiting["url"]) == (409, "INVALID_OPERATION")


def test_an_instance_has_two_consoles_at_most(rig: ConsoleRig, http: httpx.Client) -> None:
    third = ask(http, rig.uuid)
    first, _ = open_viewer(ask(http, rig.uuid))
    second, _ = open_viewer(ask(http, rig.uuid))
    with first, second:
        assert http.post(f"/instances/{rig.uuid}/vnc").status_code == 409
        assert refusal(third["url"]) == (409, "INVALID_OPERATION")
    until(lambda: states(rig).count("closed") == 2)
    viewer, _ = open_viewer(third)
    viewer.close()


def test_an_account_has_a_bounded_number(
    rig: ConsoleRig, http: httpx.Client, setting: Callable[[str, object], None]
) -> None:
    setting("CONSOLE_PER_ACCOUNT_MAX", 1)
    waiting = ask(http, rig.uuid)
    viewer, _ = open_viewer(ask(http, rig.uuid))
    with viewer:
        refused = http.post(f"/instances/{rig.uuid}/vnc")
        assert (refused.status_code, refused.json()["type"]) == (403, "QUOTA_EXCEEDED")
        assert refusal(waiting["url"]) == (403, "QUOTA_EXCEEDED")


def test_a_process_has_a_bounded_number(
    rig: ConsoleRig, http: httpx.Client, setting: Callable[[str, object], None]
) -> None:
    setting("CONSOLE_PER_PROCESS_MAX", 1)
    waiting = ask(http, rig.uuid)
    viewer, _ = open_viewer(ask(http, rig.uuid))
    with viewer:
        assert refusal(waiting["url"]) == (503, "UNAVAILABLE")
    until(lambda: states(rig).count("closed") == 1)
    # The refused ticket was not used up.
    viewer, _ = open_viewer(waiting)
    viewer.close()


def test_a_node_that_does_not_answer_is_told(rig: ConsoleRig, http: httpx.Client) -> None:
    given = ask(http, rig.uuid)
    with transaction() as session:
        # As when the domain was lost without anybody having noticed yet.
        session.execute(text("UPDATE sim.domain SET power = 'crashed'"))
    assert refusal(given["url"]) == (503, "UNAVAILABLE")
    assert states(rig) == ["closed"]


def test_consoles_of_a_dead_process_do_not_count(rig: ConsoleRig, http: httpx.Client) -> None:
    given = ask(http, rig.uuid)
    ask(http, rig.uuid)
    with transaction() as session:
        # As a process left them that held both: one that lives says so every moment.
        silent = text("now() - interval '2 minutes'")
        session.execute(update(Console).values(state="open", seen_at=silent))
    ask(http, rig.uuid)
    with transaction() as session:
        assert end_lost(session) == 2
    assert refusal(given["url"]) == (401, "UNAUTHENTICATED")


def test_open_consoles_hold_up_nothing(rig: ConsoleRig, http: httpx.Client) -> None:
    viewer, _ = open_viewer(ask(http, rig.uuid))
    with viewer:
        # It asks for much and reads nothing: its socket is full, the API goes on.
        for _ in range(400):
            viewer.press(KEY_A)
            viewer.send(b"\3\0" + b"\0" * 4 + b"\1\x40\0\xc8")
        began = time.monotonic()
        for _ in range(20):
            assert http.get(f"/instances/{rig.uuid}").status_code == 200
        assert time.monotonic() - began < 10
        # It cannot be told of its end either: the API and the node let go of it all the same.
        assert http.request("DELETE", f"/instances/{rig.uuid}", json=DELETE).status_code == 202
        until(lambda: states(rig) == ["closed"])
        viewer.socket.close_timeout = 0.1


def test_the_page(rig: ConsoleRig) -> None:
    with httpx.Client(base_url=rig.live.origin, trust_env=False) as browser:
        page = browser.get("/console")
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        for path in ("page.js", "page.css", "novnc/core/rfb.js", "novnc/LICENSE.txt"):
            assert browser.get(f"/console/{path}").status_code == 200, path
        for path in (
            *("nothing.js", "index.html", "novnc/", "novnc/core", "novnc/lock.sha256"),
            *("novnc/..%2fbuild.py", "novnc/%2fetc%2fpasswd", "/evil.example/%2e%2e"),
        ):
            answer = browser.get(f"/console/{path}")
            assert answer.status_code == 404, path
            assert "location" not in answer.headers
