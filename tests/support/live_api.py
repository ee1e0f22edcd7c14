"""The API on a real socket of the loopback, served by the server that serves it in production."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

import uvicorn
from anyio import to_thread
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from awan.api import THREADS_MAX

START_S = 20.0


class LiveApi:
    """`with LiveApi(create_app()) as live: httpx.get(live.url + "/instances")`. `url` ends in `/api/v1`."""

    def __init__(self, app: FastAPI) -> None:
        async def served(scope: Scope, receive: Receive, send: Send) -> None:
            to_thread.current_default_thread_limiter().total_tokens = THREADS_MAX
            await app(scope, receive, send)

        # The application's own lifespan would close the connections of the whole process at its end.
        config = uvicorn.Config(
            served,
            host="127.0.0.1",
            port=0,
            lifespan="off",
            log_config=None,
            access_log=False,
            backlog=1024,
            ws="awan.runtime.websockets:RefusingWebSockets",
            ws_per_message_deflate=False,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="live-api", daemon=True)

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"

    @property
    def url(self) -> str:
        """Where the API's paths begin."""
        return f"{self.origin}/api/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            assert self._thread.is_alive(), "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=START_S)
        assert not self._thread.is_alive(), "the server did not end"
