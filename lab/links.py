"""The host's own links and routes of a slot. Everything here is removed by `remove_host_links`."""

from __future__ import annotations

import json
from pathlib import Path

from lab.layout import SlotLayout
from lab.processes import run


def host_links() -> set[str]:
    return {device["ifname"] for device in json.loads(run(["ip", "-j", "link"]).stdout)}


def find_master(link: str) -> str | None:
    """The bridge a link of the host is in."""
    master = Path(f"/sys/class/net/{link}/master")
    return master.readlink().name if master.is_symlink() else None


def ensure_mgmt_bridge(layout: SlotLayout) -> None:
    """The management segment, with the host and OVN central at its first address."""
    bridge = layout.mgmt_bridge
    if bridge not in host_links():
        run(["ip", "link", "add", bridge, "type", "bridge"])
        disable_ipv6(bridge)
        disable_tx_checksum(bridge)
    run(["ip", "address", "replace", f"{layout.mgmt_ip}/24", "dev", bridge])
    run(["ip", "link", "set", bridge, "up"])


def ensure_host_routes(layout: SlotLayout) -> None:
    """Address the host's end of the link into the router and route the public prefixes there.
    The source addresses are given: the host's own must not appear in the lab."""
    link = layout.router_host_link
    Path(f"/proc/sys/net/ipv6/conf/{link}/accept_ra").write_text("0")
    run(["ip", "address", "replace", f"{layout.uplink_host_v4}/30", "dev", link])
    run(["ip", "-6", "address", "replace", f"{layout.uplink_host_v6}/64", "dev", link, "nodad"])
    run(["ip", "link", "set", link, "up"])
    for family, prefix, gateway, source in (
        ("-4", layout.public_v4_cidr, layout.uplink_router_v4, layout.uplink_host_v4),
        ("-6", layout.public_v6_prefix, layout.uplink_router_v6, layout.uplink_host_v6),
    ):
        run(
            [
                *("ip", family, "route", "replace", prefix),
                *("via", gateway, "dev", link, "src", source),
            ]
        )


def remove_host_links(layout: SlotLayout) -> None:
    """Remove the slot's links; the kernel removes their addresses, routes and far ends."""
    ours = [
        layout.router_host_link,
        *(node.host_link for node in layout.nodes),
        layout.mgmt_bridge,
    ]
    present = host_links()
    for link in ours:
        if link in present:
            run(["ip", "link", "delete", link])


def disable_ipv6(link: str) -> None:
    file = Path(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6")
    if file.exists():
        file.write_text("1")


def disable_tx_checksum(link: str) -> None:
    """Have the kernel compute checksums before it hands a packet to the link: the userspace
    datapath reads frames from a raw socket and would pass them on unfinished."""
    run(["ethtool", "-K", link, "tx", "off"])
