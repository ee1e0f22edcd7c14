"""Durable work inside guests.

instance.set_password   seed (of a stopped guest) | guest's agent (of a running one)
instance.rename         seed -> DHCP name -> guest's agent, where it answers
instance.reset          reset
instance.scrub_seed     seed without the password that a guest has booted with

A guest that has been through its first boot gets a new seed as one of the next generation: the CD changes in one step,
and the rows know of it only when the operation has succeeded. An undo puts the present generation back.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from uuid import UUID

from sqlalchemy.orm import Session

from awan.engines.hypervisor import AgentAnswer
from awan.engines.seed import SeedSpec, render_seed
from awan.errors import Conflict
from awan.events import record
from awan.instances.models import Instance, ObservedState
from awan.instances.situation import (
    PASSWORD_PURPOSE,
    SECRET_GENERATION,
    SEED_TARGET,
    Situation,
    read_situation,
    render_later_seed,
    seed_spec,
)
from awan.instances.steps import note_power, settle_late_step
from awan.instances.workflows import mark_change_failed, mark_running
from awan.kit.clock import now
from awan.kit.database import transaction
from awan.kit.secrets import delete_secret, get_secret
from awan.networks.private_names import mark_networks_of
from awan.operations import (
    Failure,
    Plan,
    Step,
    Target,
    register,
)
from awan.resources import Resource

SCRUB_AGAIN_S = 600.0

AGENT_SILENT = (
    "The guest agent does not answer, so the password was not changed. Install or start qemu-guest-agent in the guest;"
    " or stop the instance and set the password then: the guest takes it at its next boot."
)
AGENT_REFUSED = (
    "The guest refused the new password: its account {username} may not exist any more."
    " Nothing was changed."
)


# --- seeds of later boots ---


def _put_next_seed(it: Situation, spec: SeedSpec, *, with_password: bool) -> None:
    """The guest's CD holds the seed of the next generation, and no other seed is left."""
    generation = it.instance.seed_generation + 1
    iso = render_later_seed(spec, with_password=with_password)
    seed = it.engines.volumes.ensure_seed(it.node, it.instance.instance_id, generation, iso)
    it.engines.hypervisor.ensure_media(it.node, it.instance.instance_id, SEED_TARGET, seed.path)
    it.engines.volumes.delete_seeds(it.node, it.instance.instance_id, keep=generation)


def undo_write_seed(target: Target) -> None:
    """The guest's CD holds the seed that the rows know, and no other seed is left."""
    it = read_situation(target.subject_id)
    seed = it.ensure_seed()
    it.engines.hypervisor.ensure_media(it.node, target.subject_id, SEED_TARGET, seed.path)
    it.engines.volumes.delete_seeds(it.node, target.subject_id, keep=it.instance.seed_generation)


def _is_running(it: Situation) -> bool:
    return it.instance.observed_state == ObservedState.RUNNING


def _changes_seed(instance: Instance) -> bool:
    """Whether a new password changes the seed: it goes there, or an older one is there, which must not come back.

    The seed of the first boot is taken from a guest that runs by the wait for that boot.
    """
    if instance.seed_generation == SECRET_GENERATION:
        return instance.new_password_in_seed
    return instance.new_password_in_seed or instance.seed_has_password


# --- password ---


def _new_hash(instance: Instance) -> str:
    assert instance.new_password_secret_id is not None
    with transaction() as session:
        return get_secret(session, instance.new_password_secret_id, PASSWORD_PURPOSE)


def write_password_seed(target: Target) -> None:
    """A stopped guest's seed sets the new password. A running guest's does not set an older one any more."""
    it = read_situation(target.subject_id)
    if not _changes_seed(it.instance):
        return
    spec = replace(seed_spec(it), password_hash=_new_hash(it.instance))
    if it.instance.seed_generation == SECRET_GENERATION:
        # Whether the first boot is still to come or only was not seen: the one or the other part of it sets it.
        iso = render_seed(spec, insists=True)
        it.engines.volumes.ensure_seed(it.node, target.subject_id, SECRET_GENERATION, iso)
    else:
        _put_next_seed(it, spec, with_password=it.instance.new_password_in_seed)


