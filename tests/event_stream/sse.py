"""A client of server-sent events over a real socket, written from the HTML standard alone."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

WAIT_S = 40.0


@dataclass(frozen=True)
class Message:
    """One dispatched event."""

    id: str
    event: str
    data: Any


class SseClient:
    """`with SseClient(url, key) as client: client.next()`. Reads in a thread of its own."""

    def __init__(self, url: str, key: str, *, last_event_id: str = "", **query: Any) -> None:
        self._http = httpx.Client(timeout=httpx.Timeout(WAIT_S, read=60), trust_env=False)
        headers = {"x-apikey": key, "accept": "text/event-stream"}
        if last_event_id:
            headers["last-event-id"] = last_event_id
        self._request = self._http.build_request(
            "GET", f"{url}/events", headers=headers, params=query
        )
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.last_event_id = last_event_id
        self.messages: list[Message] = []
        self.comments = 0
        self.has_ended = False
        self._taken = 0

    def __enter__(self) -> Self:
        self.response = self._http.send(self._request, stream=True)
        assert self.response.status_code == 200, self.response.read()
        assert self.response.headers["content-type"].startswith("text/event-stream")
        self._thread.start()
        self._wait_for(lambda: bool(self.last_event_id))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Ends the server's side, whatever this thread is reading at the moment.
        stream = self.response.extensions["network_stream"]
        raw = stream.get_extra_info("socket")
        with self._changed:
            is_over = self.has_ended
        if not is_over:
            raw.shutdown(2)
        self._thread.join(WAIT_S)
        self.response.close()
        self._http.close()

    def next(self) -> Message:
        """The next event; waits for it."""
        self._wait_for(lambda: len(self.messages) > self._taken)
        self._taken += 1
        return self.messages[self._taken - 1]

    def take(self, count: int) -> list[Message]:
        """The next so many events."""
        return [self.next() for _ in range(count)]

    def wait_for_end(self) -> None:
        """Returns when the server has ended the stream."""
        self._wait_for(lambda: self.has_ended)

    def is_quiet(self, seconds: float) -> bool:
        """Whether nothing came meanwhile."""
        time.sleep(seconds)
        with self._changed:
            return len(self.messages) == self._taken

    def _wait_for(self, is_true: Any) -> None:
        with self._changed:
            assert self._changed.wait_for(is_true, WAIT_S), f"nothing came: {self.messages[-3:]}"

    def _read(self) -> None:
        with contextlib.suppress(httpx.HTTPError, OSError):
            self._dispatch()
        with self._changed:
            self.has_ended = True
            self._changed.notify_all()

    def _dispatch(self) -> None:
        name, data, last_id = "", [], self.last_event_id
        for line in self.response.iter_lines():
            with self._changed:
                if line == "":
                    self.last_event_id = last_id
                    if data:
                        text = "\n".join(data)
                        self.messages.append(Message(last_id, name, json.loads(text)))
                    name, data = "", []
                    self._changed.notify_all()
                elif line.startswith(":"):
                    self.comments += 1
                    self._changed.notify_all()
                else:
                    field, _, value = line.partition(":")
                    value = value.removeprefix(" ")
                    if field == "id":
                        last_id = value
                    elif field == "event":
                        name = value
                    elif field == "data":
                        data.append(value)
