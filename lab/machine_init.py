"""First process of a lab machine: makes its namespaces, mounts its private files, then sleeps.

Run as `python -m lab.machine_init` with a JSON specification on standard input (see
`lab.machine.MachineSpec`); prints `{"pid": ..., "cgroup_controllers": [...]}` once the machine is ready.
The process that stays is init of its own pid namespace: when it is killed, the kernel ends every
process of the machine with it, guests included.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# The controllers libvirt needs for CPU shares, quotas and accounting.
CGROUP_CONTROLLERS = ("cpu", "cpuacct")


def main() -> int:
    spec = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if libc.unshare(flags) != 0:
        print(f"unshare: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return 1
    ready_r, ready_w = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready_r)
        become_init(spec, ready_w)
    os.close(ready_w)
    with os.fdopen(ready_r) as ready:
        answer = ready.read()
    if not answer:
        os.waitpid(child, 0)
        return 1
    print(json.dumps({"pid": child, **json.loads(answer)}), flush=True)
    return 0


def become_init(spec: dict[str, Any], ready_w: int) -> None:
    """Prepare the machine and turn into a process that sleeps; never returns."""
    try:
        os.setsid()
        os.chdir("/")
        socket.sethostname(spec["name"])
        set_sysctls(spec["sysctls"])
        controllers = mount_all(spec)
        # Ignored across exec: the kernel then reaps the machine's orphans by itself, so that a dead
        # daemon or guest does not linger as a zombie for which libvirt would wait.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.write(ready_w, json.dumps({"cgroup_controllers": controllers}).encode())
        os.close(ready_w)
        null = os.open("/dev/null", os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.execv("/usr/bin/sleep", [f"{spec['name']}-init", "infinity"])  # noqa: S606
    except BaseException as err:  # noqa: BLE001  a forked child must not return into main
        print(f"{type(err).__name__}: {err}", file=sys.stderr, flush=True)
        os._exit(1)


def set_sysctls(sysctls: dict[str, str]) -> None:
    for name, value in sysctls.items():
        Path("/proc/sys", *name.split("/")).write_text(value)


def mount_all(spec: dict[str, Any]) -> list[str]:
    """Mount the machine's private view; gives the cgroup controllers it got."""
    mount("--make-rprivate", "/")
    mount("-t", "proc", "proc", "/proc")
    # The host's cgroups would stay listed below the new mount, and libvirt would believe in them.
    subprocess.run(["umount", "--recursive", "--lazy", "/sys"], check=True)
    # A sysfs shows the network devices of the namespace that mounted it.
    mount("-t", "sysfs", "sysfs", "/sys")
    controllers = mount_cgroups(spec["name"]) if spec["wants_cgroups"] else []
    for source, target in spec["binds"]:
        mount("--bind", source, target)
    for path in spec["hidden"]:
        if Path(path).is_dir():
            mount("-t", "tmpfs", "-o", "ro,size=4k,mode=0555", "awan-hidden", path)
    return controllers


def mount_cgroups(name: str) -> list[str]:
    """Give the machine a subtree of its own of the CPU controllers, under their usual path.
    Empty when the kernel offers none: guests then run without CPU shares and quotas."""
    hierarchies = [line.split(":", 2)[1] for line in read_lines("/proc/self/cgroup")]
    version_1 = [names for names in hierarchies if set(names.split(",")) & set(CGROUP_CONTROLLERS)]
    base = Path("/sys/fs/cgroup")
    if version_1:
        mount("-t", "tmpfs", "tmpfs", str(base))
        for names in version_1:
            mount_subtree("cgroup", ["-o", names], name, base / names.replace(",", "-"))
        return [c for c in CGROUP_CONTROLLERS if any(c in n.split(",") for n in version_1)]
    mount("-t", "cgroup2", "cgroup2", str(base))
    if "cpu" not in (base / "cgroup.controllers").read_text().split():
        subprocess.run(["umount", str(base)], check=True)
        return []
    (base / "cgroup.subtree_control").write_text("+cpu")
    (base / name).mkdir(exist_ok=True)
    mount("--bind", str(base / name), str(base))
    return list(CGROUP_CONTROLLERS)


def mount_subtree(kind: str, options: list[str], name: str, target: Path) -> None:
    root = target.with_name(f"{target.name}.root")
    root.mkdir()
    target.mkdir()
    mount("-t", kind, *options, "cgroup", str(root))
    (root / name).mkdir(exist_ok=True)
    mount("--bind", str(root / name), str(target))
    subprocess.run(["umount", str(root)], check=True)
    root.rmdir()


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


if __name__ == "__main__":
    sys.exit(main())
