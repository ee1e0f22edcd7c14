"""`GET /events` over real sockets and a real PostgreSQL: nothing lost, nothing twice, nothing of others."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import httpx
import pytest
from sqlalchemy import text, update
from sqlalchemy.orm import Session

from awan import events
from awan.accounts.models import ApiKey
from awan.api import create_app
from awan.event_stream import stream
from awan.kit import stopping
from awan.kit.clock import now
from awan.kit.database import get_engine, transaction
from awan.settings import Settings
from tests.event_stream.sse import SseClient
from tests.support.event_horizon import wait_for_horizon
from tests.support.live_api import LiveApi
from tests.support.tenants import Tenant, make_tenant


@pytest.fixture
def live(settings: Settings) -> Iterator[LiveApi]:
    """The API on a socket."""
    with LiveApi(create_app()) as running:
        yield running


@pytest.fixture
def tenant(settings: Settings) -> Tenant:
    """An account with a key, whose creation no stream tells of any more."""
    return make_settled_tenant()


def make_settled_tenant(name: str = "Tenant") -> Tenant:
    """An account with a key; its creation is below the horizon."""
    made = make_tenant(name)
    wait_for_horizon()
    return made


def record(account_id: UUID, number: int = 0, session: Session | None = None) -> None:
    """Records one event, in the session or in a transaction of its own."""
    if session is not None:
        events.record(
            session,
            kind="firewall.applied",
            actor="key:a",
            account_id=account_id,
            data={"n": number},
        )
        return
    with transaction() as own:
        record(account_id, number, own)


def numbers(client: SseClient, count: int) -> list[int]:
    """The numbers of the next events."""
    return [message.data["data"]["n"] for message in client.take(count)]


def test_an_event_arrives_as_the_list_shows_it(live: LiveApi, tenant: Tenant) -> None:
    with SseClient(live.url, tenant.key) as client:
        record(tenant.account_id, 7)
        message = client.next()
    listed = httpx.get(f"{live.url}/account/events", headers=tenant.headers).json()["data"]
    assert message.event == "firewall.applied"
    assert message.data == listed[0]
    assert message.id == message.data["position"]


def test_head_is_not_for_what_has_no_end(live: LiveApi, tenant: Tenant) -> None:
    with httpx.Client(headers=tenant.headers, timeout=10) as client:
        answer = client.head(f"{live.url}/events")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
        # On the same connection: nothing of a body may be left in it.
        shown = [client.request(way, f"{live.url}/account") for way in ("HEAD", "GET", "HEAD")]
    assert [it.status_code for it in shown] == [200, 200, 200]
    assert shown[0].content == shown[2].content == b""
    assert shown[0].headers["content-length"] == str(len(shown[1].content))


def test_only_the_accounts_own_events(live: LiveApi, tenant: Tenant) -> None:
    other = make_settled_tenant("Other")
    with SseClient(live.url, tenant.key) as client, SseClient(live.url, other.key) as others:
        record(other.account_id, 1)
        with transaction() as session:
            events.record(session, kind="ssh_key.created", actor="operator", account_id=None)
        record(tenant.account_id, 2)
        assert numbers(client, 1) == [2]
        assert numbers(others, 1) == [1]
        assert client.is_quiet(0.3)
        assert others.is_quiet(0)
    # Not even by the other's position.
    with SseClient(live.url, other.key, after="0-0") as others:
        kinds = {message.data["kind"] for message in others.take(3)}
        assert kinds == {"account.created", "api_key.created", "firewall.applied"}
        assert others.is_quiet(0.3)


def test_an_older_transaction_that_commits_later_loses_nothing(
    live: LiveApi, tenant: Tenant, settings: Settings
) -> None:
    """The first to write commits last: its event has the lower position and must come first, and once."""
    with SseClient(live.url, tenant.key) as client:
        with Session(get_engine()) as early, Session(get_engine()) as late:
            record(tenant.account_id, 1, early)
            record(tenant.account_id, 2, late)
            late.commit()
            assert client.is_quiet(0.5), "given out before what may still come before it"
            early.commit()
        assert numbers(client, 2) == [1, 2]
        assert client.is_quiet(0.5)


def test_a_foreign_transaction_only_delays(live: LiveApi, tenant: Tenant) -> None:
    """It ends without an event, so nothing announces that the horizon has moved."""
    with SseClient(live.url, tenant.key) as client:
        with Session(get_engine()) as foreign:
            foreign.execute(text("SELECT pg_current_xact_id()"))
            record(tenant.account_id, 1)
            assert client.is_quiet(0.4)
            foreign.rollback()
        assert numbers(client, 1) == [1]


def test_who_comes_back_misses_nothing(live: LiveApi, tenant: Tenant) -> None:
    """Begun before an event whose transaction is open; gone while it commits; back with the last id."""
    with Session(get_engine()) as slow:
        record(tenant.account_id, 1, slow)
        with SseClient(live.url, tenant.key) as client:
            record(tenant.account_id, 2)
            assert client.is_quiet(0.2)
        slow.commit()
    with SseClient(live.url, tenant.key, last_event_id=client.last_event_id) as client:
        assert numbers(client, 2) == [1, 2]
    record(tenant.account_id, 3)
    # The header goes before the parameter, which a browser's client repeats as it was at the beginning.
    last = client.last_event_id
    with SseClient(live.url, tenant.key, last_event_id=last, after="0-0") as client:
        assert numbers(client, 1) == [3]
    with SseClient(live.url, tenant.key, after=last) as client:
        assert numbers(client, 1) == [3]


def test_many_writers_and_a_client_that_keeps_losing_the_stream(
    live: LiveApi, tenant: Tenant
) -> None:
    """Commits in any order, reconnects at any moment: each event exactly once, in the order of positions."""
    writers, each = 6, 25
    dice = random.Random(4)
    pauses = [[dice.random() * 0.02 for _ in range(each)] for _ in range(writers)]

    def write(writer: int) -> None:
        for number, pause in enumerate(pauses[writer]):
            with transaction() as session:
                record(tenant.account_id, writer * each + number, session)
                session.execute(text("SELECT pg_sleep(:s)"), {"s": pause})

    seen = []
    with ThreadPoolExecutor(writers) as pool:
        with SseClient(live.url, tenant.key) as client:
            pass
        jobs = [pool.submit(write, writer) for writer in range(writers)]
        while len(seen) < writers * each:
            with SseClient(live.url, tenant.key, last_event_id=client.last_event_id) as client:
                wanted = min(20, writers * each - len(seen))
                client.take(wanted)
            seen += client.messages  # also what came while it was being closed
        for job in jobs:
            job.result()
    assert sorted(message.data["data"]["n"] for message in seen) == list(range(writers * each))
    positions = [events.Position.parse(message.id) for message in seen]
    assert positions == sorted(positions)


def test_a_client_that_does_not_read_holds_up_nobody(live: LiveApi, tenant: Tenant) -> None:
    """Its events wait in the database, not in memory, and it gets them all when it reads again."""
    count, padding = 400, "x" * 8000
    host, port = live.origin.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(
            f"GET /api/v1/events HTTP/1.1\r\nhost: x\r\nx-apikey: {tenant.key}\r\n\r\n".encode()
        )
        assert slow.recv(4096).startswith(b"HTTP/1.1 200")
        threads = threading.active_count()
        with SseClient(live.url, tenant.key) as client:
            for begin in range(0, count, 50):
                with transaction() as session:
                    for number in range(begin, begin + 50):
                        events.record(
                            session,
                            kind="firewall.applied",
                            actor="key:a",
                            account_id=tenant.account_id,
                            data={"n": number, "padding": padding},
                        )
            assert numbers(client, count) == list(range(count))
        assert threading.active_count() <= threads + 10
        slow.settimeout(10)
        received = b""
        while received.count(b"\ndata: ") < count:
            received += slow.recv(65536)
    found = [int(part.partition(b",")[0]) for part in received.split(b'"data":{"n":')[1:]]
    assert found == list(range(count))


@pytest.mark.parametrize("way", ["revoked", "expired", "closed"])
def test_the_stream_ends_with_its_key(
    live: LiveApi, tenant: Tenant, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.3)
    with SseClient(live.url, tenant.key) as client:
        if way == "revoked":
            key_id = tenant.key.split("_")[1]
            answer = httpx.delete(f"{live.url}/api-keys/{key_id}", headers=tenant.headers)
            assert answer.status_code == 200
        elif way == "expired":
            with transaction() as session:
                session.execute(update(ApiKey).values(expires_at=now()))
        else:
            with transaction() as session:
                session.execute(text("UPDATE account SET state = 'closed'"))
        client.wait_for_end()
        record(tenant.account_id)
        assert client.messages == []
    again = httpx.get(f"{live.url}/events", headers=tenant.headers)
    assert again.status_code == 401


def test_a_quiet_stream_beats(
    live: LiveApi, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "HEARTBEAT_S", 0.2)
    with SseClient(live.url, tenant.key) as client:
        deadline = time.monotonic() + 20
        while client.comments < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.messages == []


def test_streams_are_counted(
    live: LiveApi, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STREAMS_PER_KEY_MAX", 2)
    with SseClient(live.url, tenant.key), SseClient(live.url, tenant.key):
        refused = httpx.get(f"{live.url}/events", headers=tenant.headers)
        assert (refused.status_code, refused.json()["type"]) == (429, "RATE_LIMITED")
        assert int(refused.headers["retry-after"]) > 0
        with SseClient(live.url, make_tenant("Other").key):
            pass
    monkeypatch.setattr(stream, "STREAMS_PER_ACCOUNT_MAX", 0)
    assert httpx.get(f"{live.url}/events", headers=tenant.headers).status_code == 429
    monkeypatch.undo()
    deadline = time.monotonic() + 20
    while True:  # the server notices the ends of the two a moment later
        answer = httpx.get(f"{live.url}/events?wait_s=0", headers=tenant.headers)
        if answer.status_code == 200 and not stream._slots._open:
            break
        assert time.monotonic() < deadline, stream._slots._open
        time.sleep(0.05)


def test_what_there_is_and_an_end(live: LiveApi, tenant: Tenant) -> None:
    for number in range(stream.PAGE_EVENTS + 5):
        record(tenant.account_id, number)
    wait_for_horizon()
    got = httpx.get(f"{live.url}/events?after=0-0&wait_s=0", headers=tenant.headers, timeout=20)
    assert got.text.count("\nevent: firewall.applied\n") == stream.PAGE_EVENTS + 5
    assert httpx.get(
        f"{live.url}/events?wait_s=0", headers=tenant.headers, timeout=20
    ).text.startswith("retry: 2000\nid: ")


def test_bad_positions_are_refused(live: LiveApi, tenant: Tenant) -> None:
    for query in ({"after": "1"}, {"after": f"{2**64}-1"}, {"after": "-1-1"}, {"wait_s": "-1"}):
        answer = httpx.get(f"{live.url}/events", headers=tenant.headers, params=query)
        assert (answer.status_code, [*answer.json()["errors"]]) == (422, [*query])
    answer = httpx.get(f"{live.url}/events", headers={**tenant.headers, "last-event-id": "x"})
    assert (answer.status_code, [*answer.json()["errors"]]) == (422, ["Last-Event-ID"])


def test_one_listening_connection_and_no_other_while_nothing_happens(
    live: LiveApi, tenant: Tenant, settings: Settings
) -> None:
    clients = [SseClient(live.url, tenant.key) for _ in range(8)]
    for client in clients:
        client.__enter__()
    try:
        with get_engine().connect() as connection:
            listening = connection.scalar(
                text(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE application_name = 'awan-listener' AND datname = current_database()"
                )
            )
        assert listening == 1
        # A lost listener is replaced, and what it did not hear is read all the same.
        with get_engine().connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'awan-listener' AND datname = current_database()"
                )
            )
        record(tenant.account_id, 5)
        assert [numbers(client, 1) for client in clients] == [[5]] * 8
        assert get_engine().pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        for client in clients:
            client.__exit__(None, None, None)


def test_a_process_that_is_told_to_end_ends_its_streams(
    live: LiveApi, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_told", threading.Event())
    with SseClient(live.url, tenant.key) as client:
        stopping.begin()
        client.wait_for_end()


def test_a_client_that_takes_nothing_is_given_up(
    live: LiveApi, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would hold its place for ever: a full socket hides even the end of its key."""
    monkeypatch.setattr(stream, "SEND_MAX_S", 1.0)
    host, port = live.origin.removeprefix("http://").split(":")
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect((host, int(port)))
        stuck.sendall(
            f"GET /api/v1/events HTTP/1.1\r\nhost: x\r\nx-apikey: {tenant.key}\r\n\r\n".encode()
        )
        assert stuck.recv(4096).startswith(b"HTTP/1.1 200")
        for _ in range(6):
            with transaction() as session:
                for _ in range(100):
                    events.record(
                        session,
                        kind="firewall.applied",
                        actor="key:a",
                        account_id=tenant.account_id,
                        data={"padding": "x" * 20_000},
                    )
        deadline = time.monotonic() + 30
        while stream._slots._open:
            assert time.monotonic() < deadline, "still holds its place"
            time.sleep(0.1)
