"""Creating an instance: every field checked, then admitted in one transaction or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session

from awan.accounts import Caller, quotas
from awan.catalogue import (
    Component,
    PricedItem,
    PriceTag,
    find_tier,
    lock_newest_image,
)
from awan.catalogue.models import OsFamily, Template, TemplateImage, Tier
from awan.catalogue.rules import instance_items, is_priced, total_monthly_minor
from awan.catalogue.service import Offer, find_offer, order_prices
from awan.credentials import SshKey, find_keys
from awan.engines.seed import hash_password, validate_user_data
from awan.errors import Invalid
from awan.firewall import create_firewall
from awan.fleet import Demand, Node, place
from awan.instances.models import CpuMode, DesiredState, Instance, InstanceSshKey, ObservedState
from awan.instances.rules import MEMORY_GIB_PLAUSIBLE, check_password
from awan.instances.schemas import InstanceCreate
from awan.instances.service import Belongings, InstanceView, is_hostname_taken
from awan.instances.situation import PASSWORD_PURPOSE, USER_DATA_PURPOSE
from awan.instances.workflows import CREATE
from awan.kit.ids import new_id
from awan.kit.secrets import put_secret
from awan.ledger import lock_prices
from awan.networks import Address, find_owned_address
from awan.networks.addresses import take_address
from awan.networks.cards import create_public_nic, give_first_addresses
from awan.networks.models import PrivateNetwork, PrivateNetworkState
from awan.networks.private_networks import INVALID as INVALID_VSWITCH
from awan.networks.private_networks import NOT_USABLE, create_private_nic, find_network, members_of
from awan.operations import begin
from awan.resources import Resource, ResourceKind, create
from awan.volumes import create_root_volume

HOSTNAME_TAKEN = "The hostname has already been taken."


class Problems:
    """What is wrong with a request, collected per field so that the user sees all of it at once."""

    def __init__(self) -> None:
        self.errors: dict[str, list[str]] = {}

    def add(self, field: str, sentence: str) -> None:
        """Notes one sentence about a field."""
        self.errors.setdefault(field, []).append(sentence)

    def raise_if_any(self) -> None:
        """Raises: Invalid with everything noted."""
        if self.errors:
            raise Invalid(self.errors)


@dataclass(frozen=True)
class Order:
    """A creation whose every field was found valid."""

    offer: Offer
    tier: Tier
    template: Template
    image: TemplateImage
    cpu_mode: CpuMode
    items: tuple[PricedItem, ...]
    address_price: PriceTag | None
    ssh_keys: Sequence[SshKey]
    address: Address | None
    network: PrivateNetwork | None


@dataclass(frozen=True)
class _Ids:
    """Of what a creation makes: others are derived from them."""

    instance_id: UUID
    operation_id: UUID


def create_instance(
    session: Session, caller: Caller, request: InstanceCreate
) -> tuple[InstanceView, Belongings]:
    """Admits an instance: rows, room, address, price, and the operation that builds it. Gives what its answer shows.

    Locks, always in this order: image, quota, node, network, address. Raises: Invalid, QuotaExceeded, NoCapacity,
    Unavailable while an engine of the location is not configured.
    """
    order = check_order(session, caller, request)
    engines = order.offer.outline()
    # Before the quota is locked, for which other creations of the account wait: it takes longer than all else here.
    password_hash = hash_password(request.password)
    ids = _Ids(new_id(), new_id())
    _take_quota(session, caller, request, order)
    node = _place(session, caller, request, order, ids)
    resource = _insert_resource(session, caller, request, ids)
    instance = _insert_instance(session, caller, request, order, ids, node, password_hash)
    create_firewall(
        session,
        instance_id=ids.instance_id,
        account_id=caller.account_id,
        location_id=request.location_id,
    )
    create_root_volume(
        session,
        instance_id=ids.instance_id,
        account_id=caller.account_id,
        location_id=request.location_id,
        node_id=node.node_id,
        image_id=order.image.image_id,
        size_gib=request.storage,
        engine=engines.volumes_driver,
        operation_id=ids.operation_id,
    )
    addresses = _make_cards(session, caller, request, order, ids)
    lock_prices(session, {ids.instance_id: order.items, **_sold_address(order, addresses)})
    operation = begin(
        session,
        caller=caller,
        plan=CREATE,
        resource=resource,
        resource_kind=ResourceKind.INSTANCE,
        subject_id=ids.instance_id,
        operation_id=ids.operation_id,
    )
    view = InstanceView(
        instance,
        resource,
        order.offer.location,
        order.tier,
        order.template,
        operation,
        is_node_silent=False,
    )
    belongings = Belongings(
        addresses=addresses,
        prefix=None,
        prices=order.items,
        zones=engines.zones,
        members=members_of(session, instance_ids=[ids.instance_id]) if order.network else [],
        ssh_keys=order.ssh_keys,
    )
    return view, belongings


def check_order(session: Session, caller: Caller, request: InstanceCreate) -> Order:
    """Everything about a creation that only the database can tell.

    Raises: Invalid with all fields that are wrong.
    """
    problems = Problems()
    offer = find_offer(session, request.location_id, request.tier_id)
    tier = _offered_tier(session, request, offer, problems)
    template, image = lock_newest_image(session, request.template_id)
    if template is None or image is None:
        problems.add("template_id", "The selected template is invalid.")
    if tier is not None and template is not None and image is not None:
        _check_size(request, tier, template, image, problems)
    cpu_mode = _cpu_mode(request, tier, problems)
    _check_login(request, template, problems)
    keys = _check_ssh_keys(session, caller, request, problems)
    _check_hostname(session, caller, request, problems)
    address = _check_address(session, caller, request, problems)
    network = _check_vswitch(session, caller, request, problems)
    prices: dict[Component, PriceTag] = {}
    address_price: PriceTag | None = None
    if offer is not None and tier is not None:
        prices, address_price = order_prices(
            session, request.location_id, request.tier_id, caller.currency
        )
        if not is_priced(prices, dedicated=cpu_mode == CpuMode.DEDICATED):
            problems.add("tier_id", "The selected tier is not sold in the account's currency.")
    problems.raise_if_any()
    assert offer is not None
    assert tier is not None
    assert template is not None
    assert image is not None
    items = instance_items(
        prices,
        dedicated=cpu_mode == CpuMode.DEDICATED,
        vcpus=request.cpu,
        memory_gib=request.memory,
        storage_gib=request.storage,
        license_monthly_minor=template.license_monthly_minor,
    )
    return Order(
        offer, tier, template, image, cpu_mode, items, address_price, keys, address, network
    )


def _offered_tier(
    session: Session, request: InstanceCreate, offer: Offer | None, problems: Problems
) -> Tier | None:
    """The tier, if it is sold at the location; at an unknown location every tier will do."""
    if offer is None:
        problems.add("location_id", "The selected location is invalid.")
    tier = offer.tier if offer is not None else find_tier(session, request.tier_id)
    if tier is None:
        problems.add("tier_id", "The selected tier is invalid.")
    return tier


def _check_size(
    request: InstanceCreate,
    tier: Tier,
    template: Template,
    image: TemplateImage,
    problems: Problems,
) -> None:
    cpu_min = max(tier.cpu_min, template.cpu_min)
    if not cpu_min <= request.cpu <= tier.cpu_max:
        problems.add("cpu", f"The cpu must be between {cpu_min} and {tier.cpu_max}.")
    memory_min = -(-max(tier.memory_mib_min, template.memory_mib_min) // 1024)
    memory_max = tier.memory_mib_max // 1024
    if not memory_min <= request.memory <= memory_max:
        # Who means MiB is off by a factor of a thousand.
        unit = ": 1 means 1 GiB" if request.memory > MEMORY_GIB_PLAUSIBLE else ""
        problems.add(
            "memory", f"The memory must be between {memory_min} and {memory_max} GiB{unit}."
        )
    image_gib = -(-(image.virtual_size_bytes or 0) // 1024**3)
    storage_min = max(tier.storage_gib_min, template.storage_gib_min, image_gib)
    if not storage_min <= request.storage <= tier.storage_gib_max:
        problems.add(
            "storage", f"The storage must be between {storage_min} and {tier.storage_gib_max} GiB."
        )
    elif request.storage % tier.storage_gib_step:
        problems.add("storage", f"The storage must be a multiple of {tier.storage_gib_step} GiB.")


def _cpu_mode(request: InstanceCreate, tier: Tier | None, problems: Problems) -> CpuMode:
    """Both flags unset: shared where the tier offers it. One flag is enough; two that agree are a contradiction."""
    shared, dedicated = request.use_shared_cpu, request.use_dedicated_cpu
    if shared is None and dedicated is None:
        return CpuMode.DEDICATED if tier is not None and not tier.offers_shared else CpuMode.SHARED
    if shared == dedicated:
        problems.add("use_shared_cpu", "Choose either shared or dedicated CPUs.")
        return CpuMode.SHARED
    is_shared = shared if shared is not None else not dedicated
    if tier is not None and not (tier.offers_shared if is_shared else tier.offers_dedicated):
        field = "use_shared_cpu" if shared or dedicated is None else "use_dedicated_cpu"
        problems.add(
            field, f"The tier does not offer {'shared' if is_shared else 'dedicated'} CPUs."
        )
    return CpuMode.SHARED if is_shared else CpuMode.DEDICATED


def _check_login(request: InstanceCreate, template: Template | None, problems: Problems) -> None:
    for sentence in check_password(
        request.password, username=request.username, hostname=request.hostname
    ):
        problems.add("password", sentence)
    if request.user_data is not None:
        for sentence in validate_user_data(request.user_data):
            problems.add("user_data", sentence)
        if template is not None and template.family == OsFamily.WINDOWS:
            problems.add("user_data", "The template does not take user data.")


def _check_ssh_keys(
    session: Session, caller: Caller, request: InstanceCreate, problems: Problems
) -> list[SshKey]:
    wanted = list(dict.fromkeys(request.ssh_keys or []))
    known = find_keys(session, caller.account_id, wanted)
    if any(key_id not in known for key_id in wanted):
        problems.add("ssh_keys", "The selected ssh_keys is invalid.")
    return [known[key_id] for key_id in wanted if key_id in known]


def _check_hostname(
    session: Session, caller: Caller, request: InstanceCreate, problems: Problems
) -> None:
    if is_hostname_taken(session, caller.account_id, request.hostname):
        problems.add("hostname", HOSTNAME_TAKEN)


def _check_address(
    session: Session, caller: Caller, request: InstanceCreate, problems: Problems
) -> Address | None:
    if request.public_network is None:
        return None
    if not request.use_public_ip:
        problems.add("public_network", "A public network needs use_public_ip.")
        return None
    address = find_owned_address(
        session, caller.account_id, request.public_network, location_id=request.location_id
    )
    if address is None or address.nic_id is not None:
        problems.add("public_network", "The selected public_network is invalid.")
        return None
    return address


def _check_vswitch(
    session: Session, caller: Caller, request: InstanceCreate, problems: Problems
) -> PrivateNetwork | None:
    if request.vswitch is None:
        return None
    network = find_network(
        session, caller.account_id, request.vswitch, location_id=request.location_id
    )
    if network is None:
        problems.add("vswitch", INVALID_VSWITCH)
        return None
    if network.state != PrivateNetworkState.ACTIVE:
        problems.add("vswitch", NOT_USABLE[PrivateNetworkState(network.state)])
        return None
    return network


def _take_quota(session: Session, caller: Caller, request: InstanceCreate, order: Order) -> None:
    quotas.take(
        session,
        caller.account_id,
        instances=1,
        vcpus=request.cpu,
        memory_gib=request.memory,
        storage_gib=request.storage,
        public_ips=1 if request.use_public_ip and order.address is None else 0,
    )


def _place(
    session: Session, caller: Caller, request: InstanceCreate, order: Order, ids: _Ids
) -> Node:
    return place(
        session,
        instance_id=ids.instance_id,
        account_id=caller.account_id,
        location_id=request.location_id,
        tier=order.tier,
        demand=Demand(
            request.cpu,
            order.cpu_mode == CpuMode.DEDICATED,
            request.memory * 1024,
            request.storage,
        ),
    )


def _make_cards(
    session: Session, caller: Caller, request: InstanceCreate, order: Order, ids: _Ids
) -> list[Address]:
    """The cards that were ordered; gives the addresses of the public one, IPv4 first."""
    if order.network is not None:
        # Before the address: whoever changes a gateway locks the network first as well.
        create_private_nic(
            session,
            instance_id=ids.instance_id,
            network=order.network,
            operation_id=ids.operation_id,
        )
    if not request.use_public_ip:
        return []
    nic = create_public_nic(
        session,
        instance_id=ids.instance_id,
        account_id=caller.account_id,
        location_id=request.location_id,
        operation_id=ids.operation_id,
    )
    if order.address is not None:
        return give_first_addresses(session, nic, order.address)
    taken = take_address(session, caller, request.location_id, operation_id=ids.operation_id)
    return give_first_addresses(session, nic, taken, is_new=True)


def _sold_address(order: Order, addresses: Sequence[Address]) -> dict[UUID, list[PricedItem]]:
    """The address that was taken for the instance and its price; none where it brings its own, or has none."""
    if order.address is not None or not addresses:
        return {}
    assert addresses[0].resource_id is not None
    assert order.address_price is not None
    return {addresses[0].resource_id: [PricedItem(order.address_price, 1)]}


def _insert_resource(
    session: Session, caller: Caller, request: InstanceCreate, ids: _Ids
) -> Resource:
    return create(
        session,
        kind=ResourceKind.INSTANCE,
        resource_id=ids.instance_id,
        account_id=caller.account_id,
        name=request.hostname,
        location_id=request.location_id,
        operation_id=ids.operation_id,
        name_field="hostname",
        is_active=True,
    )


def _insert_instance(
    session: Session,
    caller: Caller,
    request: InstanceCreate,
    order: Order,
    ids: _Ids,
    node: Node,
    password_hash: str,
) -> Instance:
    password = put_secret(session, PASSWORD_PURPOSE, password_hash)
    user_data = (
        put_secret(session, USER_DATA_PURPOSE, request.user_data)
        if request.user_data is not None
        else None
    )
    session.flush()
    instance = Instance(
        instance_id=ids.instance_id,
        account_id=caller.account_id,
        location_id=request.location_id,
        tier_id=order.tier.tier_id,
        template_id=order.template.template_id,
        image_id=order.image.image_id,
        node_id=node.node_id,
        hostname=request.hostname,
        username=request.username,
        vcpus=request.cpu,
        cpu_mode=order.cpu_mode,
        memory_mib=request.memory * 1024,
        storage_gib=request.storage,
        desired_state=DesiredState.RUNNING,
        observed_state=ObservedState.ABSENT,
        password_secret_id=password,
        user_data_secret_id=user_data,
        monthly_minor=total_monthly_minor(order.items),
        currency=caller.currency,
        create_operation_id=ids.operation_id,
    )
    session.add(instance)
    session.flush()
    session.add_all(
        InstanceSshKey(instance_id=ids.instance_id, ssh_key_id=key.ssh_key_id, position=position)
        for position, key in enumerate(order.ssh_keys)
    )
    session.flush()
    return instance
