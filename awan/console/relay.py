"""One console from its websocket to its node: who is it, is the screen unlocked, then bytes in both directions.

Everything waits in the event loop: an open console has no thread and no database connection, and holds up no other
call. What the viewer and the node say to each other after the security handshake is passed on unread.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from typing import Any
from uuid import UUID

import structlog
from fastapi import WebSocket
from fastapi.concurrency import run_in_threadpool
from starlette.websockets import WebSocketDisconnect, WebSocketState

from awan.console import service
from awan.console.live import NOT_READY, LiveConsole, LiveConsoles, live_consoles
from awan.console.models import Console
from awan.console.rules import check_origin, node_password, read_ticket, viewer_password
from awan.console.workflows import CONNECT_TIMEOUT_S
from awan.engines.rfb import NodeStream, admit, open_node
from awan.errors import EngineError, Refused, Unavailable
from awan.fleet.rules import ClientCertificate
from awan.kit.database import transaction
from awan.kit.http import error_answer
from awan.settings import get_settings

CHUNK_BYTES = 64 * 1024
ADMISSION_TIMEOUT_S = 15.0
HANG_UP_TIMEOUT_S = 2.0
# Less than the worker waits before it locks the screen again.
NODE_TIMEOUT_S = CONNECT_TIMEOUT_S - 2.0
SUBPROTOCOL = "binary"
NORMAL, PROTOCOL_ERROR, POLICY = 1000, 1002, 1008
VIEWER_LEFT = "the viewer left"
SCREEN_ENDED = "the instance's screen has ended"

log = structlog.get_logger(__name__)


class ViewerStream:
    """The viewer's side as a byte stream: the binary messages of a websocket, one after the other."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._read_ahead = b""

    async def read_some(self) -> bytes:
        """The next bytes, at least one. Raises: EOFError when the viewer left or sent text."""
        data, self._read_ahead = self._read_ahead, b""
        while not data:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect" or message.get("bytes") is None:
                raise EOFError(VIEWER_LEFT)
            data = message["bytes"]
        return data

    async def read_exactly(self, count: int) -> bytes:
        """The next `count` bytes. Raises: EOFError as `read_some`."""
        data = b""
        while len(data) < count:
            data += await self.read_some()
        self._read_ahead = data[count:]
        return data[:count]

    async def write(self, data: bytes) -> None:
        """Sends one message. Raises: EOFError when the viewer left."""
        try:
            await self._websocket.send_bytes(data)
        except (WebSocketDisconnect, RuntimeError) as err:
            raise EOFError(VIEWER_LEFT) from err


async def attend(websocket: WebSocket) -> None:
    """Serves one websocket until its end. Refusals are HTTP answers in the shape of all others."""
    try:
        _check_origin(websocket)
        console_id = read_ticket(websocket.query_params.get("token", ""))
        consoles = live_consoles()
        with consoles.place():
            request_id = str(websocket.state.request_id)
            console = await run_in_threadpool(_use_ticket, console_id, request_id)
            structlog.contextvars.bind_contextvars(
                account=str(console.account_id), instance=str(console.instance_id)
            )
            await _serve(websocket, consoles, console)
    except Refused as refused:
        log.info("console.refused", type=refused.type, reason=refused.message)
        with suppress(RuntimeError, WebSocketDisconnect):  # it left before
            await websocket.send_denial_response(error_answer(refused))


def _check_origin(websocket: WebSocket) -> None:
    settings = get_settings()
    host = websocket.headers.get("host", "")
    # Whether TLS ends before us is not known without `public_url`.
    own = [settings.public_url] if settings.public_url else [f"http://{host}", f"https://{host}"]
    check_origin(websocket.headers.get("origin"), own=own, others=settings.console_origins)


