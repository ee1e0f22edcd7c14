"""What owners change about their instances besides power: password, name, labels, protection. And hard resets.

The caller holds the transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from awan.accounts import Caller
from awan.engines.seed import hash_password
from awan.errors import Conflict, Invalid
from awan.events import record
from awan.firewall.groups import follow_labels
from awan.firewall.membership import lock_membership
from awan.instances.create import HOSTNAME_TAKEN
from awan.instances.guest_workflows import RENAME, RESET, SET_PASSWORD
from awan.instances.models import DesiredState, Instance, ObservedState
from awan.instances.rules import check_password
from awan.instances.schemas import PasswordChange
from awan.instances.service import (
    begin_change,
    is_hostname_taken,
    lock_idle,
    lock_instance,
    refuse_unless_changeable,
    require_state,
)
from awan.instances.situation import PASSWORD_PURPOSE, SECRET_GENERATION
from awan.kit.secrets import put_secret
from awan.networks.private_names import mark_networks_of
from awan.operations import Operation
from awan.resources import Resource, ResourceKind, get_owned

FIRST_BOOT_PENDING = (
    "The guest has not finished its first boot yet. Try again once ready_at of the instance is set."
)
# The seed of the first boot is kept until the guest gives a sign, also when it counts as ready for its silence.
FIRST_BOOT_UNSEEN = (
    "The guest has not been seen to finish its first boot: that is known once its agent answers or, if its template"
    " has no agent, once it sends packets."
)
UNSEEN_RUNNING = (
    f"{FIRST_BOOT_UNSEEN} See on the console of the instance how far it gets, and try again a minute after it has"
    " booted; or stop the instance and rename it then."
)
NEXT_BOOT = "The instance is stopped: its guest takes the password at its next boot."


def set_password(
    session: Session, caller: Caller, instance_id: UUID, change: PasswordChange
) -> Operation:
    """Gives the instance's account another password: by the agent of a running guest, else at the next boot.

    Raises: NotFound, Invalid, Conflict (busy, its node unreachable, neither running nor stopped).
    """
    resource, instance = lock_instance(session, caller, instance_id)
    _check_password(change, instance)
    refuse_unless_changeable(session, resource, instance)
    is_stopped = instance.observed_state == ObservedState.STOPPED
    secret = put_secret(session, PASSWORD_PURPOSE, hash_password(change.password))
    session.flush()
    instance.new_password_secret_id = secret
    instance.new_password_in_seed = is_stopped
    return begin_change(session, caller, SET_PASSWORD, resource, instance, _as_wanted(instance))


def _check_password(change: PasswordChange, instance: Instance) -> None:
    errors: dict[str, list[str]] = {}
    problems = check_password(
        change.password, username=instance.username, hostname=instance.hostname
    )
    if problems:
        errors["password"] = problems
    if change.password_confirmation != change.password:
        errors["password_confirmation"] = ["The password_confirmation is not the password."]
    if errors:
        raise Invalid(errors)


def rename(session: Session, caller: Caller, instance_id: UUID, hostname: str) -> Operation:
    """Gives the instance another name, its guest included: now by the guest's agent, else at its next boot.

    Raises: NotFound, Invalid, Conflict (busy, its node unreachable, neither running nor stopped, or running in its
    first boot).
    """
    resource, instance = lock_instance(session, caller, instance_id)
    if is_hostname_taken(session, resource.account_id, hostname, by_other_than=instance_id):
        raise Invalid.field("hostname", HOSTNAME_TAKEN)
    refuse_unless_changeable(session, resource, instance)
    is_running = instance.observed_state == ObservedState.RUNNING
    if is_running and instance.seed_generation == SECRET_GENERATION:
        raise Conflict(FIRST_BOOT_PENDING if instance.ready_at is None else UNSEEN_RUNNING)
    try:
        with session.begin_nested():
            resource.name = hostname
    except IntegrityError as err:
        # Taken by a transaction that committed since we looked.
        raise Invalid.field("hostname", HOSTNAME_TAKEN) from err
    operation = begin_change(session, caller, RENAME, resource, instance, _as_wanted(instance))
    mark_networks_of(session, instance_id)
    return operation


def reset(session: Session, caller: Caller, instance_id: UUID) -> Operation:
    """Presses the reset button of a running instance. Raises: NotFound, Conflict (busy, not running)."""
    resource, instance = lock_idle(session, caller, instance_id)
    require_state(instance, ObservedState.RUNNING, "reset")
    return begin_change(session, caller, RESET, resource, instance, DesiredState.RUNNING)


def set_labels(
    session: Session, caller: Caller, instance_id: UUID, labels: Mapping[str, str]
) -> None:
    """The instance has these labels and no others, and the firewall groups that go by them.

    Raises: NotFound, QuotaExceeded (firewall groups).
    """
    owned = get_owned(session, caller, ResourceKind.INSTANCE, instance_id)
    lock_membership(session, owned.account_id)
    resource, _ = lock_instance(session, caller, instance_id)
    if resource.labels != labels:
        follow_labels(session, caller, resource, labels)
        _record(session, caller, resource, "instance.labelled", {"labels": dict(labels)})


def set_protection(session: Session, caller: Caller, instance_id: UUID, is_protected: bool) -> None:
    """Whether the instance's deletion is refused. Raises: NotFound."""
    resource, _ = lock_instance(session, caller, instance_id)
    if resource.is_protected != is_protected:
        resource.is_protected = is_protected
        kind = "instance.protected" if is_protected else "instance.unprotected"
        _record(session, caller, resource, kind, {})


def _record(
    session: Session, caller: Caller, resource: Resource, kind: str, data: dict[str, object]
) -> None:
    record(
        session,
        kind=kind,
        actor=caller.actor,
        account_id=resource.account_id,
        resource_id=resource.resource_id,
        data=data,
    )
    session.flush()


def _as_wanted(instance: Instance) -> DesiredState:
    """The power that is wanted stays what it is."""
    return DesiredState(instance.desired_state)
