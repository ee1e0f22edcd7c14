"""Connections, deadlines and keys, on libvirt's own simulated driver (`test:///default`)."""

from __future__ import annotations

import errno
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import libvirt
import pytest

from awan.engines.hypervisor import NodeEndpoint
from awan.engines.libvirt_nodes import (
    OVERDUE_PER_CONNECTION,
    OVERDUE_PER_NODE,
    LibvirtNodes,
    LifecycleEvent,
    Watcher,
    translate,
)
from awan.errors import EngineRejected, EngineUnavailable


@pytest.fixture
def nodes() -> Iterator[LibvirtNodes]:
    opened = LibvirtNodes(calls_per_node=4)
    yield opened
    opened.close()


@pytest.fixture
def node() -> NodeEndpoint:
    return NodeEndpoint(uuid4(), "n1", "test:///default")


class Gate:
    """A call that stays in libvirt until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, _conn: Any) -> str:
        self.entered.set()
        assert self.opened.wait(20)
        return "late"


def ask(
    nodes: LibvirtNodes, node: NodeEndpoint, key: str | None = None, timeout_s: float = 5
) -> str:
    return nodes.call(node, "ask", lambda conn: str(conn.getType()), timeout_s=timeout_s, key=key)


def leave_behind(
    nodes: LibvirtNodes, node: NodeEndpoint, key: str, timeout_s: float = 0.05
) -> Gate:
    gate = Gate()
    with pytest.raises(EngineUnavailable):
        nodes.call(node, "hang", gate, timeout_s=timeout_s, key=key)
    return gate


def test_a_call_gives_what_its_function_gives(nodes: LibvirtNodes, node: NodeEndpoint) -> None:
    assert ask(nodes, node).lower() == "test"


def test_one_connection_serves_all_calls(nodes: LibvirtNodes, node: NodeEndpoint) -> None:
    found = {nodes.call(node, "id", id, timeout_s=5) for _ in range(20)}
    assert len(found) == 1


def test_errors_of_the_function_reach_the_caller(nodes: LibvirtNodes, node: NodeEndpoint) -> None:
    with pytest.raises(EngineRejected) as caught:
        nodes.call(node, "look", lambda conn: conn.lookupByName("nobody"), timeout_s=5, key="k")
    assert caught.value.call == "look on n1 for k"
    with pytest.raises(ZeroDivisionError):
        nodes.call(node, "divide", lambda _: 1 // 0, timeout_s=5)


def test_a_late_call_keeps_its_key_and_nothing_else(
    nodes: LibvirtNodes, node: NodeEndpoint
) -> None:
    began = time.monotonic()
    gate = leave_behind(nodes, node, "domain-1")
    assert time.monotonic() - began < 10
    ask(nodes, node, "domain-2")
    with pytest.raises(EngineUnavailable):
        ask(nodes, node, "domain-1", timeout_s=0.1)
    gate.opened.set()
    ask(nodes, node, "domain-1")


def test_calls_of_one_key_never_overlap(nodes: LibvirtNodes, node: NodeEndpoint) -> None:
    inside = 0
    overlaps = []

    def work(_conn: Any) -> None:
        nonlocal inside
        inside += 1
        overlaps.append(inside)
        time.sleep(0.005)
        inside -= 1

    threads = [
        threading.Thread(target=nodes.call, args=(node, "work", work), kwargs=options)
        for options in [{"timeout_s": 10, "key": "k"}] * 12
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [1] * 12


def test_calls_at_once_are_bounded(nodes: LibvirtNodes, node: NodeEndpoint) -> None:
    gates = [Gate() for _ in range(4)]
    threads = [
        threading.Thread(target=nodes.call, args=(node, "hang", gate), kwargs={"timeout_s": 20})
        for gate in gates
    ]
    for thread in threads:
        thread.start()
    for gate in gates:
        assert gate.entered.wait(5)
    with pytest.raises(EngineUnavailable):
        ask(nodes, node, timeout_s=0.1)
    gates[0].opened.set()
    ask(nodes, node)
    for gate in gates:
        gate.opened.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("timeout_s", [0.0, 0.3])
def test_a_connection_full_of_late_calls_is_replaced(
    nodes: LibvirtNodes, node: NodeEndpoint, timeout_s: float
) -> None:
    first = nodes.call(node, "connection", lambda conn: conn, timeout_s=5)
    # Given up at once, perhaps before they have the connection, or once they have been on it for a while.
    gates = [leave_behind(nodes, node, f"k{n}", timeout_s) for n in range(OVERDUE_PER_CONNECTION)]
    for gate in gates:
        assert gate.entered.wait(20)
    second = nodes.call(node, "connection", lambda conn: conn, timeout_s=5)
    assert first is not second
    for gate in gates:
        gate.opened.set()
    deadline = time.monotonic() + 20
    while nodes._nodes[node.node_id].overdue:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    link = nodes._nodes[node.node_id].link
    assert link is not None
    assert link.overdue == 0


def test_too_many_late_calls_are_refused_at_once(nodes: LibvirtNodes, node: NodeEndpoint) -> None:
    gates = [leave_behind(nodes, node, f"k{n}") for n in range(OVERDUE_PER_NODE)]
    began = time.monotonic()
    with pytest.raises(EngineUnavailable):
        ask(nodes, node, timeout_s=20)
    assert time.monotonic() - began < 10
    for gate in gates:
        gate.opened.set()
    deadline = time.monotonic() + 10
    while True:
        try:
            ask(nodes, node)
            break
        except EngineUnavailable:
            assert time.monotonic() < deadline


def test_a_closed_port_fails_at_once(nodes: LibvirtNodes) -> None:
    node = NodeEndpoint(uuid4(), "off", "qemu+tcp://127.0.0.1:1/system")
    began = time.monotonic()
    with pytest.raises(EngineUnavailable):
        ask(nodes, node, timeout_s=20)
    assert time.monotonic() - began < 5


def test_a_daemon_that_never_answers_does_not_hold_callers(nodes: LibvirtNodes) -> None:
    """It accepts the connection and stays silent: every caller is free at its own deadline."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"qemu+tcp://127.0.0.1:{server.getsockname()[1]}/system"
        node = NodeEndpoint(uuid4(), "frozen", uri)
        began = time.monotonic()
        for _ in range(3):
            with pytest.raises(EngineUnavailable):
                ask(nodes, node, timeout_s=0.3)
        assert time.monotonic() - began < 10
        accepted, _ = server.accept()
        accepted.close()


