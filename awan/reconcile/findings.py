"""What an audit can find. One kind for each way in which two sides may differ."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FindingKind(StrEnum):
    """`<thing>.<what is wrong with it>`."""

    LOCATION_UNREADABLE = "location.unreadable"
    NODE_SILENT = "node.silent"
    CHASSIS_SILENT = "chassis.silent"
    FABRIC_SILENT = "fabric.silent"

    DOMAIN_STRAY = "domain.stray"
    DOMAIN_MISSING = "domain.missing"
    DOMAIN_UNDEFINED = "domain.undefined"
    DOMAIN_POWER = "domain.power"
    DOMAIN_DISKS = "domain.disks"
    DOMAIN_CARDS = "domain.cards"

    PORT_STRAY = "port.stray"
    PORT_MISSING = "port.missing"
    PORT_WRONG = "port.wrong"
    PORT_UNPROTECTED = "port.unprotected"
    PORT_UNBOUND = "port.unbound"

    NAMESERVER_SILENT = "nameserver.silent"
    NAME_STRAY = "name.stray"
    NAME_WRONG = "name.wrong"

    FIREWALL_STRAY = "firewall.stray"
    FIREWALL_MISSING = "firewall.missing"
    FIREWALL_WRONG = "firewall.wrong"

    FILE_STRAY = "file.stray"
    FILE_MISSING = "file.missing"
    FILE_SIZE = "file.size"

    RESOURCE_HOLLOW = "resource.hollow"
    RESOURCE_DANGLING = "resource.dangling_operation"
    INSTANCE_TORN = "instance.torn"
    INSTANCE_STUCK = "instance.deletion_stuck"
    INSTANCE_UNWATCHED = "instance.first_boot_lost"
    NETWORK_STRAY = "network.stray"
    NETWORK_MISSING = "network.missing"
    NETWORK_GATEWAY = "network.gateway"
    NETWORK_RESOLVER = "network.resolver"
    NETWORK_CARD = "network.card"
    PREFIX_ROUTE = "prefix.route"
    PREFIX_STRAY = "prefix.stray"
    PREFIX_ORPHAN = "prefix.orphan"
    NIC_ORPHAN = "nic.orphan"
    NIC_ADDRESSES = "nic.addresses"
    IMAGE_STUCK = "image.removal_stuck"
    IMAGE_STRAY = "image.stray_file"
    VOLUME_ORPHAN = "volume.orphan"
    ADDRESS_STATE = "address.state"
    ADDRESS_TWICE = "address.twice"
    PLACEMENT = "placement.wrong"
    NODE_COUNTER = "node.counter"
    QUOTA_COUNTER = "quota.counter"

    SPAN_MISSING = "span.missing"
    SPAN_UNEXPECTED = "span.unexpected"
    SPAN_PRICE = "span.price"
    SPAN_OVERLAP = "span.overlap"

    CONSOLE_UNHELD = "console.unheld"
    CONSOLE_UNLOCKED = "console.unlocked"

    OPERATION_OVERDUE = "operation.overdue"
    OPERATION_UNHELD = "operation.unheld"
    OPERATION_WITHOUT_WORKFLOW = "operation.without_workflow"
    WORKFLOW_WITHOUT_OPERATION = "workflow.without_operation"
    SECRET_LEFT = "secret.left"  # noqa: S105 - a kind of finding


@dataclass(frozen=True)
class Finding:
    """One difference. `subject` is the uuid or name of what is wrong; `location` its code, where it has one.

    `expected` and `found` are short; `sentence` says it all in words for an operator.
    """

    kind: FindingKind
    location: str | None
    subject: str
    expected: str
    found: str
    sentence: str
