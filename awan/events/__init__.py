"""Room: the one event log. Every change writes a row in its own transaction; the audit view and followers read it.

`record(session, kind=..., actor=..., account_id=..., resource_id=..., operation_id=..., data=...)` writes,
`history(session, resource_id)` reads one thing's past, `account_events(session, account_id, ...)` an account's,
newest first. Who must miss nothing begins at `present_position(session)` and asks `follow(session, account_id, after,
limit)` again and again, woken by `changes.woken_by(account_id, ...)`.
"""

from awan.events.models import Event
from awan.events.position import Position
from awan.events.service import (
    CHANNEL,
    Settled,
    account_events,
    changes,
    follow,
    history,
    present_position,
    record,
)

__all__ = [
    "CHANNEL",
    "Event",
    "Position",
    "Settled",
    "account_events",
    "changes",
    "follow",
    "history",
    "present_position",
    "record",
]
