"""Rows against rows: each check is one query that returns what is wrong, and nothing when all is well.

A query gives `subject`, `location` (a code or null), `expected`, `found`, and whatever its sentence names. All run
in one snapshot, and the rooms keep these rules in every transaction, so running operations make no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import TextClause, text
from sqlalchemy.orm import Session

from awan.accounts.quotas import LIMITS
from awan.console.service import LOST_AFTER_S
from awan.instances.capture_workflows import CAPTURE
from awan.reconcile.findings import Finding, FindingKind

# What has just become true needs its moment: the alarm's task runs every 10 s, and a workflow returns after the
# transaction that ended its operation.
GRACE_S = 60


@dataclass(frozen=True)
class RowCheck:
    """One rule. `sentence` is filled from the columns of each row that breaks it; `given` are named subqueries."""

    kind: FindingKind
    query: str
    sentence: str
    given: tuple[str, ...] = ()

    @property
    def statement(self) -> str:
        """The whole query."""
        return f"WITH {', '.join(self.given)} {self.query}" if self.given else self.query


# From which rows each counter of a quota is counted; a counter that is not here counts nothing yet.
QUOTA_COUNTS = {
    "instances": "SELECT account_id, count(*) FROM instance WHERE holds_quota GROUP BY 1",
    "vcpus": "SELECT account_id, sum(vcpus) FROM instance WHERE holds_quota GROUP BY 1",
    "memory_gib": "SELECT account_id, sum(memory_mib / 1024) FROM instance WHERE holds_quota GROUP BY 1",
    "storage_gib": "SELECT account_id, sum(storage_gib) FROM instance WHERE holds_quota GROUP BY 1",
    "public_ips": "SELECT account_id, count(*) FROM address"
    " WHERE family = 4 AND account_id IS NOT NULL GROUP BY 1",
    "private_networks": "SELECT account_id, count(*) FROM private_network"
    " WHERE deleted_at IS NULL GROUP BY 1",
    "ssh_keys": "SELECT account_id, count(*) FROM ssh_key WHERE deleted_at IS NULL GROUP BY 1",
}
NOTHING_COUNTED = "SELECT CAST(NULL AS uuid), CAST(0 AS bigint) WHERE false"

# What is billed at this moment. A card's address that was allocated by the creation of its instance is billed
# together with the instance, from when the guest is usable; every other address from its allocation on.
BILLED = """
    billed AS (
        SELECT instance_id AS resource_id FROM instance
        WHERE ready_at IS NOT NULL AND holds_quota AND desired_state <> 'deleted'
        UNION ALL
        SELECT address.resource_id FROM address
        LEFT JOIN nic ON nic.nic_id = address.nic_id
        LEFT JOIN instance ON instance.instance_id = nic.instance_id
        WHERE address.family = 4 AND address.resource_id IS NOT NULL
            AND address.state IN ('free', 'attached', 'gateway')
            AND NOT coalesce(
                address.operation_id = instance.create_operation_id AND instance.ready_at IS NULL, false)
            AND NOT EXISTS (
                SELECT FROM operation WHERE operation.operation_id = address.operation_id
                    AND operation.status IN ('queued', 'running'))
    )
