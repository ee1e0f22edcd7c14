"""One cloud on real engines for the whole lab suite."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import lab_cloud
from tests.support.lab_cloud import LabCloud

STATE_ROOT = Path("/var/lib/awan")


@pytest.fixture(scope="session")
def lab_cloud_session() -> Iterator[LabCloud]:
    """The cloud; started at the first use, ended with the run."""
    if os.geteuid() != 0:
        pytest.skip("the lab needs root")
    STATE_ROOT.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="test-", dir=STATE_ROOT))
    directory.chmod(0o711)
    cloud = lab_cloud.start(directory, lambda step, seconds: None)
    yield cloud
    lab_cloud.stop(cloud)


@pytest.fixture
def cloud(lab_cloud_session: LabCloud) -> Iterator[LabCloud]:
    """The cloud without instances; they are removed again after the test."""
    yield lab_cloud_session
    lab_cloud_session.delete_all()
