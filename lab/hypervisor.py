"""A lab hypervisor: Open vSwitch, ovn-controller and libvirt in a machine made of namespaces.

Software and settings are those of a plain Debian hypervisor, with the exceptions a lab needs: the
userspace datapath (no kernel module), libvirt over unencrypted TCP on one node of the two, and no
KVM where the CPU offers none.
"""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

from lab import certificates
from lab.central import INACTIVITY_PROBE_MS
from lab.errors import LabError
from lab.layout import CHECKOUT, PHYSICAL_NETWORK, STATE_ROOT, NodeLayout, SlotLayout
from lab.links import disable_ipv6, disable_tx_checksum, find_master, host_links
from lab.machine import Machine, MachineSpec
from lab.processes import ProcessTable, run, wait_until
from lab.requirements import QEMU_USER
from lab.router import Router

PKI_DIR = "/etc/libvirt/pki"
CONNECTIONS_PER_PORT = 20_000
OVS_SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"

# Private to the node and kept in its state directory: (path, mode).
PRIVATE_DIRS = (
    ("/etc/libvirt", 0o755),
    ("/etc/openvswitch", 0o755),
    ("/var/lib/libvirt", 0o755),
    ("/var/lib/openvswitch", 0o755),
    ("/var/lib/ovn", 0o755),
    ("/var/cache/libvirt", 0o711),
    ("/var/log", 0o755),
    ("/tmp", 0o1777),
    ("/var/tmp", 0o1777),
)

