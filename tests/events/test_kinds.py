"""The catalogue of event kinds: complete, told to customers, and nothing else is recorded."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy.orm import Session

from awan import events
from awan.api import create_app
from awan.events import CUSTOMER_KINDS, OPERATOR_KINDS
from tests.support.builders import make_account
from tests.support.recorded_kinds import Code
from tests.support.simulated_cloud import make_customer

PAGE = Path(__file__).parents[2] / "docs" / "events.md"


def test_the_catalogue_has_all_that_is_recorded_and_nothing_else() -> None:
    assert Code().recorded() == {*CUSTOMER_KINDS, *OPERATOR_KINDS}
    assert not CUSTOMER_KINDS.keys() & OPERATOR_KINDS.keys()


def test_what_is_not_in_the_catalogue_is_a_bug(session: Session) -> None:
    account_id = make_account(session).account_id
    for kind, owner in (
        ("bogus.event", account_id),
        ("bogus.event", None),
        ("node.added", account_id),
    ):
        with pytest.raises(ValueError, match=kind):
            events.record(session, kind=kind, actor="operator", account_id=owner)
    resource_id = uuid4()
    for kind in ("node.added", "operation.queued"):
        events.record(
            session, kind=kind, actor="operator", account_id=None, resource_id=resource_id
        )
    assert len(events.history(session, resource_id)) == 2


def test_the_page_shows_the_catalogue() -> None:
    """`docs/events.md` has these lines; take them from the message of a failure."""
    page = PAGE.read_text()
    for kinds in (CUSTOMER_KINDS, OPERATOR_KINDS):
        lines = "\n".join(f"| `{kind}` | {kinds[kind]} |" for kind in sorted(kinds))
        assert f"|---|---|\n{lines}\n" in page, lines


def test_customers_can_ask_for_the_kinds(settings: object) -> None:
    shown = make_customer().http.get("/events/kinds").json()["data"]
    assert shown == [
        {"kind": kind, "description": CUSTOMER_KINDS[kind]} for kind in sorted(CUSTOMER_KINDS)
    ]


def test_the_document_tells_the_kinds() -> None:
    schema = create_app().openapi()["components"]["schemas"]["EventKindView"]
    said = schema["properties"]["kind"]["description"]
    assert all(f"`{kind}`: {sentence}" in said for kind, sentence in CUSTOMER_KINDS.items())