def undo_write_password_seed(target: Target) -> None:
    """The seed is as before."""
    it = read_situation(target.subject_id)
    if _changes_seed(it.instance):
        undo_write_seed(target)


def set_password_in_guest(target: Target) -> None:
    """A running guest's account has the new password. Raises: Conflict when its agent is silent or refuses."""
    it = read_situation(target.subject_id)
    if it.instance.new_password_in_seed:
        return
    answer = it.engines.hypervisor.set_password(
        it.node, it.instance.instance_id, it.instance.username, _new_hash(it.instance)
    )
    if answer is AgentAnswer.SILENT:
        raise Conflict(AGENT_SILENT)
    if answer is AgentAnswer.REFUSED:
        raise Conflict(AGENT_REFUSED.format(username=it.instance.username))


def mark_password_set(session: Session, target: Target) -> None:
    """The new hash takes the old one's place; where the seed was written, its generation counts."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    if instance.deleted_at is not None:
        return
    if _changes_seed(instance):
        if instance.seed_generation > SECRET_GENERATION:
            instance.seed_generation += 1
        instance.seed_has_password = instance.new_password_in_seed
        instance.seed_look_at, instance.seed_heard_at = now(), None
    old = instance.password_secret_id
    instance.password_secret_id = instance.new_password_secret_id
    instance.new_password_secret_id, instance.new_password_in_seed = None, False
    instance.updated_at = now()
    session.flush()
    if old is not None:
        delete_secret(session, old)


def mark_password_not_set(session: Session, target: Target, failure: Failure) -> None:
    """The new password is forgotten; the instance itself is as it was."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    new, instance.new_password_secret_id = instance.new_password_secret_id, None
    instance.new_password_in_seed = False
    session.flush()
    if new is not None:
        delete_secret(session, new)


def write_scrubbed_seed(target: Target) -> None:
    """The seed holds no password any more."""
    it = read_situation(target.subject_id)
    if it.instance.seed_has_password:
        _put_next_seed(it, seed_spec(it), with_password=False)


def undo_write_scrubbed_seed(target: Target) -> None:
    """The seed is as before."""
    undo_write_seed(target)


def mark_scrubbed(session: Session, target: Target) -> None:
    """The next generation counts."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    if instance.seed_has_password and instance.deleted_at is None:
        instance.seed_generation += 1
        instance.seed_has_password = False


def mark_not_scrubbed(session: Session, target: Target, failure: Failure) -> None:
    """The password stays in the seed for now; it is tried again later."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    instance.seed_look_at = now() + timedelta(seconds=SCRUB_AGAIN_S)


# --- hostname ---


def _new_hostname(instance_id: UUID) -> str:
    with transaction() as session:
        return session.get_one(Resource, instance_id).name


def write_renamed_seed(target: Target) -> None:
    """The guest's seed says the new name."""
    it = read_situation(target.subject_id)
    spec = replace(seed_spec(it), hostname=_new_hostname(target.subject_id))
    if it.instance.seed_generation > SECRET_GENERATION:
        _put_next_seed(it, spec, with_password=it.instance.seed_has_password)
    else:
        # The guest is off, so nobody reads the file, whose name stays: its first boot is still to come.
        it.engines.volumes.ensure_seed(
            it.node,
            target.subject_id,
            SECRET_GENERATION,
            render_seed(spec, insists=it.instance.seed_has_password),
        )


def rename_ports(target: Target) -> None:
    """DHCP offers the new name."""
    it = read_situation(target.subject_id)
    hostname = _new_hostname(target.subject_id)
    for _, port in it.ports:
        it.engines.fabric.ensure_port(replace(port, hostname=hostname))


