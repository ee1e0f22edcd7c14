"""What an acceptable address of a hypervisor is, and which threads are given away. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from urllib.parse import parse_qsl, urlsplit

SCHEMES = frozenset({"qemu+tls", "qemu+ssh", "qemu+tcp", "fake"})
# Parameters that name files of keys or say how a certificate is checked more strictly; none runs a program.
PARAMETERS = frozenset(
    {"keyfile", "known_hosts", "known_hosts_verify", "pkipath", "tls_priority", "socket"}
)


def check_libvirt_uri(uri: str) -> str:
    """A libvirt URI of a remote QEMU, unchanged.

    Refused are transports and parameters by which libvirt would run a program of the caller's choice on the worker
    (`qemu+ext`, `command`, `netcat`, `proxy`), and those that switch a check off (`no_verify`).
    Raises: ValueError. Source: libvirt.org/uri.html, "Remote URI parameters".
    """
    parts = urlsplit(uri)
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise ValueError("The URI must be qemu+tls://, qemu+ssh:// or qemu+tcp:// with a host.")
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in PARAMETERS or (name == "known_hosts_verify" and value == "ignore"):
            raise ValueError(f"The URI parameter {name} is not allowed.")
    return uri


def choose_threads(threads: Sequence[int], taken: Collection[int], count: int) -> list[int]:
    """`count` of the threads that are not taken, the last ones first: a host's own work prefers the first.

    In ascending order. Raises: ValueError when there are not so many.
    """
    free = [number for number in sorted(threads) if number not in taken]
    if not 0 < count <= len(free):
        raise ValueError(f"{count} threads wanted, {len(free)} are free")
    return free[-count:]
