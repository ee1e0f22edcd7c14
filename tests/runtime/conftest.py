"""Directories that PostgreSQL's own user can enter, with paths short enough for sockets."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def open_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="awan-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)