def test_another_host_is_refused(nodes: LibvirtNodes) -> None:
    # libvirt's simulated host has no uuid in its capabilities that could match.
    node = NodeEndpoint(uuid4(), "n1", "test:///default", host_uuid=uuid4())
    with pytest.raises(EngineRejected):
        ask(nodes, node)


def test_events_reach_all_watchers(nodes: LibvirtNodes, node: NodeEndpoint) -> None:
    seen: list[queue.Queue[LifecycleEvent]] = [queue.Queue(), queue.Queue()]
    cancels = [nodes.watch(node, Watcher(found.put, lambda: None)) for found in seen]

    def destroy_and_start(conn: Any) -> None:
        domain = conn.lookupByName("test")
        if domain.isActive():
            domain.destroy()
        domain.create()

    nodes.call(node, "restart", destroy_and_start, timeout_s=5)
    for found in seen:
        events = [found.get(timeout=5).event, found.get(timeout=5).event]
        assert events == [libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STARTED]
    cancels[0]()
    nodes.call(node, "restart", destroy_and_start, timeout_s=5)
    seen[1].get(timeout=5)
    assert seen[0].empty()


def test_after_close_everything_is_refused(node: NodeEndpoint) -> None:
    nodes = LibvirtNodes()
    ask(nodes, node)
    nodes.close()
    nodes.close()
    with pytest.raises(EngineUnavailable):
        ask(nodes, node)


class CodedError(libvirt.libvirtError):  # type: ignore[misc]
    """An error as libvirt would report it."""

    def __init__(self, code: int, number: int = 0) -> None:
        super().__init__("words that mean nothing")
        self.err = (code, 0, "words", 2, "", "", "", number, -1)


@pytest.mark.parametrize(
    ("error", "family"),
    [
        (CodedError(libvirt.VIR_ERR_OPERATION_TIMEOUT), EngineUnavailable),
        (CodedError(libvirt.VIR_ERR_RPC), EngineUnavailable),
        (CodedError(libvirt.VIR_ERR_INTERNAL_ERROR), EngineUnavailable),
        (CodedError(libvirt.VIR_ERR_AGENT_UNRESPONSIVE), EngineUnavailable),
        (CodedError(libvirt.VIR_ERR_SYSTEM_ERROR, errno.ECONNREFUSED), EngineUnavailable),
        (CodedError(libvirt.VIR_ERR_SYSTEM_ERROR, errno.ENOSPC), EngineUnavailable),
        (CodedError(libvirt.VIR_ERR_SYSTEM_ERROR, errno.ENOENT), EngineRejected),
        (CodedError(libvirt.VIR_ERR_NO_DOMAIN), EngineRejected),
        (CodedError(libvirt.VIR_ERR_XML_ERROR), EngineRejected),
        (CodedError(libvirt.VIR_ERR_OPERATION_INVALID), EngineRejected),
    ],
)
def test_errors_are_told_apart_by_code(error: libvirt.libvirtError, family: type) -> None:
    assert type(translate(error, "call")) is family