LIBVIRTD_CONF = """\
listen_tls = {listen_tls}
listen_tcp = {listen_tcp}
listen_addr = "{mgmt_ip}"
auth_tcp = "none"
auth_unix_rw = "none"
host_uuid = "{host_uuid}"
max_clients = 200
max_workers = 20
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
LIBVIRTD_TLS_CONF = f"""\
auth_tls = "none"
ca_file = "{PKI_DIR}/ca-cert.pem"
cert_file = "{PKI_DIR}/server-cert.pem"
key_file = "{PKI_DIR}/server-key.pem"
"""
QEMU_TLS_CONF = f"""\
vnc_tls = 1
vnc_tls_x509_verify = 1
vnc_tls_x509_cert_dir = "{PKI_DIR}"
"""

# `namespaces`: QEMU's private /dev would bring back the machine's real /dev/kvm.
# `remember_owner`: its marks on the disks would go stale whenever a node is killed.
QEMU_CONF = """\
user = "libvirt-qemu"
group = "libvirt-qemu"
dynamic_ownership = 1
remember_owner = 0
security_driver = "none"
seccomp_sandbox = 1
namespaces = []
cgroup_controllers = [{controllers}]
vnc_listen = "{mgmt_ip}"
migration_host = "{mgmt_ip}"
migration_address = "{mgmt_ip}"
"""


class Hypervisor:
    def __init__(
        self, slot: SlotLayout, node: NodeLayout, router: Router, table: ProcessTable
    ) -> None:
        self._slot = slot
        self.layout = node
        self._router = router
        short_name = f"n{node.number}"
        self.machine = Machine(
            node.name, slot.run_dir / short_name, slot.state_dir / short_name, table
        )

    def ensure(self) -> None:
        """Start what does not run. The router must be up."""
        if self.machine.find_init_pid() is None:
            self._start()
        self._ensure_links()
        self._ensure_switch()
        self._ensure_libvirt()

    def host_path(self, path: str) -> Path:
        """Where a private file of the node lies on the host.
        Raises: LabError for a path that is not private to the node."""
        if path.startswith("/run/"):
            return self.machine.run_dir / path.removeprefix("/run/")
        for private, _ in PRIVATE_DIRS:
            if path == private or path.startswith(f"{private}/"):
                return self.machine.state_dir / path.removeprefix("/")
        raise LabError(f"{path} is not private to {self.layout.name}")

    def is_libvirt_listening(self) -> bool:
        try:
            with socket.create_connection(
                (self.layout.mgmt_ip, self.layout.libvirt_port), timeout=1
            ):
                return True
        except OSError:
            return False

    def shut_down_guests(self, *, timeout_s: float) -> None:
        """Ask every running guest to shut down by ACPI and wait. Those that do not are left."""
        if self.machine.find_init_pid() is None or not self.is_libvirt_listening():
            return
        virsh = ["virsh", "-q", "-c", self.layout.libvirt_uri]

        def running() -> list[str]:
            return run([*virsh, "list", "--uuid", "--state-running"]).stdout.split()

        guests = running()
        for guest in guests:
            run([*virsh, "shutdown", guest, "--mode", "acpi"], check=False)
        if guests:
            try:
                wait_until(lambda: not running(), "guests to shut down", timeout_s=timeout_s)
            except LabError:
                return

    def _start(self) -> None:
        machine = self.machine
        binds = [(str(machine.run_dir), "/run")]
        for path, mode in PRIVATE_DIRS:
            source = machine.state_dir / path.removeprefix("/")
            source.mkdir(parents=True, exist_ok=True)
            source.chmod(mode)
            binds.append((str(source), path))
        hosts = machine.state_dir / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{n.mgmt_ip} {n.name}" for n in self._slot.nodes)]
        hosts.write_text("\n".join(lines) + "\n")
        binds.append((str(hosts), "/etc/hosts"))
        if Path("/dev/kvm").exists() and not cpu_offers_kvm():
            # With a /dev/kvm that QEMU cannot use, libvirt probes QEMU anew at every start.
            cover = machine.state_dir / "kvm"
            cover.touch()
            cover.chmod(0o600)
            binds.append((str(cover), "/dev/kvm"))
        for folder in ("openvswitch", "ovn", "libvirt", "lock"):
            (machine.run_dir / folder).mkdir(parents=True, exist_ok=True)
        for folder in ("openvswitch", "ovn", "libvirt/qemu"):
            (machine.state_dir / "var/log" / folder).mkdir(parents=True, exist_ok=True)
        if self.layout.host_link in host_links():
            run(["ip", "link", "delete", self.layout.host_link])
        controllers = machine.start(
            MachineSpec(
                name=machine.name,
                binds=tuple(binds),
                # What belongs to the control plane or to other nodes is not on a hypervisor.
                hidden=(str(STATE_ROOT.parent), str(CHECKOUT)),
                # The node's own interfaces speak IPv4 only; instances' IPv6 passes through OVS.
                sysctls={"net/ipv6/conf/default/disable_ipv6": "1"},
                wants_cgroups=True,
            )
        )
        self._write_libvirt_config(controllers)
        # Ports of an earlier life are gone with their namespace.
        (machine.state_dir / "etc/openvswitch/conf.db").unlink(missing_ok=True)
        machine.exec(["ip", "link", "set", "lo", "up"])

    def _write_libvirt_config(self, cgroup_controllers: list[str]) -> None:
        folder = self.machine.state_dir / "etc/libvirt"
        quoted = ", ".join(f'"{name}"' for name in cgroup_controllers)
        mgmt_ip, has_tls = self.layout.mgmt_ip, self.layout.has_tls
        libvirtd = LIBVIRTD_CONF.format(
            mgmt_ip=mgmt_ip,
            host_uuid=self.layout.host_uuid,
            listen_tls=int(has_tls),
            listen_tcp=int(not has_tls),
        )
        qemu = QEMU_CONF.format(mgmt_ip=mgmt_ip, controllers=quoted)
        if has_tls:
            libvirtd, qemu = libvirtd + LIBVIRTD_TLS_CONF, qemu + QEMU_TLS_CONF
            pki = self.host_path(PKI_DIR)
            certificates.issue_for_node(self._slot, self.layout, pki)
            # QEMU shows the same certificate, and has no power to read root's key.
            shutil.chown(pki / "server-key.pem", group=QEMU_USER)
            (pki / "server-key.pem").chmod(0o640)
        (folder / "libvirtd.conf").write_text(libvirtd)
        (folder / "qemu.conf").write_text(qemu)

    def _ensure_links(self) -> None:
        link = self.layout.host_link
        if link not in host_links():
            run(
                [
                    *("ip", "link", "add", link, "type", "veth"),
                    *("peer", "name", "mgmt0", "address", self.layout.mgmt_mac),
                    *("netns", str(self.machine.init_pid)),
                ]
            )
            disable_ipv6(link)
            disable_tx_checksum(link)
            run(["ip", "link", "set", link, "master", self._slot.mgmt_bridge, "up"])
            self.machine.exec(["ethtool", "-K", "mgmt0", "tx", "off"])
            self.machine.exec(["ip", "link", "set", "mgmt0", "up"])
        elif find_master(link) != self._slot.mgmt_bridge:
            run(["ip", "link", "set", link, "master", self._slot.mgmt_bridge])
        self._router.connect(self.machine, self.layout.router_link)

    def _ensure_switch(self) -> None:
        machine = self.machine
        config = machine.state_dir / "etc/openvswitch/conf.db"
        if not config.exists():
            machine.exec(["ovsdb-tool", "create", "/etc/openvswitch/conf.db", OVS_SCHEMA])
        if machine.ensure_daemon(
            "ovsdb-server",
            _ovs_daemon(
                "ovsdb-server",
                "openvswitch",
                "--remote=punix:/run/openvswitch/db.sock",
                "/etc/openvswitch/conf.db",
            ),
            "/run/openvswitch/ovsdb-server.pid",
        ):
            self._configure_open_vswitch()
        machine.ensure_daemon(
            "ovs-vswitchd",
            # As Debian's own scripts start it: a switch that has ended itself is started again.
            _ovs_daemon("ovs-vswitchd", "openvswitch", "--monitor"),
            "/run/openvswitch/ovs-vswitchd.pid",
            is_monitored=True,
        )
        self._ensure_bridges()
        # No port has more tracked connections than its share, also after the switch was started again.
        self._ensure_script("conntrack-limits", str(CONNECTIONS_PER_PORT))
        # No packet goes on as rules had it that are gone.
        self._ensure_script("datapath-flows")
        # No connection makes the switch end itself.
        self._ensure_script("userspace-tracking")
        machine.ensure_daemon(
            "ovn-controller",
            _ovs_daemon("ovn-controller", "ovn", "unix:/run/openvswitch/db.sock"),
            "/run/ovn/ovn-controller.pid",
        )

    def _ensure_script(self, name: str, *argv: str) -> None:
        """A script of `deploy` that stays beside the switch, with the file for its process id as last argument."""
        script, pid_file = f"etc/openvswitch/{name}", f"/run/openvswitch/{name}.pid"
        shutil.copy(CHECKOUT / "deploy" / name, self.machine.state_dir / script)
        command = " ".join((f"/{script}", *argv, pid_file))
        log = f"/var/log/openvswitch/{name}.log"
        self.machine.ensure_daemon(
            name, ["sh", "-c", f"setsid {command} < /dev/null >> {log} 2>&1 &"], pid_file
        )

    def _configure_open_vswitch(self) -> None:
        identity = {
            "system-id": self.layout.system_id,
            "hostname": self.layout.name,
            "ovn-remote": self._slot.info().ovn_sb,
            "ovn-remote-probe-interval": str(INACTIVITY_PROBE_MS),
            "ovn-openflow-probe-interval": str(INACTIVITY_PROBE_MS // 1000),
            "ovn-encap-type": "geneve",
            "ovn-encap-ip": self.layout.mgmt_ip,
            "ovn-bridge-datapath-type": "netdev",
            "ovn-bridge-mappings": f"{PHYSICAL_NETWORK}:br-ex",
        }
        columns = [f"external-ids:{name}={value}" for name, value in identity.items()]
        self.machine.exec(["ovs-vsctl", "--no-wait", "init"])
        self.machine.exec(["ovs-vsctl", "--no-wait", "set", "open", ".", *columns])

    def _ensure_bridges(self) -> None:
        """br-phy carries management and Geneve, br-ex the public segment, br-int the instances.
        The Geneve endpoint must be the address of a userspace bridge: a tunnel cannot leave
        through an interface that the datapath does not see."""
        machine = self.machine
        present = machine.links()
        wanted = {"br-phy", "br-ex", "br-int"}
        # Open vSwitch sets the interfaces it opens to promiscuous, and holds on to one that was
        # replaced by another of the same name until the port is removed.
        unplugged = [name for name in ("mgmt0", "ex0") if "PROMISC" not in _flags(present[name])]
        for name in unplugged:
            machine.exec(["ovs-vsctl", "--if-exists", "del-port", name])
        if unplugged or not wanted <= present.keys():
            bridges: list[str] = []
            for bridge, port in (("br-phy", "mgmt0"), ("br-ex", "ex0"), ("br-int", None)):
                bridges += ["--", "--may-exist", "add-br", bridge]
                bridges += ["--", "set", "bridge", bridge, "datapath_type=netdev"]
                if port is not None:
                    bridges += ["--", "--may-exist", "add-port", bridge, port]
            mac = f'other-config:hwaddr="{self.layout.mgmt_mac}"'
            bridges += ["--", "set", "bridge", "br-phy", mac]
            bridges += ["--", "set", "bridge", "br-int", "fail-mode=secure"]
            machine.exec(["ovs-vsctl", *bridges[1:]])
            present = machine.links()
        for bridge in wanted:
            if "UP" not in _flags(present[bridge]):
                machine.exec(["ethtool", "-K", bridge, "tx", "off"])
                machine.exec(["ip", "link", "set", bridge, "up"])
        address = self.layout.mgmt_ip
        if not any(a["local"] == address for a in _addresses(present["br-phy"])):
            machine.exec(["ip", "address", "replace", f"{address}/24", "dev", "br-phy"])
            wait_until(self._reaches_central, f"{self.layout.name} to reach OVN central")

    def _reaches_central(self) -> bool:
        ping = ["ping", "-c", "1", "-W", "1", self._slot.mgmt_ip]
        return self.machine.exec(ping, check=False).returncode == 0

    def _ensure_libvirt(self) -> None:
        self.machine.ensure_daemon(
            "virtlogd", ["virtlogd", "-d", "-p", "/run/virtlogd.pid"], "/run/virtlogd.pid"
        )
        started = self.machine.ensure_daemon(
            "libvirtd", ["libvirtd", "-d", "-l", "-p", "/run/libvirtd.pid"], "/run/libvirtd.pid"
        )
        what = f"libvirt of {self.layout.name} to answer"
        wait_until(self.is_libvirt_listening, what, timeout_s=60)
        if started:
            # It listens before its drivers are ready; the first call waits for them.
            run(["virsh", "-q", "-c", self.layout.libvirt_uri, "list"], timeout_s=60)


def cpu_offers_kvm() -> bool:
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return flags is not None and bool({"vmx", "svm"} & set(flags[1].split()))


def _ovs_daemon(program: str, folder: str, *arguments: str) -> list[str]:
    return [
        *(program, "--detach", "--no-chdir", "-vconsole:off"),
        *(f"--pidfile=/run/{folder}/{program}.pid", f"--log-file=/var/log/{folder}/{program}.log"),
        *arguments,
    ]


def _flags(device: dict[str, object]) -> list[str]:
    flags = device["flags"]
    assert isinstance(flags, list)
    return flags


def _addresses(device: dict[str, object]) -> list[dict[str, object]]:
    addresses = device["addr_info"]
    assert isinstance(addresses, list)
    return addresses
