"""One cloud on real engines for the whole run. After each test the engines hold nothing and the audit is green."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import LabInfo
from tests.support import lab_cloud
from tests.support.lab_cloud import LabCloud


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
