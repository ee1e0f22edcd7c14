"""Awan Tiny: Debian's cloud kernel, busybox and a hand-picked set of Debian programs on ext4.

The programs are taken out of their packages by name together with the libraries that the dynamic
linker says they need; what the guest does with them is in overlays/tiny-1, plain files.
"""

import gzip
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from lab.templates import disk_image
from lab.templates.build_host import TemplateBuildError, mmdebstrap, require_root_and_tools, run

SIZE_MIB = 192
LABEL = "awan-tiny"

_TOOLS = disk_image.TOOLS | {"cpio": "cpio", "depmod": "kmod", "mmdebstrap": "mmdebstrap"}
_OVERLAY = Path(__file__).parent / "overlays" / "tiny-1"

_PACKAGES = (
    *("bash", "busybox", "login", "ncurses-base", "netbase", "passwd", "sudo", "util-linux"),
    *("cloud-guest-utils", "e2fsprogs", "fdisk", "linux-image-cloud-amd64"),
    *("dhcpcd-base", "iproute2", "iputils-ping", "netcat-openbsd", "tcpdump"),
    *("dropbear-bin", "openssh-sftp-server", "jshon", "qemu-guest-agent"),
    *("libpam-modules", "libc-bin"),
)
# Paths as in the packages, with /usr merged. A folder is taken whole.
_PROGRAMS = (
    "/usr/bin/bash",
    "/usr/bin/busybox",
    "/usr/bin/chage",
    "/usr/bin/getent",
    "/usr/bin/growpart",
    "/usr/bin/jshon",
    "/usr/bin/login",
    "/usr/bin/lsblk",
    "/usr/bin/nc.openbsd",
    "/usr/bin/partx",
    "/usr/bin/passwd",
    "/usr/bin/ping",
    "/usr/bin/ss",
    "/usr/bin/su",
    "/usr/bin/sudo",
    "/usr/bin/tcpdump",
    "/usr/sbin/blkid",
    "/usr/sbin/chpasswd",
    "/usr/sbin/dhcpcd",
    "/usr/sbin/dropbear",
    "/usr/bin/dropbearkey",
    "/usr/sbin/e2fsck",
    "/usr/sbin/groupadd",
    "/usr/sbin/mke2fs",
    "/usr/sbin/mkfs.ext4",
    "/usr/sbin/fsck.ext4",
    "/usr/sbin/nologin",
    "/usr/sbin/qemu-ga",
    "/usr/sbin/resize2fs",
    "/usr/sbin/sfdisk",
    "/usr/sbin/unix_chkpwd",
    "/usr/sbin/useradd",
    "/usr/sbin/userdel",
    "/usr/sbin/usermod",
    "/usr/bin/ip",
    "/usr/lib/openssh/sftp-server",
    "/usr/lib/sftp-server",
    "/usr/libexec/sudo",
    *(
        f"/usr/lib/x86_64-linux-gnu/security/pam_{module}.so"
        for module in ("deny", "faildelay", "permit", "rootok", "unix")
    ),
    # Loaded by glibc itself when a thread is cancelled.
    "/usr/lib/x86_64-linux-gnu/libgcc_s.so.1",
    "/usr/lib/terminfo",
    "/etc/login.defs",
    "/etc/mke2fs.conf",
    "/etc/protocols",
    "/etc/services",
    "/etc/skel",
)
_INITRAMFS_MODULES = ("virtio_pci", "virtio_scsi", "virtio_blk", "sd_mod")
_MODULES = (
    *_INITRAMFS_MODULES,
    *("button", "evdev", "sr_mod", "isofs", "nls_utf8", "nls_iso8859-1"),
    *("virtio_net", "virtio_console", "virtio_balloon", "virtio_rng", "virtio_mem"),
    *("pvpanic-pci", "pvpanic-mmio", "8021q", "dummy", "tun", "vfat", "nls_cp437", "nls_ascii"),
    *("inet_diag", "tcp_diag", "udp_diag", "unix_diag", "af_packet_diag"),
)
# Programs of ours or of Debian stand in the place of these busybox commands.
_BUSYBOX_LEFT_OUT = {"busybox", "halt", "init", "nc", "poweroff", "reboot"}

