"""Deliveries of webhooks, where no sender runs."""

from __future__ import annotations

from typing import Any

from awan.webhooks.deliveries import fan_out
from tests.support.event_horizon import wait_for_horizon


def fan_out_all() -> int:
    """Makes the deliveries of everything that has been recorded; gives the number of events."""
    wait_for_horizon()
    return fan_out()


def first_delivery(http: Any, webhook: str) -> str:
    """The uuid of the newest delivery of a webhook that an event has been recorded for."""
    fan_out_all()
    rows = http.get(f"/webhooks/{webhook}/deliveries").json()["data"]["data"]
    assert rows, "no delivery"
    return str(rows[0]["uuid"])
