"""Pixmaps as PNG: pixel for pixel, and nothing but whole pixmaps."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awan.engines.hypervisor.pixmap import PNG_SIGNATURE, png_of_pixmap
from awan.errors import EngineRejected


@st.composite
def pictures(draw: st.DrawFn) -> tuple[int, int, bytes]:
    """Width, height and the pixels, three bytes each."""
    width, height = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    size = width * height * 3
    return width, height, draw(st.binary(min_size=size, max_size=size))


@given(pictures())
def test_every_pixel_is_kept(picture: tuple[int, int, bytes]) -> None:
    width, height, pixels = picture
    png = png_of_pixmap(b"P6\n%d %d\n255\n" % (width, height) + pixels)
    assert png.startswith(PNG_SIGNATURE)
    assert png[8:].startswith(struct.pack(">I", 13) + b"IHDR" + struct.pack(">II", width, height))
    start = png.index(b"IDAT")
    (length,) = struct.unpack(">I", png[start - 4 : start])
    rows = zlib.decompress(png[start + 4 : start + 4 + length])
    stride = 1 + width * 3
    assert all(rows[n] == 0 for n in range(0, len(rows), stride))
    assert b"".join(rows[n + 1 : n + stride] for n in range(0, len(rows), stride)) == pixels


@pytest.mark.parametrize(
    "content",
    [
        b"", b"P5\n1 1\n255\n\0", b"P6\n1 1\n65535\n" + b"\0" * 6, b"P6\n1 1\n255\n\0\0",
        b"P6\n1 1\n255\n\0\0\0\0", b"P6\n0 1\n255\n", b"P6\n99999 1\n255\n", b"P6\n-1 1\n255\n", b"\x89PNG",
    ],
)  # fmt: skip
def test_what_is_no_pixmap(content: bytes) -> None:
    with pytest.raises(EngineRejected):
        png_of_pixmap(content)
