"""A database that refuses connections is waited for by workflows, not taken for a failure of their steps."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from dbos._utils import retriable_postgres_exception
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

from awan.kit.database import sqlalchemy_url
from awan.operations import durable


def test_a_refused_connection_is_retried_by_the_workflow_engine(tmp_path: Path) -> None:
    assert durable.APPLICATION  # the mark is made where the workflow engine is known
    with socket.socket(socket.AF_UNIX) as nobody_listens:
        nobody_listens.bind(str(tmp_path / ".s.PGSQL.5432"))
        engine = create_engine(sqlalchemy_url(f"postgresql://awan@/awan?host={tmp_path}"))
        with pytest.raises(OperationalError, match="refused") as caught:
            engine.connect()
        engine.dispose()
    assert retriable_postgres_exception(caught.value)
