"""Who waits for the locks of a transaction."""

from __future__ import annotations

import time

from sqlalchemy import Connection, text

# Not pg_stat_activity: within a transaction it shows those sessions only that it showed at the first look.
_WAITERS = text(
    "SELECT count(DISTINCT pid) FROM pg_locks"
    " WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))"
)


def wait_for_waiters(holder: Connection, count: int = 1) -> None:
    """Returns when so many sessions wait for a lock of the holder's. Raises: AssertionError after a minute."""
    deadline = time.monotonic() + 60
    while (holder.scalar(_WAITERS) or 0) < count:
        assert time.monotonic() < deadline, "nobody waits"
        time.sleep(0.01)
