"""A viewer of consoles: RFB over a websocket or over TCP, as far as the tests go."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

TIMEOUT_S = 20.0
RAW = 0


def des_answer(challenge: bytes, password: str) -> bytes:
    """VNC's answer to a challenge, written a second time so that ours is compared with something."""
    key = bytes(
        sum(((byte >> bit) & 1) << (7 - bit) for bit in range(8))
        for byte in password.encode().ljust(8, b"\0")[:8]
    )
    encryptor = Cipher(TripleDES(key + key + key), modes.ECB()).encryptor()
    return encryptor.update(challenge) + encryptor.finalize()


@dataclass
class Screen:
    """What ServerInit tells."""

    width: int
    height: int
    name: str


class Rfb:
    """The client's side of RFB 3.8 over something that can send and receive bytes."""

    def __init__(self, send: Callable[[bytes], Any], receive: Callable[[int], bytes]) -> None:
        self.send = send
        self.receive = receive

    def security_types(self) -> bytes:
        """Versions are exchanged; what the server offers."""
        assert self.receive(12) == b"RFB 003.008\n"
        self.send(b"RFB 003.008\n")
        return self.receive(self.receive(1)[0])

    def authenticate(self, password: str) -> bool:
        """VNC authentication; whether it succeeded."""
        assert self.security_types() == b"\x02", "only VNC authentication is offered"
        self.send(b"\x02")
        self.send(des_answer(self.receive(16), password))
        return self.receive(4) == b"\0\0\0\0"

    def begin(self) -> Screen:
        """ClientInit and ServerInit."""
        self.send(b"\1")
        width, height = struct.unpack(">HH", self.receive(4))
        self.receive(16)
        (length,) = struct.unpack(">I", self.receive(4))
        return Screen(width, height, self.receive(length).decode())

    def update(self, screen: Screen, *, incremental: bool = False) -> bytes:
        """The pixels of the next update, in raw encoding."""
        self.send(struct.pack(">BxHi", 2, 1, RAW))
        self.send(struct.pack(">BBHHHH", 3, int(incremental), 0, 0, screen.width, screen.height))
        return self.read_update()

    def read_update(self) -> bytes:
        """The pixels of an update that was asked for."""
        while (kind := self.receive(1)[0]) != 0:
            assert kind == 2, f"an unexpected message {kind}"  # the bell
        _, count = struct.unpack(">BH", self.receive(3))
        pixels = b""
        for _ in range(count):
            _, _, width, height, encoding = struct.unpack(">HHHHi", self.receive(12))
            assert encoding == RAW
            pixels += self.receive(width * height * 4)
        return pixels

    def press(self, symbol: int) -> None:
        """A key goes down and up."""
        for is_down in (1, 0):
            self.send(struct.pack(">BBxxI", 4, is_down, symbol))


class Viewer(Rfb):
    """A console's websocket. `with Viewer(url) as viewer: ...`; refusals raise `InvalidStatus`."""

    def __init__(self, url: str, origin: str | None = None) -> None:
        self._read_ahead = b""
        self._held = ExitStack()
        self.socket: ClientConnection = self._held.enter_context(
            connect(
                url,
                origin=origin,  # type: ignore[arg-type]
                open_timeout=TIMEOUT_S,
                close_timeout=TIMEOUT_S,
                compression=None,
                proxy=None,
            )
        )
        super().__init__(self.socket.send, self._receive)

    def _receive(self, count: int) -> bytes:
        while len(self._read_ahead) < count:
            data = self.socket.recv(timeout=TIMEOUT_S)
            assert isinstance(data, bytes)
            self._read_ahead += data
        found, self._read_ahead = self._read_ahead[:count], self._read_ahead[count:]
        return found

    def closed(self, timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
        """Close code and reason; what was still under way is dropped. Raises: TimeoutError when it stays open."""
        with pytest.raises(ConnectionClosed) as closed:
            self._drop_all(timeout_s)
        assert closed.value.rcvd is not None, "broken off without a word"
        return closed.value.rcvd.code, closed.value.rcvd.reason

    def _drop_all(self, timeout_s: float) -> None:
        while True:
            self.socket.recv(timeout=timeout_s)

    def close(self) -> None:
        """The viewer leaves."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class DirectViewer(Rfb):
    """A VNC server spoken to without the relay, over TCP."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), timeout=TIMEOUT_S)
        super().__init__(self._socket.sendall, self._receive)

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._socket.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()


def ask(client: httpx.Client, uuid: str) -> dict[str, Any]:
    """Operation 7: the console's data."""
    answer = client.post(f"/instances/{uuid}/vnc")
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["data"])


def open_viewer(given: dict[str, Any], origin: str | None = None) -> tuple[Viewer, Screen]:
    """An admitted viewer and its screen."""
    viewer = Viewer(given["url"], origin)
    try:
        assert viewer.authenticate(given["password"])
        return viewer, viewer.begin()
    except BaseException:
        viewer.close()
        raise
