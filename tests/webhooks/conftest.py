"""An account with webhooks to a receiver on the loopback, which the operator has allowed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from awan import events
from awan.kit.database import transaction
from awan.settings import Settings
from awan.webhooks import sender
from tests.support.changed_settings import changed_settings
from tests.support.simulated_cloud import make_customer
from tests.webhooks.receiver import WAIT_S, Receiver


@dataclass
class Site:
    """An account, its client, and what the worker's periodic task does."""

    account_id: Any
    http: TestClient

    def add(self, url: str, **fields: Any) -> dict[str, Any]:
        """A webhook as the API answers, with its secret."""
        answer = self.http.post("/webhooks", json={"url": url, **fields})
        assert answer.status_code == 201, answer.text
        return dict(answer.json()["data"])

    def record(self, kind: str = "firewall.applied", count: int = 1) -> None:
        """Events of the account."""
        with transaction() as session:
            for number in range(count):
                events.record(
                    session,
                    kind=kind,
                    actor="key:a",
                    account_id=self.account_id,
                    data={"n": number},
                )

    def until(self, is_true: Callable[[], Any]) -> Any:
        """Delivers again and again until it is true, and gives what it was."""
        deadline = time.monotonic() + WAIT_S
        while not (found := is_true()):
            assert time.monotonic() < deadline
            sender.deliver_due()
            time.sleep(0.05)
        return found

    def deliveries(self, webhook: dict[str, Any], **query: Any) -> list[dict[str, Any]]:
        """The webhook's deliveries."""
        answer = self.http.get(f"/webhooks/{webhook['uuid']}/deliveries", params=query)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"]["data"])

    def delivery(self, webhook: dict[str, Any], uuid: str) -> dict[str, Any]:
        """One delivery with its log."""
        answer = self.http.get(f"/webhooks/{webhook['uuid']}/deliveries/{uuid}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["data"])

    def until_attempted(self, webhook: dict[str, Any], attempts: int = 1) -> dict[str, Any]:
        """The webhook's only delivery of `firewall.applied`, once so many attempts are in its log."""

        def find() -> dict[str, Any] | None:
            for row in self.deliveries(webhook):
                if row["kind"] == "firewall.applied":
                    detail = self.delivery(webhook, row["uuid"])
                    return detail if len(detail["log"]) >= attempts else None
            return None

        return dict(self.until(find))

    def make_due(self) -> None:
        """The pause before the next attempt, or a dead sender's lease, is over."""
        with transaction() as session:
            session.execute(
                text("UPDATE webhook_delivery SET next_attempt_at = now() WHERE state = 'pending'")
            )


@pytest.fixture
def site(settings: Settings) -> Iterator[Site]:
    """The account; loopback and http are allowed."""
    with changed_settings(outbound_allow_http="true", outbound_allowed_networks='["127.0.0.0/8"]'):
        customer = make_customer()
        yield Site(customer.account_id, customer.http)
        deadline = time.monotonic() + WAIT_S
        while sender._sender.free < sender.IN_FLIGHT_MAX:
            assert time.monotonic() < deadline, "calls are still under way"
            time.sleep(0.05)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver that says yes."""
    with Receiver() as running:
        yield running
