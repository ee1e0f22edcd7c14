"""What can be broken in a lab, and mended again."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from lab.processes import start_ticks
from tests.support.lab_cloud import LabCloud, until


def kill_processes(cloud: LabCloud, suffix: str) -> None:
    """kill -9 of the lab's processes with this end of their name. `cloud.heal()` starts them again."""
    victims = [it for it in cloud.lab.status().processes if it.name.endswith(suffix)]
    assert victims, f"no process of the lab is called *{suffix}"
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
    until(lambda: all(not start_ticks(it.pid) for it in victims), 10, "they are still alive")


@contextmanager
def cut_off(cloud: LabCloud, node: str) -> Iterator[None]:
    """Inside, the node has no management network: neither libvirt nor OVN reaches it. Its guests run on."""
    link = next(it.host_link for it in cloud.lab.layout.nodes if it.name == node)
    subprocess.run(["ip", "link", "set", link, "nomaster"], check=True)
    try:
        yield
    finally:
        bridge = cloud.lab.layout.mgmt_bridge
        subprocess.run(["ip", "link", "set", link, "master", bridge], check=True)
