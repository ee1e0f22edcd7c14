"""The data centre's upstream router of a slot, in a namespace of its own.

It owns the public segment (bridge `pub`) with the IPv4 and IPv6 gateways, announces itself to the
instances, and lets the host in. Instances find no way out: there is no default route, and they
cannot open connections to the host.
"""

from __future__ import annotations

from lab.layout import SlotLayout
from lab.links import disable_tx_checksum, ensure_host_routes, host_links
from lab.machine import Machine, MachineSpec
from lab.processes import ProcessTable, run
from lab.resolver import ensure_resolver

# Addresses come by DHCPv6 (managed), never by autoconfiguration: an instance may only use the
# address that is reserved for it.
RADVD_CONF = """\
interface pub {{
    AdvSendAdvert on;
    AdvManagedFlag on;
    AdvOtherConfigFlag on;
    MinRtrAdvInterval 3;
    MaxRtrAdvInterval 10;
    AdvDefaultLifetime 1800;
    prefix {prefix} {{
        AdvOnLink on;
        AdvAutonomous off;
    }};
}};
"""

# The resolver answers private networks alone. Where the kernel shows bridged frames to the IP filter, neighbours of the
# segment pass it too.
FIREWALL = """\
flush ruleset
table inet upstream {
    chain input {
        type filter hook input priority filter; policy accept;
        ip daddr RESOLVER ip saddr != SERVICES drop
        iifname "pub" ip daddr UPLINK drop
    }
    chain forward {
        type filter hook forward priority filter; policy drop;
        iifname "host0" accept
        iifname "pub" oifname "pub" accept
        ct state established,related accept
    }
}
"""


class Router:
    def __init__(self, layout: SlotLayout, table: ProcessTable) -> None:
        self._layout = layout
        self.machine = Machine(
            layout.router_name,
            layout.run_dir / "up",
            layout.state_dir / "up",
            table,
        )

    def ensure(self) -> None:
        """Start what does not run."""
        if self.machine.find_init_pid() is None:
            self._start()
        if self._layout.router_host_link not in host_links():
            self._link_host()
        ensure_host_routes(self._layout)
        route = [self._layout.routed_v6_cidr, "via", self._layout.routed_v6_router]
        self.machine.exec(["ip", "-6", "route", "replace", *route, "dev", "pub"])
        facts = self._layout.nameserver
        firewall = FIREWALL.replace("RESOLVER", facts.resolver)
        firewall = firewall.replace("SERVICES", facts.services_cidr)
        firewall = firewall.replace("UPLINK", self._layout.uplink_router_v4)
        self.machine.exec(["nft", "-f", "-"], stdin=firewall)
        length = facts.services_cidr.partition("/")[2]
        self.machine.exec(["ip", "address", "replace", f"{facts.resolver}/{length}", "dev", "pub"])
        # Only for the transfer of the private zone: what comes in on the public segment is not forwarded there.
        nameserver = [f"{self._layout.mgmt_ip}/32", "via", self._layout.uplink_host_v4]
        self.machine.exec(["ip", "route", "replace", *nameserver])
        ensure_resolver(self._layout, self.machine)
        config = self.machine.run_dir / "radvd.conf"
        config.write_text(RADVD_CONF.format(prefix=self._layout.public_v6_cidr))
        self.machine.ensure_daemon(
            "radvd",
            ["radvd", "-C", "/run/radvd.conf", "-p", "/run/radvd.pid", "-m", "stderr_syslog"],
            "/run/radvd.pid",
        )

    def _start(self) -> None:
        machine, layout = self.machine, self._layout
        # A stale far end would keep the name of the new link.
        if layout.router_host_link in host_links():
            run(["ip", "link", "delete", layout.router_host_link])
        machine.start(
            MachineSpec(
                name=machine.name,
                binds=((str(machine.run_dir), "/run"),),
                sysctls={
                    "net/ipv4/ip_forward": "1",
                    "net/ipv6/conf/all/forwarding": "1",
                    "net/ipv6/conf/default/accept_dad": "0",
                },
            )
        )
        inside = machine.exec
        inside(["ip", "link", "set", "lo", "up"])
        inside(["ip", "link", "add", "pub", "address", layout.router_mac, "type", "bridge"])
        inside(["ethtool", "-K", "pub", "tx", "off"])
        inside(["ip", "address", "add", f"{layout.public_v4_gateway}/24", "dev", "pub"])
        inside(["ip", "address", "add", f"{layout.public_v6_gateway}/64", "dev", "pub", "nodad"])
        inside(["ip", "link", "set", "pub", "up"])

    def _link_host(self) -> None:
        machine, layout = self.machine, self._layout
        link = layout.router_host_link
        run(
            [
                *("ip", "link", "add", link, "type", "veth"),
                *("peer", "name", "host0", "netns", str(machine.init_pid)),
            ]
        )
        disable_tx_checksum(link)
        inside = machine.exec
        inside(["ethtool", "-K", "host0", "tx", "off"])
        inside(["ip", "address", "add", f"{layout.uplink_router_v4}/30", "dev", "host0"])
        inside(
            ["ip", "-6", "address", "add", f"{layout.uplink_router_v6}/64", "dev", "host0", "nodad"]
        )
        inside(["ip", "link", "set", "host0", "up"])

    def connect(self, node: Machine, router_link: str) -> None:
        """Plug a node's `ex0` into the public segment unless it is."""
        has_router_end = router_link in self.machine.links()
        if has_router_end and "ex0" in node.links():
            return
        if has_router_end:
            # Left of a node that died: the kernel removes such links, but only some time later.
            self.machine.exec(["ip", "link", "delete", router_link], check=False)
        run(
            [
                *("ip", "link", "add", router_link, "netns", str(self.machine.init_pid)),
                *("type", "veth", "peer", "name", "ex0", "netns", str(node.init_pid)),
            ]
        )
        for machine, link in ((self.machine, router_link), (node, "ex0")):
            machine.exec(["ethtool", "-K", link, "tx", "off"])
        self.machine.exec(["ip", "link", "set", router_link, "master", "pub", "up"])
        node.exec(["ip", "link", "set", "ex0", "up"])
