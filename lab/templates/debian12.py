"""Debian 12 with cloud-init, as a customer expects it, without what makes its boot slow.

The configuration is in overlays/debian-12, plain files. The boot menu names /vmlinuz and
/initrd.img, the links that Debian's kernel packages keep at the newest kernel, so that kernel
upgrades inside a guest need no boot loader.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from lab.templates import disk_image
from lab.templates.build_host import TemplateBuildError, mmdebstrap, require_root_and_tools, run

SIZE_MIB = 2048
LABEL = "root"

_TOOLS = disk_image.TOOLS | {"mmdebstrap": "mmdebstrap"}
_OVERLAY = Path(__file__).parent / "overlays" / "debian-12" / "root"

_PACKAGES = (
    *("linux-image-cloud-amd64", "initramfs-tools", "lz4", "e2fsprogs", "fdisk", "gdisk"),
    *("systemd-sysv", "systemd-resolved", "systemd-timesyncd", "udev", "dbus"),
    *("cloud-init", "cloud-guest-utils", "qemu-guest-agent", "openssh-server", "sudo"),
    *("iproute2", "iputils-ping", "netbase", "ca-certificates", "curl", "nftables"),
    *("procps", "less", "vim-tiny", "bash-completion"),
)
# Nobody reads manuals in a template; a guest's own packages install theirs.
_EXCLUDED = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")
_ENABLED_UNITS = (
    *("cloud-init-local.service", "cloud-init.service", "cloud-config.service"),
    *("cloud-final.service", "ssh.service", "systemd-networkd.service"),
    *("systemd-resolved.service", "systemd-timesyncd.service"),
)
# Periodic work that a fresh guest would start in its first minute.
_DISABLED_UNITS = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer"),
)
# cloud-init writes 10-cloud-init-<interface>.network; by itself networkd ignores the MTU that DHCP
# offers, and an overlay network then drops full-sized packets.
_USE_OFFERED_MTU = "[DHCPv4]\nUseMTU=true\n"
_INTERFACES_MAX = 8
# What must be made anew in every guest, and what only the build needed.
_REMOVED = ("etc/ssh/ssh_host_*", "var/lib/apt/lists/*", "var/cache/apt/*.bin", "var/log/*.log")


def build(out: Path, work: Path, progress: Callable[[str], None]) -> None:
    """Write the image to `out`, using the folder `work`.   Raises: TemplateBuildError."""
    require_root_and_tools(_TOOLS)
    root = work / "root"
    progress("debian-12: installing packages")
    mmdebstrap(
        root,
        "minbase",
        _PACKAGES,
        # Nothing of a half-made tree is kept, so dpkg need not wait for the disk.
        ["--dpkgopt=force-unsafe-io", *(f"--dpkgopt=path-exclude={p}" for p in _EXCLUDED)],
    )
    progress("debian-12: configuring")
    _configure(root)
    disk_image.write_boot_menu(
        root,
        "/vmlinuz",
        "/initrd.img",
        f"root=LABEL={LABEL} ro console=tty0 console=ttyS0,115200 quiet net.ifnames=0 "
        "memhp_default_state=online",
    )
    progress("debian-12: writing the disk image")
    disk_image.make_bootable_qcow2(
        root, out, work, size_mib=SIZE_MIB, label=LABEL, reserved_percent=2
    )


def _configure(root: Path) -> None:
    for link in ("vmlinuz", "initrd.img"):
        if not (root / link).is_symlink():
            raise TemplateBuildError(f"the kernel package made no link /{link}")
    for source in sorted(_OVERLAY.rglob("*")):
        target = root / source.relative_to(_OVERLAY)
        if source.is_dir():
            target.mkdir(exist_ok=True)
        else:
            shutil.copyfile(source, target)
            target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)
    for index in range(_INTERFACES_MAX):
        drop_ins = root / f"etc/systemd/network/10-cloud-init-eth{index}.network.d"
        drop_ins.mkdir()
        (drop_ins / "mtu.conf").write_text(_USE_OFFERED_MTU)
    run(["chroot", root, "systemctl", "enable", *_ENABLED_UNITS])
    run(["chroot", root, "systemctl", "disable", *_DISABLED_UNITS])
    run(["chroot", root, "update-initramfs", "-u"])
    for pattern in _REMOVED:
        for path in root.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    # Empty, not absent: systemd writes a new one at the first boot without asking questions.
    (root / "etc/machine-id").write_text("")
    (root / "var/lib/dbus/machine-id").unlink(missing_ok=True)
    resolv_conf = root / "etc/resolv.conf"
    resolv_conf.unlink(missing_ok=True)
    resolv_conf.symlink_to("../run/systemd/resolve/stub-resolv.conf")
