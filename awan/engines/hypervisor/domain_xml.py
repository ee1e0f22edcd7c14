"""The libvirt XML of a domain: written from a `DomainSpec`, and read back into facts.

The XML a domain is born with decides what can be done to it later while it runs: spare PCIe ports
for hot-plug, the vCPU and memory limits, the SCSI controller that disks are added to. Every address
is explicit, so that redefining a domain never moves a device in its guest.

Texts enter only as values of the element tree, so they cannot become elements; values that end in
QEMU's own syntax or in the guest (serials, paths, MAC addresses) are checked first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import PurePosixPath
from uuid import UUID

from lxml import etree

from awan.engines.hypervisor import (
    CONSOLE_PASSWORD_MAX,
    BackingSpec,
    DiskSpec,
    DomainSpec,
    NicSpec,
    card_device,
)
from awan.errors import EngineRejected

NAMESPACE = "https://awan.dev/ns/domain/1"
DEDICATED, SHARED = "dedicated", "shared"
SERIAL_LOG_DIR = PurePosixPath("/var/log/libvirt/qemu")
READER_PREFIX = "awan-serial-"

TCG_CPU_MODEL = "qemu64"
TCG_CPU_FEATURES = ("ssse3", "sse4.1", "sse4.2", "popcnt")
"""CPU shown to guests without hardware acceleration. The features make it an x86-64-v2, which
current distributions require. As an AMD it spares the guest's kernel the page-table isolation of
older Intel models, and it has no wide vectors, which are slow to emulate: a guest boots with a
fifth less work than as "Nehalem", a tenth less than as "max" (measured with QEMU 7.2)."""

SPARE_PCIE_PORTS = 12
DISK_TARGETS_MAX = 64
MEMORY_SLOTS = 16
BALLOON_STATS_PERIOD_S = 10
# Weights that both cgroup versions accept (v1: 2..262144, v2: 1..10000).
CPU_SHARES_MIN, CPU_SHARES_MAX = 2, 10_000
TITLE_LENGTH_MAX = 200

LOCKED_SINCE = datetime(2000, 1, 1, tzinfo=UTC)
"""The end of validity of a password that opens nothing."""

# The guest's PCIe buses in front of the network cards: one device behind each root port.
_SCSI_BUS, _SERIAL_BUS, _BALLOON_BUS, _RNG_BUS, _FIRST_NIC_BUS = 1, 2, 3, 4, 5
# Root ports are functions of the slots from this one on (slot 1 is the video card's).
_FIRST_PORT_SLOT, _PORTS_PER_SLOT, _PORT_SLOTS = 2, 8, 8

_SERIAL_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,36}")
_CPUSET_PART = re.compile(r"(\^?)(\d{1,5})(?:-(\d{1,5}))?")
_MAC_PATTERN = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_PASSWORD_PATTERN = re.compile(rf"[!-~]{{1,{CONSOLE_PASSWORD_MAX}}}")
_PARSER = etree.XMLParser(resolve_entities=False, no_network=True, remove_blank_text=True)

Element = etree._Element


@dataclass(frozen=True)
class HostTraits:
    """What the definition depends on besides the wish: properties of the node.

    `ovs_bridge` is OVN's integration bridge. `nic_offloads` must be False where that switch runs in
    user space: it forwards packets whose checksum the guest left to the card. `has_cpu_shares`: the
    node's cgroups can weigh CPUs.
    """

    kvm: bool
    emulator: str
    ovs_bridge: str
    nic_offloads: bool
    has_cpu_shares: bool = True


@dataclass(frozen=True)
class DomainIdentity:
    """What a domain's XML says about whose it is and what it uses. None: not a domain of ours.

    `threads` of the host that its vCPUs may run on, in ascending order; none when the XML does not say. `is_reader`:
    it is never started, and is there for the moment in which a serial log is read.
    """

    instance_id: UUID | None
    operation_id: UUID | None
    disk_paths: tuple[str, ...]
    port_ids: tuple[UUID, ...]
    threads: tuple[int, ...]
    is_dedicated: bool
    is_reader: bool
    unlocked_until: datetime | None


@dataclass(frozen=True)
class FoundNic:
    """A network card in a domain's XML. `port_id` is None for one that is not on a logical switch.

    `alias` is its name while the domain runs, `bus` the PCI bus it sits on (0: none is told).
    """

    port_id: UUID | None
    mac: str
    mtu: int | None
    alias: str
    bus: int
    xml: str

    def is_as(self, spec: NicSpec) -> bool:
        """Whether this is the card that `spec` describes."""
        return (self.port_id, self.mac, self.mtu) == (spec.port_id, spec.mac, spec.mtu)


def domain_name(instance_id: UUID) -> str:
    """The domain's name on its node."""
    return f"awan-{instance_id}"


