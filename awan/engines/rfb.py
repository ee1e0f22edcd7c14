"""The beginning of a VNC connection (RFB 3.8): who is it, and is the line encrypted? From either side.

`authenticate` speaks with a hypervisor's server, `admit` with a viewer. Both end right after the security result:
what follows is the viewer's and the server's own business and is passed on unread.

Source: RFC 6143 section 7.1; VeNCrypt: rfbproto, "VeNCrypt", security type 19.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import ssl
import struct
from typing import Protocol

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes

from awan.engines.hypervisor import CONSOLE_PASSWORD_MAX, ConsoleEndpoint
from awan.errors import EngineRejected, EngineUnavailable

ENGINE = "vnc"
VERSION = b"RFB 003.008\n"
VERSIONS_ADMITTED = (VERSION, b"RFB 003.007\n")
VNC_AUTHENTICATION, VENCRYPT = 2, 19
VENCRYPT_VERSION = b"\0\2"
X509_VNC = 261
"""VeNCrypt's TLS with certificates, then a VNC password inside."""
CHALLENGE_BYTES = 16
REASON_MAX_BYTES = 1024
CLOSE_TIMEOUT_S = 2.0


class ByteStream(Protocol):
    """A byte stream in both directions, however it is carried."""

    async def read_exactly(self, count: int) -> bytes:
        """The next `count` bytes. Raises: EOFError when the other side ends before."""
        ...

    async def write(self, data: bytes) -> None:
        """Sends the bytes; waits while the other side is slow."""
        ...


class NodeStream:
    """The connection to a node's server, over TCP, and over TLS once `start_tls` was called."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read_exactly(self, count: int) -> bytes:
        """As in `ByteStream`."""
        return await self.reader.readexactly(count)

    async def write(self, data: bytes) -> None:
        """As in `ByteStream`."""
        self.writer.write(data)
        await self.writer.drain()

    async def start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        """Encrypts what follows; the certificate must be `hostname`'s. Raises: ssl.SSLError."""
        await self.writer.start_tls(context, server_hostname=hostname)

    async def close(self) -> None:
        """Ends the connection; safe on one that is broken."""
        self.writer.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.writer.wait_closed()
        except (OSError, TimeoutError):
            self.writer.transport.abort()


def respond(challenge: bytes, password: str) -> bytes:
    """The answer to a VNC challenge: DES under the password, the bits of each of its bytes reversed.

    It keeps nobody out who listens: therefore passwords are for one opening, and lines to nodes are encrypted or
    private. Source: RFC 6143 section 7.2.2; the reversal is what every implementation does.
    """
    padded = password.encode("ascii")[:CONSOLE_PASSWORD_MAX].ljust(CONSOLE_PASSWORD_MAX, b"\0")
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in padded)
    # Three times the same key is single DES.
    encryptor = Cipher(TripleDES(key * 3), modes.ECB()).encryptor()  # noqa: S305 - the protocol's
    return encryptor.update(challenge) + encryptor.finalize()


async def open_node(
    endpoint: ConsoleEndpoint, password: str, tls: ssl.SSLContext | None
) -> NodeStream:
    """An authenticated connection to a node's server; the next bytes are the viewer's ClientInit.

    `tls` holds our certificate and the authority of the node's; None where none are set up.
    Raises: EngineUnavailable (not reachable, broken off), EngineRejected (password, TLS or protocol refused).
    """
    what = f"open {endpoint.host}:{endpoint.port}"
    try:
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    except OSError as err:
        raise EngineUnavailable(ENGINE, what, str(err)) from err
    stream = NodeStream(reader, writer)
    try:
        await authenticate(stream, endpoint, password, tls)
    except BaseException as err:
        await stream.close()
        if isinstance(err, ssl.SSLError):
            raise EngineRejected(ENGINE, what, f"TLS: {err}") from err
        if isinstance(err, (OSError, EOFError)):
            raise EngineUnavailable(ENGINE, what, str(err) or "the node broke off") from err
        raise
    return stream


