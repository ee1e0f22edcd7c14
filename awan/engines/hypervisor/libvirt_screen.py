"""Guests' screens: pictures of them, and the password that opens them."""

from __future__ import annotations

import contextlib
import secrets
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import libvirt

from awan.engines.hypervisor import ConsoleEndpoint, NodeEndpoint, domain_xml
from awan.engines.hypervisor.libvirt_domains import find
from awan.engines.hypervisor.pixmap import PNG_SIGNATURE, png_of_pixmap
from awan.engines.libvirt_nodes import ENGINE, Connection, has_code
from awan.errors import EngineRejected, EngineUnavailable
from awan.kit.clock import now

# What a stream's message may carry with every libvirt since streams exist.
STREAM_CHUNK_BYTES = 262120
SCREENSHOT_MAX_BYTES = 64 * 1024**2


def draw(conn: Connection, instance_id: UUID) -> bytes:
    """A picture of the screen, a PNG."""
    domain = conn.lookupByUUID(instance_id.bytes)
    stream = conn.newStream(0)
    try:
        domain.screenshot(stream, 0, 0)
        picture = _receive(stream, SCREENSHOT_MAX_BYTES)
        stream.finish()
    except BaseException:
        # A stream that failed by itself refuses to be aborted.
        with contextlib.suppress(libvirt.libvirtError):
            stream.abort()
        raise
    return picture if picture.startswith(PNG_SIGNATURE) else png_of_pixmap(picture)


def unlock(
    conn: Connection, node: NodeEndpoint, instance_id: UUID, password: str, valid_s: float
) -> ConsoleEndpoint:
    """This password opens the screen of the running domain for a while."""
    domain = conn.lookupByUUID(instance_id.bytes)
    live = domain.XMLDesc(0)
    if not domain.isActive():
        what = f"unlock the console of {instance_id} on {node.name}"
        raise EngineRejected(ENGINE, what, "the domain does not run")
    host, port = domain_xml.read_console(live)
    changed = domain_xml.build_console_password(live, password, now() + timedelta(seconds=valid_s))
    domain.updateDeviceFlags(changed, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    # A node that is spoken to with certificates serves its screens so as well.
    return ConsoleEndpoint(host, port, urlsplit(node.uri).scheme == "qemu+tls")


def lock(conn: Connection, instance_id: UUID) -> None:
    """No password that anybody knows opens the screen."""
    password = secrets.token_urlsafe(6)
    domain = find(conn, instance_id)
    if domain is None or not domain.isActive():
        return
    changed = domain_xml.build_console_password(
        domain.XMLDesc(0), password, domain_xml.LOCKED_SINCE
    )
    try:
        domain.updateDeviceFlags(changed, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as err:
        # It has been stopped meanwhile.
        if not has_code(err, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
            raise


def _receive(stream: Any, most: int) -> bytes:
    """Everything that a stream gives. Raises: EngineRejected above `most` bytes, EngineUnavailable without data."""
    content = bytearray()
    while chunk := stream.recv(STREAM_CHUNK_BYTES):
        if not isinstance(chunk, bytes):
            raise EngineUnavailable(ENGINE, "read a stream", "the stream gives no data")
        content += chunk
        if len(content) > most:
            raise EngineRejected(ENGINE, "read a stream", f"more than {most} bytes")
    return bytes(content)