_MODES = {
    "etc/shadow": 0o640,
    "etc/gshadow": 0o640,
    "etc/sudoers": 0o440,
    "etc/sudoers.d": 0o750,
    "root": 0o700,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
}
_SHADOW_GROUP_ID = 42


def build(out: Path, work: Path, progress: Callable[[str], None]) -> None:
    """Write the image to `out`, using the folder `work`.   Raises: TemplateBuildError."""
    require_root_and_tools(_TOOLS)
    packages, root = work / "packages", work / "root"
    progress("tiny-1: fetching packages")
    mmdebstrap(
        packages,
        "extract",
        _PACKAGES,
        ["--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", "--skip=cleanup/apt"],
    )
    progress("tiny-1: laying out the root file system")
    _make_skeleton(root)
    _copy_programs(packages, root)
    _copy_overlay(_OVERLAY / "root", root)
    _link_commands(packages, root)
    release = _copy_kernel(packages, root)
    _write_initramfs(root, work / "initramfs", release)
    for path, mode in _MODES.items():
        (root / path).chmod(mode)
    for path in ("etc/shadow", "etc/gshadow"):
        os.chown(root / path, 0, _SHADOW_GROUP_ID)
    disk_image.write_boot_menu(
        root,
        "/boot/vmlinuz",
        "/boot/initrd.img",
        f"root=LABEL={LABEL} console=tty0 console=ttyS0,115200 quiet net.ifnames=0 "
        "memhp_default_state=online panic=10",
    )
    progress("tiny-1: writing the disk image")
    disk_image.make_bootable_qcow2(root, out, work, size_mib=SIZE_MIB, label=LABEL)


def _make_skeleton(root: Path) -> None:
    for folder in (
        *("boot", "dev", "etc/dropbear", "etc/sudoers.d", "home", "mnt", "proc", "root", "run"),
        *("sys", "tmp", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "usr/local/bin"),
        *("usr/local/sbin", "var/lib/dhcpcd", "var/log", "var/spool", "var/tmp"),
    ):
        (root / folder).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "var/run").symlink_to("/run")
    (root / "etc/mtab").symlink_to("/proc/self/mounts")


def _copy_programs(packages: Path, root: Path) -> None:
    """Copy every program and, by the dynamic linker's own account, the libraries it loads."""
    libraries: set[Path] = {Path("/usr/lib64/ld-linux-x86-64.so.2")}
    for name in _PROGRAMS:
        source = packages / name.lstrip("/")
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, root / name.lstrip("/"), symlinks=True, dirs_exist_ok=True)
            members: Iterable[Path] = (path for path in source.rglob("*") if path.is_file())
        else:
            _copy_with_targets(packages, root, Path(name))
            members = [source]
        for member in members:
            libraries |= _libraries(packages, member)
    for library in libraries:
        _copy_with_targets(packages, root, library)


def _libraries(packages: Path, program: Path) -> set[Path]:
    real = _resolve(packages, Path("/") / program.relative_to(packages))
    inside = packages / str(real).lstrip("/")
    with inside.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return set()
    needed = run(["chroot", packages, "/lib64/ld-linux-x86-64.so.2", "--list", real])
    if missing := re.findall(r"(\S+) => not found", needed):
        raise TemplateBuildError(f"{real} needs {', '.join(missing)}, which no package brought")
    found = re.findall(r"=> (/\S+) ", needed)
    return {_merged(Path(path)) for path in found}


def _merged(path: Path) -> Path:
    """/lib/x as /usr/lib/x: the layout of the tree, whatever name the linker prints."""
    outside_usr = path.parts[1] in ("bin", "sbin", "lib", "lib64")
    return Path("/usr", *path.parts[1:]) if outside_usr else path


def _resolve(packages: Path, path: Path) -> Path:
    """Follow the links of `path` inside the tree `packages`, never out of it."""
    for _ in range(10):
        inside = packages / str(_merged(path)).lstrip("/")
        if not inside.is_symlink():
            return _merged(path)
        path = Path(os.path.normpath(_merged(path).parent / inside.readlink()))
    raise TemplateBuildError(f"too many links at {path}")


