"""Fixtures of the fabric's contract suite: the fake, a private OVN central without nodes, and a whole lab location.

A `Tenant` is a guest without a machine: a network namespace on a lab node whose one interface hangs on br-int as a
guest's would. The test process holds packet sockets inside the namespace, so frames are sent and seen as they are.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from awan.engines.fabric import Fabric, PortSpec, PublicNetworkSpec
from awan.engines.fabric.fake import FakeFabric
from awan.engines.fabric.ovn import OvnFabric
from awan.engines.sim import SimStore
from lab.location import Lab
from tests.support.database_server import ServerAddress

CLONE_NEWNET = 0x40000000
FRAME_BYTES_MAX = 65535
CENTRAL_SWITCH = "public-contract"


def network_spec(switch: str = CENTRAL_SWITCH, **changes: object) -> PublicNetworkSpec:
    fields: dict[str, object] = {
        "switch": switch,
        "physical_network": "public",
        "vlan": None,
        "ipv4_cidr": IPv4Network("198.18.200.0/24"),
        "ipv4_gateway": IPv4Address("198.18.200.1"),
        "ipv6_cidr": IPv6Network("2001:db8:200:1::/64"),
        "ipv6_gateway": IPv6Address("2001:db8:200:1::1"),
        "dns_servers": (IPv4Address("198.18.200.1"), IPv6Address("2001:db8:200:1::1")),
    }
    return PublicNetworkSpec(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def make_network_spec() -> Callable[..., PublicNetworkSpec]:
    """Builds the contract's network, with changes."""
    return network_spec


@pytest.fixture
def make_port_spec() -> Callable[..., PortSpec]:
    """Builds a port of the contract's network; host number `n` gives MAC and addresses."""

    def make(n: int = 10, **changes: object) -> PortSpec:
        fields: dict[str, object] = {
            "port_id": uuid4(),
            "switch": CENTRAL_SWITCH,
            "mac": f"02:00:00:00:{n >> 8:02x}:{n & 255:02x}",
            "ipv4": IPv4Address("198.18.200.0") + n,
            "ipv6": IPv6Address("2001:db8:200:1::") + n,
            "hostname": f"host-{n}",
            "instance_id": uuid4(),
            "account_id": uuid4(),
            "operation_id": uuid4(),
        }
        return PortSpec(**{**fields, **changes})  # type: ignore[arg-type]

    return make


