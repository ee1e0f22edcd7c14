"""API and worker as processes: events reach streams and receivers, and streams do not hold the API up at its end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from awan.settings import Settings
from tests.event_stream.sse import SseClient
from tests.support.real_processes import RealProcesses
from tests.support.tenants import make_tenant
from tests.webhooks.receiver import Receiver


@pytest.mark.timeout(180)
def test_from_a_call_to_stream_and_receiver(settings: Settings, tmp_path: Path) -> None:
    allowed = {
        "AWAN_OUTBOUND_ALLOW_HTTP": "true",
        "AWAN_OUTBOUND_ALLOWED_NETWORKS": '["127.0.0.0/8"]',
    }
    tenant = make_tenant()
    with Receiver() as receiver, RealProcesses(tmp_path, **allowed) as plane:
        with SseClient(plane.url, tenant.key) as client:
            created = httpx.post(
                f"{plane.url}/webhooks",
                headers=tenant.headers,
                json={"url": f"{receiver.url}?token=Hidden-7"},
                trust_env=False,
            )
            assert created.status_code == 201, created.text
            assert client.next().event == "webhook.created"
            [received] = receiver.wait_for(1)
            assert received.is_signed_with(created.json()["data"]["secret"])
            # The API ends while the stream is open, well before it would cut answers off.
            api = plane._processes[0]
            began_at = time.monotonic()
            os.kill(api.pid, signal.SIGTERM)
            client.wait_for_end()
            api.wait(20)
            assert time.monotonic() - began_at < 8
        log = plane.log()
    assert "Hidden-7" not in log
    assert created.json()["data"]["secret"] not in log
    assert "Cancel" not in log