def undo_rename_ports(target: Target) -> None:
    """DHCP offers the old name."""
    it = read_situation(target.subject_id)
    for _, port in it.ports:
        it.engines.fabric.ensure_port(port)


def rename_guest(target: Target) -> None:
    """A running guest has the new name now, if its agent can give it; else it takes it at its next boot."""
    it = read_situation(target.subject_id)
    answer = AgentAnswer.SILENT
    if _is_running(it):
        hostname = _new_hostname(target.subject_id)
        answer = it.engines.hypervisor.set_hostname(it.node, target.subject_id, hostname)
    with transaction() as session:
        instance = session.get_one(Instance, target.subject_id, with_for_update=True)
        instance.hostname_is_pending = answer is not AgentAnswer.DONE


def undo_rename_guest(target: Target) -> None:
    """A running guest that listens has the old name again."""
    it = read_situation(target.subject_id)
    if _is_running(it):
        it.engines.hypervisor.set_hostname(it.node, target.subject_id, it.instance.hostname)


def mark_renamed(session: Session, target: Target) -> None:
    """The new name counts; the event tells when the guest has it."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    resource = session.get_one(Resource, target.subject_id)
    if instance.deleted_at is not None:
        return
    instance.hostname = resource.name
    if instance.seed_generation > SECRET_GENERATION:
        instance.seed_generation += 1
    instance.updated_at = now()
    record(
        session,
        kind="instance.renamed",
        actor=f"operation:{target.operation_id}",
        account_id=instance.account_id,
        resource_id=instance.instance_id,
        operation_id=target.operation_id,
        data={
            "hostname": instance.hostname,
            "applied": "next_boot" if instance.hostname_is_pending else "now",
        },
    )


def mark_not_renamed(session: Session, target: Target, failure: Failure) -> None:
    """The old name stays. Nobody could take it meanwhile: names are compared with both."""
    instance = session.get_one(Instance, target.subject_id, with_for_update=True)
    if instance.deleted_at is None:
        session.get_one(Resource, target.subject_id).name = instance.hostname
        mark_networks_of(session, target.subject_id)


# --- reset ---


def reset_domain(target: Target) -> None:
    """The reset button is pressed. Run again, it is pressed again: the guest then starts anew once more."""
    it = read_situation(target.subject_id)
    it.engines.hypervisor.reset(it.node, it.instance.instance_id)


SET_PASSWORD = register(
    Plan(
        workflow="instance.set_password.v1",
        kind="instance.set_password",
        steps=(
            Step("seed", write_password_seed, undo_write_password_seed, percent=10),
            Step("guest", set_password_in_guest, percent=60),
        ),
        succeed=mark_password_set,
        fail=mark_password_not_set,
        overtaken=settle_late_step,
        deadline_s=300,
    )
)
SCRUB_SEED = register(
    Plan(
        workflow="instance.scrub_seed.v1",
        kind="instance.scrub_seed",
        steps=(Step("seed", write_scrubbed_seed, undo_write_scrubbed_seed, percent=10),),
        succeed=mark_scrubbed,
        fail=mark_not_scrubbed,
        overtaken=settle_late_step,
        deadline_s=300,
    )
)
RENAME = register(
    Plan(
        workflow="instance.rename.v1",
        kind="instance.rename",
        steps=(
            Step("seed", write_renamed_seed, undo_write_seed, percent=10),
            Step("port", rename_ports, undo_rename_ports, percent=40),
            Step("guest", rename_guest, undo_rename_guest, percent=60),
        ),
        succeed=mark_renamed,
        fail=mark_not_renamed,
        overtaken=settle_late_step,
        deadline_s=300,
    )
)
RESET = register(
    Plan(
        workflow="instance.reset.v1",
        kind="instance.reset",
        steps=(Step("reset", reset_domain, note_power, percent=30),),
        succeed=mark_running,
        fail=mark_change_failed,
        overtaken=settle_late_step,
        deadline_s=120,
    )
)
