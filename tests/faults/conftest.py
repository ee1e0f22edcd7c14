"""Faults on real engines. After each test the lab is healed, the engines hold nothing and the audit is green.

Moments are random: the seed is printed at the end, and AWAN_FAULTS_SEED repeats it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.support import fault_report, lab_cloud
from tests.support.fault_report import FaultRow
from tests.support.lab_cloud import LabCloud

# How often a fault at a random moment is tried: in a sample and in full.
COUNTS = {"kill_number": (2, 10), "outage_number": (1, 5)}
SAMPLED_FAULTS = ("libvirtd", "postgres", "frozen_worker")


def pytest_configure(config: pytest.Config) -> None:
    """The mark by which faults are chosen for the sample."""
    config.addinivalue_line("markers", "fault(name): which part fails; some are left to --full")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`--full` asks for all kills instead of a sample."""
    for name, (sample, full) in COUNTS.items():
        if name in metafunc.fixturenames:
            count = full if metafunc.config.getoption("full") else sample
            metafunc.parametrize(name, range(count))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--full` only some of the faults are tried."""
    if config.getoption("full"):
        return
    left_out = [
        item
        for item in items
        if (mark := item.get_closest_marker("fault")) and mark.args[0] not in SAMPLED_FAULTS
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def lab_cloud_session(request: pytest.FixtureRequest) -> Iterator[LabCloud]:
    """The cloud; started at the first use, ended with the run."""
    yield lab_cloud.shared(request.config)
    lab_cloud.stop_shared(request.config)


@pytest.fixture
def cloud(lab_cloud_session: LabCloud) -> Iterator[LabCloud]:
    """The cloud without instances; healed and emptied after the test."""
    yield lab_cloud_session
    lab_cloud_session.heal()
    lab_cloud_session.delete_all()
    lab_cloud_session.assert_nothing_left()
    lab_cloud_session.assert_green()


@dataclass(frozen=True)
class Durations:
    """How long an undisturbed create and delete take here and now, from the accepted request, in seconds."""

    create_s: float
    delete_s: float


@pytest.fixture(scope="session")
def durations(lab_cloud_session: LabCloud) -> Durations:
    """Measured once, so that random moments fall into the work and not beside it."""
    cloud = lab_cloud_session
    for _ in cloud.info.nodes:  # the image is uploaded to each of them
        cloud.create_instance()
    cloud.delete_all()
    started = time.monotonic()
    uuid = cloud.create_instance()["uuid"]
    created = time.monotonic()
    assert cloud.delete_instance(uuid)["status"] == "succeeded"
    return Durations(created - started, time.monotonic() - created)


@pytest.fixture
def moments(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of this test alone, whatever runs before it."""
    return random.Random(f"{fault_report.SEED} {request.node.name}")


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[FaultRow], None]:
    """Adds a line to the table at the end of the run."""
    return fault_report.reporter(request)
