"""Screens of simulated guests: a small RFB server on the loopback for each, which shows one colour.

The colour changes with each key that is pressed, so that a viewer sees that its keys arrive. As with a real QEMU, a
screen ends with its guest, and a viewer that got in stays in when the password changes.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from awan.engines.rfb import NodeStream, admit

HOST = "127.0.0.1"
WIDTH, HEIGHT = 320, 200
FIRST_COLOUR = (0x20, 0x40, 0x60)
NAME = b"Simulated guest"
POWER_CHECK_INTERVAL_S = 0.5
ADMISSION_TIMEOUT_S = 15.0
# Bytes after the type of a viewer's message, RFC 6143 section 7.5; those of a variable length are read apart.
SET_PIXEL_FORMAT, SET_ENCODINGS, UPDATE_REQUEST, KEY, POINTER, CUT_TEXT = 0, 2, 3, 4, 5, 6
FORMAT = struct.Struct(">BBBBHHHBBB3x")

T = TypeVar("T")


@dataclass(frozen=True)
class Guest:
    """What a screen asks of its guest. Both may block."""

    is_on: Callable[[], bool]
    find_password: Callable[[], str | None]


class FakeScreens:
    """The screens that this process serves, in one thread of their own. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._servers: dict[UUID, asyncio.Server] = {}
        self._viewers: set[asyncio.Task[None]] = set()

    def serve(self, instance_id: UUID, guest: Guest) -> tuple[str, int]:
        """The guest's screen is served; host and port."""
        with self._lock:
            server = self._servers.get(instance_id)
            if server is None:
                server = self._servers[instance_id] = self._run(self._listen(guest))
            port: int = server.sockets[0].getsockname()[1]
            return HOST, port

    def close(self) -> None:
        """All screens end."""
        with self._lock:
            if self._loop is not None:
                self._run(self._end())
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(
                target=_turn, args=(self._loop,), name="fake-screens", daemon=True
            ).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self, guest: Guest) -> asyncio.Server:
        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._viewers.add(task)
            try:
                await _attend(NodeStream(reader, writer), guest)
            finally:
                self._viewers.discard(task)

        return await asyncio.start_server(meet, HOST, 0)

    async def _end(self) -> None:
        for server in self._servers.values():
            server.close()
        for task in self._viewers:
            task.cancel()
        await asyncio.gather(*self._viewers, return_exceptions=True)
        self._servers.clear()


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


async def _attend(stream: NodeStream, guest: Guest) -> None:
    """One viewer, from its first byte until it or the guest ends."""
    showing = asyncio.create_task(_show(stream, guest))
    try:
        while await asyncio.to_thread(guest.is_on):
            if (await asyncio.wait([showing], timeout=POWER_CHECK_INTERVAL_S))[0]:
                break
    finally:
        showing.cancel()
        with suppress(EOFError, OSError, TimeoutError, asyncio.CancelledError):
            await showing
        await stream.close()


async def _show(stream: NodeStream, guest: Guest) -> None:
    async with asyncio.timeout(ADMISSION_TIMEOUT_S):
        # Without a password that is valid now, no answer is right.
        password = await asyncio.to_thread(guest.find_password)
        if not await admit(stream, password or secrets.token_urlsafe(6)):
            return
        await stream.read_exactly(1)
    # 32 bits a pixel, 24 of them used, little-endian, true colour with 8 bits each.
    own = FORMAT.pack(32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
    await stream.write(struct.pack(">HH16sI", WIDTH, HEIGHT, own, len(NAME)) + NAME)
    await _draw(stream, own)


async def _draw(stream: NodeStream, pixel_format: bytes) -> None:
    """Answers the viewer's messages for ever. Raises: EOFError when it ends or says what there is not."""
    colour, is_drawn, is_wanted = FIRST_COLOUR, False, False
    while True:
        kind = (await stream.read_exactly(1))[0]
        if kind == SET_PIXEL_FORMAT:
            pixel_format = (await stream.read_exactly(19))[3:]
            if pixel_format[0] != 32:
                raise EOFError("only 32 bits a pixel")
        elif kind == SET_ENCODINGS:
            (count,) = struct.unpack(">xH", await stream.read_exactly(3))
            await stream.read_exactly(4 * count)
        elif kind == UPDATE_REQUEST:
            is_wanted = True
            is_incremental = (await stream.read_exactly(9))[0] == 1
            is_drawn = is_drawn and is_incremental
        elif kind == KEY:
            is_down, symbol = struct.unpack(">BxxI", await stream.read_exactly(7))
            if is_down:
                colour, is_drawn = (symbol >> 8 & 0xFF, symbol & 0xFF, colour[2] ^ 0xFF), False
        elif kind == POINTER:
            await stream.read_exactly(5)
        elif kind == CUT_TEXT:
            (length,) = struct.unpack(">xxxI", await stream.read_exactly(7))
            await stream.read_exactly(length)
        else:
            raise EOFError(f"unknown message {kind}")
        if is_wanted and not is_drawn:
            await stream.write(_whole_screen(colour, pixel_format))
            is_drawn, is_wanted = True, False


def _whole_screen(colour: tuple[int, int, int], pixel_format: bytes) -> bytes:
    """A FramebufferUpdate of one raw rectangle, RFC 6143 section 7.6.1."""
    _, _, is_big_endian, _, _, _, _, *shifts = FORMAT.unpack(pixel_format)
    pixel = sum(part << shift for part, shift in zip(colour, shifts, strict=True)) & 0xFFFFFFFF
    order = ">" if is_big_endian else "<"
    header = struct.pack(">BxHHHHHi", 0, 1, 0, 0, WIDTH, HEIGHT, 0)
    return header + struct.pack(f"{order}I", pixel) * (WIDTH * HEIGHT)
