"""A cloud on real engines for the time of a benchmark."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import lab_cloud
from tests.support.lab_cloud import LabCloud


@contextmanager
def real_cloud() -> Iterator[LabCloud]:
    """A lab slot and a control plane of its own; both end with the block."""
    root = Path("/var/lib/awan")
    root.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=root))
    directory.chmod(0o711)
    cloud = lab_cloud.start(directory, lambda step, seconds: None)
    try:
        yield cloud
    finally:
        lab_cloud.stop(cloud)
