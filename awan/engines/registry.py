"""Opens the engines of a location from its rows, once per process.

A driver's options are checked by its own model, so that a wrong endpoint is refused when it is stored and not when it
is first used. Drivers are imported when they are first opened: a process that needs none (the API) loads none.
"""

from __future__ import annotations

import json
import threading
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from awan.engines.fabric import Fabric
from awan.engines.hypervisor import Hypervisor, NodeEndpoint
from awan.engines.nameserver import Nameserver, Zones
from awan.engines.sim import SimStore
from awan.engines.volumes import Volumes
from awan.errors import EngineRejected, Invalid
from awan.kit.forms import Matching, field_errors
from awan.kit.inet import PRIVATE_USE
from awan.kit.resolving import split_server
from awan.settings import get_settings


class EngineOptions(BaseModel):
    """Options of a driver; unknown ones are refused. Those in `SECRETS` are stored encrypted and never shown."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    SECRETS: ClassVar[frozenset[str]] = frozenset()


class FakeOptions(EngineOptions):
    """A simulated engine: when a simulated guest is up after its start, and the size of each node."""

    boot_s: float = Field(default=0.5, ge=0)
    node_threads: int = Field(default=16, gt=0)
    node_memory_mib: int = Field(default=65536, gt=0)
    node_disk_gib: int = Field(default=2000, gt=0)


class LibvirtOptions(EngineOptions):
    """libvirt over the uri of each node. `ovs_bridge` is the integration bridge on the nodes.

    `nic_offloads` null: on where the node has KVM; false for nodes whose virtual switch runs in user space.
    """

    ovs_bridge: str = "br-int"
    calls_per_node: int = Field(default=8, gt=0, le=64)
    nic_offloads: bool | None = None


class LocalVolumesOptions(EngineOptions):
    """qcow2 files in a directory pool on each node."""

    pool_name: str = "awan"
    pool_path: str = "/var/lib/libvirt/images/awan"


_REMOTES = Matching(
    r"^(tcp|unix|ssl):[^,]+(,(tcp|unix|ssl):[^,]+)*$",
    "The endpoints must be like ssl:10.0.0.1:6641 (or tcp:, unix:), with commas between them.",
)
_PEM_FILE = Matching(r"^/[^\x00-\x1f]+$", "The file must be named by its whole path.")


class OvnOptions(EngineOptions):
    """OVSDB endpoints of the location's OVN, such as `ssl:10.0.0.1:6641`, several joined by commas.

    `ssl:` needs the three PEM files, which the workers must be able to read: our private key, our certificate, and
    the authority that signed those of the servers.
    """

    northbound: Annotated[str, _REMOTES]
    southbound: Annotated[str, _REMOTES]
    private_key: Annotated[str, _PEM_FILE] | None = None
    certificate: Annotated[str, _PEM_FILE] | None = None
    ca_certificate: Annotated[str, _PEM_FILE] | None = None

    @model_validator(mode="after")
    def _keys_fit_the_remotes(self) -> OvnOptions:
        keys = (self.private_key, self.certificate, self.ca_certificate)
        is_tls = any(
            one.startswith("ssl:")
            for remotes in (self.northbound, self.southbound)
            for one in remotes.split(",")
        )
        if is_tls and None in keys:
            raise ValueError("ssl: needs private_key, certificate and ca_certificate.")
        if not is_tls and any(keys):
            raise ValueError("Keys are of use with ssl: endpoints only.")
        return self


Zone = Annotated[
    str,
    StringConstraints(to_lower=True),
    Matching(
        r"^([A-Za-z0-9_-]{1,63}\.)+[A-Za-z0-9-]{2,63}$",
        "The zone must be a domain name of two labels or more, without a dot at its end.",
    ),
]


def _checked_server(server: str) -> str:
    split_server(server)
    return server


def _checked_secret(secret: str) -> str:
    """Raises: ValueError unless it is base64 of 16 bytes or more."""
    try:
        bits = 8 * len(b64decode(secret, validate=True))
    except ValueError:
        raise ValueError("The key must be base64.") from None
    if bits < 128:
        raise ValueError("The key must have 128 bits or more.")
    return secret


def _checked_services(cidr: str) -> str:
    """In its usual form. Raises: ValueError unless it has room, and no private network can overlap it."""
    try:
        network = IPv4Network(cidr)
    except ValueError:
        raise ValueError("The prefix must be IPv4 in CIDR form without host bits.") from None
    if not 8 <= network.prefixlen <= 30:
        raise ValueError("The prefix length is from 8 to 30.")
    if any(network.overlaps(inside) for inside in PRIVATE_USE):
        raise ValueError("Private networks may have a prefix in it; take one of 100.64.0.0/10.")
    return str(network)


def _checked_resolver(address: str) -> str:
    try:
        return str(IPv4Address(address))
    except ValueError:
        raise ValueError("The resolver must be an IPv4 address.") from None


class PrivateNamesOptions(EngineOptions):
    """Names inside private networks. They are in `zone`; guests ask the resolver at `resolver`, which serves it too.

    The resolver is on the provider network `physical_network`, in `vlan` if it has one. There each private network has
    an address of `services_cidr`, in which the resolver's lies as well.
    """

    zone: Zone
    resolver: Annotated[str, AfterValidator(_checked_resolver)]
    services_cidr: Annotated[str, AfterValidator(_checked_services)] = "100.64.0.0/16"
    physical_network: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    vlan: int | None = Field(default=None, ge=1, le=4094)

    @model_validator(mode="after")
    def _resolver_is_there(self) -> PrivateNamesOptions:
        inside = IPv4Network(self.services_cidr)
        resolver = IPv4Address(self.resolver)
        if resolver not in inside or resolver in (inside[0], inside[-1]):
            raise ValueError("The resolver must be a host address of services_cidr.")
        return self


class NameserverOptions(EngineOptions):
    """The zones of a location: default names of its addresses are in `forward_zone`, PTR records in `reverse_zones`.

    Without `private_names` there are no names inside private networks.
    """

    forward_zone: Zone
    reverse_zones: list[Zone] = Field(min_length=1, max_length=64)
    private_names: PrivateNamesOptions | None = None

    @model_validator(mode="after")
    def _zones_differ(self) -> NameserverOptions:
        private = self.private_names
        if private is not None and private.zone in (self.forward_zone, *self.reverse_zones):
            raise ValueError("The zone of private names must be one of its own.")
        return self

    @property
    def zones(self) -> Zones:
        """The same as the engines have it."""
        private = self.private_names.zone if self.private_names is not None else None
        return Zones(self.forward_zone, tuple(self.reverse_zones), private)


class FakeNameserverOptions(NameserverOptions):
    """A simulated nameserver."""


class Rfc2136Options(NameserverOptions):
    """A nameserver that takes updates and transfers signed with this TSIG key. `server` as in `split_server`."""

    SECRETS: ClassVar[frozenset[str]] = frozenset({"key_secret"})

    server: Annotated[str, AfterValidator(_checked_server)]
    key_name: (
        Zone
        | Annotated[
            str,
            Matching(
                r"^[A-Za-z0-9_-]{1,63}$",
                "The name of the key must be a domain name, or one label of it.",
            ),
        ]
    )
    key_algorithm: Literal["hmac-sha256", "hmac-sha384", "hmac-sha512"] = "hmac-sha256"
    key_secret: Annotated[str, AfterValidator(_checked_secret)]


EngineKindName = Literal["hypervisor", "fabric", "volumes", "nameserver"]
DRIVERS: dict[str, dict[str, type[EngineOptions]]] = {
    "hypervisor": {"libvirt": LibvirtOptions, "fake": FakeOptions},
    "volumes": {"local": LocalVolumesOptions, "fake": FakeOptions},
    "fabric": {"ovn": OvnOptions, "fake": FakeOptions},
    "nameserver": {"rfc2136": Rfc2136Options, "fake": FakeNameserverOptions},
}


@dataclass(frozen=True)
class LocationEngines:
    """The opened engines of one location, and the names of their drivers. A location may have no nameserver."""

    hypervisor: Hypervisor
    volumes: Volumes
    fabric: Fabric
    drivers: Mapping[str, str]
    nameserver: Nameserver | None = None


def check_options(kind: str, driver: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with defaults filled in. Raises: Invalid naming the field that is wrong."""
    if driver not in DRIVERS[kind]:
        raise Invalid.field("driver", f"Unknown driver; {kind} has {', '.join(DRIVERS[kind])}.")
    try:
        return DRIVERS[kind][driver].model_validate(dict(options)).model_dump()
    except ValidationError as err:
        details = err.errors(include_url=False, include_input=False)
        for detail in details:
            detail["loc"] = ("options", *detail["loc"])
        raise Invalid(field_errors(details, {"options": options})) from err