class OvnCentral:
    """OVN's two databases and northd on sockets in a directory of their own: everything but nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.follower: OvnFabric | None = None

    @property
    def nb(self) -> str:
        return f"unix:{self.folder}/nb.sock"

    @property
    def sb(self) -> str:
        return f"unix:{self.folder}/sb.sock"

    def start(self) -> None:
        for name in ("nb", "sb"):
            schema = f"/usr/share/ovn/ovn-{name}.ovsschema"
            subprocess.run(["ovsdb-tool", "create", self.folder / f"{name}.db", schema], check=True)
            self.start_server(name)
        self.nbctl("init")
        self.sbctl("init")
        self._start("northd", "ovn-northd", f"--ovnnb-db={self.nb}", f"--ovnsb-db={self.sb}")

    def start_server(self, name: str, *more: str) -> None:
        remote = f"--remote=punix:{self.folder}/{name}.sock"
        self._start(name, "ovsdb-server", remote, *more, str(self.folder / f"{name}.db"))
        deadline = time.monotonic() + 10
        while not (self.folder / f"{name}.sock").exists():
            assert time.monotonic() < deadline, f"{name} does not start"
            time.sleep(0.01)

    def stop_server(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait()
        (self.folder / f"{name}.sock").unlink(missing_ok=True)

    def stop(self) -> None:
        for name in list(self.processes):
            self.stop_server(name)

    def nbctl(self, *arguments: str) -> str:
        """What the command prints. The engine under test has been told of what it did."""
        printed = self._ctl("ovn-nbctl", self.nb, arguments)
        if self.follower is not None:
            # A change of the engine is made on its copy of the rows, which lags behind others for a moment.
            self.follower.list_ports()
        return printed

    def sbctl(self, *arguments: str) -> str:
        return self._ctl("ovn-sbctl", self.sb, arguments)

    def add_chassis(self, system_id: str) -> None:
        """A registered chassis without a process behind it: it confirms only what the test writes."""
        encap_ip = f"127.0.0.{len(self.sbctl('list', 'Chassis').split('_uuid'))}"
        self.sbctl("chassis-add", system_id, "geneve", encap_ip)
        self.sbctl("create", "Chassis_Private", f"name={system_id}")

    def confirm(self, system_id: str, nb_cfg: int) -> None:
        self.sbctl("set", "Chassis_Private", system_id, f"nb_cfg={nb_cfg}")

    def nb_cfg(self) -> int:
        return int(self.nbctl("get", "NB_Global", ".", "nb_cfg"))

    def nb_transactions(self) -> list[dict[str, Any]]:
        """Every transaction that the northbound database has committed, from its log.

        A record is a header line `OVSDB JSON <length> <checksum>`, then so many bytes of JSON: table -> row -> columns
        (None for a deleted row).
        """
        log = (self.folder / "nb.db").read_bytes()
        found = []
        position = 0
        while position < len(log):
            end_of_header = log.index(b"\n", position)
            length = int(log[position:end_of_header].split()[2])
            found.append(json.loads(log[end_of_header + 1 : end_of_header + 1 + length]))
            position = end_of_header + 1 + length
        return found[1:]  # the first record is the schema

    def _ctl(self, program: str, remote: str, arguments: tuple[str, ...]) -> str:
        done = subprocess.run(
            [program, f"--db={remote}", "--timeout=10", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _start(self, name: str, program: str, *arguments: str) -> None:
        self.processes[name] = subprocess.Popen(
            [program, "-vconsole:off", f"--unixctl={self.folder}/{name}.ctl", *arguments],
            cwd=self.folder,
        )


@pytest.fixture
def ovn_central() -> Iterator[OvnCentral]:
    with running_central() as central:
        yield central


@pytest.fixture
def second_central() -> Iterator[OvnCentral]:
    """That of another location."""
    with running_central() as central:
        yield central


@contextmanager
def running_central() -> Iterator[OvnCentral]:
    if shutil.which("ovn-northd") is None:
        pytest.skip("OVN is not installed")
    folder = Path(tempfile.mkdtemp(prefix="awan-ovn-"))  # a short path, for the sockets in it
    central = OvnCentral(folder)
    try:
        central.start()
        yield central
    finally:
        central.stop()
        shutil.rmtree(folder)


@pytest.fixture
def ovn_fabric(ovn_central: OvnCentral) -> Iterator[OvnFabric]:
    fabric = OvnFabric(ovn_central.nb, ovn_central.sb)
    ovn_central.follower = fabric
    yield fabric
    ovn_central.follower = None
    fabric.close()


@pytest.fixture(scope="session")
def sim_database_url(database_server: ServerAddress) -> Iterator[str]:
    name = f"fabric_contract_{uuid4().hex}"
    yield database_server.create_empty(name)
    database_server.drop(name)


@pytest.fixture(params=["fake", "ovn"])
def fabric(request: pytest.FixtureRequest) -> Iterator[Fabric]:
    """The contract's engine, with its network and one live chassis `node-1` that confirms everything."""
    if request.param == "fake":
        store = SimStore(request.getfixturevalue("sim_database_url"))
        fake = FakeFabric(store, location=str(uuid4()))
        fake.ensure_public_network(network_spec())
        yield fake
        store.close()
        return
    central: OvnCentral = request.getfixturevalue("ovn_central")
    central.add_chassis("node-1")
    central.confirm("node-1", 1_000_000)
    ovn: OvnFabric = request.getfixturevalue("ovn_fabric")
    ovn.ensure_public_network(network_spec())
    yield ovn