"""
# Spans with what came before them on the same component of the same resource.
ORDERED = """
    ordered AS (
        SELECT *, count(*) FILTER (WHERE closed_at IS NULL) OVER earlier AS open_before,
            max(closed_at) OVER earlier AS closed_before
        FROM usage_span
        WINDOW earlier AS (PARTITION BY resource_id, component ORDER BY opened_at, span_id
            ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
    )
"""
# A resource with its location's code and a name for sentences.
NAMED = """
    named AS (
        SELECT resource.*, location.code,
            replace(resource.kind, '_', ' ') || ' ' || resource.name AS label
        FROM resource LEFT JOIN location USING (location_id)
    )
"""


def _quota_query() -> str:
    parts = [
        f"""
        SELECT quota.account_id AS subject, NULL AS location, account.name AS account,
            coalesce(counted.number, 0) AS expected, quota.{name}_used AS found, '{words}' AS words
        FROM quota JOIN account USING (account_id)
        LEFT JOIN ({QUOTA_COUNTS.get(name, NOTHING_COUNTED)}) AS counted (account_id, number)
            USING (account_id)
        WHERE quota.{name}_used <> coalesce(counted.number, 0)
        """  # noqa: S608 - names and queries of this module
        for name, words in LIMITS.items()
    ]
    return " UNION ALL ".join(parts)


RESOURCES = (
    RowCheck(
        FindingKind.RESOURCE_HOLLOW,
        """
        SELECT resource_id AS subject, code AS location, label, 'a row of its own' AS expected,
            'none' AS found
        FROM named
        WHERE deleted_at IS NULL AND NOT CASE kind
            WHEN 'instance' THEN EXISTS (
                SELECT FROM instance WHERE instance_id = resource_id AND deleted_at IS NULL
                    AND instance.account_id = named.account_id)
            WHEN 'private_network' THEN EXISTS (
                SELECT FROM private_network AS network
                WHERE network.resource_id = named.resource_id AND network.deleted_at IS NULL
                    AND network.account_id = named.account_id)
            WHEN 'public_ip' THEN EXISTS (
                SELECT FROM address WHERE address.resource_id = named.resource_id
                    AND address.account_id = named.account_id)
            WHEN 'firewall_group' THEN EXISTS (
                SELECT FROM firewall_group WHERE group_id = named.resource_id
                    AND deleted_at IS NULL AND firewall_group.account_id = named.account_id)
            WHEN 'ssh_key' THEN EXISTS (
                SELECT FROM ssh_key WHERE ssh_key.resource_id = named.resource_id
                    AND deleted_at IS NULL AND ssh_key.account_id = named.account_id)
            WHEN 'webhook' THEN EXISTS (
                SELECT FROM webhook_endpoint WHERE endpoint_id = named.resource_id
                    AND deleted_at IS NULL AND webhook_endpoint.account_id = named.account_id)
            ELSE true END
        """,
        "The {label} ({subject}) is owned, but there is no such thing of that account.",
        given=(NAMED,),
    ),
    RowCheck(
        FindingKind.INSTANCE_TORN,
        """
        SELECT instance_id AS subject, code AS location, hostname,
            'all gone, or all there' AS expected,
            format('instance %s, ownership %s, quota %s',
                CASE WHEN instance.deleted_at IS NULL THEN 'there' ELSE 'gone' END,
                CASE WHEN resource.deleted_at IS NULL THEN 'there' ELSE 'gone' END,
                CASE WHEN holds_quota THEN 'held' ELSE 'given back' END) AS found
        FROM instance JOIN resource ON resource_id = instance_id
        JOIN location ON location.location_id = instance.location_id
        WHERE (instance.deleted_at IS NULL) <> (resource.deleted_at IS NULL)
            OR (instance.deleted_at IS NOT NULL AND holds_quota)
            OR (instance.deleted_at IS NOT NULL) <> (observed_state = 'deleted')
        """,
        "Instance {hostname} ({subject}) is gone in one place and there in another: {found}.",
    ),
    RowCheck(
        FindingKind.INSTANCE_STUCK,
        """
        SELECT instance_id AS subject, code AS location, hostname,
            'gone, or being deleted' AS expected, observed_state AS found,
            coalesce(status_reason, 'no reason is stored') AS reason
        FROM instance JOIN resource ON resource_id = instance_id
        JOIN location ON location.location_id = instance.location_id
        WHERE desired_state = 'deleted' AND instance.deleted_at IS NULL
            AND active_operation_id IS NULL
        """,
        "Instance {hostname} ({subject}) should be gone, but its deletion ended without that: {reason}",
    ),
    RowCheck(
        FindingKind.IMAGE_STUCK,
        """
        SELECT image_id AS subject, NULL AS location, name, version,
            'gone, or being removed' AS expected, state AS found,
            coalesce(refusal, 'no reason is stored') AS reason
        FROM template_image JOIN template USING (template_id)
        LEFT JOIN operation ON operation_id = template_image.removal_operation_id
        WHERE state = 'removing' AND coalesce(operation.status, '') NOT IN ('queued', 'running')
        """,
        "The image {subject} of {name} {version} should be gone, but its removal ended without that: {reason}",
    ),
    RowCheck(
        FindingKind.VOLUME_ORPHAN,
        """
        SELECT volume_id AS subject, code AS location, volume.instance_id AS instance,
            'deleted' AS expected, volume.state AS found
        FROM volume LEFT JOIN instance USING (instance_id)
        JOIN location ON location.location_id = volume.location_id
        WHERE state <> 'deleted' AND holds_quota IS NOT TRUE
            AND (role = 'root' OR volume.instance_id IS NOT NULL)
        """,
        "The disk {subject} is {found}, but its instance {instance} is gone.",
    ),
)

ADDRESSES = (
    RowCheck(
        FindingKind.NIC_ORPHAN,
        """
        SELECT nic_id AS subject, code AS location, nic.instance_id AS instance,
            'deleted' AS expected, 'live' AS found
        FROM nic LEFT JOIN instance USING (instance_id)
        JOIN location ON location.location_id = nic.location_id
        WHERE nic.deleted_at IS NULL AND holds_quota IS NOT TRUE
        """,
        "The card {subject} is live, but its instance {instance} is gone.",
    ),
    RowCheck(
        FindingKind.PREFIX_ORPHAN,
        """
        SELECT prefix.cidr AS subject, code AS location, prefix.instance_id AS instance,
            'an instance that has it' AS expected, 'none' AS found
        FROM routed_prefix AS prefix JOIN prefix_pool USING (prefix_pool_id)
        JOIN location USING (location_id)
        LEFT JOIN instance ON instance.instance_id = prefix.instance_id
            AND instance.account_id = prefix.account_id
        WHERE (prefix.state = 'assigned' AND holds_quota IS NOT TRUE)
            OR (prefix.state <> 'assigned' AND EXISTS (
                SELECT FROM prefix_name WHERE prefix_name.prefix_id = prefix.prefix_id))
        """,
        "The prefix {subject} is assigned to {instance}, which is gone, or has names of nobody.",
    ),
    RowCheck(
        FindingKind.NIC_ADDRESSES,
        """
        SELECT nic.nic_id AS subject, code AS location, nic.instance_id AS instance,
            'one IPv4 address and at most one IPv6, if it is public' AS expected,
            format('%s and %s', count(*) FILTER (WHERE family = 4),
                count(*) FILTER (WHERE family = 6)) AS found
        FROM nic JOIN location USING (location_id) LEFT JOIN address USING (nic_id)
        WHERE nic.deleted_at IS NULL
        GROUP BY nic.nic_id, code
        HAVING count(*) FILTER (WHERE family = 4) <> CASE nic.role WHEN 'public' THEN 1 ELSE 0 END
            OR count(*) FILTER (WHERE family = 6) > CASE nic.role WHEN 'public' THEN 1 ELSE 0 END
        """,
        "The card {subject} of instance {instance} has {found} addresses (IPv4 and IPv6).",
    ),
    RowCheck(
        FindingKind.ADDRESS_TWICE,
        """
        SELECT host(inet) AS subject, min(code) AS location, 'one card' AS expected,
            count(*) || ' cards' AS found, string_agg(CAST(nic_id AS text), ', ') AS cards
        FROM address JOIN pool USING (pool_id) JOIN location USING (location_id)
        WHERE nic_id IS NOT NULL
        GROUP BY location_id, inet HAVING count(*) > 1
        """,
        "The address {subject} is on {found}: {cards}.",
    ),
    RowCheck(
        FindingKind.ADDRESS_STATE,
        """
        SELECT address_id AS subject, code AS location, host(inet) AS inet, address.state AS expected,
            concat_ws(', ',
                CASE WHEN address.account_id IS NULL THEN 'no owner' ELSE 'an owner' END,
                CASE WHEN address.nic_id IS NULL THEN 'no card'
                    WHEN nic.deleted_at IS NOT NULL THEN 'a deleted card' ELSE 'a card' END,
                CASE WHEN address.resource_id IS NULL THEN 'not a resource'
                    WHEN resource.deleted_at IS NOT NULL THEN 'a deleted resource'
                    ELSE 'a resource' END) AS found
        FROM address JOIN pool USING (pool_id) JOIN location USING (location_id)
        LEFT JOIN nic ON nic.nic_id = address.nic_id
        LEFT JOIN resource ON resource.resource_id = address.resource_id
        WHERE NOT CASE
            WHEN address.state = 'attached' THEN
                nic.nic_id IS NOT NULL AND nic.deleted_at IS NULL
                AND nic.account_id IS NOT DISTINCT FROM address.account_id
            WHEN address.state = 'free' THEN address.nic_id IS NULL AND address.account_id IS NOT NULL
            WHEN address.state = 'gateway' THEN
                address.nic_id IS NULL AND EXISTS (
                    SELECT FROM private_network AS network
                    WHERE address_id IN (gateway_address_id, next_gateway_address_id)
                        AND network.deleted_at IS NULL
                        AND network.account_id = address.account_id)
            ELSE address.nic_id IS NULL AND address.account_id IS NULL
            END
            OR NOT CASE
            WHEN address.family = 4 AND address.state IN ('attached', 'free', 'gateway') THEN
                resource.resource_id IS NOT NULL AND resource.deleted_at IS NULL
                AND resource.kind = 'public_ip'
                AND resource.account_id IS NOT DISTINCT FROM address.account_id
            ELSE address.resource_id IS NULL
            END
        """,
        "The address {inet} ({subject}) is {expected}, but has {found}, or these disagree on the owner.",
    ),
)

NETWORKS = (
    RowCheck(
        FindingKind.NETWORK_GATEWAY,
        """
        SELECT network.resource_id AS subject, code AS location, host(inet) AS inet,
            'gateway, of one network' AS expected,
            format('%s, of %s', address.state, count(*) OVER (PARTITION BY address_id)) AS found
        FROM private_network AS network JOIN location USING (location_id)
        JOIN address ON address_id IN (gateway_address_id, next_gateway_address_id)
        WHERE network.deleted_at IS NULL AND (address.state <> 'gateway' OR (
            SELECT count(*) FROM private_network AS other
            WHERE address_id IN (other.gateway_address_id, other.next_gateway_address_id)) > 1)
        """,
        "The private network {subject} has the gateway {inet}, whose address is {found}.",
    ),
    RowCheck(
        FindingKind.NETWORK_CARD,
        """
        SELECT nic_id AS subject, code AS location, network.resource_id AS network,
            'a live network of its owner' AS expected, network.state AS found
        FROM nic JOIN private_network AS network USING (network_id)
        JOIN location ON location.location_id = nic.location_id
        WHERE nic.deleted_at IS NULL AND (network.deleted_at IS NOT NULL
            OR network.account_id <> nic.account_id
            OR network.location_id <> nic.location_id OR NOT private_ip << cidr)
        """,
        "The card {subject} is in the private network {network}, which is {found}, another account's, or elsewhere.",
    ),
)

COUNTERS = (
    RowCheck(
        FindingKind.PLACEMENT,
        """
        SELECT coalesce(instance.instance_id, placement.instance_id) AS subject, code AS location,
            coalesce(hostname, 'unknown') AS hostname,
            CASE WHEN holds_quota THEN format('node %s: %s vCPU %s, %s MiB, %s GiB',
                instance.node_id, instance.vcpus, cpu_mode, instance.memory_mib, storage_gib)
                ELSE 'none' END AS expected,
            CASE WHEN placement.instance_id IS NULL THEN 'none'
                ELSE format('node %s: %s vCPU %s, %s MiB, %s GiB', placement.node_id,
                placement.vcpus, CASE WHEN is_dedicated THEN 'dedicated' ELSE 'shared' END,
                placement.memory_mib, disk_gib) END AS found
        FROM instance FULL JOIN placement ON placement.instance_id = instance.instance_id
        LEFT JOIN location USING (location_id)
        WHERE (holds_quota IS TRUE) <> (placement.instance_id IS NOT NULL)
            OR (holds_quota AND (
                placement.node_id IS DISTINCT FROM instance.node_id
                OR placement.account_id <> instance.account_id
                OR placement.vcpus <> instance.vcpus
                OR is_dedicated <> (cpu_mode = 'dedicated')
                OR placement.memory_mib <> instance.memory_mib
                OR disk_gib <> storage_gib))
        """,
        "The reservation of instance {hostname} ({subject}) should be {expected}; it is {found}.",
    ),
    RowCheck(
        FindingKind.NODE_COUNTER,
        """
        WITH placed AS (
            SELECT node_id,
                coalesce(sum(vcpus) FILTER (WHERE NOT is_dedicated), 0) AS shared,
                coalesce(sum(vcpus) FILTER (WHERE is_dedicated), 0) AS dedicated,
                sum(memory_mib) AS memory, sum(disk_gib) AS disk
            FROM placement GROUP BY node_id
        )
        SELECT node.node_id AS subject, code AS location, node.name AS node, words,
            coalesce(counted, 0) AS expected, used AS found
        FROM node JOIN location USING (location_id) LEFT JOIN placed USING (node_id),
            LATERAL (VALUES
                ('shared vCPUs', vcpus_used, shared),
                ('dedicated threads', dedicated_threads_used, dedicated),
                ('MiB of memory', memory_mib_used, memory),
                ('GiB of disk', disk_gib_used, disk)) AS counter (words, used, counted)
        WHERE used <> coalesce(counted, 0)
        """,
        "Node {node} says that {found} {words} are used; the reservations on it add up to {expected}.",
    ),
    RowCheck(
        FindingKind.QUOTA_COUNTER,
        _quota_query(),
        "The account {account} ({subject}) is counted as using {found} {words}; its rows say {expected}.",
    ),
)

SPANS = (
    RowCheck(
        FindingKind.SPAN_MISSING,
        """
        SELECT named.resource_id AS subject, code AS location, label, component,
            component || ' billed' AS expected, 'not billed' AS found
        FROM billed JOIN named USING (resource_id) JOIN locked_price USING (resource_id)
        WHERE NOT EXISTS (
            SELECT FROM usage_span WHERE usage_span.resource_id = billed.resource_id
                AND usage_span.component = locked_price.component AND closed_at IS NULL)
        """,
        "The {component} of {label} ({subject}) is in use and not billed.",
        given=(BILLED, NAMED),
    ),
    RowCheck(
        FindingKind.SPAN_UNEXPECTED,
        """
        SELECT named.resource_id AS subject, code AS location, label, component,
            'not billed' AS expected, component || ' billed' AS found,
            CASE WHEN named.deleted_at IS NULL THEN 'not to be billed now' ELSE 'deleted' END AS why
        FROM usage_span JOIN named USING (resource_id)
        WHERE closed_at IS NULL AND resource_id NOT IN (SELECT resource_id FROM billed)
        """,
        "The {component} of {label} ({subject}) is billed, but the thing is {why}.",
        given=(BILLED, NAMED),
    ),
    RowCheck(
        FindingKind.SPAN_PRICE,
        """
        SELECT named.resource_id AS subject, code AS location, label, usage_span.component,
            CASE WHEN locked_price.component IS NULL THEN 'no price was locked'
                ELSE format('%s x %s %s', locked_price.quantity, locked_price.monthly_minor,
                locked_price.currency) END AS expected,
            format('%s x %s %s', usage_span.quantity, usage_span.monthly_minor,
                usage_span.currency) AS found
        FROM usage_span JOIN named USING (resource_id)
        LEFT JOIN locked_price ON locked_price.resource_id = usage_span.resource_id
            AND locked_price.component = usage_span.component
        WHERE closed_at IS NULL AND (
            locked_price.component IS NULL
            OR locked_price.quantity <> usage_span.quantity
            OR locked_price.monthly_minor <> usage_span.monthly_minor
            OR locked_price.currency <> usage_span.currency
            OR locked_price.price_id IS DISTINCT FROM usage_span.price_id
            OR usage_span.account_id <> named.account_id)
        """,
        "The {component} of {label} ({subject}) is billed at {found} a month; it was sold at {expected}.",
        given=(NAMED,),
    ),
    RowCheck(
        FindingKind.SPAN_OVERLAP,
        """
        SELECT named.resource_id AS subject, code AS location, label, component,
            'billed once at a time' AS expected, 'span ' || span_id || ' overlaps' AS found, span_id
        FROM ordered JOIN named USING (resource_id)
        WHERE opened_at < closed_before OR open_before > 0
        """,
        "The {component} of {label} ({subject}) is billed twice at once: span {span_id} overlaps an earlier one.",
        given=(NAMED, ORDERED),
    ),
)

OPERATIONS = (
    RowCheck(
        FindingKind.OPERATION_OVERDUE,
        """
        SELECT operation_id AS subject, NULL AS location, kind, deadline_at,
            'ended, or an alarm, by ' || deadline_at AS expected, status || ', no alarm' AS found
        FROM operation
        WHERE status IN ('queued', 'running') AND alarmed_at IS NULL
            AND deadline_at < now() - make_interval(secs => :grace_s)
        """,
        "The operation {kind} ({subject}) is past its deadline of {deadline_at} and no alarm was raised.",
    ),
    RowCheck(
        FindingKind.RESOURCE_DANGLING,
        """
        SELECT named.resource_id AS subject, code AS location, label, active_operation_id,
            'no active operation' AS expected, coalesce(operation.status, 'unknown operation') AS found
        FROM named LEFT JOIN operation ON operation_id = active_operation_id
        WHERE active_operation_id IS NOT NULL
            AND coalesce(operation.status, '') NOT IN ('queued', 'running')
        """,
        "The {label} ({subject}) waits for the operation {active_operation_id}, which is over ({found}).",
        given=(NAMED,),
    ),
    RowCheck(
        FindingKind.OPERATION_UNHELD,
        """
        SELECT operation_id AS subject, code AS location, label, operation.kind, status,
            'an active operation on its resource' AS expected, 'none' AS found
        FROM operation JOIN named USING (resource_id)
        WHERE status IN ('queued', 'running') AND active_operation_id IS NULL
            AND operation.holds_resource
        """,
        "The operation {kind} ({subject}) is {status}, but the {label} does not know of any operation.",
        given=(NAMED,),
    ),
    RowCheck(
        FindingKind.OPERATION_WITHOUT_WORKFLOW,
        """
        SELECT operation_id AS subject, NULL AS location, kind, operation.status,
            'a workflow that is queued or running' AS expected,
            coalesce(workflow.status, 'none') AS found
        FROM operation
        LEFT JOIN dbos.workflow_status AS workflow
            ON workflow.workflow_uuid = CAST(operation_id AS text)
        WHERE operation.status IN ('queued', 'running')
            AND coalesce(workflow.status, '') NOT IN ('ENQUEUED', 'PENDING', 'DELAYED')
        """,
        "The operation {kind} ({subject}) is {status}, but nothing works on it: its workflow is {found}.",
    ),
    RowCheck(
        FindingKind.WORKFLOW_WITHOUT_OPERATION,
        f"""
        SELECT workflow_uuid AS subject, NULL AS location, workflow.name, workflow.status,
            'an unfinished operation' AS expected, coalesce(operation.status, 'none') AS found
        FROM dbos.workflow_status AS workflow
        LEFT JOIN operation ON CAST(operation_id AS text) = workflow_uuid
        WHERE queue_name = 'operations' AND workflow.status IN ('ENQUEUED', 'PENDING', 'DELAYED')
            AND workflow.name <> '{CAPTURE}'
            AND (operation_id IS NULL OR (operation.status NOT IN ('queued', 'running')
                AND finished_at < now() - make_interval(secs => :grace_s)))
        """,  # noqa: S608 - the name of a workflow
        "The workflow {name} ({subject}) is {status}, but its operation is {found}.",
    ),
    RowCheck(
        FindingKind.SECRET_LEFT,
        """
        SELECT secret_id AS subject, NULL AS location, purpose,
            'forgotten' AS expected, 'stored' AS found
        FROM secret
        WHERE purpose LIKE 'instance.%'
            AND NOT EXISTS (SELECT FROM instance
                WHERE password_secret_id = secret_id AND deleted_at IS NULL)
            AND NOT EXISTS (SELECT FROM instance
                WHERE user_data_secret_id = secret_id AND deleted_at IS NULL)
            AND NOT EXISTS (SELECT FROM instance
                WHERE new_password_secret_id = secret_id AND deleted_at IS NULL)
        """,
        "A secret ({purpose}, {subject}) is still stored, though no instance needs it.",
    ),
    RowCheck(
        FindingKind.SECRET_LEFT,
        """
        SELECT secret_id AS subject, NULL AS location, purpose,
            'forgotten' AS expected, 'stored' AS found
        FROM secret
        WHERE purpose LIKE 'webhook.%'
            AND NOT EXISTS (SELECT FROM webhook_endpoint
                WHERE secret.secret_id IN (webhook_endpoint.secret_id, old_secret_id))
        """,
        "A secret ({purpose}, {subject}) is still stored, though no webhook needs it.",
    ),
    RowCheck(
        FindingKind.SECRET_LEFT,
        """
        SELECT secret_id AS subject, NULL AS location, purpose,
            'forgotten' AS expected, 'stored' AS found
        FROM secret
        WHERE purpose LIKE 'engine.%'
            AND NOT EXISTS (SELECT FROM location_engine WHERE location_engine.secret_id = secret.secret_id)
        """,
        "A secret ({purpose}, {subject}) is still stored, though no engine needs it.",
    ),
)

CONSOLES = (
    RowCheck(
        FindingKind.CONSOLE_UNHELD,
        f"""
        SELECT console_id AS subject, code AS location, hostname, console.state,
            'closed, or held by an API process' AS expected,
            'not seen since ' || coalesce(seen_at, console.created_at) AS found
        FROM console JOIN instance USING (instance_id) JOIN location USING (location_id)
        WHERE console.state IN ('opening', 'ready', 'open')
            AND coalesce(seen_at, console.created_at)
                < now() - make_interval(secs => {LOST_AFTER_S} + :grace_s)
        """,  # noqa: S608 - a number of ours
        "The console {subject} of {hostname} counts as {state}, but no API process holds it: {found}.",
    ),
)

CHECKS: tuple[RowCheck, ...] = (
    *RESOURCES,
    *ADDRESSES,
    *NETWORKS,
    *COUNTERS,
    *SPANS,
    *CONSOLES,
    *OPERATIONS,
)


def _bound(check: RowCheck) -> TextClause:
    statement = text(check.statement)
    return statement.bindparams(grace_s=GRACE_S) if ":grace_s" in check.statement else statement


def check_rows(session: Session) -> Iterator[Finding]:
    """Every rule over all rows that the session sees."""
    for check in CHECKS:
        for row in session.execute(_bound(check)).mappings():
            yield Finding(
                kind=check.kind,
                location=row["location"],
                subject=str(row["subject"]),
                expected=str(row["expected"]),
                found=str(row["found"]),
                sentence=check.sentence.format(**row),
            )
