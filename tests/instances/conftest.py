"""A simulated cloud per test."""

from __future__ import annotations

import pytest

from tests.support.in_process_worker import InProcessWorker
from tests.support.simulated_cloud import SimulatedCloud, make_cloud


@pytest.fixture
def cloud(worker: InProcessWorker) -> SimulatedCloud:
    """Location, tier, template, two nodes and a customer, over simulated engines."""
    return make_cloud()
