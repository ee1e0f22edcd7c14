"""The catalogue of event kinds: every kind that is recorded, and what it says happened.

A kind is `<noun>.<past participle>`, or the kind of an operation (`instance.start`): then that operation was begun, and
`operation.succeeded`, `operation.failed` or `operation.cancelled` tells how it ended. `webhook.test` alone is neither.
"""

from __future__ import annotations

CUSTOMER_KINDS = {
    "account.changed": "The account's name, state or quotas were changed.",
    "account.created": "The account was created.",
    "api_key.created": "An API key was created.",
    "api_key.revoked": "An API key was revoked.",
    "console.closed": "A console was closed.",
    "console.opened": "A console was opened: a viewer is connected to the instance's screen.",
    "console.requested": "A ticket for a console was issued.",
    "firewall.applied": "All changes of the firewall are in force.",
    "firewall.groups_changed": "The firewall groups that the instance is behind were changed.",
    "firewall.ipset_created": "An IPSet was created.",
    "firewall.ipset_deleted": "An IPSet was deleted.",
    "firewall.ipset_entry_created": "An entry was added to an IPSet.",
    "firewall.ipset_entry_deleted": "An entry was taken out of an IPSet.",
    "firewall.pending": "Changes of the firewall are not in force yet; they are tried again.",
    "firewall.policy_changed": "What the firewall does with traffic that no rule matches was changed.",
    "firewall.rule_changed": "A firewall rule was changed.",
    "firewall.rule_created": "A firewall rule was created.",
    "firewall.rule_deleted": "A firewall rule was deleted.",
    "firewall.rule_disabled": "A firewall rule was disabled.",
    "firewall.rule_enabled": "A firewall rule was enabled.",
    "firewall.rule_moved": "A firewall rule was moved to another position.",
    "firewall.rules_replaced": "All firewall rules were replaced.",
    "firewall.trial_begun": "A trial of the firewall was begun.",
    "firewall.trial_confirmed": "A trial was confirmed: what was changed in it stays.",
    "firewall.trial_reverted": "A trial ended: what was changed in it was taken back.",
    "firewall_group.applied": "All changes of the firewall group are in force.",
    "firewall_group.changed": "The firewall group's name, description or labels were changed.",
    "firewall_group.created": "A firewall group was created.",
    "firewall_group.deleted": "The firewall group was deleted.",
    "firewall_group.pending": "Changes of the firewall group are not in force yet; they are tried again.",
    "firewall_group.rules_replaced": "The rules of the firewall group were replaced.",
    "instance.add_ipv6_prefix": "A routed IPv6 prefix is being given to the instance.",
    "instance.attach_network": "The instance is being attached to a private network.",
    "instance.charged_stopped": "The instance was stopped before its first boot was over; it is charged from now on.",
    "instance.crashed": "The instance crashed.",
    "instance.create_failed": "The instance could not be created, or its creation was cancelled.",
    "instance.created": "The instance was created and runs.",
    "instance.delete": "The instance is being deleted.",
    "instance.deleted": "The instance was deleted.",
    "instance.detach_network": "The instance is being detached from a private network.",
    "instance.ipv6_name_changed": "The reverse name of an IPv6 address of the instance was changed.",
    "instance.labelled": "The instance's labels were changed.",
    "instance.lost": "The instance was lost with its node.",
    "instance.lost_power": "The instance was found without power, though it should run.",
    "instance.paused": "The instance was found paused.",
    "instance.powered_off": "The instance shut down, or its power was cut, without a call of the API.",
    "instance.powered_on": "The instance was found running without a call of the API.",
    "instance.protected": "The instance was protected from deletion.",
    "instance.public_network_changed": "The instance's public address was added, changed or removed.",
    "instance.reachable": "The instance's node answers again.",
    "instance.ready": "The instance's first boot is over; it is charged from now on.",
    "instance.recover": "The instance is being brought back to running, by the control plane.",
    "instance.remove_ipv6_prefix": "The routed IPv6 prefix of the instance is being taken away.",
    "instance.rename": "The instance's hostname is being changed.",
    "instance.renamed": "The instance's hostname was changed.",
    "instance.repair": "What the instance lacks is being put back, by the control plane.",
    "instance.reset": "The instance is being reset.",
    "instance.restart": "The instance is being restarted.",
    "instance.resumed": "The paused instance was found running again.",
    "instance.set_password": "The instance's password is being set.",
    "instance.silent": "The instance's guest gave no sign of life in time; it is charged from now on.",
    "instance.start": "The instance is being started.",
    "instance.stop": "The instance is being stopped.",
    "instance.unprotected": "The instance's protection from deletion was taken away.",
    "instance.unreachable": "The instance's node does not answer.",
    "operation.cancelled": "An operation was cancelled, and what it had done was undone.",
    "operation.failed": "An operation failed, and what it had done was undone.",
    "operation.queued": "An operation was begun.",
    "operation.succeeded": "An operation succeeded.",
    "private_network.create": "A private network is being created.",
    "private_network.delete": "The private network is being deleted.",
    "private_network.gateway": "The private network's gateway is being changed.",
    "private_network.renamed": "The private network was renamed.",
    "private_network.repaired": "What the private network lacked was put back.",
    "public_ip.allocated": "A public address was allocated to the account.",
    "public_ip.rdns_changed": "The reverse name of a public address was changed.",
    "public_ip.released": "A public address was given back.",
    "ssh_key.created": "An SSH key was added.",
    "ssh_key.deleted": "An SSH key was deleted.",
    "webhook.changed": "The webhook was changed.",
    "webhook.created": "The webhook was created.",
    "webhook.deleted": "The webhook was deleted.",
    "webhook.disabled": "The webhook was disabled, because its receiver took no messages.",
    "webhook.replayed": "A delivery of the webhook is being sent again.",
    "webhook.secret_rotated": "The webhook has a new secret.",
    "webhook.test": "Nothing has happened: the webhook is being tried.",
}
"""Kind -> one sentence: what the owner of an account reads in lists, streams and webhooks."""

