"""What a lab's engines really hold, seen past the control plane: domains, ports, files, processes."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab import Lab

POOL_NAME = "awan"
POOL_PATH = "/var/lib/libvirt/images/awan"


@dataclass(frozen=True)
class Holdings:
    """Domains as (node, uuid), tenant ports by name, files as (node, name) without templates."""

    domains: tuple[tuple[str, str], ...]
    ports: tuple[str, ...]
    files: tuple[tuple[str, str], ...]

    def __bool__(self) -> bool:
        return bool(self.domains or self.ports or self.files)


def read_holdings(lab: Lab) -> Holdings:
    """Everything that the location's engines hold for instances."""
    return Holdings(
        tuple((node.name, uuid) for node in lab.info.nodes for uuid in domains_on(lab, node.name)),
        tuple(ports(lab)),
        tuple(
            (node.name, name)
            for node in lab.info.nodes
            for name in files_on(lab, node.name)
            if not name.startswith("image-")
        ),
    )


def node_uri(lab: Lab, node: str) -> str:
    """The node's libvirt."""
    return next(found.libvirt_uri for found in lab.info.nodes if found.name == node)


def virsh(lab: Lab, node: str, *arguments: str) -> str:
    """The output of a virsh command on a node."""
    return _run("virsh", "-q", "-c", node_uri(lab, node), *arguments)


def domains_on(lab: Lab, node: str) -> list[str]:
    """Uuids of the domains that the node's libvirt knows."""
    return virsh(lab, node, "list", "--all", "--uuid").split()


def node_of(lab: Lab, uuid: str) -> str:
    """The one node that has the instance's domain."""
    found = [node.name for node in lab.info.nodes if uuid in domains_on(lab, node.name)]
    assert len(found) == 1, f"the domain {uuid} is on {found}"
    return found[0]


def ports(lab: Lab) -> list[str]:
    """Names of the tenant ports in the northbound database."""
    return _run(
        *("ovn-nbctl", f"--db={lab.info.ovn_nb}", "--timeout=20", "--bare", "--columns=name"),
        *("find", "Logical_Switch_Port", 'type=""'),
    ).split()


def files_on(lab: Lab, node: str) -> list[str]:
    """Names of the files in the node's pool."""
    pool = lab.node_path(node, POOL_PATH)
    return sorted(path.name for path in pool.iterdir()) if pool.is_dir() else []


def download(lab: Lab, node: str, volume: str) -> bytes:
    """The content of a file of the pool, through libvirt's stream, as the control plane sees it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "content"
        virsh(lab, node, "vol-download", volume, str(target), "--pool", POOL_NAME)
        return target.read_bytes()


def database_dump(lab: Lab, name: str) -> str:
    """All of OVN's northbound or southbound database as text."""
    remote = lab.info.ovn_nb if name == "OVN_Northbound" else lab.info.ovn_sb
    return _run("ovsdb-client", "dump", remote, name)


def qemu_pid(uuid: str) -> int:
    """The QEMU process of an instance, by the uuid on its command line."""
    found = [pid for pid, argv in command_lines() if b"-uuid" in argv and uuid.encode() in argv]
    assert len(found) == 1, f"the QEMU processes of {uuid} are {found}"
    return found[0]


def command_lines() -> Iterator[tuple[int, list[bytes]]]:
    """Pid and arguments of every process of the machine."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                yield int(name), Path("/proc", name, "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue


def process_status(pid: int) -> dict[str, str]:
    """The fields of /proc/<pid>/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr.strip()}"
    return done.stdout
