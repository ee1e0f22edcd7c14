"""Checks disk images that come from outside, and brings them into the one form that Awan stores.

The only module that runs `qemu-img`. Three rules keep a hostile image harmless:

1. The format is what the caller declares, passed with -f, never probed. A file that looks like
   another format than the declared one is refused.
2. The header is read here, in Python, before QEMU sees the file. Whatever would make QEMU open a
   second file (backing file, external data file) or take memory without bound (huge tables) is
   refused by then.
3. `qemu-img` runs without privileges, with limits on memory, CPU time, output size and wall time,
   and gets the already opened file (`/proc/self/fd/N`), not a path that could be exchanged.

Nothing is ever decompressed here but the clusters of a checked qcow2. Format of the headers: QEMU's
docs/interop/qcow2.rst; signatures of the other formats: the `*_probe` functions in QEMU's block/.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import re
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from awan.engines.volumes import VolumeFormat
from awan.errors import EngineRejected, EngineUnavailable, Invalid

SANDBOX_USER = "nobody"
MEMORY_MAX_BYTES = 1 << 30
CHECK_CPU_S = 20
CHECK_TIMEOUT_S = 25.0
CONVERT_TIMEOUT_S = 900.0
REPORT_MAX_BYTES = 1 << 20
STORED_CLUSTER_BYTES = 65536

SECTOR_BYTES = 512
QCOW2_MAGIC = b"QFI\xfb"
# QEMU's own upper bounds (block/qcow2.h); the tables must also lie inside the file.
L1_TABLE_MAX_BYTES = 32 << 20
REFCOUNT_TABLE_MAX_BYTES = 8 << 20
INCOMPATIBLE_COMPRESSION_TYPE = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
INCOMPATIBLE_ALLOWED = INCOMPATIBLE_COMPRESSION_TYPE | INCOMPATIBLE_EXTENDED_L2
EXTENSION_END = 0
EXTENSION_FEATURE_NAMES = 0x6803F857

REFUSED_INCOMPATIBLE = {
    0: "The image was not closed cleanly (dirty bit): repair it with qemu-img check first.",
    1: "The image is marked as corrupt.",
    2: "The image keeps its data in an external file, which is not allowed.",
}
REFUSED_EXTENSIONS = {
    0xE2792ACA: "The image refers to a backing file, which is not allowed: flatten it first.",
    0x44415441: "The image keeps its data in an external file, which is not allowed.",
    0x0537BE77: "The image is encrypted, which is not supported.",
    0x23852875: "The image holds bitmaps, which are not supported: flatten it first.",
}

# (name, offset from the start or, when negative, from the end, bytes)
SIGNATURES: tuple[tuple[str, int, bytes], ...] = (
    ("qcow", 0, QCOW2_MAGIC),
    ("VMDK", 0, b"KDMV"),
    ("VMDK", 0, b"COWD"),
    ("VHDX", 0, b"vhdxfile"),
    ("VHD", 0, b"conectix"),
    ("VHD", -512, b"conectix"),
    ("VHD", -511, b"conectix"),
    ("VDI", 0, b"<<< "),
    ("VDI", 0x40, b"\x7f\x10\xda\xbe"),
    ("QED", 0, b"QED\0"),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("Parallels", 0, b"WithoutFreeSpace"),
    ("Parallels", 0, b"WithouFreSpacExt"),
    ("Bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format"),
    ("DMG", -512, b"koly"),
    ("ISO 9660", 0x8001, b"CD001"),
    ("gzip", 0, b"\x1f\x8b"),
    ("xz", 0, b"\xfd7zXZ\0"),
    ("bzip2", 0, b"BZh"),
    ("zstd", 0, b"\x28\xb5\x2f\xfd"),
    ("lz4", 0, b"\x04\x22\x4d\x18"),
    ("zip", 0, b"PK\x03\x04"),
    ("7z", 0, b"7z\xbc\xaf\x27\x1c"),
    ("tar", 257, b"ustar"),
)
# QEMU takes a text as a VMDK descriptor when `version=` is its first line that is not a comment.
VMDK_DESCRIPTOR = re.compile(rb"\A(?:[ \t]*(?:#[^\n]*)?\r?\n)*[ \t]*version[ \t]*=", re.IGNORECASE)
DESCRIPTOR_SCAN_BYTES = 1 << 16


@dataclass(frozen=True)
class ImageFacts:
    """A checked image. Sizes are the guest's disk and the file; `sha256` is the file's, in hex."""

    format: VolumeFormat
    virtual_size_bytes: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Qcow2Header:
    """The fields of a qcow2 header that decide whether the image is harmless."""

    version: int
    backing_offset: int
    cluster_bits: int
    virtual_size_bytes: int
    encryption: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshots: int
    incompatible: int
    refcount_order: int
    length: int

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits


def check_image(
    path: Path, declared_format: VolumeFormat, *, max_virtual_bytes: int, max_file_bytes: int
) -> ImageFacts:
    """Facts of the image at `path`, proved to be a harmless, self-contained `declared_format`.

    Opens this one file only. Takes at most CHECK_TIMEOUT_S per run of qemu-img (one for raw, two
    for qcow2) plus one reading of the file. When run as root the file is readable by all while it
    is checked: keep it in a private directory.
    Raises Invalid (field `file`) with a sentence for the user.
    """
    with _opened(path) as fd:
        size_bytes = os.fstat(fd).st_size
        if size_bytes == 0:
            raise _refusal("The file is empty.")
        if size_bytes > max_file_bytes:
            raise _refusal(f"The file is larger than {max_file_bytes} bytes.")
        if declared_format == "qcow2":
            _refuse_foreign_signature(fd, size_bytes, expected="qcow")
            header = _read_qcow2_header(fd, size_bytes)
            _screen_qcow2(header, size_bytes, max_virtual_bytes)
            _screen_qcow2_extensions(fd, header)
            virtual_size_bytes = header.virtual_size_bytes
        else:
            _refuse_foreign_signature(fd, size_bytes, expected=None)
            if size_bytes > max_virtual_bytes:
                raise _refusal(f"The disk is larger than {max_virtual_bytes} bytes.")
            if size_bytes % SECTOR_BYTES:
                raise _refusal("The size of a raw image must be a multiple of 512 bytes.")
            virtual_size_bytes = size_bytes
        _confirm_with_qemu(fd, declared_format, virtual_size_bytes)
        sha256 = _hash(fd)
        if os.fstat(fd).st_size != size_bytes:
            raise _refusal("The file changed while it was checked.")
    return ImageFacts(declared_format, virtual_size_bytes, size_bytes, sha256)


def normalize(
    path_in: Path, declared_format: VolumeFormat, path_out: Path, *, compress: bool = False
) -> ImageFacts:
    """Writes the checked image `path_in` to `path_out` as a flat qcow2 v3, mode 0444.

    Gives the facts of `path_out`.
    `path_out` appears complete or not at all; an existing file there is replaced. `compress` makes
    the file smaller (zstd) and each first read by a guest slower.
    Raises EngineRejected when the conversion fails or passes a limit.
    """
    part = path_out.with_name(path_out.name + ".part")
    part.unlink(missing_ok=True)
    try:
        with _opened(path_in) as source:
            virtual_size_bytes = _virtual_size_bytes(source, declared_format)
            options = f"compat=1.1,cluster_size={STORED_CLUSTER_BYTES}"
            if compress:
                options += ",compression_type=zstd"
            target = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if (sandbox := _sandbox_ids()) is not None:
                    os.fchown(target, *sandbox)
                # Tables of a qcow2 take far below 1/64 of its data.
                output_max_bytes = virtual_size_bytes + virtual_size_bytes // 64 + (16 << 20)
                _run_qemu_img(
                    ["convert", "-f", declared_format, "-O", "qcow2", "-o", options]
                    + (["-c"] if compress else [])
                    + [f"/proc/self/fd/{source}", f"/proc/self/fd/{target}"],
                    fds=(source, target),
                    cpu_s=int(CONVERT_TIMEOUT_S),
                    timeout_s=CONVERT_TIMEOUT_S,
                    output_max_bytes=output_max_bytes,
                )
                os.fchown(target, os.geteuid(), os.getegid())
                os.fchmod(target, 0o444)
                os.fsync(target)
            finally:
                os.close(target)
        facts = check_image(
            part, "qcow2", max_virtual_bytes=virtual_size_bytes, max_file_bytes=output_max_bytes
        )
        part.rename(path_out)
    finally:
        part.unlink(missing_ok=True)
    return facts


def _virtual_size_bytes(fd: int, declared_format: VolumeFormat) -> int:
    size_bytes = os.fstat(fd).st_size
    if declared_format == "raw":
        return size_bytes
    return _read_qcow2_header(fd, size_bytes).virtual_size_bytes


def _refusal(sentence: str) -> Invalid:
    return Invalid.field("file", sentence)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The regular file at `path`, open for reading; the sandbox's user may read it meanwhile."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as err:
        raise _refusal(f"The file cannot be opened: {err.strerror}.") from err
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise _refusal("This is not a regular file.")
        lends = _sandbox_ids() is not None and not mode & stat.S_IROTH
        if lends:
            os.fchmod(fd, stat.S_IMODE(mode) | stat.S_IROTH)
        try:
            yield fd
        finally:
            if lends:
                os.fchmod(fd, stat.S_IMODE(mode))
    finally:
        os.close(fd)


def _refuse_foreign_signature(fd: int, size_bytes: int, expected: str | None) -> None:
    """Refuses a file that some program could take for another format than the declared one."""
    for name, offset, signature in SIGNATURES:
        start = offset if offset >= 0 else size_bytes + offset
        if start < 0 or name == expected:
            continue
        if os.pread(fd, len(signature), start) == signature:
            raise _refusal(f"This looks like a {name} file, not like the declared format.")
    if VMDK_DESCRIPTOR.match(os.pread(fd, DESCRIPTOR_SCAN_BYTES, 0)):
        raise _refusal("This looks like a VMDK descriptor, not like the declared format.")
    if expected == "qcow" and (
        os.pread(fd, 8, SECTOR_BYTES) == b"EFI PART" or os.pread(fd, 2, 510) == b"\x55\xaa"
    ):
        raise _refusal("The image's header holds a partition table: its format is ambiguous.")


def _read_qcow2_header(fd: int, size_bytes: int) -> Qcow2Header:
    """The header's fields; refuses what is no qcow2 of version 2 or 3."""
    head = os.pread(fd, 104, 0)
    if len(head) < 72 or head[:4] != QCOW2_MAGIC:
        raise _refusal("This is not a qcow2 image.")
    (
        version,
        backing_offset,
        _backing_length,
        cluster_bits,
        virtual_size_bytes,
        encryption,
        l1_entries,
        l1_offset,
        refcount_table_offset,
        refcount_table_clusters,
        snapshots,
        _snapshots_offset,
    ) = struct.unpack(">4xIQIIQIIQQIIQ", head[:72])
    incompatible, refcount_order, length = 0, 4, 72
    if version == 3:
        if len(head) < 104:
            raise _refusal("The image's header is cut off.")
        incompatible, refcount_order, length = struct.unpack(">Q16xII", head[72:104])
    elif version != 2:
        raise _refusal(f"qcow2 version {version} is not supported.")
    return Qcow2Header(
        version=version,
        backing_offset=backing_offset,
        cluster_bits=cluster_bits,
        virtual_size_bytes=virtual_size_bytes,
        encryption=encryption,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        snapshots=snapshots,
        incompatible=incompatible,
        refcount_order=refcount_order,
        length=length,
    )