OPERATOR_KINDS = {
    "instance.found": "What a node told of an instance that led to its repair, in the engine's words.",
    "instance.note_removed": "A note about an instance was removed.",
    "instance.noted": "A note about an instance was written.",
    "location.changed": "A location was changed.",
    "location.created": "A location was created.",
    "location.engine_set": "An engine of a location was set.",
    "network.repaired": "The switch of a public network was put back.",
    "node.abandoned": "A node was given up for good.",
    "node.added": "A node is in service.",
    "node.adding": "A node is being added.",
    "node.cordoned": "A node was taken out of placement.",
    "node.fenced": "An abandoned node came back, and what ran on it was stopped.",
    "node.reachable": "A node answers again.",
    "node.removed": "A node was removed.",
    "node.removing": "A node is being removed.",
    "node.uncordoned": "A node was taken back into placement.",
    "node.unreachable": "A node does not answer.",
    "operation.overdue": "An operation has not ended by its deadline.",
    "operation.undo_failed": "An operation failed, and something that it had done could not be undone.",
    "pool.created": "A pool of public addresses was created.",
    "pool.deleted": "A pool of public addresses was deleted.",
    "prefix_pool.created": "A pool of routed prefixes was created.",
    "prefix_pool.deleted": "A pool of routed prefixes was deleted.",
    "prefix_router.repaired": "The router of routed prefixes was put right.",
    "price.set": "A price was set.",
    "quarantine.entered": "Something was found on an engine that no row knows.",
    "quarantine.left": "Something that no row knew is not on its engine any more.",
    "size.created": "A size template was created.",
    "size.disabled": "A size template was removed.",
    "template.changed": "A template was changed.",
    "template.created": "A template was created.",
    "template.removed": "A template was removed.",
    "template_image.removed": "An image of a template was removed.",
    "tier.changed": "A tier was changed.",
    "tier.created": "A tier was created.",
}
"""Kind -> one sentence: events of no account."""


def check_kind(kind: str, *, is_for_customer: bool) -> None:
    """Raises: ValueError for a kind that the catalogue has not, or has for the operator only: a bug."""
    if kind in CUSTOMER_KINDS or (kind in OPERATOR_KINDS and not is_for_customer):
        return
    raise ValueError(f"{kind} is no kind of event{' of an account' if is_for_customer else ''}")


def has_kinds_like(pattern: str) -> bool:
    """Whether a kind that customers see matches `*`, `instance.*` or `instance.created`."""
    if pattern == "*" or pattern in CUSTOMER_KINDS:
        return True
    noun, _, verb = pattern.partition(".")
    return verb == "*" and any(kind.startswith(f"{noun}.") for kind in CUSTOMER_KINDS)
