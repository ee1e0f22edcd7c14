"""Pictures of guests' screens: PNG out of what QEMU draws. Pure.

Source: ppm(5) for the binary form "P6"; RFC 2083 for PNG.
"""

from __future__ import annotations

import re
import struct
import zlib

from awan.errors import EngineRejected

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIDE_MAX = 8192
_HEADER = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s")
_RGB_8_BIT = struct.pack(">BBBBB", 8, 2, 0, 0, 0)


def png_of_pixmap(pixmap: bytes) -> bytes:
    """The PNG of a binary PPM with 8 bits a channel. Raises: EngineRejected for anything else."""
    header = _HEADER.match(pixmap)
    if header is None:
        raise _unreadable("it is no binary pixmap of 8 bits")
    width, height = int(header[1]), int(header[2])
    pixels = memoryview(pixmap)[header.end() :]
    if not (1 <= width <= SIDE_MAX and 1 <= height <= SIDE_MAX):
        raise _unreadable(f"it has {width} x {height} pixels")
    if len(pixels) != width * height * 3:
        raise _unreadable(f"it has {len(pixels)} bytes for {width} x {height} pixels")
    return encode_png(width, height, pixels)


def encode_png(width: int, height: int, pixels: bytes | memoryview) -> bytes:
    """A PNG of `width` x `height` pixels, three bytes each (red, green, blue), row by row from the top."""
    stride = width * 3
    # Each row begins with its filter; 0 is none.
    rows = b"".join(
        b"\0" + bytes(pixels[start : start + stride]) for start in range(0, height * stride, stride)
    )
    return b"".join(
        (
            PNG_SIGNATURE,
            _chunk(b"IHDR", struct.pack(">II", width, height) + _RGB_8_BIT),
            _chunk(b"IDAT", zlib.compress(rows, 6)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def _unreadable(why: str) -> EngineRejected:
    return EngineRejected("libvirt", "read a screenshot", why)
