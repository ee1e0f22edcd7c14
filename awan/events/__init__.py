"""Room: the one event log. Every change writes a row in its own transaction; the audit view and followers read it.

`record(session, kind=..., actor=..., account_id=..., resource_id=..., operation_id=..., data=...)` writes,
`history(session, resource_id)` reads one thing's past, `account_events(session, account_id, ...)` an account's,
newest first. Who must miss nothing begins at `present_position(session)` and asks `follow(session, account_id, after,
limit)` again and again, woken by `changes.woken_by(account_id, ...)`. `kinds` is the catalogue of what can be recorded.
"""

from awan.events.kinds import CUSTOMER_KINDS, OPERATOR_KINDS, has_kinds_like
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
    "CUSTOMER_KINDS",
    "OPERATOR_KINDS",
    "Event",
    "Position",
    "Settled",
    "account_events",
    "changes",
    "follow",
    "has_kinds_like",
    "history",
    "present_position",
    "record",
]