def secret_options(kind: str, driver: str) -> frozenset[str]:
    """Names of the driver's options that are secrets."""
    return DRIVERS[kind][driver].SECRETS


_sim_lock = threading.Lock()
_sim_store: SimStore | None = None
_lock = threading.Lock()
_opened: dict[int, tuple[str, LocationEngines]] = {}


def open_engines(
    location_id: int, rows: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> LocationEngines:
    """The location's engines, opened again when `rows` (kind -> driver, options) changed since the last call."""
    stamp = json.dumps(
        {kind: [driver, dict(options)] for kind, (driver, options) in rows.items()}, sort_keys=True
    )
    with _lock:
        known = _opened.get(location_id)
        if known is not None and known[0] == stamp:
            return known[1]
        if known is not None:
            _close(known[1])
        engines = _open(location_id, rows)
        _opened[location_id] = (stamp, engines)
        return engines


def _close(engines: LocationEngines) -> None:
    engines.hypervisor.close()
    engines.fabric.close()
    if engines.nameserver is not None:
        engines.nameserver.close()


def _open(location_id: int, rows: Mapping[str, tuple[str, Mapping[str, Any]]]) -> LocationEngines:
    options = {
        kind: DRIVERS[kind][driver].model_validate(dict(stored))
        for kind, (driver, stored) in rows.items()
    }
    drivers = {kind: driver for kind, (driver, _) in rows.items()}
    fabric = _open_fabric(location_id, options["fabric"])
    nameserver = _open_nameserver(location_id, options.get("nameserver"))
    hypervisor, volumes = options["hypervisor"], options["volumes"]
    if isinstance(hypervisor, FakeOptions) and isinstance(volumes, FakeOptions):
        return _open_fake_nodes(location_id, hypervisor, fabric, nameserver, drivers)
    if not isinstance(hypervisor, LibvirtOptions) or not isinstance(volumes, LocalVolumesOptions):
        raise EngineRejected("registry", "open", "nodes are all simulated or all real")
    from awan.engines.hypervisor.libvirt import LibvirtHypervisor
    from awan.engines.libvirt_nodes import LibvirtNodes
    from awan.engines.volumes.local import LocalVolumes

    nodes = LibvirtNodes(calls_per_node=hypervisor.calls_per_node)
    return LocationEngines(
        hypervisor=LibvirtHypervisor(
            nodes,
            pool_name=volumes.pool_name,
            ovs_bridge=hypervisor.ovs_bridge,
            nic_offloads=hypervisor.nic_offloads,
        ),
        volumes=LocalVolumes(nodes, pool_name=volumes.pool_name, pool_path=volumes.pool_path),
        fabric=fabric,
        drivers=drivers,
        nameserver=nameserver,
    )


def _open_fabric(location_id: int, options: EngineOptions) -> Fabric:
    if isinstance(options, FakeOptions):
        from awan.engines.fabric.fake import FakeFabric

        return FakeFabric(sim_store(), location=str(location_id))
    assert isinstance(options, OvnOptions)
    from awan.engines.fabric.ovn import OvnFabric
    from awan.engines.fabric.tls import TlsKeys

    keys = None
    if options.private_key and options.certificate and options.ca_certificate:
        keys = TlsKeys(
            Path(options.private_key), Path(options.certificate), Path(options.ca_certificate)
        )
    return OvnFabric(options.northbound, options.southbound, keys=keys)


def _open_nameserver(location_id: int, options: EngineOptions | None) -> Nameserver | None:
    if options is None:
        return None
    if isinstance(options, FakeNameserverOptions):
        from awan.engines.nameserver.fake import FakeNameserver

        return FakeNameserver(sim_store(), zones=options.zones, location=str(location_id))
    assert isinstance(options, Rfc2136Options)
    from awan.engines.nameserver.rfc2136 import Rfc2136Nameserver, TsigKey

    host, port = split_server(options.server)
    key = TsigKey(options.key_name, options.key_algorithm, options.key_secret)
    return Rfc2136Nameserver(host, port, zones=options.zones, key=key)


def _open_fake_nodes(
    location_id: int,
    options: FakeOptions,
    fabric: Fabric,
    nameserver: Nameserver | None,
    drivers: Mapping[str, str],
) -> LocationEngines:
    """Simulated nodes. Each comes with its chassis, as a real node's ovn-controller registers one."""
    from awan.engines.fabric.fake import FakeFabric
    from awan.engines.hypervisor.fake import FakeHypervisor
    from awan.engines.volumes.fake import FakeVolumes

    def register_chassis(node: NodeEndpoint) -> None:
        if isinstance(fabric, FakeFabric):
            fabric.set_chassis_alive(node.name, is_alive=True)

    return LocationEngines(
        hypervisor=FakeHypervisor(
            sim_store(),
            location=str(location_id),
            boot_s=options.boot_s,
            threads=options.node_threads,
            memory_mib=options.node_memory_mib,
            disk_gib=options.node_disk_gib,
            on_probe=register_chassis,
        ),
        volumes=FakeVolumes(sim_store(), location=str(location_id)),
        fabric=fabric,
        drivers=drivers,
        nameserver=nameserver,
    )


def sim_store() -> SimStore:
    """The one store of this process's simulated engines: their state, latency and planned faults."""
    global _sim_store
    with _sim_lock:
        if _sim_store is None:
            _sim_store = SimStore(get_settings().database_url)
        return _sim_store
