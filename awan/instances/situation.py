"""Everything that the steps of an instance need, and what is rendered from it: its seed and its domain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from uuid import UUID

from sqlalchemy import bindparam, select

from awan.catalogue import image_source
from awan.catalogue.models import LocationEngine, TemplateImage, Tier
from awan.catalogue.service import engines_of
from awan.credentials import SshKey
from awan.engines.fabric import PortSpec
from awan.engines.fabric.firewall import FirewallSpec
from awan.engines.hypervisor import DiskSpec, DomainSpec, NicSpec
from awan.engines.registry import LocationEngines
from awan.engines.seed import (
    SeedNic,
    SeedSpec,
    render_password_seed,
    render_scrubbed_seed,
    render_seed,
)
from awan.engines.volumes import ImageSource, VolumeHandle
from awan.firewall import firewall_id_of, read_spec
from awan.fleet import Node, NodeState, NodeThreads, endpoint, node_threads
from awan.instances.models import CpuMode, Instance, InstanceSshKey
from awan.instances.rules import cpu_shares
from awan.kit.database import single_statements, transaction
from awan.kit.secrets import get_secret
from awan.networks import port_specs
from awan.networks.ports import NetworkSpec
from awan.operations import Target
from awan.volumes import Volume
from awan.volumes.service import is_root_disk_of

PASSWORD_PURPOSE = "instance.password_hash"  # noqa: S105 - a purpose, not a password
USER_DATA_PURPOSE = "instance.user_data"
ROOT_TARGET, SEED_TARGET = 0, 1
SECRET_GENERATION, SCRUBBED_GENERATION = 1, 2
_KEPT = "situation"
# Every step asks this; built once, because building it takes longer than sending it.
_SITUATION = (
    select(Instance, Node, Tier, TemplateImage, Volume, LocationEngine)
    .join(Node, Node.node_id == Instance.node_id)
    .join(Tier, Tier.tier_id == Instance.tier_id)
    .join(TemplateImage, TemplateImage.image_id == Instance.image_id)
    .outerjoin(Volume, is_root_disk_of(Instance.instance_id))
    .outerjoin(LocationEngine, LocationEngine.location_id == Instance.location_id)
    .where(Instance.instance_id == bindparam("instance"))
    .order_by(Volume.created_at)
)

_KEYS = (
    select(SshKey.key)
    .join(InstanceSshKey, InstanceSshKey.ssh_key_id == SshKey.ssh_key_id)
    .where(InstanceSshKey.instance_id == bindparam("instance"))
    .order_by(InstanceSshKey.position)
)


class Situation:
    """Everything that the steps of one instance need.

    `tier`: what it was sold as; `root`: its root disk, None when that is deleted. Its networks, its firewall and the
    threads of its node are read when first asked for: as they are then, and the same from then on. A node that is lost
    is asked for nothing any more: what lay on it is gone with it.

    `pushed_revision`: what the fabric was told of the firewall at least; None while that was not asked.
    """

    def __init__(
        self,
        instance: Instance,
        node: Node,
        tier: Tier,
        image: TemplateImage,
        root: Volume | None,
        engines: LocationEngines,
    ) -> None:
        assert node.ovn_system_id is not None
        self.instance = instance
        self.tier = tier
        self.root = root
        self.node = endpoint(node)
        self.is_node_lost = node.state == NodeState.LOST
        self.chassis = node.ovn_system_id
        self.engines = engines
        self.firewall_id = firewall_id_of(instance.instance_id)
        self.pushed_revision: int | None = None
        self._node = node
        self._image = image
        self._root_disk: VolumeHandle | None = None
        self._seed: VolumeHandle | None = None

    @cached_property
    def threads(self) -> NodeThreads:
        """Whose the threads of the node are."""
        return self.read_threads()

    @property
    def image(self) -> ImageSource:
        """What the root disk is made of. Raises: NotFound when it is not available any more."""
        return image_source(self._image)

    @cached_property
    def ports(self) -> list[tuple[NetworkSpec, PortSpec]]:
        """The ports that the fabric must have, each with its network."""
        with single_statements() as session:
            return port_specs(
                session,
                self.instance.instance_id,
                hostname=self.instance.hostname,
                operation_id=self.instance.create_operation_id,
                firewall_id=self.firewall_id,
            )

    @cached_property
    def firewall(self) -> FirewallSpec | None:
        """As it is wanted; None once it has ended."""
        with transaction() as session:
            return read_spec(session, self.firewall_id)

    def read_threads(self) -> NodeThreads:
        """Whose threads they are by now, of those that the node had when the instance was read."""
        with single_statements() as session:
            return node_threads(session, self._node, self.instance.instance_id)

    def ensure_root_disk(self) -> VolumeHandle:
        """The root disk exists over the image; the engine is asked once."""
        if self._root_disk is None:
            assert self.root is not None
            self._root_disk = self.engines.volumes.create_from_image(
                self.node, self.root.volume_id, self.image, self.root.size_gib
            )
        return self._root_disk

    def ensure_seed(self) -> VolumeHandle:
        """The seed that the rows want lies on the node; it is rendered and the engine asked once."""
        if self._seed is None:
            instance, spec = self.instance, seed_spec(self)
            if instance.seed_generation == SECRET_GENERATION:
                iso = render_seed(spec, insists=instance.seed_has_password)
            else:
                iso = render_later_seed(spec, with_password=instance.seed_has_password)
            self._seed = self.engines.volumes.ensure_seed(
                self.node, instance.instance_id, instance.seed_generation, iso
            )
        return self._seed


def situation_of(target: Target) -> Situation:
    """The instance as the first step of this execution that asked has read it.

    For steps of an operation that holds the instance: its own rows are changed by nobody else meanwhile. What is shared
    with others (its networks, its firewall) is as it was when first asked for: by the step that brings it to an engine.
    """
    if _KEPT not in target.kept:
        target.kept[_KEPT] = read_situation(target.subject_id)
    it: Situation = target.kept[_KEPT]
    return it


def read_situation(instance_id: UUID) -> Situation:
    """The instance as the database has it now."""
    with single_statements() as session:
        rows = session.execute(_SITUATION, {"instance": instance_id}).all()
        instance, node, tier, image, root, _ = rows[0]
        opened = engines_of(session, instance.location_id, (engine for *_, engine in rows))
        return Situation(instance, node, tier, image, root, opened)


def render_later_seed(spec: SeedSpec, *, with_password: bool) -> bytes:
    """The seed of a guest that has been through its first boot."""
    return render_password_seed(spec) if with_password else render_scrubbed_seed(spec)


def seed_spec(it: Situation, *, with_secrets: bool = True) -> SeedSpec:
    """What the guest is told; secrets only as long as they are stored.

    Without `with_secrets` that is what a scrubbed seed says: hostname and network.
    """
    instance = it.instance
    with single_statements() as session:
        keys = (
            session.scalars(_KEYS, {"instance": instance.instance_id}).all() if with_secrets else ()
        )
        password_hash = (
            get_secret(session, instance.password_secret_id, PASSWORD_PURPOSE)
            if with_secrets and instance.password_secret_id is not None
            else None
        )
        user_data = (
            get_secret(session, instance.user_data_secret_id, USER_DATA_PURPOSE)
            if with_secrets and instance.user_data_secret_id is not None
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
    seed = it.ensure_seed()
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
