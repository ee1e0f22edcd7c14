"""What the whole database holds, in a form that two moments can be compared by."""

from __future__ import annotations

from sqlalchemy import text

from awan.kit.database import get_engine
from tests.support.database_server import TABLES

# Calls count and keys note their use whatever the answer is; workers' hearts beat.
RESTLESS = {"public.rate_counter", "public.api_key", "public.worker"}


def contents() -> dict[str, str]:
    """Table -> number of rows and a digest of all of them. Equal when, and only when, nothing was changed."""
    with get_engine().connect() as connection:
        names = sorted(set(connection.scalars(text(TABLES))) - RESTLESS)
        union = " UNION ALL ".join(
            f"SELECT '{name}', count(*) || ' ' || coalesce(md5(string_agg(line, '' ORDER BY line)), '')"
            f" FROM (SELECT one::text AS line FROM {name} AS one) AS lines"
            for name in names
        )
        return {row[0]: row[1] for row in connection.execute(text(union))}


def changed(before: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """The tables that are not as they were, each with how it was and is."""
    after = contents()
    return {
        name: (before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }
