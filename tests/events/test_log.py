"""The event log: written with the change, announced when it commits."""

from __future__ import annotations

from uuid import uuid4

import psycopg
from sqlalchemy.orm import Session

from awan import events
from awan.settings import Settings
from tests.support.builders import make_account


def test_an_event_commits_with_its_change(session: Session, settings: Settings) -> None:
    account_id, resource_id = make_account(session).account_id, uuid4()
    session.commit()
    with psycopg.connect(settings.database_url, autocommit=True) as listener:
        listener.execute(f"LISTEN {events.CHANNEL}")
        events.record(session, kind="firewall.rule_moved", actor="key:a", account_id=account_id)
        session.rollback()
        for number in range(2):
            events.record(
                session,
                kind="firewall.applied",
                actor="key:a",
                account_id=account_id,
                resource_id=resource_id,
                data={"n": number, "text": "é"},
            )
        events.record(session, kind="ssh_key.created", actor="operator", account_id=None)
        assert list(listener.notifies(timeout=0.1)) == []
        session.commit()
        announced = [
            (notify.channel, notify.payload)
            for notify in listener.notifies(timeout=2, stop_after=2)
        ]
    assert announced == [("awan_event", str(account_id)), ("awan_event", "")]
    past = events.history(session, resource_id)
    assert [event.data["n"] for event in past] == [1, 0]
    assert past[0].xid == past[1].xid
    assert [event.kind for event in events.history(session, resource_id, limit=1)] == [
        "firewall.applied"
    ]
    assert len(events.account_events(session, account_id)) == 2