async def _serve(websocket: WebSocket, consoles: LiveConsoles, console: Console) -> None:
    """From the used ticket to the end. Raises: Unavailable when the node cannot be reached."""
    reason = "the server ended"
    try:
        with consoles.entered(console) as live:
            node = await _reach(consoles, live)
            try:
                if not await run_in_threadpool(_mark_open, console.console_id):
                    raise Unavailable(NOT_READY)
                offered = websocket.scope.get("subprotocols", [])
                await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
                log.info("console.opened", console=str(console.console_id))
                code, reason = await _show(ViewerStream(websocket), node, live)
                await _hang_up(websocket, code, reason)
            except (RuntimeError, WebSocketDisconnect):
                reason = VIEWER_LEFT
            finally:
                await node.close()
    except Unavailable as refused:
        reason = refused.message
        raise
    finally:
        log.info("console.closed", console=str(console.console_id), reason=reason)
        await run_in_threadpool(_close, console.console_id, reason)


async def _reach(consoles: LiveConsoles, live: LiveConsole) -> NodeStream:
    """The authenticated connection to the node, once a worker has unlocked the screen. Raises: Unavailable."""
    screen = await consoles.wait_until_ready(live)
    endpoint = screen.endpoint
    try:
        tls = None
        if screen.certificate is not None:
            tls = await run_in_threadpool(_tls_context, screen.certificate)
        async with asyncio.timeout(NODE_TIMEOUT_S):
            return await open_node(endpoint, node_password(live.console_id), tls)
    except (EngineError, TimeoutError, OSError) as err:
        log.error("console.node_refused", host=endpoint.host, port=endpoint.port, error=str(err))
        raise Unavailable(NOT_READY) from err


def _tls_context(files: ClientCertificate) -> ssl.SSLContext:
    """Our certificate and the nodes' authority, read anew each time. Raises: OSError for unusable files."""
    context = ssl.create_default_context(cafile=files.authority)
    context.load_cert_chain(files.certificate, files.key)
    return context


async def _show(viewer: ViewerStream, node: NodeStream, live: LiveConsole) -> tuple[int, str]:
    """Admits the viewer, then relays until one side ends or the console must; close code and reason."""
    try:
        async with asyncio.timeout(ADMISSION_TIMEOUT_S):
            if not await admit(viewer, viewer_password(live.console_id)):
                return POLICY, "the password was wrong"
    except TimeoutError:
        return PROTOCOL_ERROR, "the viewer did not answer"
    except EOFError as err:
        return PROTOCOL_ERROR, str(err) or VIEWER_LEFT
    up = asyncio.create_task(_relay_keys(viewer, node))
    down = asyncio.create_task(_relay_screen(node, viewer))
    try:
        ends: set[asyncio.Future[Any]] = {up, down, live.closing}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if live.closing.done():
            return POLICY, live.closing.result()
        return (NORMAL, SCREEN_ENDED) if down.done() else (NORMAL, VIEWER_LEFT)
    finally:
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _relay_keys(viewer: ViewerStream, node: NodeStream) -> None:
    with suppress(EOFError, OSError):
        while True:
            await node.write(await viewer.read_some())


async def _relay_screen(node: NodeStream, viewer: ViewerStream) -> None:
    with suppress(EOFError, OSError):
        while data := await node.reader.read(CHUNK_BYTES):
            await viewer.write(data)


async def _hang_up(websocket: WebSocket, code: int, reason: str) -> None:
    if WebSocketState.DISCONNECTED in (websocket.client_state, websocket.application_state):
        return
    # A viewer that reads nothing cannot be told either.
    with suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
        async with asyncio.timeout(HANG_UP_TIMEOUT_S):
            await websocket.close(code, reason)


def _use_ticket(console_id: UUID, request_id: str) -> Console:
    with transaction() as session:
        return service.use_ticket(session, console_id, request_id)


def _mark_open(console_id: UUID) -> bool:
    with transaction() as session:
        return service.mark_open(session, console_id)


def _close(console_id: UUID, reason: str) -> None:
    try:
        with transaction() as session:
            service.close(session, console_id, reason)
    except Unavailable as err:
        # The row says so when it has not been refreshed for a while.
        log.warning("console.close_not_noted", console=str(console_id), error=str(err))
