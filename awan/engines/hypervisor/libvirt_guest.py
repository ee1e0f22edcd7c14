"""What is asked of and set in a running guest: by its agent, and by the packets it has sent."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from uuid import UUID

import libvirt
import libvirt_qemu

from awan.engines.hypervisor import (
    NODE_CALL_TIMEOUT_S,
    AgentAnswer,
    GuestSign,
    NodeEndpoint,
    domain_xml,
)
from awan.engines.hypervisor.libvirt_domains import find
from awan.engines.libvirt_nodes import Connection, has_code, translate
from awan.errors import EngineUnavailable

AGENT_TIMEOUT_S = 2
AGENT_COMMAND_TIMEOUT_S = 8
GUEST_EXEC_TIMEOUT_S = 15.0
GUEST_EXEC_POLL_S = 0.1
CALL_MARGIN_S = 5.0
"""How much longer than an agent may take the call to its node may."""

T = TypeVar("T")

# Run in the guest with the full name as its one argument. Systems with systemd keep their static name with hostnamectl,
# others in /etc/hostname. cloud-init takes a name that differs from the one it set last for the owner's own and never
# changes it again: so it is told.
_SET_HOSTNAME = """
set -e
name=${1%%.*}
if command -v hostnamectl >/dev/null 2>&1 && [ -d /run/systemd/system ]; then
    hostnamectl set-hostname "$name"
else
    echo "$name" >/etc/hostname
    hostname "$name"
fi
if [ "$1" = "$name" ]; then names=$name; else names="$1 $name"; fi
if grep -q '^127\\.0\\.1\\.1[[:space:]]' /etc/hosts 2>/dev/null; then
    sed -i "s/^127\\.0\\.1\\.1[[:space:]].*/127.0.1.1 $names/" /etc/hosts