def disk_name(target: int) -> str:
    """The device name libvirt wants for SCSI target `target`: 0 is sda, 26 is sdaa."""
    letters = ""
    number = target + 1
    while number > 0:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return f"sd{letters}"


def build_domain(spec: DomainSpec, host: HostTraits, vnc_password: str) -> str:
    """The definition as XML text. Pure: the same arguments give the same text.

    `vnc_password` (at most 8 characters count) is locked from birth by a validity that has ended.
    Raises EngineRejected for a spec that must not reach a node.
    """
    check_spec(spec)
    domain = etree.Element("domain", type="kvm" if host.kvm else "qemu")
    _add(domain, "name", domain_name(spec.instance_id))
    _add(domain, "uuid", str(spec.instance_id))
    _add(domain, "title", printable_title(spec.title))
    _add_metadata(domain, spec)
    _add_memory(domain, spec)
    _add_cpus(domain, spec, host)
    os = _add(domain, "os")
    _add(os, "type", "hvm", arch="x86_64", machine="q35")
    features = _add(domain, "features")
    _add(features, "acpi")
    _add(features, "apic")
    _add_cpu_model(domain, spec, host)
    _add_clock(domain, host)
    _add(domain, "on_poweroff", "destroy")
    _add(domain, "on_reboot", "restart")
    _add(domain, "on_crash", "destroy")
    _add_devices(domain, spec, host, vnc_password)
    return etree.tostring(domain, encoding="unicode", pretty_print=True)


def build_media(target: int, path: str | None) -> str:
    """The XML that changes the CD drive at `target`: raw image `path`, or empty."""
    if path is not None:
        _check_path(path)
    return etree.tostring(_cdrom(target, path), encoding="unicode")


def build_nic(spec: NicSpec, bus: int, host: HostTraits) -> str:
    """The XML of a network card on the PCI bus `bus`, to be plugged in."""
    devices = etree.Element("devices")
    _add_nic(devices, spec, bus, host)
    return etree.tostring(devices[0], encoding="unicode")


def build_console_password(xml: str, password: str, valid_until: datetime) -> str:
    """The XML that gives the screen of the running domain `xml` another password, valid until then.

    Everything else is repeated as it is: libvirt refuses a change of it. Raises EngineRejected: no screen, or a
    password that VNC cannot carry.
    """
    check_console_password(password)
    graphics = _vnc(xml)
    graphics.set("passwd", password)
    graphics.set("passwdValidTo", _valid_to(valid_until))
    return etree.tostring(graphics, encoding="unicode")


def check_console_password(password: str) -> None:
    """Raises EngineRejected for a password that VNC cannot carry whole."""
    if not _PASSWORD_PATTERN.fullmatch(password):
        raise EngineRejected("libvirt", "set the console's password", "not possible: its form")


def read_console(xml: str) -> tuple[str, int]:
    """Address and port at which the screen of the running domain `xml` is served.

    Raises EngineRejected when that is no single address that is reachable from other hosts: with `vnc_listen` unset
    it is the node's loopback, and on every address guests' networks might reach it.
    """
    graphics = _vnc(xml)
    host, port = graphics.get("listen", ""), int(graphics.get("port", "-1"))
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    if address is None or address.is_unspecified or address.is_loopback or port <= 0:
        words = f"VNC listens on {host or 'nothing'}; vnc_listen must be the management address"
        raise EngineRejected("libvirt", "find the console", words)
    return host, port


def read_identity(xml: str) -> DomainIdentity:
    """Facts of a domain's XML as libvirt returns it. Malformed ids of ours count as absent."""
    domain = etree.fromstring(xml, _PARSER)
    ours = domain.find(f"metadata/{{{NAMESPACE}}}domain")
    parameters = domain.iterfind("devices/interface/virtualport/parameters")
    ports = (_uuid(element.get("interfaceid")) for element in parameters)
    sources = domain.iterfind("devices/disk/source")
    return DomainIdentity(
        instance_id=_uuid(ours.get("instance")) if ours is not None else None,
        operation_id=_uuid(ours.get("operation")) if ours is not None else None,
        disk_paths=tuple(path for path in (element.get("file") for element in sources) if path),
        port_ids=tuple(port for port in ports if port is not None),
        threads=_read_threads(domain),
        is_dedicated=ours is not None and ours.get("cpus") == DEDICATED,
        is_reader=domain.find(f"metadata/{{{NAMESPACE}}}reader") is not None,
        unlocked_until=_read_unlocked(domain),
    )


