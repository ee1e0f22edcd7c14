"""Guest templates built from Debian packages: bootable BIOS qcow2 images that read a NoCloud seed.

    debian-12   Debian 12 with cloud-init: what customers use
    tiny-1      Awan Tiny: a small Debian-based guest that boots in seconds, for tests and trials

Both start from the partition /dev/sda1 of whatever virtio disk they sit on, grow their root file
system to the disk, take addresses by DHCPv4, router advertisements and DHCPv6, run an SSH server,
answer the ACPI power button, and bring hot-plugged CPUs and memory online. Both run the QEMU guest
agent, started only when the seed has been applied, written to disk, and SSH is up: an answer to
`guest-ping` therefore means that the user of the seed can log in and that the seed may be replaced.

The seed is an ISO 9660 CD with the volume id `cidata` (user-data, meta-data, network-config).
`dsmode: local` in meta-data makes Debian's cloud-init apply all of it in one run before the network
instead of two, an eighth of the time to the first login; Awan Tiny does not care.
For Awan Tiny the cloud-config in user-data must be JSON after its `#cloud-config` line (which is
valid YAML, so one writer serves both); it may be one part of a MIME multipart message. The guest
knows hostname, fqdn, manage_etc_hosts, preserve_hostname, ssh_pwauth, disable_root and of `users`
name, hashed_passwd, lock_passwd, shell, sudo and ssh_authorized_keys, and ignores the rest.
"""

import fcntl
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.templates import debian12, disk_image, tiny
from lab.templates.build_host import TemplateBuildError

__all__ = [
    "CACHE",
    "TemplateBuildError",
    "TemplateFile",
    "TemplateKind",
    "build_debian12",
    "build_tiny",
    "cached",
]

TemplateKind = Literal["debian-12", "tiny-1"]
Progress = Callable[[str], None]

CACHE = Path("/var/cache/awan/templates")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class TemplateFile:
    """A built image and what a catalogue says of it. `path` is a qcow2 file without backing file."""

    path: Path
    sha256: str
    virtual_size_bytes: int
    name: str
    version: str
    family: str
    default_username: str
    min_memory_mib: int
    min_storage_gib: int
    has_agent: bool


def build_debian12(out: Path, progress: Progress) -> TemplateFile:
    """Build the Debian 12 image at `out` (replaced when done). About a minute; needs root.

    Raises: TemplateBuildError.
    """
    with _workspace(out) as work:
        debian12.build(out, work, progress)
    return _describe("debian-12", out)


def build_tiny(out: Path, progress: Progress) -> TemplateFile:
    """Build the Awan Tiny image at `out` (replaced when done). Some ten seconds; needs root.

    Raises: TemplateBuildError.
    """
    with _workspace(out) as work:
        tiny.build(out, work, progress)
    return _describe("tiny-1", out)


def cached(kind: TemplateKind, progress: Progress) -> TemplateFile:
    """Give the image of this recipe from the cache, building it there first if it is absent.

    Safe to call from several processes: the others wait for the one that builds. The file name
    carries a hash of the build sources, so a changed recipe makes a new file.
    Raises: TemplateBuildError.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    out = CACHE / f"{kind}-{_recipe_hash(kind)}.qcow2"
    with (CACHE / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists():
            progress(f"{kind}: using {out}")
            return _describe(kind, out)
        return (build_debian12 if kind == "debian-12" else build_tiny)(out, progress)


def _describe(kind: TemplateKind, path: Path) -> TemplateFile:
    with path.open("rb") as image:
        sha256 = hashlib.file_digest(image, "sha256").hexdigest()
    size_bytes = disk_image.virtual_size_bytes(path)
    if kind == "debian-12":
        return TemplateFile(
            path=path,
            sha256=sha256,
            virtual_size_bytes=size_bytes,
            name="Debian",
            version="12",
            family="debian",
            default_username="debian",
            min_memory_mib=512,
            min_storage_gib=2,
            has_agent=True,
        )
    return TemplateFile(
        path=path,
        sha256=sha256,
        virtual_size_bytes=size_bytes,
        name="Awan Tiny",
        version="1",
        family="awan",
        default_username="awan",
        min_memory_mib=128,
        min_storage_gib=1,
        has_agent=True,
    )


def _recipe_hash(kind: TemplateKind) -> str:
    """12 hex digits over the names, modes and contents of everything that shapes the image."""
    recipe = {"debian-12": "debian12.py", "tiny-1": "tiny.py"}[kind]
    sources = [_HERE / name for name in ("build_host.py", "disk_image.py", recipe)]
    sources += sorted(path for path in (_HERE / "overlays" / kind).rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for source in sources:
        mode = source.stat().st_mode & 0o111
        digest.update(f"{source.relative_to(_HERE)}\0{mode:o}\0".encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """Scratch space on the file system of the result, removed at the end; no partial result stays."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # The package manager's sandbox user must be able to enter it, hence not mkdtemp's 0700.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="awan-template-") as folder:
        Path(folder).chmod(0o701)
        try:
            yield Path(folder)
        finally:
            out.with_name(out.name + ".partial").unlink(missing_ok=True)