fi
known=/var/lib/cloud/data/previous-hostname
if [ -e "$known" ]; then echo "$name" >"$known"; fi
"""


class DomainCall(Protocol):
    """A call to a node about one domain, as the engine makes them. See `LibvirtHypervisor`."""

    def __call__(
        self,
        node: NodeEndpoint,
        name: str,
        fn: Callable[[Connection], T],
        instance_id: UUID | None = None,
        *,
        role: str = "",
        timeout_s: float = NODE_CALL_TIMEOUT_S,
    ) -> T: ...


class Guests:
    """The guests of a location's nodes. Thread-safe."""

    def __init__(self, call: DomainCall) -> None:
        self._call = call

    def guest_sign(self, node: NodeEndpoint, instance_id: UUID) -> GuestSign:
        """As `Hypervisor.guest_sign`."""
        if self._agent_answers(node, instance_id):
            return GuestSign.AGENT

        def has_sent(conn: Connection) -> bool:
            domain = find(conn, instance_id)
            if domain is None or not domain.isActive():
                return False
            names = domain_xml.read_interface_names(domain.XMLDesc(0))
            # Counted from the guest's side: index 5 is the number of packets it has sent.
            return any(int(domain.interfaceStats(name)[5]) > 0 for name in names)

        is_heard = self._call(node, "read traffic", has_sent, instance_id)
        return GuestSign.TRAFFIC if is_heard else GuestSign.NONE

    def set_password(
        self, node: NodeEndpoint, instance_id: UUID, username: str, password_hash: str
    ) -> AgentAnswer:
        """As `Hypervisor.set_password`."""
        wish = {
            "username": username,
            "password": base64.b64encode(password_hash.encode()).decode(),
            "crypted": True,
        }
        try:
            said = self._ask_agent(node, instance_id, "guest-set-user-password", wish)
        except _AgentRefused:
            return AgentAnswer.REFUSED
        return AgentAnswer.SILENT if said is None else AgentAnswer.DONE

    def set_hostname(self, node: NodeEndpoint, instance_id: UUID, hostname: str) -> AgentAnswer:
        """As `Hypervisor.set_hostname`."""
        command = {"path": "/bin/sh", "arg": ["-c", _SET_HOSTNAME, "set-hostname", hostname]}
        try:
            started = self._ask_agent(node, instance_id, "guest-exec", command)
            pid = started.get("pid") if started is not None else None
            exit_code = self._wait_for_exit(node, instance_id, pid)
        except _AgentRefused:
            return AgentAnswer.REFUSED
        if exit_code is None:
            return AgentAnswer.SILENT
        return AgentAnswer.DONE if exit_code == 0 else AgentAnswer.REFUSED

    def _wait_for_exit(self, node: NodeEndpoint, instance_id: UUID, pid: object) -> int | None:
        """The exit code of a program in the guest, -1 when a signal ended it.

        None when it goes on for too long, or nobody tells. Raises: _AgentRefused.
        """
        deadline = time.monotonic() + GUEST_EXEC_TIMEOUT_S
        while isinstance(pid, int) and time.monotonic() < deadline:
            status = self._send_agent(node, instance_id, "guest-exec-status", {"pid": pid})
            if status is None:
                return None
            if status.get("exited"):
                code = status.get("exitcode")
                return code if isinstance(code, int) else -1
            time.sleep(GUEST_EXEC_POLL_S)
        return None

    def _ask_agent(
        self, node: NodeEndpoint, instance_id: UUID, command: str, arguments: dict[str, Any]
    ) -> dict[str, Any] | None:
        """As `_send_agent`, after a ping: a refusal is then known to be the agent's own."""
        if not self._agent_answers(node, instance_id):
            return None
        return self._send_agent(node, instance_id, command, arguments)

    def _send_agent(
        self, node: NodeEndpoint, instance_id: UUID, command: str, arguments: dict[str, Any]
    ) -> dict[str, Any] | None:
        """What the agent returns for a command that returns an object; None when nobody answers.

        Raises: _AgentRefused. The guest decides what is in the object.
        """
        text = json.dumps({"execute": command, "arguments": arguments})

        def send(conn: Connection) -> dict[str, Any] | None:
            domain = find(conn, instance_id)
            if domain is None or not domain.isActive():
                return None
            try:
                said = libvirt_qemu.qemuAgentCommand(domain, text, AGENT_COMMAND_TIMEOUT_S, 0)
            except libvirt.libvirtError as err:
                if has_code(err, libvirt.VIR_ERR_INTERNAL_ERROR) and conn.isAlive():
                    # What the agent says when it cannot do something has no code of its own.
                    raise _AgentRefused from err
                if _is_silence(conn, err):
                    return None
                raise
            return _read_return(said)

        timeout_s = AGENT_COMMAND_TIMEOUT_S + CALL_MARGIN_S
        return self._call(node, command, send, instance_id, role="/agent", timeout_s=timeout_s)

    def _agent_answers(self, node: NodeEndpoint, instance_id: UUID) -> bool:
        ping = json.dumps({"execute": "guest-ping"})

        def ask(conn: Connection) -> bool:
            domain = find(conn, instance_id)
            if domain is None or not domain.isActive():
                return False
            try:
                libvirt_qemu.qemuAgentCommand(domain, ping, AGENT_TIMEOUT_S, 0)
            except libvirt.libvirtError as err:
                if _is_silence(conn, err):
                    return False
                raise
            return True

        timeout_s = AGENT_TIMEOUT_S + CALL_MARGIN_S
        return self._call(node, "ping agent", ask, instance_id, role="/agent", timeout_s=timeout_s)


class _AgentRefused(Exception):
    """The guest's agent answers that it cannot do what it was asked."""


def _is_silence(conn: Connection, err: libvirt.libvirtError) -> bool:
    """Not connected, not answering, answering nonsense: no agent, as far as we can tell. Else the node is to blame."""
    if isinstance(translate(err, "ask agent"), EngineUnavailable):
        return bool(conn.isAlive())
    return has_code(
        err,
        libvirt.VIR_ERR_OPERATION_INVALID,
        libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
        libvirt.VIR_ERR_NO_DOMAIN,
    )


def _read_return(said: str) -> dict[str, Any] | None:
    """The object in an agent's answer; None when the guest sends anything else."""
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        return None
    found = answer.get("return") if isinstance(answer, dict) else None
    return found if isinstance(found, dict) else None