def serial_log_path(instance_id: UUID) -> str:
    """The file on the node in which virtlogd keeps what the guest prints on its serial console."""
    return str(SERIAL_LOG_DIR / f"{domain_name(instance_id)}-serial.log")


def build_serial_reader(reader_id: UUID, instance_id: UUID, paths: tuple[str, ...]) -> str:
    """The definition of a domain that is never started, with these files as raw disks: see `serial_log`."""
    domain = etree.Element("domain", type="qemu")
    _add(domain, "name", f"{READER_PREFIX}{instance_id}")
    _add(domain, "uuid", str(reader_id))
    _add(domain, "title", "Reads a serial log; never started, may be undefined")
    metadata = _add(domain, "metadata")
    etree.SubElement(metadata, f"{{{NAMESPACE}}}reader", nsmap={"awan": NAMESPACE})
    _add(domain, "memory", "1", unit="MiB")
    _add(_add(domain, "os"), "type", "hvm", arch="x86_64")
    devices = _add(domain, "devices")
    for number, path in enumerate(paths):
        disk = _add(devices, "disk", type="file", device="disk")
        _add(disk, "driver", name="qemu", type="raw")
        _add(disk, "source", file=path)
        _add(disk, "target", dev=disk_name(number), bus="scsi")
        _add(disk, "readonly")
    return etree.tostring(domain, encoding="unicode")


def read_media_path(xml: str, target: int) -> str | None:
    """The image in the CD drive at `target`, or None when it is empty. Raises EngineRejected: no such drive."""
    for disk in etree.fromstring(xml, _PARSER).iterfind("devices/disk[@device='cdrom']"):
        device = disk.find("target")
        if device is not None and device.get("dev") == disk_name(target):
            source = disk.find("source")
            return source.get("file") if source is not None else None
    raise EngineRejected("libvirt", "read media", f"the domain has no CD drive at target {target}")


def read_interface_names(xml: str) -> list[str]:
    """The host-side devices of a running domain's network cards."""
    targets = etree.fromstring(xml, _PARSER).iterfind("devices/interface/target")
    return [name for name in (element.get("dev") for element in targets) if name]


def read_nics(xml: str) -> list[FoundNic]:
    """The network cards of a domain, in the order of its XML."""
    return [_read_nic(nic) for nic in etree.fromstring(xml, _PARSER).iterfind("devices/interface")]


def _read_nic(nic: Element) -> FoundNic:
    port, mac, mtu = nic.find("virtualport/parameters"), nic.find("mac"), nic.find("mtu")
    alias, address = nic.find("alias"), nic.find("address[@type='pci']")
    return FoundNic(
        port_id=_uuid(port.get("interfaceid")) if port is not None else None,
        mac=mac.get("address", "") if mac is not None else "",
        mtu=int(mtu.get("size", "0")) if mtu is not None else None,
        alias=alias.get("name", "") if alias is not None else "",
        bus=int(address.get("bus", "0"), 16) if address is not None else 0,
        xml=etree.tostring(nic, encoding="unicode"),
    )


def free_nic_buses(xml: str) -> set[int]:
    """The PCI buses behind root ports of the domain on which a network card may be put."""
    domain = etree.fromstring(xml, _PARSER)
    ports = domain.iterfind("devices/controller[@model='pcie-root-port']")
    used = {int(at.get("bus", "0"), 16) for at in domain.iterfind("devices/*/address[@type='pci']")}
    found = {int(port.get("index", "0")) for port in ports}
    return {bus for bus in found - used if bus >= _FIRST_NIC_BUS}


def drop_cpu_shares(xml: str) -> str | None:
    """The same definition without CPU weights, or None when it has none."""
    domain = etree.fromstring(xml, _PARSER)
    shares = domain.find("cputune/shares")
    if shares is None:
        return None
    tune = shares.getparent()
    assert tune is not None
    tune.remove(shares)
    if len(tune) == 0:
        domain.remove(tune)
    return etree.tostring(domain, encoding="unicode")


