"""One cloud on real engines for the whole run. After each test the engines hold nothing and the audit is green."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from lab import LabInfo
from tests.support import lab_cloud
from tests.support.lab_cloud import LabCloud

SAMPLE_SIZES = {"accident": 4, "story": 4}
"""How many tests with the mark `sampled` of this kind a run has that is not full."""


def pytest_configure(config: pytest.Config) -> None:
    """The mark by which tests are chosen for the sample."""
    config.addinivalue_line("markers", "sampled(kind): some of this kind in a run, all with --full")


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
    """Without `--full` a few tests of each sampled kind are run, others in each run."""
    if config.getoption("full"):
        return
    left_out = set[pytest.Item]()
    for kind, size in SAMPLE_SIZES.items():
        several = [
            item
            for item in items
            if (mark := item.get_closest_marker("sampled")) and mark.args[0] == kind
        ]
        if len(several) > size:
            several.sort(key=lambda item: item.nodeid)
            draw = random.Random(config.getoption("randomly_seed", 0))
            left_out.update(draw.sample(several, len(several) - size))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
