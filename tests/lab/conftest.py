"""One cloud on real engines for the whole run. After each test the engines hold nothing and the audit is green."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from lab import LabInfo
from tests.support import lab_cloud
from tests.support.lab_cloud import LabCloud

ACCIDENTS = 4
"""How many tests with the mark `accident` a run has that is not full."""


def pytest_configure(config: pytest.Config) -> None:
    """The mark by which tests are chosen for the sample."""
    config.addinivalue_line("markers", "accident: one of many; a sample of them unless --full")


@pytest.fixture(scope="session")
def lab_cloud_session(request: pytest.FixtureRequest) -> Iterator[LabCloud]:
    """The cloud; started at the first use, ended with the run."""
    yield lab_cloud.shared(request.config)
    lab_cloud.stop_shared(request.config)


@pytest.fixture(scope="session")
def lab_info(lab_cloud_session: LabCloud) -> LabInfo:
    """Addresses and names of the cloud's location."""
    return lab_cloud_session.info


@pytest.fixture
def cloud(lab_cloud_session: LabCloud) -> Iterator[LabCloud]:
    """The cloud without instances; they are removed again after the test."""
    yield lab_cloud_session
    lab_cloud_session.delete_all()
    lab_cloud_session.assert_nothing_left()
    lab_cloud_session.assert_green()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--full` a few of the accidents are tried, others in each run."""
    accidents = [item for item in items if item.get_closest_marker("accident")]
    if config.getoption("full") or len(accidents) <= ACCIDENTS:
        return
    chosen = random.Random(config.getoption("randomly_seed", 0)).sample(
        sorted(accidents, key=lambda item: item.nodeid), ACCIDENTS
    )
    left_out = [item for item in accidents if item not in chosen]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