def check_spec(spec: DomainSpec) -> None:
    """Raises EngineRejected for a spec that must not reach a node."""
    if not 1 <= spec.vcpus <= spec.vcpus_max:
        raise _rejected(f"{spec.vcpus} of at most {spec.vcpus_max} vCPUs")
    if not 1 <= spec.memory_mib <= spec.memory_max_mib:
        raise _rejected(f"{spec.memory_mib} of at most {spec.memory_max_mib} MiB")
    if len(set(spec.threads)) != len(spec.threads) or any(number < 0 for number in spec.threads):
        raise _rejected(f"threads {spec.threads}")
    if spec.dedicated and len(spec.threads) != spec.vcpus:
        raise _rejected(f"{spec.vcpus} dedicated vCPUs on {len(spec.threads)} threads")
    targets = [disk.target for disk in spec.disks]
    if len(set(targets)) != len(targets) or not all(0 <= n < DISK_TARGETS_MAX for n in targets):
        raise _rejected(f"disk targets {targets}")
    ports = _FIRST_NIC_BUS - 1 + len(spec.nics) + SPARE_PCIE_PORTS
    if ports > _PORTS_PER_SLOT * _PORT_SLOTS:
        raise _rejected(f"{len(spec.nics)} network cards")
    for disk in spec.disks:
        _check_path(disk.path)
        for layer in disk.backing:
            _check_path(layer.path)
        if not _SERIAL_PATTERN.fullmatch(disk.serial):
            raise _rejected(f"disk serial {disk.serial!r}")
    check_nics(spec.nics)


def check_nics(nics: tuple[NicSpec, ...]) -> None:
    """Raises EngineRejected for cards that must not reach a node."""
    for nic in nics:
        if not _MAC_PATTERN.fullmatch(nic.mac):
            raise _rejected(f"MAC address {nic.mac!r}")
    if len({nic.port_id for nic in nics}) != len(nics) or len({nic.mac for nic in nics}) != len(
        nics
    ):
        raise _rejected("two network cards of one port or one MAC address")


def require_free_bus(free: set[int], preferred: int) -> int:
    """The bus for a new card, taken out of `free`. Raises EngineRejected when there is none."""
    if not free:
        raise EngineRejected("libvirt", "plug in a network card", "all the domain's ports are used")
    bus = preferred if preferred in free else min(free)
    free.discard(bus)
    return bus


def _check_path(path: str) -> None:
    if not (path.startswith("/") and path.isprintable()):
        raise _rejected(f"disk path {path!r}")


def _rejected(what: str) -> EngineRejected:
    return EngineRejected("libvirt", "build the domain's definition", f"not possible: {what}")


def printable_title(text: str) -> str:
    """User text for display only: what XML or libvirt's one-line title cannot hold becomes a space."""
    return "".join(char if char.isprintable() else " " for char in text)[:TITLE_LENGTH_MAX]


def _add(parent: Element, tag: str, text: str | None = None, **attributes: str) -> Element:
    element = etree.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _add_metadata(domain: Element, spec: DomainSpec) -> None:
    metadata = _add(domain, "metadata")
    etree.SubElement(
        metadata,
        f"{{{NAMESPACE}}}domain",
        {
            "instance": str(spec.instance_id),
            "account": str(spec.account_id),
            "operation": str(spec.operation_id),
            "cpus": DEDICATED if spec.dedicated else SHARED,
        },
        nsmap={"awan": NAMESPACE},
    )


def _add_memory(domain: Element, spec: DomainSpec) -> None:
    # QEMU refuses slots without room to use them.
    if spec.memory_max_mib > spec.memory_mib:
        maximum = str(spec.memory_max_mib)
        _add(domain, "maxMemory", maximum, slots=str(MEMORY_SLOTS), unit="MiB")
    _add(domain, "memory", str(spec.memory_mib), unit="MiB")
    _add(domain, "currentMemory", str(spec.memory_mib), unit="MiB")


def _add_cpus(domain: Element, spec: DomainSpec, host: HostTraits) -> None:
    # Also where QEMU's own threads run, which no vcpupin speaks of.
    cpuset = {"cpuset": ",".join(map(str, spec.threads))} if spec.threads else {}
    vcpu = _add(domain, "vcpu", str(spec.vcpus_max), placement="static", **cpuset)
    vcpu.set("current", str(spec.vcpus))
    pins = spec.threads if spec.dedicated else ()
    if not host.has_cpu_shares and not pins:
        return
    tune = _add(domain, "cputune")
    if host.has_cpu_shares:
        _add(tune, "shares", str(min(max(spec.cpu_shares, CPU_SHARES_MIN), CPU_SHARES_MAX)))
    for number, thread in enumerate(pins):
        _add(tune, "vcpupin", vcpu=str(number), cpuset=str(thread))


