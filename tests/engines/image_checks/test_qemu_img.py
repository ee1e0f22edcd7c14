"""Images from outside: harmless ones pass, hostile ones are refused before QEMU could follow them."""

from __future__ import annotations

import ctypes
import gzip
import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from awan.engines.volumes import qemu_img
from awan.errors import EngineRejected, Invalid

MIB = 1 << 20
GIB = 1 << 30
VIRTUAL_MAX = 40 * GIB
FILE_MAX = 64 * MIB


def create(path: Path, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", *options[:-1], str(path), options[-1]], check=True)
    return path


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    return create(tmp_path / "disk.qcow2", "-f", "qcow2", "1G")


def patch(path: Path, offset: int, content: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
    return path


def check(path: Path, declared: str = "qcow2") -> qemu_img.ImageFacts:
    return qemu_img.check_image(
        path,
        "raw" if declared == "raw" else "qcow2",
        max_virtual_bytes=VIRTUAL_MAX,
        max_file_bytes=FILE_MAX,
    )


def refused(path: Path, declared: str = "qcow2") -> str:
    """The sentence with which the image is refused; fails the test when it is accepted or slow."""
    started_at = time.monotonic()
    with pytest.raises(Invalid) as caught:
        check(path, declared)
    assert time.monotonic() - started_at < 30
    assert caught.value.errors is not None
    (sentence,) = caught.value.errors["file"]
    return sentence


@contextmanager
def opens_of(path: Path) -> Iterator[Callable[[], int]]:
    """Counts how often any process opened `path` (inotify IN_OPEN) inside the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0
    assert libc.inotify_add_watch(fd, os.fsencode(path), 0x20) >= 0

    def count() -> int:
        try:
            return len(os.read(fd, 65536)) // 16
        except BlockingIOError:
            return 0

    try:
        yield count
    finally:
        os.close(fd)


# Accepted


def test_plain_qcow2_is_accepted_with_its_facts(qcow2: Path) -> None:
    facts = check(qcow2)
    assert (facts.format, facts.virtual_size_bytes) == ("qcow2", GIB)
    assert facts.size_bytes == qcow2.stat().st_size
    digest = subprocess.run(["sha256sum", qcow2], check=True, capture_output=True, text=True).stdout
    assert facts.sha256 == digest.split()[0]


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compression_type=zstd",
        "extended_l2=on",
        "cluster_size=2M",
        "cluster_size=512",
    ],
)
def test_harmless_variants_of_qcow2_are_accepted(tmp_path: Path, options: str) -> None:
    assert check(create(tmp_path / "v.qcow2", "-f", "qcow2", "-o", options, "64M"))


def test_raw_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\xeb\x63\x90" + bytes(MIB - 5) + b"\x55\xaa")
    facts = check(path, "raw")
    assert (facts.format, facts.virtual_size_bytes, facts.size_bytes) == ("raw", MIB, MIB)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("declared", ["raw", "qcow2"])
def test_normalize_keeps_the_content(tmp_path: Path, declared: str, compress: bool) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(os.urandom(MIB) + bytes(2 * MIB) + os.urandom(MIB))
    source = raw
    if declared == "qcow2":
        source = tmp_path / "disk.qcow2"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, source], check=True)
    out = tmp_path / "out.qcow2"
    facts = qemu_img.normalize(
        source, "raw" if declared == "raw" else "qcow2", out, compress=compress
    )
    assert (facts.format, facts.virtual_size_bytes) == ("qcow2", 4 * MIB)
    assert out.stat().st_mode & 0o777 == 0o444
    assert out.stat().st_uid == os.geteuid()
    assert sorted(tmp_path.iterdir()) == sorted({raw, source, out})
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, out], check=True)


def test_the_file_is_as_private_after_the_check_as_before(qcow2: Path) -> None:
    qcow2.chmod(0o600)
    check(qcow2)
    assert qcow2.stat().st_mode & 0o777 == 0o600


# Backing files (checks 1)


@pytest.mark.parametrize(
    "backing",
    [
        "/etc/passwd",
        "../../../etc/passwd",
        'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
        "nbd://127.0.0.1:1/x",
        "nbd:unix:/run/x.sock",
    ],
)
@pytest.mark.parametrize("with_format", [True, False])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_backing_file_is_refused(
    tmp_path: Path, backing: str, with_format: bool, compat: str
) -> None:
    path = tmp_path / "b.qcow2"
    create(path, "-f", "qcow2", "-o", f"compat={compat}", "64M")
    form = ["-F", "raw"] if with_format else []
    if with_format:
        subprocess.run(
            ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", *form, "-b", backing, path],
            check=True,
        )
    else:
        patch(path, 8, struct.pack(">QI", 1024, len(backing)))
        patch(path, 1024, backing.encode())
    assert "backing file" in refused(path)


def test_backing_file_is_never_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(MIB))
    path = create(tmp_path / "b.qcow2", "-f", "qcow2", "-F", "raw", "-b", str(secret), "1M")
    with opens_of(secret) as count:
        subprocess.run(
            ["qemu-img", "info", "--backing-chain", "-f", "qcow2", path],
            check=True,
            capture_output=True,
        )
        assert count() > 0, "the counter itself does not work"
    with opens_of(secret) as count:
        refused(path)
        with pytest.raises((Invalid, EngineRejected)):
            qemu_img.normalize(path, "raw", tmp_path / "out.qcow2")
        assert count() == 0


def test_fifo_as_backing_file_does_not_block(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    path = create(tmp_path / "b.qcow2", "-f", "qcow2", "64M")
    command = ["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", str(fifo)]
    subprocess.run([*command, str(path)], check=True)
    started_at = time.monotonic()
    assert "backing file" in refused(path)
    assert time.monotonic() - started_at < 15


# External data files and unknown features (check 2)


def test_external_data_file_is_refused_and_not_opened(tmp_path: Path) -> None:
    data = tmp_path / "data"
    path = create(tmp_path / "d.qcow2", "-f", "qcow2", "-o", f"data_file={data}", "64M")
    with opens_of(data) as count:
        assert "external file" in refused(path)
        assert count() == 0


def test_data_file_name_without_its_feature_bit_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    path = create(tmp_path / "d.qcow2", "-f", "qcow2", "-o", f"data_file={data}", "64M")
    patch(path, 72, bytes(8))
    assert "external file" in refused(path)


@pytest.mark.parametrize("bit", [0, 1, 2, 5, 17, 63])
def test_incompatible_features_are_refused(qcow2: Path, bit: int) -> None:
    patch(qcow2, 72, struct.pack(">Q", 1 << bit))
    assert refused(qcow2)


def test_unknown_header_extension_is_refused(qcow2: Path) -> None:
    (length,) = struct.unpack(">I", qcow2.read_bytes()[100:104])
    patch(qcow2, length, struct.pack(">II8xII", 0x12345678, 8, 0, 0))
    assert "extensions" in refused(qcow2)


def test_extension_that_runs_over_the_header_is_refused(qcow2: Path) -> None:
    (length,) = struct.unpack(">I", qcow2.read_bytes()[100:104])
    patch(qcow2, length, struct.pack(">II", qemu_img.EXTENSION_FEATURE_NAMES, 0xFFFFFFF0))
    assert refused(qcow2)


@pytest.mark.parametrize("method", [1, 2, 3])
def test_encryption_is_refused(qcow2: Path, method: int) -> None:
    assert "encrypted" in refused(patch(qcow2, 32, struct.pack(">I", method)))


def test_snapshots_and_bitmaps_are_refused(tmp_path: Path) -> None:
    snapshot = create(tmp_path / "s.qcow2", "-f", "qcow2", "1M")
    subprocess.run(["qemu-img", "snapshot", "-c", "one", snapshot], check=True)
    assert "snapshots" in refused(snapshot)
    bitmap = create(tmp_path / "m.qcow2", "-f", "qcow2", "1M")
    subprocess.run(["qemu-img", "bitmap", "-f", "qcow2", "--add", bitmap, "one"], check=True)
    assert "bitmaps" in refused(bitmap)


# Lying formats (check 3)


def test_vmdk_descriptor_that_names_a_host_file_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(MIB))
    descriptor = (
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 2048 FLAT "{secret}" 0\n'
    )
    for head in ("", "\n # a comment first\r\n", "#" + "x" * 5000 + "\n"):
        path = tmp_path / "flat.vmdk"
        path.write_bytes((head + descriptor).encode().ljust(8192, b"\n"))
        with opens_of(secret) as count:
            assert "VMDK" in refused(path, "raw")
            assert refused(path, "qcow2")
            assert count() == 0


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("qcow2", []),
        ("vmdk", []),
        ("vmdk", ["-o", "subformat=twoGbMaxExtentFlat"]),
        ("vhdx", []),
        ("vpc", []),
        ("vpc", ["-o", "subformat=fixed"]),
        ("vdi", []),
        ("qed", []),
        ("parallels", []),
        ("qcow", []),
    ],
)
def test_containers_declared_raw_or_qcow2_are_refused(
    tmp_path: Path, form: str, options: list[str]
) -> None:
    path = create(tmp_path / f"x.{form}", "-f", form, *options, "8M")
    size = path.stat().st_size
    os.truncate(path, -(-size // 512) * 512) if form != "vpc" else None
    assert "looks like" in refused(path, "raw")
    if form != "qcow2":
        assert refused(path, "qcow2")


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (0, b"LUKS\xba\xbe"),
        (0, b"Bochs Virtual HD Image"),
        (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
        (0, b"COWD"),
        (0x8001, b"CD001"),
        (MIB - 512, b"koly"),
        (MIB - 512, b"conectix"),
    ],
)
def test_signatures_of_other_formats_are_refused(
    tmp_path: Path, offset: int, content: bytes
) -> None:
    path = tmp_path / "x.raw"
    path.write_bytes(bytes(MIB))
    patch(path, offset, content)
    assert "looks like" in refused(path, "raw")


def test_qcow2_with_a_partition_table_is_refused_as_either_format(qcow2: Path) -> None:
    patch(qcow2, 510, b"\x55\xaaEFI PART")
    assert "ambiguous" in refused(qcow2)
    assert "qcow" in refused(qcow2, "raw")


def test_what_is_no_image_is_refused(tmp_path: Path, qcow2: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    assert "empty" in refused(empty)
    assert refused(tmp_path / "absent")
    assert refused(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(qcow2)
    assert refused(link)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "regular" in refused(fifo)
    short = tmp_path / "short"
    short.write_bytes(qcow2.read_bytes()[:80])
    assert "cut off" in refused(short)
    odd = tmp_path / "odd.raw"
    odd.write_bytes(bytes(1000))
    assert "512" in refused(odd, "raw")


# Bombs (check 5)


def test_huge_virtual_size_is_refused(tmp_path: Path, qcow2: Path) -> None:
    patch(qcow2, 24, struct.pack(">Q", (8 << 60) - 512))
    assert "larger than" in refused(qcow2)
    assert "larger than" in refused(create(tmp_path / "t.qcow2", "-f", "qcow2", "41G"))
    raw = tmp_path / "big.raw"
    raw.touch()
    os.truncate(raw, FILE_MAX + 512)
    assert "larger than" in refused(raw, "raw")


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (36, struct.pack(">I", 0xFFFFFFFF)),  # L1 entries
        (36, struct.pack(">I", (32 << 20) // 8)),  # allowed by QEMU, but beyond the file
        (36, struct.pack(">I", 0)),
        (40, struct.pack(">Q", 1 << 62)),  # L1 offset
        (40, struct.pack(">Q", 513)),
        (48, struct.pack(">Q", 1 << 40)),  # refcount table offset
        (48, struct.pack(">Q", 0)),
        (56, struct.pack(">I", 0xFFFFFFFF)),  # refcount table clusters
        (56, struct.pack(">I", 127)),
        (56, struct.pack(">I", 0)),
        (20, struct.pack(">I", 8)),  # cluster bits
        (20, struct.pack(">I", 63)),
        (96, struct.pack(">I", 7)),  # refcount order
        (100, struct.pack(">I", 0xFFFFFFF8)),  # header length
        (100, struct.pack(">I", 64)),
        (4, struct.pack(">I", 4)),  # version
        (24, struct.pack(">Q", 0)),
    ],
)
def test_impossible_headers_are_refused(qcow2: Path, offset: int, value: bytes) -> None:
    assert refused(patch(qcow2, offset, value))


def test_tables_that_lead_nowhere_are_refused(qcow2: Path) -> None:
    (l1_offset,) = struct.unpack(">Q", qcow2.read_bytes()[40:48])
    patch(qcow2, l1_offset, struct.pack(">Q", (1 << 63) | (1 << 45)))
    assert "damaged" in refused(qcow2)


def test_compressed_files_are_not_unpacked(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.gz"
    with gzip.open(bomb, "wb") as file:
        for _ in range(64):
            file.write(bytes(MIB))
    assert refused(bomb, "qcow2")
    assert "gzip" in refused(bomb, "raw")


def test_conversion_is_bounded_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(os.urandom(8 * MIB))
    out = tmp_path / "out.qcow2"
    monkeypatch.setattr(qemu_img, "CONVERT_TIMEOUT_S", 0.001)
    with pytest.raises(EngineRejected):
        qemu_img.normalize(raw, "raw", out)
    monkeypatch.setattr(qemu_img, "CONVERT_TIMEOUT_S", 60.0)
    monkeypatch.setattr(qemu_img, "MEMORY_MAX_BYTES", 16 * MIB)
    with pytest.raises(EngineRejected):
        qemu_img.normalize(raw, "raw", out)
    assert list(tmp_path.iterdir()) == [raw]