def _copy_with_targets(packages: Path, root: Path, path: Path) -> None:
    """Copy one file with mode and owner; of a link, the link and what it leads to."""
    for _ in range(10):
        path = _merged(path)
        source, target = packages / str(path).lstrip("/"), root / str(path).lstrip("/")
        if not source.exists() and not source.is_symlink():
            raise TemplateBuildError(f"no package brought {path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() or target.is_symlink():
            return
        if not source.is_symlink():
            shutil.copy2(source, target)
            os.chown(target, source.stat().st_uid, source.stat().st_gid)
            # After chown, which drops set-uid bits.
            target.chmod(source.stat().st_mode & 0o7777)
            return
        target.symlink_to(source.readlink())
        path = Path(os.path.normpath(path.parent / source.readlink()))


def _copy_overlay(overlay: Path, root: Path) -> None:
    for source in sorted(overlay.rglob("*")):
        target = root / source.relative_to(overlay)
        if source.is_dir():
            target.mkdir(exist_ok=True)
        else:
            shutil.copyfile(source, target)
            target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)


def _link_commands(packages: Path, root: Path) -> None:
    commands = run(["chroot", packages, "/usr/bin/busybox", "--list"]).split()
    for command in set(commands) - _BUSYBOX_LEFT_OUT:
        link = root / "usr/bin" / command
        if not link.exists() and not (root / "usr/sbin" / command).exists():
            link.symlink_to("busybox")
    (root / "usr/sbin/init").symlink_to("../bin/busybox")
    (root / "usr/bin/nc").symlink_to("nc.openbsd")
    for name in ("halt", "poweroff", "reboot", "shutdown"):
        (root / "usr/sbin" / name).symlink_to("../lib/awan-tiny/power")


def _copy_kernel(packages: Path, root: Path) -> str:
    """Copy the kernel and the modules with what they depend on; give the kernel's release."""
    release = next((packages / "usr/lib/modules").iterdir()).name
    shutil.copyfile(packages / f"boot/vmlinuz-{release}", root / "boot/vmlinuz")
    run(["depmod", "--basedir", packages, release])
    _copy_modules(packages, root, release, _MODULES)
    return release


def _copy_modules(packages: Path, root: Path, release: str, modules: Iterable[str]) -> None:
    source, target = (tree / "usr/lib/modules" / release for tree in (packages, root))
    needs: dict[str, list[str]] = {}
    for line in (source / "modules.dep").read_text().splitlines():
        module, _, others = line.partition(":")
        needs[module] = others.split()
    by_name = {Path(module).name.partition(".")[0].replace("-", "_"): module for module in needs}
    built_in = {
        Path(line).name.partition(".")[0].replace("-", "_")
        for line in (source / "modules.builtin").read_text().splitlines()
    }
    for name in (module.replace("-", "_") for module in modules):
        if name in built_in:
            continue
        if name not in by_name:
            raise TemplateBuildError(f"kernel {release} has no module {name}")
        for path in (by_name[name], *needs[by_name[name]]):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)
    for index in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copyfile(source / index, target / index)
    run(["depmod", "--basedir", root, release])


def _write_initramfs(root: Path, tree: Path, release: str) -> None:
    """Pack busybox, its libraries and the disk drivers, taken from the finished root."""
    for folder in ("dev", "proc", "root", "sys", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin"):
        (tree / folder).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    busybox = Path("/usr/bin/busybox")
    loader = Path("/usr/lib64/ld-linux-x86-64.so.2")
    for path in {busybox, loader} | _libraries(root, root / "usr/bin/busybox"):
        _copy_with_targets(root, tree, path)
    for command in (
        *("cat", "findfs", "mount", "modprobe", "reboot", "sh", "sleep", "switch_root"),
    ):
        (tree / "usr/bin" / command).symlink_to("busybox")
    _copy_overlay(_OVERLAY / "initramfs", tree)
    _copy_modules(root, tree, release, _INITRAMFS_MODULES)
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    archive = tree.with_suffix(".cpio")
    run(
        ["cpio", "--quiet", "--create", "--format=newc", "--directory", tree, "-F", archive],
        input_text="\n".join(names) + "\n",
    )
    (root / "boot/initrd.img").write_bytes(gzip.compress(archive.read_bytes(), 9))