async def authenticate(
    stream: NodeStream, endpoint: ConsoleEndpoint, password: str, tls: ssl.SSLContext | None
) -> None:
    """Security handshake as the client of a node's server.

    Raises: EngineRejected; EOFError, OSError when the connection breaks.
    """
    version = await stream.read_exactly(len(VERSION))
    if not version.startswith(b"RFB 003.") or version < VERSION:
        raise _rejected(endpoint, f"the node speaks {version!r}")
    await stream.write(VERSION)
    count = (await stream.read_exactly(1))[0]
    if count == 0:
        raise _rejected(endpoint, await _read_reason(stream))
    offered = await stream.read_exactly(count)
    if VENCRYPT in offered:
        await _encrypt(stream, endpoint, tls)
    elif endpoint.requires_tls:
        raise _rejected(endpoint, "the node does not offer TLS")
    elif VNC_AUTHENTICATION in offered:
        await stream.write(bytes([VNC_AUTHENTICATION]))
    else:
        # Domains are born with a password: one that asks for none is not as we left it.
        raise _rejected(endpoint, f"the node offers the security types {list(offered)}")
    await stream.write(respond(await stream.read_exactly(CHALLENGE_BYTES), password))
    if await stream.read_exactly(4) != b"\0\0\0\0":
        raise _rejected(endpoint, await _read_reason(stream))


async def _encrypt(
    stream: NodeStream, endpoint: ConsoleEndpoint, tls: ssl.SSLContext | None
) -> None:
    if tls is None:
        raise _rejected(endpoint, "the node wants TLS and no certificates are set up for it")
    await stream.write(bytes([VENCRYPT]))
    if await stream.read_exactly(2) < VENCRYPT_VERSION:
        raise _rejected(endpoint, "the node's VeNCrypt is too old")
    await stream.write(VENCRYPT_VERSION)
    if await stream.read_exactly(1) != b"\0":
        raise _rejected(endpoint, "the node refused VeNCrypt 0.2")
    count = (await stream.read_exactly(1))[0]
    kinds = struct.unpack(f">{count}I", await stream.read_exactly(4 * count))
    if X509_VNC not in kinds:
        raise _rejected(endpoint, f"the node offers the VeNCrypt types {list(kinds)}")
    await stream.write(struct.pack(">I", X509_VNC))
    if await stream.read_exactly(1) != b"\1":
        raise _rejected(endpoint, "the node refused TLS with certificates")
    await stream.start_tls(tls, endpoint.host)


async def admit(stream: ByteStream, password: str) -> bool:
    """Security handshake as the server of a viewer; whether it knew the password.

    The viewer was told the reason when it did not. Raises: EOFError when it broke off or speaks another protocol.
    """
    await stream.write(VERSION)
    if await stream.read_exactly(len(VERSION)) not in VERSIONS_ADMITTED:
        raise EOFError("the viewer speaks another version of RFB")
    await stream.write(bytes([1, VNC_AUTHENTICATION]))
    if await stream.read_exactly(1) != bytes([VNC_AUTHENTICATION]):
        raise EOFError("the viewer chose a security type that was not offered")
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    await stream.write(challenge)
    answer = await stream.read_exactly(CHALLENGE_BYTES)
    if hmac.compare_digest(answer, respond(challenge, password)):
        await stream.write(b"\0\0\0\0")
        return True
    reason = b"The password is not right."
    await stream.write(struct.pack(">II", 1, len(reason)) + reason)
    return False


async def _read_reason(stream: ByteStream) -> str:
    (length,) = struct.unpack(">I", await stream.read_exactly(4))
    reason = await stream.read_exactly(min(length, REASON_MAX_BYTES))
    return reason.decode("utf-8", "replace")


def _rejected(endpoint: ConsoleEndpoint, words: str) -> EngineRejected:
    return EngineRejected(ENGINE, f"open {endpoint.host}:{endpoint.port}", words)
