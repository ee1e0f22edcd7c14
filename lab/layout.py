"""Names, addresses and paths of a slot: pure arithmetic, nothing here touches the system.

Slot k owns:
    10.77.k.0/24            management and Geneve: .1 this host and OVN central, .11 and .12 the nodes,
                            .252/30 the link between host (.253) and upstream router (.254)
    198.51.100.0/24 (k=0)   public IPv4, gateway .1 on the upstream router
    198.18.k.0/24  (k>0)
    2001:db8:k::/48         public IPv6: :1::/64 is the on-link network of the instances with
                            gateway 2001:db8:k:1::1, :ffff::/64 the link between host and router,
                            :100::/56 the prefixes that are routed to instances by way of :1::2
    100.64.0.0/16           services: the resolver of private names (.0.53) on the upstream router, and one address
                            for each private network; on the segment of the public addresses, in every slot the same
The digits of k are used as they are, so that 2001:db8:12::/48 is slot 12.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

RUN_ROOT = Path("/run/awan")
STATE_ROOT = Path("/var/lib/awan/lab")
CHECKOUT = Path(__file__).resolve().parent.parent
SLOT_MAX = 99
PHYSICAL_NETWORK = "public"
NAMESERVER_PORT = 5300
SERVICES_CIDR = "100.64.0.0/16"
RESOLVER = "100.64.0.53"
"""Where instances ask for the names of their private networks: on the upstream router, the same in every slot."""
NODE_NUMBERS = (1, 2)
TLS_NODE_NUMBER = 2
"""The node that is reached with certificates on both sides, libvirt and VNC; the other one speaks in the clear."""

_HOST_UUID_NAMESPACE = uuid.UUID("5b2c2d0e-2f43-4b5c-9d1b-6f0a37a0c1de")


@dataclass(frozen=True)
class LabNode:
    """One hypervisor of a lab location, as an operator would register it."""

    name: str
    libvirt_uri: str
    mgmt_ip: str
    system_id: str
    host_uuid: str


@dataclass(frozen=True)
class LabNameserver:
    """A nameserver, as an operator would register it. `key_file` holds the TSIG secret, for its owner only.

    `private_zone` holds the names inside private networks; `resolver` serves it to their members, from an address of
    the services network. `customer_zone` belongs to somebody else than the location, but takes the same key: there
    tests put names that lead to a customer's address.
    """

    server: str
    forward_zone: str
    reverse_zones: tuple[str, ...]
    private_zone: str
    customer_zone: str
    key_name: str
    key_algorithm: str
    key_file: Path
    services_cidr: str = SERVICES_CIDR
    resolver: str = RESOLVER

    @property
    def options(self) -> dict[str, Any]:
        """The options of the driver `rfc2136`."""
        return {
            "server": self.server,
            "forward_zone": self.forward_zone,
            "reverse_zones": list(self.reverse_zones),
            "private_names": {
                "zone": self.private_zone,
                "resolver": self.resolver,
                "services_cidr": self.services_cidr,
                "physical_network": PHYSICAL_NETWORK,
            },
            "key_name": self.key_name,
            "key_algorithm": self.key_algorithm,
            "key_secret": self.key_file.read_text().strip(),
        }


@dataclass(frozen=True)
class LabInfo:
    """What the control plane needs to know of a lab location."""

    slot: int
    ovn_nb: str
    ovn_sb: str
    nodes: tuple[LabNode, ...]
    physical_network: str
    public_v4_cidr: str
    public_v4_gateway: str
    public_v6_cidr: str
    public_v6_gateway: str
    routed_v6_cidr: str
    routed_v6_router: str
    dns_servers: tuple[str, ...]
    nameserver: LabNameserver


@dataclass(frozen=True)
class NodeLayout:
    """Names, address and paths of node `number` of a slot."""

    slot: int
    number: int

    @property
    def name(self) -> str:
        return f"aw{self.slot}-n{self.number}"

    @property
    def mgmt_ip(self) -> str:
        return f"10.77.{self.slot}.{10 + self.number}"

    @property
    def host_link(self) -> str:
        """The host's end of the management link (`mgmt0` in the node)."""
        return f"aw{self.slot}-m{self.number}"

    @property
    def mgmt_mac(self) -> str:
        """Fixed, because br-phy takes it over and outlives the link."""
        return f"02:61:77:01:{self.slot:02x}:{self.number:02x}"

    @property
    def router_link(self) -> str:
        """The router's end of the public link (`ex0` in the node)."""
        return f"pub-n{self.number}"

    @property
    def system_id(self) -> str:
        return self.name

    @property
    def host_uuid(self) -> str:
        """libvirt's host identity. Both nodes share one machine and would otherwise report its
        UUID, whereupon libvirt refuses to migrate between them."""
        return str(uuid.uuid5(_HOST_UUID_NAMESPACE, self.name))

    @property
    def has_tls(self) -> bool:
        """Whether certificates are asked for and shown."""
        return self.number == TLS_NODE_NUMBER

    @property
    def libvirt_port(self) -> int:
        """libvirt's own ports for TLS and for TCP."""
        return 16514 if self.has_tls else 16509

    @property
    def libvirt_uri(self) -> str:
        if self.has_tls:
            pki = SlotLayout(self.slot).control_plane_pki_dir
            return f"qemu+tls://{self.mgmt_ip}/system?pkipath={pki}"
        return f"qemu+tcp://{self.mgmt_ip}/system"


