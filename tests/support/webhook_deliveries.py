"""Deliveries of webhooks, where no sender runs."""

from __future__ import annotations

import time
from typing import Any

from awan.webhooks.deliveries import fan_out

HORIZON_S = 20.0


def first_delivery(http: Any, webhook: str) -> str:
    """The uuid of the newest delivery of a webhook that an event has been recorded for.

    Events wait for older transactions of the whole server to end, also of databases that other tests use.
    """
    deadline = time.monotonic() + HORIZON_S
    while True:
        fan_out()
        rows = http.get(f"/webhooks/{webhook}/deliveries").json()["data"]["data"]
        if rows:
            return str(rows[0]["uuid"])
        assert time.monotonic() < deadline, "no delivery"
        time.sleep(0.05)