def _add_cpu_model(domain: Element, spec: DomainSpec, host: HostTraits) -> None:
    """One socket (systems licensed by the socket see one) and one NUMA cell, which live memory needs."""
    if host.kvm:
        cpu = _add(domain, "cpu", mode="host-model", check="partial")
    else:
        cpu = _add(domain, "cpu", mode="custom", match="exact", check="none")
        _add(cpu, "model", TCG_CPU_MODEL, fallback="forbid")
    _add(cpu, "topology", sockets="1", dies="1", cores=str(spec.vcpus_max), threads="1")
    if not host.kvm:
        for feature in TCG_CPU_FEATURES:
            _add(cpu, "feature", policy="require", name=feature)
    numa = _add(cpu, "numa")
    cpus = f"0-{spec.vcpus_max - 1}" if spec.vcpus_max > 1 else "0"
    _add(numa, "cell", id="0", cpus=cpus, memory=str(spec.memory_mib), unit="MiB")


def _add_clock(domain: Element, host: HostTraits) -> None:
    clock = _add(domain, "clock", offset="utc")
    if host.kvm:
        _add(clock, "timer", name="rtc", tickpolicy="catchup")
        _add(clock, "timer", name="pit", tickpolicy="delay")
        _add(clock, "timer", name="hpet", present="no")