@dataclass(frozen=True)
class SlotLayout:
    """Everything that is named or addressed after slot `slot`."""

    slot: int

    @property
    def run_dir(self) -> Path:
        return RUN_ROOT / str(self.slot)

    @property
    def state_dir(self) -> Path:
        return STATE_ROOT / str(self.slot)

    @property
    def pki_dir(self) -> Path:
        """The location's certificate authority and all it has signed."""
        return self.state_dir / "pki"

    @property
    def control_plane_pki_dir(self) -> Path:
        """cacert.pem, clientcert.pem and clientkey.pem, by libvirt's names."""
        return self.pki_dir / "control-plane"

    @property
    def lock_file(self) -> Path:
        return RUN_ROOT / f"slot-{self.slot}"

    @property
    def mutex_file(self) -> Path:
        """Held while an `up` or a `down` of this slot runs."""
        return RUN_ROOT / f"slot-{self.slot}.change"

    @property
    def owner_file(self) -> Path:
        return self.state_dir / "owner.json"

    @property
    def nodes(self) -> tuple[NodeLayout, ...]:
        return tuple(NodeLayout(self.slot, number) for number in NODE_NUMBERS)

    @property
    def router_name(self) -> str:
        return f"aw{self.slot}-up"

    @property
    def mgmt_bridge(self) -> str:
        return f"aw{self.slot}-mgmt"

    @property
    def router_host_link(self) -> str:
        """The host's end of the link into the router's namespace (`host0` there)."""
        return f"aw{self.slot}-up"

    @property
    def mgmt_ip(self) -> str:
        return f"10.77.{self.slot}.1"

    @property
    def nameserver(self) -> LabNameserver:
        """Not on port 53: that is for the host's own resolver, if it has one."""
        return LabNameserver(
            server=f"{self.mgmt_ip}:{NAMESERVER_PORT}",
            forward_zone=f"slot{self.slot}.awan.example",
            reverse_zones=(
                _reverse_zone(self.public_v4_cidr),
                _reverse_zone(self.public_v6_cidr),
                _reverse_zone(self.routed_v6_cidr),
            ),
            private_zone=f"internal.slot{self.slot}.awan.example",
            customer_zone="customer.example",
            key_name=f"awan-slot{self.slot}",
            key_algorithm="hmac-sha256",
            key_file=self.state_dir / "nameserver" / "key",
        )

    @property
    def uplink_host_v4(self) -> str:
        return f"10.77.{self.slot}.253"

    @property
    def uplink_router_v4(self) -> str:
        return f"10.77.{self.slot}.254"

    @property
    def uplink_host_v6(self) -> str:
        return f"2001:db8:{self.slot}:ffff::2"

    @property
    def uplink_router_v6(self) -> str:
        return f"2001:db8:{self.slot}:ffff::1"

    @property
    def public_v4_cidr(self) -> str:
        return "198.51.100.0/24" if self.slot == 0 else f"198.18.{self.slot}.0/24"

    @property
    def public_v4_gateway(self) -> str:
        return self.public_v4_cidr.removesuffix("0/24") + "1"

    @property
    def public_v6_prefix(self) -> str:
        """The /48 routed to the location."""
        return f"2001:db8:{self.slot}::/48"

    @property
    def public_v6_cidr(self) -> str:
        """The on-link /64 of the instances."""
        return f"2001:db8:{self.slot}:1::/64"

    @property
    def public_v6_gateway(self) -> str:
        return f"2001:db8:{self.slot}:1::1"

    @property
    def routed_v6_cidr(self) -> str:
        """The range of prefixes that the upstream router sends to `routed_v6_router`."""
        return f"2001:db8:{self.slot}:100::/56"

    @property
    def routed_v6_router(self) -> str:
        """The on-link address from which instances' prefixes are reached."""
        return f"2001:db8:{self.slot}:1::2"

    @property
    def router_mac(self) -> str:
        """Fixed, so that guests keep their neighbour entries when the router is rebuilt."""
        return f"02:61:77:00:{self.slot:02x}:01"

    def info(self) -> LabInfo:
        return LabInfo(
            slot=self.slot,
            ovn_nb=f"tcp:{self.mgmt_ip}:6641",
            ovn_sb=f"tcp:{self.mgmt_ip}:6642",
            nodes=tuple(
                LabNode(
                    name=node.name,
                    libvirt_uri=node.libvirt_uri,
                    mgmt_ip=node.mgmt_ip,
                    system_id=node.system_id,
                    host_uuid=node.host_uuid,
                )
                for node in self.nodes
            ),
            physical_network=PHYSICAL_NETWORK,
            public_v4_cidr=self.public_v4_cidr,
            public_v4_gateway=self.public_v4_gateway,
            public_v6_cidr=self.public_v6_cidr,
            public_v6_gateway=self.public_v6_gateway,
            routed_v6_cidr=self.routed_v6_cidr,
            routed_v6_router=self.routed_v6_router,
            dns_servers=(self.public_v4_gateway, self.public_v6_gateway),
            nameserver=self.nameserver,
        )


def _reverse_zone(cidr: str) -> str:
    """The zone of a prefix that ends between two labels."""
    network = ip_network(cidr)
    labels = network.network_address.reverse_pointer.split(".")
    kept = network.prefixlen // (8 if network.version == 4 else 4)
    return ".".join(labels[-kept - 2 :])
