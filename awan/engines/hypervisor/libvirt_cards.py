"""Plugging network cards into domains and out of them."""

from __future__ import annotations

import libvirt

from awan.engines.hypervisor import NicSpec, domain_xml
from awan.engines.hypervisor.domain_xml import HostTraits
from awan.engines.hypervisor.libvirt_domains import Domain
from awan.engines.libvirt_nodes import has_code


def define_nics(domain: Domain, nics: tuple[NicSpec, ...], host: HostTraits) -> None:
    """The definition has exactly these cards. Those that are plugged in already keep their place."""
    config = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    found = domain_xml.read_nics(config)
    for nic in found:
        if not any(nic.is_as(spec) for spec in nics):
            domain.detachDeviceFlags(nic.xml, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    missing = [spec for spec in nics if not any(nic.is_as(spec) for nic in found)]
    if not missing:
        return
    free = domain_xml.free_nic_buses(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    live = domain.XMLDesc(0) if domain.isActive() else None
    places = {nic.port_id: nic.bus for nic in domain_xml.read_nics(live)} if live else {}
    # A place that is taken in the running domain would move the card at the next start.
    both = free & domain_xml.free_nic_buses(live) if live else free
    for spec in missing:
        preferred = places.get(spec.port_id) or min(both, default=0)
        bus = domain_xml.require_free_bus(free, preferred)
        both.discard(bus)
        xml = domain_xml.build_nic(spec, bus, host)
        domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_CONFIG)


def plug_nics(domain: Domain, nics: tuple[NicSpec, ...], host: HostTraits) -> list[str]:
    """The running domain gets the cards that it lacks, where its definition has them, and is asked for the others.

    Returns the MAC addresses of those that its guest holds on to. One that ends meanwhile holds none.
    """
    try:
        found = domain_xml.read_nics(domain.XMLDesc(0))
        held = [nic for nic in found if not any(nic.is_as(spec) for spec in nics)]
        for nic in held:
            _ask_to_release(domain, nic.alias)
        taken = {nic.port_id for nic in found} | {nic.mac for nic in found}
        missing = [spec for spec in nics if spec.port_id not in taken and spec.mac not in taken]
        if missing:
            config = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            places = {nic.port_id: nic.bus for nic in domain_xml.read_nics(config)}
            free = domain_xml.free_nic_buses(domain.XMLDesc(0))
            for spec in missing:
                bus = domain_xml.require_free_bus(free, places.get(spec.port_id, 0))
                xml = domain_xml.build_nic(spec, bus, host)
                domain.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as err:
        if has_code(err, libvirt.VIR_ERR_OPERATION_INVALID) and not domain.isActive():
            return []
        raise
    return [nic.mac for nic in held]


def _ask_to_release(domain: Domain, alias: str) -> None:
    """Asks the guest for a card; the device is gone once the guest has answered.

    QEMU refuses to ask twice, without a code of its own for it: what is held is seen at the next look.
    """
    try:
        domain.detachDeviceAlias(alias, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as err:
        if not has_code(
            err,
            libvirt.VIR_ERR_INTERNAL_ERROR,
            libvirt.VIR_ERR_OPERATION_FAILED,
            libvirt.VIR_ERR_DEVICE_MISSING,
        ):
            raise
