"""Run by Alembic: connects the revisions with the given connection and with the models."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext

from awan.events.models import Xid8
from awan.migrations import load_metadata


def render_item(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """How a type of our own is written in a revision."""
    if kind == "type" and isinstance(item, Xid8):
        autogen.imports.add("from awan.events.models import Xid8")
        return "Xid8()"
    return False


# Only the default schema is looked at: `dbos` and `sim` are not ours.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=load_metadata(),
    render_item=render_item,
    compare_type=True,
    compare_server_default=True,
)
with context.begin_transaction():
    context.run_migrations()
