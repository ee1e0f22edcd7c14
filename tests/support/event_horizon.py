"""When what has been recorded may be told to who follows."""

from __future__ import annotations

import time

from sqlalchemy import text

from awan.kit.database import get_engine

# Longer than the server bears a transaction in which nothing happens.
HORIZON_S = 30.0


def wait_for_horizon() -> None:
    """Returns when all that is committed is below the horizon (see `events.follow`).

    Events wait for older transactions of the whole server to end, also of databases that other test processes use.
    """
    with get_engine().connect() as connection:
        newest = connection.scalar(text("SELECT max(xid) FROM event"))
        deadline = time.monotonic() + HORIZON_S
        while not connection.scalar(
            text("SELECT pg_snapshot_xmin(pg_current_snapshot()) > CAST(:newest AS xid8)"),
            {"newest": str(newest or 0)},
        ):
            connection.rollback()
            assert time.monotonic() < deadline, "an older transaction does not end"
            time.sleep(0.02)
