"""What the supervisor runs: `python -m awan.runtime.process api|worker`.

Kept apart from the command line so that a killed process is back quickly: nothing is imported that it does not need.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from types import FrameType

from awan.kit import stopping
from awan.runtime.environment import load_environment
from awan.runtime.logs import configure_logging
from awan.settings import get_settings

WEBSOCKET_MESSAGE_MAX_BYTES = 1024 * 1024
# Of new objects before the collector looks: a process has hundreds of thousands that live as long as it, and with
# Python's own 700 a busy one spends a sixth of its time looking through them.
GC_THRESHOLDS = (10_000, 20, 50)
STARTUP_FAILED = 3  # uvicorn's own code


def run_api() -> None:
    """Serves the HTTP API until SIGTERM; requests under way get 10 s to end."""
    import uvicorn

    class Server(uvicorn.Server):
        """Tells endless answers to end, before it waits for all answers."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            stopping.begin()
            super().handle_exit(sig, frame)

    settings = get_settings()
    configure_logging("api", level=settings.log_level, is_json=settings.log_json)
    config = uvicorn.Config(
        "awan.api:app",
        host=settings.listen_host,
        port=settings.listen_port,
        log_config=None,
        access_log=False,  # the API logs each call itself, with its request id
        server_header=False,
        proxy_headers=False,  # the API decides by `trusted_proxies`
        ws="awan.runtime.websockets:RefusingWebSockets",
        # A screen is compressed already, or cheap to send; viewers send keys.
        ws_per_message_deflate=False,
        ws_max_size=WEBSOCKET_MESSAGE_MAX_BYTES,
        timeout_graceful_shutdown=10,
    )
    server = Server(config)
    with contextlib.suppress(KeyboardInterrupt):  # as uvicorn's own `run` ends
        server.run()
    if not server.started:
        sys.exit(STARTUP_FAILED)


def run_worker() -> None:
    """Runs workflows, reconcilers and schedules until SIGTERM."""
    settings = get_settings()
    configure_logging("worker", level=settings.log_level, is_json=settings.log_json)
    # By name, because the runtime lies below the rooms and may not import them.
    importlib.import_module("awan.worker").main()


PROCESSES = {"api": run_api, "worker": run_worker}


def main() -> None:
    """Runs the process named by the one argument."""
    if len(sys.argv) != 2 or sys.argv[1] not in PROCESSES:
        sys.exit(f"usage: python -m {__spec__.name} {'|'.join(PROCESSES)}")
    load_environment()
    gc.set_threshold(*GC_THRESHOLDS)
    PROCESSES[sys.argv[1]]()


if __name__ == "__main__":
    main()
