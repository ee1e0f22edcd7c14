"""Disk images as files."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_qcow2(path: Path, size: str = "1G", *options: str) -> bytes:
    """An empty qcow2 image of that size; its bytes."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size]
    subprocess.run(command, check=True)
    return path.read_bytes()
