"""Room: the one event log. Every change writes a row in its own transaction; the audit view and followers read it.

`record(session, kind=..., actor=..., account_id=..., resource_id=..., operation_id=..., data=...)` writes,
`history(session, resource_id)` reads one thing's past, `account_events(session, account_id, ...)` an account's.
"""

from awan.events.models import Event
from awan.events.service import CHANNEL, account_events, history, record

__all__ = ["CHANNEL", "Event", "account_events", "history", "record"]
