"""The lab that the real engines of all contract suites run in."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab import Lab, acquire_free_slot


@pytest.fixture(scope="session")
def lab_slot() -> Iterator[Lab]:
    """A location of our own, in a free slot."""
    if os.geteuid() != 0:
        pytest.skip("the lab needs root")
    lab = Lab(acquire_free_slot(first=1))
    try:
        lab.up()
        yield lab
    finally:
        lab.down()
