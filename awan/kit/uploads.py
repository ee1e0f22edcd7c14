"""Large bodies, streamed to a file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from awan.errors import BadRequest, PayloadTooLarge

BUFFER_BYTES = 4 * 1024 * 1024


async def save_body(request: Request, path: Path, *, max_bytes: int) -> str:
    """Writes the request's body to `path` (0600) and returns its SHA-256; what was written is removed on failure.

    Raises: PayloadTooLarge past `max_bytes`, BadRequest for an empty body.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise PayloadTooLarge(f"The file is larger than {max_bytes} bytes.")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    size, buffer, digest = 0, bytearray(), hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                raise PayloadTooLarge(f"The file is larger than {max_bytes} bytes.")
            buffer += chunk
            if len(buffer) >= BUFFER_BYTES:
                await run_in_threadpool(_write, handle, bytes(buffer), digest)
                buffer.clear()
        if not size:
            raise BadRequest("The body is empty; send the image as application/octet-stream.")
        await run_in_threadpool(_write, handle, bytes(buffer), digest)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return digest.hexdigest()


def _write(handle: int, data: bytes, digest: hashlib._Hash) -> None:
    digest.update(data)
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