def _screen_qcow2(header: Qcow2Header, size_bytes: int, max_virtual_bytes: int) -> None:
    """Refuses a header that refers to other files, hides content, or asks for huge tables."""
    if header.backing_offset:
        raise _refusal(REFUSED_EXTENSIONS[0xE2792ACA])
    for bit, sentence in REFUSED_INCOMPATIBLE.items():
        if header.incompatible & (1 << bit):
            raise _refusal(sentence)
    if header.incompatible & ~INCOMPATIBLE_ALLOWED:
        raise _refusal("The image uses features of qcow2 that are not known here.")
    if header.encryption:
        raise _refusal(REFUSED_EXTENSIONS[0x0537BE77])
    if header.snapshots:
        raise _refusal("The image holds internal snapshots: flatten it first.")
    if not 9 <= header.cluster_bits <= 21:
        raise _refusal("The image's cluster size is out of range.")
    if header.virtual_size_bytes == 0 or header.virtual_size_bytes % SECTOR_BYTES:
        raise _refusal("The image's disk has an impossible size.")
    if header.virtual_size_bytes > max_virtual_bytes:
        raise _refusal(f"The image's disk is larger than {max_virtual_bytes} bytes.")
    if header.refcount_order > 6 or header.length < 72 or header.length % 8:
        raise _refusal("The image's header is damaged.")
    if header.length > header.cluster_bytes:
        raise _refusal("The image's header is damaged.")
    l2_entry_bytes = 16 if header.incompatible & INCOMPATIBLE_EXTENDED_L2 else 8
    bytes_per_l1_entry = header.cluster_bytes * (header.cluster_bytes // l2_entry_bytes)
    l1_entries_needed = -(-header.virtual_size_bytes // bytes_per_l1_entry)
    if header.l1_entries < l1_entries_needed:
        raise _refusal("The image's cluster table is too small for its disk.")
    _screen_table(header, size_bytes, header.l1_offset, header.l1_entries * 8, L1_TABLE_MAX_BYTES)
    if header.refcount_table_clusters == 0:
        raise _refusal("The image has no reference counts.")
    _screen_table(
        header,
        size_bytes,
        header.refcount_table_offset,
        header.refcount_table_clusters * header.cluster_bytes,
        REFCOUNT_TABLE_MAX_BYTES,
    )


def _screen_table(
    header: Qcow2Header, size_bytes: int, offset: int, table_bytes: int, max_bytes: int
) -> None:
    if table_bytes > max_bytes:
        raise _refusal("The image's tables are larger than any real image needs.")
    if offset < header.cluster_bytes or offset % header.cluster_bytes:
        raise _refusal("The image's tables lie at an impossible place.")
    if offset + table_bytes > size_bytes:
        raise _refusal("The image is cut off: its tables lie behind the end of the file.")


def _screen_qcow2_extensions(fd: int, header: Qcow2Header) -> None:
    """Refuses all header extensions but feature names. They lie in the first cluster."""
    offset = header.length
    while offset + 8 <= header.cluster_bytes:
        entry = os.pread(fd, 8, offset)
        if len(entry) < 8:
            raise _refusal("The image's header is cut off.")
        kind, length = struct.unpack(">II", entry)
        if kind == EXTENSION_END:
            return
        if kind in REFUSED_EXTENSIONS:
            raise _refusal(REFUSED_EXTENSIONS[kind])
        if kind != EXTENSION_FEATURE_NAMES:
            raise _refusal("The image uses header extensions that are not known here.")
        offset += 8 + (length + 7) // 8 * 8
    if offset > header.cluster_bytes:
        raise _refusal("The image's header is damaged.")


def _confirm_with_qemu(fd: int, declared_format: VolumeFormat, virtual_size_bytes: int) -> None:
    """QEMU agrees with what the pre-screen read, and finds the image's tables consistent."""
    file = f"/proc/self/fd/{fd}"
    try:
        info = _run_qemu_img(["info", "-f", declared_format, "--output=json", file], fds=(fd,))
        facts: dict[str, Any] = json.loads(info)
        if declared_format == "qcow2":
            # Exit status 3 (leaked clusters only) is harmless and kept by some image builders.
            _run_qemu_img(["check", "-f", "qcow2", "--output=json", file], fds=(fd,), accept=(0, 3))
    except EngineRejected as err:
        raise _refusal("The image is damaged, or too costly to read.") from err
    details = facts.get("format-specific", {}).get("data", {})
    if facts.get("format") != declared_format or facts.get("virtual-size") != virtual_size_bytes:
        raise _refusal("The image's header contradicts itself.")
    if "backing-filename" in facts or "data-file" in details or "encrypt" in details:
        raise _refusal("The image refers to other files or is encrypted, which is not allowed.")


def _hash(fd: int) -> str:
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sandbox_ids() -> tuple[int, int] | None:
    """uid and gid that qemu-img runs with, or None when this process is unprivileged itself."""
    if os.geteuid() != 0:
        return None
    user = pwd.getpwnam(SANDBOX_USER)
    return user.pw_uid, user.pw_gid


def _run_qemu_img(
    arguments: list[str],
    *,
    fds: tuple[int, ...],
    cpu_s: int = CHECK_CPU_S,
    timeout_s: float = CHECK_TIMEOUT_S,
    output_max_bytes: int = REPORT_MAX_BYTES,
    accept: tuple[int, ...] = (0,),
) -> bytes:
    """Runs qemu-img confined; gives its output.

    Raises EngineRejected for any other exit than `accept`, also when a limit ended it, and
    EngineUnavailable when it cannot be started.
    """
    # prlimit sets the limits and then becomes qemu-img: no code of ours runs between fork and exec.
    command = [
        "prlimit",
        f"--as={MEMORY_MAX_BYTES}",
        f"--cpu={cpu_s}",
        f"--fsize={output_max_bytes}",
        "--core=0",
        "--",
        "qemu-img",
        *arguments,
    ]
    sandbox = _sandbox_ids()
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            pass_fds=fds,
            cwd="/",
            # One heap: glibc otherwise reserves 64 MiB of address space for each thread, and a
            # conversion with its thread pool now and then fails at the limit of `--as`.
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "LC_ALL": "C",
                "MALLOC_ARENA_MAX": "1",
            },
            user=sandbox[0] if sandbox else None,
            group=sandbox[1] if sandbox else None,
            extra_groups=[] if sandbox else None,
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        raise EngineRejected("qemu-img", arguments[0], f"ended after {timeout_s} s") from err
    except OSError as err:
        raise EngineUnavailable("qemu-img", arguments[0], str(err)) from err
    if done.returncode not in accept:
        words = done.stderr.decode(errors="replace").strip()[:500]
        raise EngineRejected("qemu-img", arguments[0], words or f"exit status {done.returncode}")
    return done.stdout
