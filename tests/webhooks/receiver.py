"""A receiver of webhooks on the loopback, and the specification's side of the signature, written anew."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

WAIT_S = 40.0
TOLERANCE_S = 300


@dataclass(frozen=True)
class Received:
    """One POST as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        """The message's id."""
        return self.headers["webhook-id"]

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    def is_signed_with(self, secret: str) -> bool:
        """Standard Webhooks: `v1,` and base64 of HMAC-SHA256 over `id.timestamp.body`, among others perhaps."""
        timestamp = self.headers["webhook-timestamp"]
        assert abs(time.time() - int(timestamp)) < TOLERANCE_S
        assert secret.startswith("whsec_")
        key = base64.b64decode(secret[len("whsec_") :], validate=True)
        assert 24 <= len(key) <= 64
        content = b".".join([self.id.encode(), timestamp.encode(), self.body])
        expected = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest())
        for signature in self.headers["webhook-signature"].split(" "):
            version, _, value = signature.partition(",")
            if version == "v1" and hmac.compare_digest(value.encode(), expected):
                return True
        return False


@dataclass
class Receiver:
    """`with Receiver() as receiver: receiver.url`. `answer(received)` gives the status, and may take its time."""

    answer: Callable[[Received], int] = lambda _: 204
    received: list[Received] = field(default_factory=list)
    retry_after: str | None = None

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                received = Received(self.path, headers, body)
                with receiver._changed:
                    receiver.received.append(received)
                    receiver._changed.notify_all()
                status = receiver.answer(received)
                try:
                    self.send_response(status)
                    self.send_header("content-length", "0")
                    if receiver.retry_after is not None:
                        self.send_header("retry-after", receiver.retry_after)
                    if 300 <= status < 400:
                        self.send_header("location", f"{receiver.url}/moved")
                    self.end_headers()
                except OSError:
                    self.close_connection = True  # the sender has given up

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A handshake that the sender broke off is its right."""

        self._server = Server(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """Where to send."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/hook"

    def use_tls(self, certificate: Path) -> None:
        """Speaks TLS from the next connection on; the file holds key and certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, count: int) -> list[Received]:
        """What came, once it is so many."""
        with self._changed:
            is_there = self._changed.wait_for(lambda: len(self.received) >= count, WAIT_S)
            assert is_there, f"{len(self.received)} of {count} came"
            return list(self.received)