# -- a whole location ------------------------------------------------------------------------------


@dataclass
class Location:
    """A lab location with the public network made by the engine under test."""

    lab: Lab
    fabric: OvnFabric
    network: PublicNetworkSpec
    tenants: list[Tenant]

    def port_spec(self, node: int, host: int) -> PortSpec:
        """A port with MAC and addresses after node and host number."""
        assert self.network.ipv6_cidr is not None
        return PortSpec(
            port_id=uuid4(),
            switch=self.network.switch,
            mac=f"02:aa:00:00:{node:02x}:{host:02x}",
            ipv4=self.network.ipv4_cidr.network_address + host,
            ipv6=self.network.ipv6_cidr.network_address + host,
            hostname=f"tenant-{host}",
            instance_id=uuid4(),
            account_id=uuid4(),
            operation_id=uuid4(),
        )

    def prepare_tenant(self, node: int, host: int) -> Tenant:
        """A namespace with its interface on node 1 or 2; the port and the attachment are the caller's."""
        tenant = Tenant(self.lab, self.lab.info.nodes[node - 1].name, self.port_spec(node, host))
        self.tenants.append(tenant)
        tenant.plug()
        return tenant

    def add_tenant(self, node: int, host: int) -> Tenant:
        """A tenant whose port is bound and up."""
        tenant = self.prepare_tenant(node, host)
        self.fabric.ensure_port(tenant.spec)
        tenant.attach()
        assert self.fabric.wait_port_up(tenant.spec.port_id, tenant.node, timeout_s=15)
        return tenant

    def remove_tenants(self) -> None:
        for tenant in self.tenants:
            tenant.unplug()
            self.fabric.ensure_port_absent(tenant.spec.port_id)
        self.tenants.clear()


