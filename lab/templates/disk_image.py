"""From a directory tree to a bootable qcow2 file: DOS label, one ext4 partition, extlinux."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.templates.build_host import TemplateBuildError, run

TOOLS = {
    "extlinux": "extlinux",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "sfdisk": "fdisk",
}
_MBR = Path("/usr/lib/syslinux/mbr/mbr.bin")
_PARTITION_START_BYTES = 1024 * 1024
# The boot loader reads neither 64-bit block numbers nor checksummed metadata.
_EXT4_FEATURES = "^64bit,^metadata_csum,^orphan_file"


@contextmanager
def _loop_device(image: Path, offset_bytes: int) -> Iterator[Path]:
    """A loop device over `image` from the offset on (a kernel may lack loop partitions)."""
    device = Path(
        run(["losetup", "--find", "--show", "--offset", str(offset_bytes), image]).strip()
    )
    try:
        yield device
    finally:
        run(["losetup", "--detach", device])


@contextmanager
def _mounted(device: Path, mount_point: Path) -> Iterator[Path]:
    mount_point.mkdir()
    run(["mount", device, mount_point])
    try:
        yield mount_point
    finally:
        run(["umount", mount_point])


def write_boot_menu(root: Path, kernel: str, initrd: str, command_line: str) -> None:
    """Write the extlinux configuration: one entry, started at once."""
    folder = root / "boot" / "extlinux"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "extlinux.conf").write_text(
        f"DEFAULT linux\nPROMPT 0\nTIMEOUT 0\nLABEL linux\n"
        f"  KERNEL {kernel}\n  INITRD {initrd}\n  APPEND {command_line}\n"
    )


def make_bootable_qcow2(
    root: Path, out: Path, work: Path, *, size_mib: int, label: str, reserved_percent: int = 1
) -> None:
    """Turn the tree `root` into the compressed BIOS-bootable qcow2 `out` of `size_mib` virtual size.

    `root` holds /boot/extlinux (write_boot_menu); `label` names the file system, by which the
    kernel finds it. `work` is scratch space. Mounts and loop devices are gone afterwards, also
    when a step fails.
    """
    if not _MBR.exists():
        raise TemplateBuildError("missing Debian packages: syslinux-common")
    raw = work / "disk.raw"
    with raw.open("wb") as image:
        image.truncate(size_mib * 1024 * 1024)
    start_sector = _PARTITION_START_BYTES // 512
    run(
        ["sfdisk", "--quiet", raw],
        input_text=f"label: dos\nlabel-id: 0x{secrets.randbits(32):08x}\n"
        f"start={start_sector}, type=83, bootable\n",
    )
    with raw.open("r+b") as image:
        image.write(_MBR.read_bytes()[:440])
    with _loop_device(raw, _PARTITION_START_BYTES) as device:
        run(
            [
                *("mkfs.ext4", "-q", "-L", label, "-O", _EXT4_FEATURES, "-b", "4096", "-I", "256"),
                *("-m", str(reserved_percent), "-E", "lazy_itable_init=0,nodiscard"),
                *("-d", root, device),
            ]
        )
        with _mounted(device, work / "mnt") as mounted:
            run(["extlinux", "--install", mounted / "boot" / "extlinux"])
    partial = out.with_name(out.name + ".partial")
    run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, partial])
    partial.replace(out)


def virtual_size_bytes(image: Path) -> int:
    """The size of the disk a guest sees in a qcow2 file."""
    described = json.loads(run(["qemu-img", "info", "-f", "qcow2", "--output=json", image]))
    return int(described["virtual-size"])
