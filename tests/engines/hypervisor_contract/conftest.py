"""Fixtures of the hypervisor's contract suite."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from awan.engines.hypervisor import DomainSpec
from awan.engines.sim import SimStore
from awan.engines.volumes import ImageSource
from awan.runtime.postgres import EmbeddedPostgres
from lab.layout import TLS_NODE_NUMBER
from lab.location import Lab
from lab.templates import cached
from tests.engines.hypervisor_contract.rigs import (
    Events,
    FakeRig,
    LabRig,
    Rig,
    boot_tiny,
    build_blank,
    remove_all,
)


@pytest.fixture(scope="session")
def sim_database_url() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="awan-sim-"))
    folder.chmod(0o755)
    postgres = EmbeddedPostgres(folder / "data", folder / "run", is_durable=False)
    postgres.init()
    with postgres.running():
        yield postgres.url()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def tiny_image() -> ImageSource:
    found = cached("tiny-1", lambda _: None)
    size_bytes = found.path.stat().st_size
    return ImageSource(found.path, found.sha256, "qcow2", size_bytes, found.virtual_size_bytes)


@pytest.fixture
def lab_rig(lab_slot: Lab) -> Iterator[LabRig]:
    rig = LabRig(lab_slot)
    rig.volumes.ensure_pool(rig.node)
    try:
        yield rig
    finally:
        remove_all(rig)
        rig.hypervisor.close()


@pytest.fixture
def tls_rig(lab_slot: Lab) -> Iterator[LabRig]:
    """The node that is spoken to with certificates."""
    rig = LabRig(lab_slot, TLS_NODE_NUMBER - 1)
    rig.volumes.ensure_pool(rig.node)
    try:
        yield rig
    finally:
        remove_all(rig)
        rig.hypervisor.close()


@pytest.fixture
def fake_rig(sim_database_url: str) -> Iterator[FakeRig]:
    store = SimStore(sim_database_url, location=str(uuid4()))
    rig = FakeRig(store)
    rig.volumes.ensure_pool(rig.node)
    yield rig
    store.close()


@pytest.fixture(params=["fake", pytest.param("libvirt", marks=pytest.mark.lab)])
def rig(request: pytest.FixtureRequest) -> Rig:
    name = "fake_rig" if request.param == "fake" else "lab_rig"
    found: Rig = request.getfixturevalue(name)
    return found


@pytest.fixture
def blank_spec(rig: Rig) -> Callable[..., DomainSpec]:
    """Builds a domain with an empty disk and a CD drive with an image: no system in it, starts in no time."""

    def build(**changes: Any) -> DomainSpec:
        return build_blank(rig, **changes)

    return build


@pytest.fixture
def boot_guest(rig: Rig, tiny_image: ImageSource) -> Callable[..., DomainSpec]:
    """Starts the small guest and waits until its agent answers; gives its spec."""

    def boot(**changes: Any) -> DomainSpec:
        return boot_tiny(rig, tiny_image, **changes)

    return boot


@pytest.fixture
def listen(rig: Rig) -> Iterator[Callable[[UUID], Events]]:
    """Subscribes to the events of a domain of the rig's node."""
    subscriptions = []

    def start(instance_id: UUID) -> Events:
        events = Events(instance_id)
        subscriptions.append(rig.hypervisor.subscribe(rig.node, events.put))
        # The real engine connects in the background: it listens once a call has gone through.
        rig.hypervisor.find_domain(rig.node, instance_id)
        return events

    yield start
    for subscription in subscriptions:
        subscription.cancel()