def _add_devices(domain: Element, spec: DomainSpec, host: HostTraits, vnc_password: str) -> None:
    devices = _add(domain, "devices")
    _add(devices, "emulator", host.emulator)
    for disk in spec.disks:
        devices.append(_cdrom(disk.target, disk.path) if disk.device == "cdrom" else _disk(disk))
    _add_controllers(devices, len(spec.nics))
    for number, nic in enumerate(spec.nics):
        _add_nic(devices, nic, _FIRST_NIC_BUS + number, host)
    _add_serial(devices, spec.instance_id)
    channel = _add(devices, "channel", type="unix")
    _add(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    # No listen address: it would tie the definition to one node and stop migration.
    _add(
        devices,
        "graphics",
        type="vnc",
        port="-1",
        autoport="yes",
        passwd=vnc_password,
        passwdValidTo=_valid_to(LOCKED_SINCE),
    )
    video = _add(devices, "video")
    _add(video, "model", type="vga", vram="16384", heads="1", primary="yes")
    _add_pci_address(video, bus=0, slot=1)
    balloon = _add(devices, "memballoon", model="virtio")
    _add(balloon, "stats", period=str(BALLOON_STATS_PERIOD_S))
    _add_pci_address(balloon, bus=_BALLOON_BUS)
    rng = _add(devices, "rng", model="virtio")
    _add(rng, "backend", "/dev/urandom", model="random")
    _add_pci_address(rng, bus=_RNG_BUS)
    _add(devices, "panic", model="isa")


def _disk(spec: DiskSpec) -> Element:
    disk = etree.Element("disk", type="file", device="disk")
    _add(disk, "driver", name="qemu", type=spec.format, cache="writeback", discard="unmap")
    _add(disk, "source", file=spec.path)
    _add_backing(disk, spec.backing)
    _add(disk, "target", dev=disk_name(spec.target), bus="scsi")
    _add(disk, "serial", spec.serial)
    if spec.target == 0:
        _add(disk, "boot", order="1")
    _add_drive_address(disk, spec.target)
    return disk


def _add_backing(parent: Element, layers: tuple[BackingSpec, ...]) -> None:
    """Names every layer and its format, and ends the chain, so that libvirt probes nothing."""
    for layer in layers:
        parent = _add(parent, "backingStore", type="file")
        _add(parent, "format", type=layer.format)
        source = _add(parent, "source", file=layer.path)
        # Images are shared by guests and belong to root: libvirt must not hand them to QEMU's user.
        _add(source, "seclabel", model="dac", relabel="no")
    _add(parent, "backingStore")


def _cdrom(target: int, path: str | None) -> Element:
    disk = etree.Element("disk", type="file", device="cdrom")
    _add(disk, "driver", name="qemu", type="raw")
    if path is not None:
        _add(disk, "source", file=path)
    _add(disk, "target", dev=disk_name(target), bus="scsi")
    _add(disk, "readonly")
    _add_drive_address(disk, target)
    return disk


def _add_drive_address(disk: Element, target: int) -> None:
    where = {"controller": "0", "bus": "0", "target": str(target), "unit": "0"}
    _add(disk, "address", type="drive", **where)


def _add_pci_address(device: Element, *, bus: int, slot: int = 0, function: int = 0) -> Element:
    return _add(
        device,
        "address",
        type="pci",
        domain="0x0000",
        bus=f"0x{bus:02x}",
        slot=f"0x{slot:02x}",
        function=f"0x{function:x}",
    )


def _add_controllers(devices: Element, nic_count: int) -> None:
    scsi = _add(devices, "controller", type="scsi", index="0", model="virtio-scsi")
    _add_pci_address(scsi, bus=_SCSI_BUS)
    serial = _add(devices, "controller", type="virtio-serial", index="0")
    _add_pci_address(serial, bus=_SERIAL_BUS)
    _add(devices, "controller", type="usb", index="0", model="none")
    _add(devices, "controller", type="pci", index="0", model="pcie-root")
    last_bus = _FIRST_NIC_BUS - 1 + nic_count + SPARE_PCIE_PORTS
    for bus in range(1, last_bus + 1):
        slot, function = divmod(bus - 1, _PORTS_PER_SLOT)
        port = _add(devices, "controller", type="pci", index=str(bus), model="pcie-root-port")
        address = _add_pci_address(port, bus=0, slot=_FIRST_PORT_SLOT + slot, function=function)
        if function == 0:
            address.set("multifunction", "on")


def _add_nic(devices: Element, spec: NicSpec, bus: int, host: HostTraits) -> None:
    nic = _add(devices, "interface", type="bridge")
    _add(nic, "mac", address=spec.mac)
    _add(nic, "source", bridge=host.ovs_bridge)
    port = _add(nic, "virtualport", type="openvswitch")
    _add(port, "parameters", interfaceid=str(spec.port_id))
    _add(nic, "target", dev=card_device(spec.port_id))
    _add(nic, "model", type="virtio")
    if not host.nic_offloads:
        off = dict.fromkeys(("csum", "tso4", "tso6", "ecn", "ufo"), "off")
        driver = _add(nic, "driver", name="qemu")
        _add(driver, "host", **off, gso="off", mrg_rxbuf="off")
        _add(driver, "guest", **off)
    _add(nic, "mtu", size=str(spec.mtu))
    # No boot ROM: nothing boots from the network, and the firmware would load it each time.
    _add(nic, "rom", enabled="no")
    _add_pci_address(nic, bus=bus)


def _add_serial(devices: Element, instance_id: UUID) -> None:
    """The serial console; virtlogd keeps what it prints, in a bounded file."""
    serial = _add(devices, "serial", type="pty")
    _add(serial, "log", file=serial_log_path(instance_id), append="on")
    _add(serial, "target", type="isa-serial", port="0")
    console = _add(devices, "console", type="pty")
    _add(console, "target", type="serial", port="0")


def _vnc(xml: str) -> Element:
    graphics = etree.fromstring(xml, _PARSER).find("devices/graphics[@type='vnc']")
    if graphics is None:
        raise EngineRejected("libvirt", "find the console", "the domain has no VNC screen")
    return graphics


def _read_unlocked(domain: Element) -> datetime | None:
    """When the password of the screen ends; `datetime.max` for a screen that has none, or one that never ends."""
    ends = []
    for graphics in domain.iterfind("devices/graphics"):
        text = graphics.get("passwdValidTo") if graphics.get("passwd") is not None else None
        try:
            ends.append(datetime.fromisoformat(text or "").replace(tzinfo=UTC))
        except ValueError:
            ends.append(datetime.max.replace(tzinfo=UTC))
    return max(ends, default=None)


def _valid_to(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        return None


def _read_threads(domain: Element) -> tuple[int, ...]:
    """All threads that some vCPU is pinned to; else those of the domain as a whole."""
    pins = [pin.get("cpuset", "") for pin in domain.iterfind("cputune/vcpupin")]
    if not pins:
        vcpu = domain.find("vcpu")
        pins = [vcpu.get("cpuset", "")] if vcpu is not None else []
    return tuple(sorted({number for cpuset in pins for number in parse_cpuset(cpuset)}))


def parse_cpuset(text: str) -> set[int]:
    """The numbers of libvirt's notation `0-3,^2,8`; what is not of that form counts for nothing."""
    included: set[int] = set()
    excluded: set[int] = set()
    for part in text.split(","):
        found = _CPUSET_PART.fullmatch(part.strip())
        if found is not None:
            numbers = range(int(found[2]), int(found[3] or found[2]) + 1)
            (excluded if found[1] else included).update(numbers)
    return included - excluded
