"""Every fault that is planted is found, and nothing else is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from awan.reconcile import FindingKind as Kind
from awan.reconcile import run_audit
from tests.reconcile.conftest import World


@dataclass(frozen=True)
class Fault:
    """What is done to rows and simulated engines, and what the audit must say: kind and a part of the subject."""

    name: str
    statements: tuple[str, ...]
    found: tuple[tuple[Kind, str], ...]


def fault(name: str, *statements: str, found: dict[Kind, str | tuple[str, ...]]) -> Fault:
    """`found` maps a kind to the names of its subjects in `World.ids` (or their very text)."""
    pairs = [
        (kind, subject)
        for kind, subjects in found.items()
        for subject in ((subjects,) if isinstance(subjects, str) else subjects)
    ]
    return Fault(name, statements, tuple(pairs))


NEW_PENDING_WORKFLOW = (
    "INSERT INTO dbos.workflow_status (workflow_uuid, status, name, queue_name, created_at,"
    " updated_at, priority) VALUES (CAST(:new AS text), 'PENDING', 'x.y.v1', 'operations', 0, 0, 0)"
)


NEW_CONSOLE = (
    "INSERT INTO console (console_id, instance_id, account_id, key_id, state, ticket_expires_at, seen_at)"
    " SELECT :new, instance_id, instance.account_id, key_id, 'open', now(), now() - interval '1 hour'"
    " FROM instance, api_key WHERE instance_id = :running LIMIT 1"
)


def new_operation(resource: str, deadline: str) -> str:
    """A running operation without a workflow; its workflow is `NEW_PENDING_WORKFLOW`."""
    return (
        "INSERT INTO operation (operation_id, kind, resource_id, resource_kind, actor, request_id,"
        f" status, deadline_at) VALUES (:new, 'x.y', {resource}, 'x', 'test', 'test', 'running',"
        f" now() + interval '{deadline}')"
    )


def new_span(component: str, opened: str, closed: str, resource: str = ":running") -> str:
    """A span like an earlier one of the same component, over another time."""
    return (
        "INSERT INTO usage_span (account_id, resource_id, component, quantity, price_id, currency,"
        " monthly_minor, opened_at, closed_at, actor)"
        " SELECT account_id, resource_id, component, quantity, price_id, currency, monthly_minor,"
        f" {opened}, {closed}, actor FROM usage_span"
        f" WHERE resource_id = {resource} AND component = '{component}' LIMIT 1"
    )


ENGINES = [
    fault(
        "missing name",
        "DELETE FROM sim.name_record WHERE name = :pointer",
        found={Kind.NAME_WRONG: "pointer"},
    ),
    fault(
        "name of somebody else",
        "UPDATE sim.name_record SET record_values = '{evil.example.com}' WHERE name = :pointer",
        found={Kind.NAME_WRONG: "pointer"},
    ),
    fault(
        "name of an address that is not there",
        "INSERT INTO sim.name_record VALUES (:location, 'ip-198-51-101-9.jkt1.awan.example', 'A',"
        " '{198.51.101.9}')",
        found={Kind.NAME_STRAY: "ip-198-51-101-9.jkt1.awan.example"},
    ),
    fault(
        "name that the operator keeps in our zone",
        "INSERT INTO sim.name_record VALUES (:location, 'www.jkt1.awan.example', 'A',"
        " '{198.51.101.9}')",
        found={},
    ),
    fault(
        "stray domain",
        "INSERT INTO sim.domain (location, node_id, uuid, power, config) SELECT location, node_id,"
        " :new, 'running', jsonb_set(config, '{instance_id}', to_jsonb(CAST(:new AS text)))"
        " FROM sim.domain WHERE uuid = :running",
        found={Kind.DOMAIN_STRAY: "new"},
    ),
    fault(
        "domain that carries another instance's metadata",
        "UPDATE sim.domain SET live = jsonb_set(live, '{instance_id}', to_jsonb(CAST(:new AS text)))"
        " WHERE uuid = :running",
        found={Kind.DOMAIN_STRAY: "running"},
    ),
    fault(
        "missing domain",
        "DELETE FROM sim.domain WHERE uuid = :running",
        found={Kind.DOMAIN_MISSING: "running"},
    ),
    fault(
        "domain on the wrong node",
        "UPDATE sim.domain SET node_id = :other_node WHERE uuid = :running",
        found={Kind.DOMAIN_MISSING: "running", Kind.DOMAIN_STRAY: "running"},
    ),
    fault(
        "domain of a deleted instance",
        "UPDATE sim.domain SET uuid = :deleted, live = jsonb_set(live, '{instance_id}',"
        " to_jsonb(CAST(:deleted AS text))) WHERE uuid = :running",
        found={Kind.DOMAIN_MISSING: "running", Kind.DOMAIN_STRAY: "deleted"},
    ),
    fault(
        "off instead of running",
        "UPDATE sim.domain SET power = 'crashed', live = NULL WHERE uuid = :running",
        found={Kind.DOMAIN_POWER: "running"},
    ),
    fault(
        "running without a definition",
        "UPDATE sim.domain SET is_persistent = false WHERE uuid = :running",
        found={Kind.DOMAIN_UNDEFINED: "running"},
    ),
    fault(
        "paused instead of running",
        "UPDATE sim.domain SET power = 'paused' WHERE uuid = :running",
        found={Kind.DOMAIN_POWER: "running"},
    ),
    fault(
        "running instead of stopped",
        "UPDATE sim.domain SET power = 'running', live = config WHERE uuid = :stopped",
        found={Kind.DOMAIN_POWER: "stopped"},
    ),
    fault(
        "domain with somebody else's disk",
        "UPDATE sim.domain SET live = jsonb_set(live, '{disks,0,path}',"
        " to_jsonb('/pool/vol-' || CAST(:new AS text) || '.qcow2')) WHERE uuid = :running",
        found={Kind.DOMAIN_DISKS: "running"},
    ),
    fault(
        "domain without its card",
        "UPDATE sim.domain SET live = jsonb_set(live, '{port_ids}', '[]') WHERE uuid = :running",
        found={Kind.DOMAIN_CARDS: "running"},
    ),
    fault(
        "stray port",
        "INSERT INTO sim.fabric_port (location, name, switch, address_line, security_line, hostname)"
        " VALUES (:location, 'left-over', 'public-1', '52:00:00:00:00:01', '52:00:00:00:00:01', '')",
        found={Kind.PORT_STRAY: "left-over"},
    ),
    fault(
        "missing port",
        "DELETE FROM sim.fabric_port WHERE instance_id = :running",
        found={Kind.PORT_MISSING: "nic"},
    ),
    fault(
        "port without DHCP",
        "UPDATE sim.fabric_port SET dhcp_families = '{4}' WHERE instance_id = :running",
        found={Kind.PORT_WRONG: "nic"},
    ),
    fault(
        "port to which the rules for tenants do not apply",
        "UPDATE sim.fabric_port SET is_confined = false WHERE instance_id = :running",
        found={Kind.PORT_WRONG: "nic"},
    ),
    fault(
        "port without security",
        "UPDATE sim.fabric_port SET security_line = '' WHERE instance_id = :running",
        found={Kind.PORT_UNPROTECTED: "nic"},
    ),
    fault(
        "port with too wide a security",
        "UPDATE sim.fabric_port SET security_line = security_line || ' 198.51.100.66'"
        " WHERE instance_id = :running",
        found={Kind.PORT_WRONG: "nic"},
    ),
    fault(
        "port with another address",
        "UPDATE sim.fabric_port SET address_line = address_line || ' 198.51.100.66'"
        " WHERE instance_id = :running",
        found={Kind.PORT_WRONG: "nic"},
    ),
    fault(
        "port on another switch",
        "UPDATE sim.fabric_port SET switch = 'public-9' WHERE instance_id = :running",
        found={Kind.PORT_WRONG: "nic"},
    ),
    fault(
        "port outside of its firewall",
        "UPDATE sim.fabric_port SET firewall_id = NULL WHERE instance_id = :running",
        found={Kind.PORT_WRONG: "nic"},
    ),
    fault(
        "firewall that is gone",
        "DELETE FROM sim.fabric_firewall WHERE firewall_id = :firewall",
        found={Kind.FIREWALL_MISSING: "firewall", Kind.PORT_WRONG: "nic"},
    ),
    fault(
        "firewall with a rule that nobody wrote",
        "UPDATE sim.fabric_firewall SET lines = '{x}' WHERE firewall_id = :firewall",
        found={Kind.FIREWALL_WRONG: "firewall"},
    ),
    fault(
        "firewall without its rule",
        "UPDATE firewall SET policy = 'DROP' WHERE firewall_id = :firewall",
        found={Kind.FIREWALL_WRONG: "firewall"},
    ),
    fault(
        "firewall with the port of another",
        "UPDATE sim.fabric_port SET firewall_id = :firewall WHERE instance_id = :stopped",
        found={Kind.FIREWALL_WRONG: "firewall", Kind.PORT_WRONG: ""},
    ),
    fault(
        "firewall of nobody",
        "INSERT INTO sim.fabric_firewall"
        " SELECT location, :new, account_id, 1, false, '{}', '{}'"
        " FROM sim.fabric_firewall LIMIT 1",
        found={Kind.FIREWALL_STRAY: "fw_00000000000040008000000000000001"},
    ),
    fault(
        "port of a running instance that is down",
        "UPDATE sim.fabric_port SET is_up = false WHERE instance_id = :running",
        found={Kind.PORT_UNBOUND: "nic"},
    ),
    fault(
        "port bound to another node",
        "UPDATE sim.fabric_port SET chassis = 'elsewhere' WHERE instance_id = :running",
        found={Kind.PORT_UNBOUND: "nic"},
    ),
    fault(
        "stray disk",
        "INSERT INTO sim.volume (location, node_id, name, capacity_bytes, allocation_bytes)"
        " VALUES (:location, :node, 'vol-' || CAST(:new AS text) || '.qcow2', 1, 1)",
        found={Kind.FILE_STRAY: "new"},
    ),
    fault(
        "foreign file",
        "INSERT INTO sim.volume (location, node_id, name, capacity_bytes, allocation_bytes)"
        " VALUES (:location, :node, 'notes.txt', 1, 1)",
        found={Kind.FILE_STRAY: "notes.txt"},
    ),
    fault(
        "seed with secrets left over",
        "INSERT INTO sim.volume (location, node_id, name, capacity_bytes, allocation_bytes)"
        " VALUES (:location, :node, 'seed-' || CAST(:running AS text) || '-1.iso', 1, 1)",
        found={Kind.FILE_STRAY: "running"},
    ),
    fault(
        "image that no row explains",
        "INSERT INTO sim.volume (location, node_id, name, capacity_bytes, allocation_bytes)"
        " VALUES (:location, :node, 'image-' || repeat('cd', 32) || '.qcow2', 1, 1)",
        found={Kind.FILE_STRAY: "cd" * 32},
    ),
    fault(
        "image whose removal was given up",
        "UPDATE template_image SET state = 'removing' WHERE sha256 = :sha256",
        found={Kind.IMAGE_STUCK: ""},
    ),
    fault(
        "missing disk",
        "DELETE FROM sim.volume WHERE name = 'vol-' || CAST(:volume AS text) || '.qcow2'",
        found={Kind.FILE_MISSING: "volume"},
    ),
    fault(
        "missing seed",
        "DELETE FROM sim.volume WHERE name LIKE 'seed-' || CAST(:stopped AS text) || '%'",
        found={Kind.FILE_MISSING: "stopped"},
    ),
    fault(
        "missing image",
        "DELETE FROM sim.volume WHERE node_id = :node AND name LIKE 'image-%'",
        found={Kind.FILE_MISSING: "sha256"},
    ),
    fault(
        "disk of another size",
        "UPDATE sim.volume SET capacity_bytes = capacity_bytes - 1"
        " WHERE name = 'vol-' || CAST(:volume AS text) || '.qcow2'",
        found={Kind.FILE_SIZE: "volume"},
    ),
    fault(
        "node that does not answer",
        "INSERT INTO sim.hypervisor_node (location, node_id, is_available)"
        " VALUES (:location, :node, false)",
        found={Kind.NODE_SILENT: "node"},
    ),
    fault(
        "chassis that does not answer",
        "UPDATE sim.fabric_chassis SET is_alive = false WHERE location = CAST(:location AS text) AND"
        " system_id = (SELECT ovn_system_id FROM node WHERE node_id = :node)",
        found={Kind.CHASSIS_SILENT: "node"},
    ),
    fault(
        "engine that cannot be opened",
        "DELETE FROM location_engine WHERE kind = 'fabric'",
        found={Kind.LOCATION_UNREADABLE: "jkt1"},
    ),
]
COUNTERS = [
    *(
        fault(
            f"wrong quota of {name}",
            f"UPDATE quota SET {name}_used = {name}_used + 1 WHERE account_id = :account",
            found={Kind.QUOTA_COUNTER: "account"},
        )
        for name in (
            "instances",
            "vcpus",
            "memory_gib",
            "storage_gib",
            "public_ips",
            "private_networks",
            "ssh_keys",
        )
    ),
    *(
        fault(
            f"wrong node counter {column}",
            f"UPDATE node SET {column} = {column} + 1 WHERE node_id = :node",
            found={Kind.NODE_COUNTER: "node"},
        )
        for column in ("vcpus_used", "dedicated_threads_used", "memory_mib_used", "disk_gib_used")
    ),
    fault(
        "missing reservation",
        "DELETE FROM placement WHERE instance_id = :running",
        found={Kind.PLACEMENT: "running", Kind.NODE_COUNTER: ("node", "node", "node")},
    ),
    fault(
        "reservation of a deleted instance",
        "UPDATE placement SET instance_id = :deleted WHERE instance_id = :running",
        found={Kind.PLACEMENT: ("running", "deleted")},
    ),
    fault(
        "reservation on the wrong node",
        "UPDATE placement SET node_id = :other_node WHERE instance_id = :running",
        found={
            Kind.PLACEMENT: "running",
            Kind.NODE_COUNTER: ("node", "node", "node", "other_node", "other_node", "other_node"),
        },
    ),
]
ROWS = [
    fault(
        "owned thing that does not exist",
        "INSERT INTO resource (resource_id, kind, account_id, name)"
        " VALUES (:new, 'public_ip', :account, '198.51.100.99')",
        found={Kind.RESOURCE_HOLLOW: "new"},
    ),
    fault(
        "half deleted instance",
        "UPDATE instance SET observed_state = 'stopped' WHERE instance_id = :deleted",
        found={Kind.INSTANCE_TORN: "deleted"},
    ),
    fault(
        "deletion that was given up",
        "UPDATE instance SET desired_state = 'deleted', observed_state = 'error'"
        " WHERE instance_id = :stopped",
        "UPDATE usage_span SET closed_at = now() WHERE resource_id = :stopped",
        found={Kind.INSTANCE_STUCK: "stopped"},
    ),
    fault(
        "guest that nobody waits for",
        "UPDATE instance SET ready_at = NULL WHERE instance_id = :running",
        "UPDATE usage_span SET closed_at = now() WHERE resource_id = :running OR resource_id ="
        " (SELECT resource_id FROM address WHERE address_id = :address)",
        found={Kind.INSTANCE_UNWATCHED: "running"},
    ),
    fault(
        "card of a deleted instance",
        "UPDATE nic SET deleted_at = NULL WHERE instance_id = :deleted",
        "UPDATE address SET state = 'attached', nic_id = (SELECT nic_id FROM nic"
        " WHERE instance_id = :deleted) WHERE resource_id = :free",
        found={Kind.NIC_ORPHAN: ""},
    ),
    fault(
        "disk of a deleted instance",
        "UPDATE volume SET state = 'ready' WHERE instance_id = :deleted",
        found={Kind.VOLUME_ORPHAN: ""},
    ),
    fault(
        "card with two addresses",
        "UPDATE address SET state = 'attached', nic_id = :nic WHERE resource_id = :free",
        found={Kind.NIC_ADDRESSES: "nic"},
    ),
    fault(
        "address that is attached and not its owner's",
        "UPDATE address SET account_id = NULL WHERE address_id = :address6",
        found={Kind.ADDRESS_STATE: "address6"},
    ),
    fault(
        "available address with an owner",
        "UPDATE address SET account_id = :account WHERE address_id = (SELECT address_id FROM address"
        " WHERE state = 'available' ORDER BY inet LIMIT 1)",
        "UPDATE quota SET public_ips_used = public_ips_used + 1 WHERE account_id = :account",
        found={Kind.ADDRESS_STATE: ""},
    ),
    fault(
        "address on a deleted card",
        "UPDATE address SET state = 'attached', nic_id = (SELECT nic_id FROM nic"
        " WHERE instance_id = :deleted) WHERE resource_id = :free",
        found={Kind.ADDRESS_STATE: ""},
    ),
    fault(
        "one address on two cards",
        "INSERT INTO pool (location_id, family, cidr, gateway, physical_network, dns_servers)"
        " VALUES (CAST(:location AS bigint), 6, '2001:db8::/32', '2001:db8::1', 'x', '{}')",
        "INSERT INTO address (address_id, pool_id, family, inet, state, account_id, nic_id)"
        " SELECT :new, (SELECT max(pool_id) FROM pool), 6, inet, 'attached', account_id, nic_id"
        " FROM address WHERE address_id = :address6",
        found={Kind.ADDRESS_TWICE: "2001:db8:", Kind.NIC_ADDRESSES: "nic"},
    ),
    fault(
        "secret of a deleted instance",
        "INSERT INTO secret (secret_id, purpose, key_id, nonce, ciphertext, created_at)"
        " VALUES (:new, 'instance.password_hash', 'k1', '', '', now())",
        "UPDATE instance SET password_secret_id = :new WHERE instance_id = :deleted",
        found={Kind.SECRET_LEFT: "new"},
    ),
    fault(
        "secret of no webhook",
        "INSERT INTO secret (secret_id, purpose, key_id, nonce, ciphertext, created_at)"
        " VALUES (:new, 'webhook.signing', 'k1', '', '', now())",
        found={Kind.SECRET_LEFT: "new"},
    ),
    fault(
        "webhook without an endpoint",
        "INSERT INTO resource (resource_id, kind, account_id, name)"
        " SELECT :new, 'webhook', account_id, 'x' FROM account LIMIT 1",
        found={Kind.RESOURCE_HOLLOW: "new"},
    ),
]
MONEY = [
    fault(
        "running instance that is not billed",
        "UPDATE usage_span SET closed_at = now() WHERE resource_id = :running",
        found={Kind.SPAN_MISSING: ("running", "running", "running")},
    ),
    fault(
        "kept address that is not billed",
        "UPDATE usage_span SET closed_at = now() WHERE resource_id = :free",
        found={Kind.SPAN_MISSING: "free"},
    ),
    fault(
        "billed after deletion",
        new_span("memory", "now()", "NULL", ":deleted"),
        found={Kind.SPAN_UNEXPECTED: "deleted"},
    ),
    fault(
        "billed at another price",
        "UPDATE usage_span SET monthly_minor = monthly_minor + 1"
        " WHERE resource_id = :running AND component = 'memory'",
        found={Kind.SPAN_PRICE: "running"},
    ),
    fault(
        "billed for another quantity",
        "UPDATE usage_span SET quantity = quantity + 1"
        " WHERE resource_id = :running AND component = 'memory'",
        found={Kind.SPAN_PRICE: "running"},
    ),
    fault(
        "billed for what was never sold",
        "UPDATE locked_price SET component = 'backup'"
        " WHERE resource_id = :running AND component = 'memory'",
        found={Kind.SPAN_PRICE: "running", Kind.SPAN_MISSING: "running"},
    ),
    fault(
        "billed twice for one hour",
        new_span("memory", "now() - interval '1 hour'", "now() + interval '1 hour'"),
        found={Kind.SPAN_OVERLAP: "running"},
    ),
]
OPERATIONS = [
    fault(
        "waiting for an operation that is over",
        "UPDATE resource SET active_operation_id = :create WHERE resource_id = :running",
        found={Kind.RESOURCE_DANGLING: "running"},
    ),
    fault(
        "waiting for an operation that never was",
        "UPDATE resource SET active_operation_id = :new WHERE resource_id = :running",
        found={Kind.RESOURCE_DANGLING: "running"},
    ),
    fault(
        "overdue operation without an alarm",
        new_operation("NULL", "-1 hour"),
        NEW_PENDING_WORKFLOW,
        found={Kind.OPERATION_OVERDUE: "new"},
    ),
    fault(
        "operation that its resource does not know",
        new_operation(":running", "1 hour"),
        NEW_PENDING_WORKFLOW,
        found={Kind.OPERATION_UNHELD: "new"},
    ),
    fault(
        "console that no process holds",
        NEW_CONSOLE,
        found={Kind.CONSOLE_UNHELD: "new"},
    ),
    fault(
        "screen that opens for nobody's console",
        "INSERT INTO sim.console (location, node_id, uuid, started_at, password, valid_until)"
        " SELECT location, node_id, uuid, started_at, 'secret', now() + interval '1 hour'"
        " FROM sim.domain WHERE uuid = :running",
        found={Kind.CONSOLE_UNLOCKED: "running"},
    ),
    fault(
        "domain that is paused, and known as running",
        "UPDATE sim.domain SET power = 'paused' WHERE uuid = :running",
        found={Kind.DOMAIN_POWER: "running"},
    ),
    fault(
        "operation that nothing works on",
        new_operation("NULL", "1 hour"),
        found={Kind.OPERATION_WITHOUT_WORKFLOW: "new"},
    ),
    fault(
        "workflow of no operation",
        NEW_PENDING_WORKFLOW,
        found={Kind.WORKFLOW_WITHOUT_OPERATION: "new"},
    ),
    fault(
        "workflow of an operation that is long over",
        "UPDATE operation SET finished_at = now() - interval '1 hour' WHERE operation_id = :create",
        "UPDATE dbos.workflow_status SET status = 'PENDING'"
        " WHERE workflow_uuid = CAST(:create AS text)",
        found={Kind.WORKFLOW_WITHOUT_OPERATION: "create"},
    ),
]
NEW_SWITCH = "private-00000000-0000-4000-8000-000000000001"
NEW_NETWORK = (
    "INSERT INTO resource (resource_id, kind, account_id, location_id, name)"
    " VALUES (:new, 'private_network', :account, CAST(:location AS bigint), 'backend')",
    "INSERT INTO private_network (resource_id, account_id, location_id, cidr, state, made_at)"
    " VALUES (:new, :account, CAST(:location AS bigint), '10.20.0.0/24', 'active', now())",
    "UPDATE quota SET private_networks_used = 1 WHERE account_id = :account",
)
NEW_SWITCH_ROW = "INSERT INTO sim.fabric_network VALUES (:location, 'private-' || :new, '{\"is_private\": true}')"
NETWORKS = [
    fault("private network that is whole", *NEW_NETWORK, NEW_SWITCH_ROW, found={}),
    fault("missing private network", *NEW_NETWORK, found={Kind.NETWORK_MISSING: NEW_SWITCH}),
    fault("stray private network", NEW_SWITCH_ROW, found={Kind.NETWORK_STRAY: NEW_SWITCH}),
    fault(
        "private network with a gateway of its own making",
        *NEW_NETWORK,
        NEW_SWITCH_ROW,
        "INSERT INTO sim.fabric_gateway VALUES (:location, 'private-' || :new,"
        ' \'{"public_ip": "198.51.100.9", "chassis": ["n1"]}\')',
        found={Kind.NETWORK_GATEWAY: NEW_SWITCH},
    ),
    fault(
        "way to a resolver where there are no names",
        *NEW_NETWORK,
        NEW_SWITCH_ROW,
        "INSERT INTO sim.fabric_resolver VALUES (:location, 'private-' || :new,"
        ' \'{"outer": "100.64.0.9", "chassis": ["n1"]}\')',
        found={Kind.NETWORK_RESOLVER: NEW_SWITCH},
    ),
    fault(
        "gateway whose address is free",
        *NEW_NETWORK,
        NEW_SWITCH_ROW,
        "UPDATE private_network SET next_gateway_address_id ="
        " (SELECT address_id FROM address WHERE resource_id = :free)",
        found={Kind.NETWORK_GATEWAY: "new"},
    ),
    fault(
        "address of a gateway that is none",
        "UPDATE address SET state = 'gateway' WHERE resource_id = :free",
        found={Kind.ADDRESS_STATE: ""},
    ),
    fault(
        "card outside of its network's prefix",
        *NEW_NETWORK,
        NEW_SWITCH_ROW,
        "INSERT INTO nic (nic_id, instance_id, account_id, location_id, role, mac, network_id,"
        " private_ip, operation_id) SELECT :create, :running, :account, location_id, 'private',"
        " '52:00:00:00:00:07', network_id, '10.21.0.5', :create FROM private_network",
        found={
            Kind.NETWORK_CARD: "create",
            Kind.PORT_MISSING: "create",
            Kind.DOMAIN_CARDS: "running",
        },
    ),
]
FAULTS = [*ENGINES, *COUNTERS, *ROWS, *MONEY, *OPERATIONS, *NETWORKS]


def test_a_cloud_at_rest_is_green(world: World) -> None:
    assert run_audit() == []


@pytest.mark.parametrize("planted", FAULTS, ids=[it.name for it in FAULTS])
def test_a_planted_fault_is_found(world: World, planted: Fault) -> None:
    world.plant(*planted.statements)
    findings = run_audit()
    wanted = sorted((kind, world.ids.get(subject, subject)) for kind, subject in planted.found)
    found = sorted((it.kind, it.subject) for it in findings)
    assert [kind for kind, _ in found] == [kind for kind, _ in wanted], findings
    for (_, part), (_, subject) in zip(wanted, found, strict=True):
        assert part in subject
    assert all(it.sentence and it.expected != it.found for it in findings)
    # The audit changes nothing: asked again, it says the same.
    assert run_audit() == findings


def test_every_kind_is_planted() -> None:
    planted = {kind for it in FAULTS for kind, _ in it.found}
    # Simulated fabrics and nameservers have no way of not answering: `test_audit.py` shows that. A file of the control
    # plane is no row: `tests/volumes/test_image_removal.py` leaves one over. `tests/networks/test_ipv6_prefixes.py`
    # plants what is wrong with prefixes.
    elsewhere = {Kind.FABRIC_SILENT, Kind.NAMESERVER_SILENT, Kind.IMAGE_STRAY}
    elsewhere |= {Kind.PREFIX_ROUTE, Kind.PREFIX_STRAY, Kind.PREFIX_ORPHAN}
    assert planted == set(Kind) - elsewhere


def test_what_an_operation_works_on_is_left_alone(world: World) -> None:
    world.plant(
        new_operation(":running", "1 hour"),
        NEW_PENDING_WORKFLOW,
        "UPDATE resource SET active_operation_id = :new WHERE resource_id = :running",
        "DELETE FROM sim.domain WHERE uuid = :running",
        "DELETE FROM sim.fabric_port WHERE instance_id = :running",
        "DELETE FROM sim.volume WHERE name LIKE '%' || CAST(:volume AS text) || '%'",
        "INSERT INTO sim.volume (location, node_id, name, capacity_bytes, allocation_bytes)"
        " VALUES (:location, :node, 'seed-' || CAST(:running AS text) || '-1.iso', 1, 1)",
    )
    assert run_audit() == []
