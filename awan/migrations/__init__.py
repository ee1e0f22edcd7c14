"""The schema's history. `awan migrate` brings a database to the newest revision.

    python -m awan.migrations "volume gets a checksum"       writes a revision with what the schema lacks
    python -m awan.migrations --replace "initial schema"     forgets all revisions and writes one (before a release)

Both work on a throw-away PostgreSQL of their own. The schemas `dbos` (workflow engine) and `sim` (simulated
engines) belong to others and are left alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path

from alembic.config import Config
from sqlalchemy import Connection, MetaData
from sqlalchemy.dialects.postgresql.base import ischema_names

import awan
from awan.events.models import Xid8
from awan.kit.database import Base


def load_metadata() -> MetaData:
    """The tables of all rooms: every `awan/<room>/models.py`, and that of the stored secrets."""
    importlib.import_module("awan.kit.secrets")
    # SQLAlchemy knows this type of PostgreSQL by no name of its own.
    ischema_names["xid8"] = Xid8
    for module in pkgutil.iter_modules(awan.__path__):
        name = f"awan.{module.name}.models"
        if module.ispkg and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    return Base.metadata


def alembic_config(connection: Connection) -> Config:
    """Alembic's configuration, bound to a connection whose transaction is the caller's."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
    config.attributes["connection"] = connection
    return config
