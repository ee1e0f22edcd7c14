"""Everything that the steps of an instance need, and what is rendered from it: its seed and its domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import select

from awan.catalogue import engines, image_source
from awan.catalogue.models import Tier
from awan.credentials import SshKey
from awan.engines.fabric import PortSpec
from awan.engines.fabric.firewall import FirewallSpec
from awan.engines.hypervisor import DiskSpec, DomainSpec, NicSpec, NodeEndpoint
from awan.engines.registry import LocationEngines
from awan.engines.seed import (
    SeedNic,
    SeedSpec,
    render_password_seed,
    render_scrubbed_seed,
    render_seed,
)
from awan.engines.volumes import ImageSource, VolumeHandle
from awan.firewall import Firewall, firewall_id_of, read_spec
from awan.fleet import Node, NodeState, NodeThreads, endpoint, node_threads
from awan.instances.models import CpuMode, Instance, InstanceSshKey
from awan.instances.rules import cpu_shares
from awan.kit.database import transaction
from awan.kit.secrets import get_secret
from awan.networks import port_specs
from awan.networks.ports import NetworkSpec
from awan.volumes import Volume, volumes_of

PASSWORD_PURPOSE = "instance.password_hash"  # noqa: S105 - a purpose, not a password
USER_DATA_PURPOSE = "instance.user_data"
ROOT_TARGET, SEED_TARGET = 0, 1
SECRET_GENERATION, SCRUBBED_GENERATION = 1, 2


@dataclass(frozen=True)
class Situation:
    """Everything that the steps of one instance need, read in one transaction.

    A node that is lost is asked for nothing any more: what lay on it is gone with it.
    `firewall` is None once it has ended; `pushed_revision` is what the fabric was told of it before.
    """

    instance: Instance
    tier: Tier
    node: NodeEndpoint
    is_node_lost: bool
    threads: NodeThreads
    chassis: str
    engines: LocationEngines
    image: ImageSource
    root: Volume | None
    ports: list[tuple[NetworkSpec, PortSpec]]
    firewall_id: UUID
    firewall: FirewallSpec | None
    pushed_revision: int


def read_situation(instance_id: UUID) -> Situation:
    """The instance as the database has it now."""
    with transaction() as session:
        instance = session.get_one(Instance, instance_id)
        node = session.get_one(Node, instance.node_id)
        assert node.ovn_system_id is not None
        volumes = volumes_of(session, instance_id)
        firewall_id = firewall_id_of(instance_id)
        return Situation(
            instance=instance,
            tier=session.get_one(Tier, instance.tier_id),
            node=endpoint(node),
            is_node_lost=node.state == NodeState.LOST,
            threads=node_threads(session, node, instance_id),
            chassis=node.ovn_system_id,
            engines=engines(session, instance.location_id),
            image=image_source(session, instance.image_id),
            root=volumes[0] if volumes else None,
            ports=port_specs(
                session,
                instance_id,
                hostname=instance.hostname,
                operation_id=instance.create_operation_id,
                firewall_id=firewall_id,
            ),
            firewall_id=firewall_id,
            firewall=read_spec(session, firewall_id),
            pushed_revision=session.get_one(Firewall, firewall_id).pushed_revision,
        )


def root_handle(it: Situation) -> VolumeHandle:
    assert it.root is not None
    return it.engines.volumes.create_from_image(
        it.node, it.root.volume_id, it.image, it.root.size_gib
    )


def seed_handle(it: Situation) -> VolumeHandle:
    spec, generation = seed_spec(it), it.instance.seed_generation
    if generation == SECRET_GENERATION:
        iso = render_seed(spec, insists=it.instance.seed_has_password)
    else:
        iso = render_later_seed(spec, with_password=it.instance.seed_has_password)
    return it.engines.volumes.ensure_seed(it.node, it.instance.instance_id, generation, iso)


def render_later_seed(spec: SeedSpec, *, with_password: bool) -> bytes:
    """The seed of a guest that has been through its first boot."""
    return render_password_seed(spec) if with_password else render_scrubbed_seed(spec)


def seed_spec(it: Situation) -> SeedSpec:
    """What the guest is told; the secrets only as long as they are stored."""
    instance = it.instance
    with transaction() as session:
        keys = session.scalars(
            select(SshKey.key)
            .join(InstanceSshKey, InstanceSshKey.ssh_key_id == SshKey.ssh_key_id)
            .where(InstanceSshKey.instance_id == instance.instance_id)
            .order_by(InstanceSshKey.position)
        ).all()
        password_hash = (
            get_secret(session, instance.password_secret_id, PASSWORD_PURPOSE)
            if instance.password_secret_id is not None
            else None
        )
        user_data = (
            get_secret(session, instance.user_data_secret_id, USER_DATA_PURPOSE)
            if instance.user_data_secret_id is not None
            else None
        )
    return SeedSpec(
        instance_id=instance.instance_id,
        hostname=instance.hostname,
        username=instance.username,
        password_hash=password_hash,
        ssh_keys=tuple(keys),
        nics=tuple(
            SeedNic(port.mac, port.ipv4 is not None, port.ipv6 is not None) for _, port in it.ports
        ),
        user_data=user_data,
    )


def domain_spec(it: Situation, threads: NodeThreads, root: VolumeHandle) -> DomainSpec:
    instance = it.instance
    seed = seed_handle(it)
    return DomainSpec(
        instance_id=instance.instance_id,
        operation_id=instance.create_operation_id,
        account_id=instance.account_id,
        title=instance.hostname,
        vcpus=instance.vcpus,
        vcpus_max=max(it.tier.cpu_max, instance.vcpus),
        memory_mib=instance.memory_mib,
        memory_max_mib=max(it.tier.memory_mib_max, instance.memory_mib),
        dedicated=instance.cpu_mode == CpuMode.DEDICATED,
        cpu_shares=cpu_shares(instance.vcpus),
        threads=threads.own or (threads.shared if threads.dedicated else ()),
        disks=(
            DiskSpec(
                path=root.path,
                format=root.format,
                target=ROOT_TARGET,
                serial=instance.instance_id.hex[:20],
                backing=root.backing,
            ),
            DiskSpec(
                path=seed.path, format="raw", target=SEED_TARGET, serial="seed", device="cdrom"
            ),
        ),
        nics=nic_specs(it.ports),
    )


def nic_specs(ports: Sequence[tuple[NetworkSpec, PortSpec]]) -> tuple[NicSpec, ...]:
    """The network cards of a domain with these ports."""
    return tuple(NicSpec(port.port_id, port.mac, network.mtu) for network, port in ports)