class Tenant:
    """A guest's network card: namespace, address and interface on a node, and packet sockets in it."""

    def __init__(self, lab: Lab, node: str, spec: PortSpec) -> None:
        self.lab = lab
        self.node = node
        self.spec = spec
        self.name = f"t{spec.port_id.hex[:8]}"
        self._sender: socket.socket | None = None

    def plug(self) -> None:
        run = self.run_on_node
        run("ip", "netns", "add", self.name)
        peer = ["peer", "name", "eth0", "address", self.spec.mac, "netns", self.name]
        run("ip", "link", "add", self.name, "type", "veth", *peer)
        # The datapath in user space hands checksums on as they are.
        run("ethtool", "-K", self.name, "tx", "off")
        self.run("ethtool", "-K", "eth0", "tx", "off")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "set", "eth0", "up")
        run("ip", "link", "set", self.name, "up")
        self._sender = self.open_socket()

    def attach(self) -> None:
        """Hangs the interface on br-int under the port's name, as libvirt does for a guest."""
        add = ["add-port", "br-int", self.name, "--", "set", "Interface", self.name]
        self.run_on_node("ovs-vsctl", *add, f"external_ids:iface-id={self.spec.port_id}")

    def unplug(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self.run_on_node("ovs-vsctl", "--if-exists", "del-port", "br-int", self.name)
        self.run_on_node("ip", "netns", "delete", self.name)

    def run_on_node(self, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        return self.lab.node_exec(self.node, argv, stdin=stdin, check=check).stdout

    def run(self, *argv: str, stdin: str | None = None, check: bool = True) -> str:
        """Runs a command inside the namespace; gives its output."""
        return self.run_on_node("ip", "netns", "exec", self.name, *argv, stdin=stdin, check=check)

    def configure(self) -> None:
        """The addresses of the port, set by hand."""
        self.run("ip", "address", "add", f"{self.spec.ipv4}/24", "dev", "eth0")
        self.run("ip", "address", "add", f"{self.spec.ipv6}/64", "dev", "eth0", "nodad")

    def ping(self, target: object, *, count: int = 3) -> bool:
        version = 6 if ":" in str(target) else 4
        argv = ["ping", f"-{version}", "-c", str(count), "-i", "0.2", "-W", "2", str(target)]
        return ", 0% packet loss" in self.run(*argv, check=False)

    def send(self, frame: bytes) -> None:
        assert self._sender is not None
        self._sender.send(frame)

    def open_socket(self) -> socket.socket:
        """A packet socket on the namespace's eth0 that belongs to this process."""

        def make() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
            sock.bind(("eth0", 0x0003))
            return sock

        return self.open_inside(make)

    def open_inside(self, make: Callable[[], socket.socket]) -> socket.socket:
        """The socket that `make` opens inside the namespace; it stays there."""
        argv = self.lab.machine_argv(self.node, [])
        init_pid = argv[argv.index("--target") + 1]
        namespace = Path(f"/proc/{init_pid}/root/run/netns/{self.name}")
        opened: list[socket.socket | BaseException] = []

        def enter_and_open() -> None:
            # A thread of its own: it stays in the namespace it enters.
            try:
                with namespace.open("rb") as file:
                    if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                opened.append(make())
            except BaseException as err:  # noqa: BLE001  handed to the caller below
                opened.append(err)

        thread = threading.Thread(target=enter_and_open)
        thread.start()
        thread.join()
        if isinstance(opened[0], BaseException):
            raise opened[0]
        return opened[0]

    def listen(self) -> Capture:
        return Capture(self.open_socket())


class Capture:
    """Collects the frames that arrive at a tenant until it is closed."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.settimeout(0.05)
        self._changed = threading.Condition()
        self._frames: list[bytes] = []
        self._is_open = True
        self._thread = threading.Thread(target=self._collect)
        self._thread.start()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._thread.join()
        self._socket.close()

    @property
    def frames(self) -> list[bytes]:
        with self._changed:
            return list(self._frames)

    def has(self, frame: bytes) -> bool:
        """Whether the frame has arrived, whatever padding it has got on its way."""
        return any(seen.startswith(frame) for seen in self.frames)

    def wait_for(self, frame: bytes, *, timeout_s: float = 5.0) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: any(seen.startswith(frame) for seen in self._frames), timeout_s
            )

    def wait_for_packet(
        self, is_wanted: Callable[[Packet], object], *, timeout_s: float = 5.0
    ) -> Packet:
        """The first packet that is wanted. Fails the test when none comes in time."""

        def find() -> Packet | None:
            packets = (Ether(frame) for frame in self._frames)
            return next((packet for packet in packets if is_wanted(packet)), None)

        with self._changed:
            packet = self._changed.wait_for(find, timeout_s)
        assert packet is not None, "no such packet arrived"
        return packet

    def _collect(self) -> None:
        while self._is_open:
            try:
                frame, origin = self._socket.recvfrom(FRAME_BYTES_MAX)
            except TimeoutError:
                continue
            if origin[2] == socket.PACKET_OUTGOING:
                continue
            with self._changed:
                self._frames.append(frame)
                self._changed.notify_all()


@contextmanager
def opened_location(lab: Lab) -> Iterator[Location]:
    """The lab with its public network; tenants made in it go with the block."""
    info = lab.info
    fabric = OvnFabric(info.ovn_nb, info.ovn_sb)
    network = PublicNetworkSpec(
        switch="public-lab",
        physical_network=info.physical_network,
        vlan=None,
        ipv4_cidr=IPv4Network(info.public_v4_cidr),
        ipv4_gateway=IPv4Address(info.public_v4_gateway),
        ipv6_cidr=IPv6Network(info.public_v6_cidr),
        ipv6_gateway=IPv6Address(info.public_v6_gateway),
        dns_servers=tuple(ip_address(server) for server in info.dns_servers),
    )
    fabric.ensure_public_network(network)
    found = Location(lab, fabric, network, [])
    try:
        yield found
    finally:
        found.remove_tenants()
        fabric.close()


@pytest.fixture
def location(lab_slot: Lab) -> Iterator[Location]:
    with opened_location(lab_slot) as found:
        yield found
