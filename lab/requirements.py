"""What the lab needs of the host, checked before anything is touched."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

from lab.errors import LabError
from lab.processes import ENVIRONMENT

# Command or file -> the Debian package that brings it.
PACKAGES = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "mount": "mount",
    "ethtool": "ethtool",
    "ping": "iputils-ping",
    "nft": "nftables",
    "radvd": "radvd",
    "knotd": "knot",
    "ovsdb-server": "openvswitch-switch",
    "ovs-vswitchd": "openvswitch-switch",
    "ovs-vsctl": "openvswitch-switch",
    "/usr/share/openvswitch/vswitch.ovsschema": "openvswitch-switch",
    "ovn-northd": "ovn-central",
    "ovn-nbctl": "ovn-central",
    "/usr/share/ovn/ovn-nb.ovsschema": "ovn-central",
    "/usr/share/ovn/ovn-sb.ovsschema": "ovn-central",
    "ovn-controller": "ovn-host",
    "libvirtd": "libvirt-daemon-system",
    "virtlogd": "libvirt-daemon-system",
    "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so": (
        "libvirt-daemon-driver-qemu"
    ),
    "virsh": "libvirt-clients",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
}
QEMU_USER = "libvirt-qemu"


def require_root() -> None:
    """Raises: LabError unless the process runs as root."""
    if os.geteuid() != 0:
        raise LabError(
            "the lab needs root, because it makes network interfaces, namespaces and mounts"
        )


def missing_packages() -> list[str]:
    """The Debian packages to install, sorted; empty when the host has all the lab needs."""
    missing = set()
    for needed, package in PACKAGES.items():
        if needed.startswith("/"):
            present = Path(needed).exists()
        else:
            present = shutil.which(needed, path=ENVIRONMENT["PATH"]) is not None
        if not present:
            missing.add(package)
    try:
        pwd.getpwnam(QEMU_USER)
    except KeyError:
        missing.add("libvirt-daemon-system")
    return sorted(missing)


def check_requirements() -> None:
    """Raises: LabError naming what to do, if not root or if packages are missing."""
    require_root()
    missing = missing_packages()
    if missing:
        raise LabError(
            f"Debian packages are missing: run `apt-get install --no-install-recommends "
            f"{' '.join(missing)}`"
        )
