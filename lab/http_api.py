"""A small client of Awan's public API, as a customer's script would have one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

POLL_INTERVAL_S = 0.25
UPLOAD_CHUNK_BYTES = 1024 * 1024


class ApiError(Exception):
    """The API refused a call. `type` is its error type, the text names the call and the reason."""

    def __init__(self, call: str, status: int, body: Any) -> None:
        fields = body if isinstance(body, dict) else {}
        self.status = status
        self.type = str(fields.get("type", ""))
        details = "; ".join(
            f"{field}: {' '.join(sentences)}"
            for field, sentences in (fields.get("errors") or {}).items()
        )
        reason = str(fields.get("message") or body)
        super().__init__(f"{call}: {status} {reason}{f' ({details})' if details else ''}")


class OperationFailed(Exception):
    """An operation ended without success; the text is what the API says of it."""


class Api:
    """Calls with one key. Every method gives the answer's `data` unless it says otherwise."""

    def __init__(self, base_url: str, key: str) -> None:
        self._client = httpx.Client(
            base_url=f"{base_url}/", headers={"x-apikey": key}, timeout=60, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def call(
        self, method: str, path: str, json: Any = None, *, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The whole answer: message, data, operation. Waits when the key's calls per minute are used up.

        Raises: ApiError when refused.
        """
        while True:
            response = self._client.request(method, path, json=json, headers=headers)
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                return self._answer(response)
            time.sleep(float(response.headers.get("retry-after", 1)))

    def get(self, path: str) -> Any:
        return self.call("GET", path)["data"]

    def post(self, path: str, json: Any = None) -> Any:
        return self.call("POST", path, json if json is not None else {})["data"]

    def put(self, path: str, json: Any) -> Any:
        return self.call("PUT", path, json)["data"]

    def upload(self, path: str, file: Path) -> dict[str, Any]:
        """Sends a file as the raw body; gives the whole answer."""

        def chunks() -> Iterator[bytes]:
            with file.open("rb") as source:
                while chunk := source.read(UPLOAD_CHUNK_BYTES):
                    yield chunk

        headers = {
            "content-type": "application/octet-stream",
            "content-length": str(file.stat().st_size),
        }
        return self._answer(self._client.post(path, content=chunks(), headers=headers, timeout=600))

    def follow(
        self,
        operation: dict[str, Any],
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        *,
        timeout_s: float = 600,
    ) -> dict[str, Any]:
        """Polls an operation until it ends and gives its last state; `on_progress` sees each state.

        Raises: OperationFailed when it failed, was cancelled, or is not done in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            state: dict[str, Any] = self.get(f"operations/{operation['uuid']}")
            if on_progress is not None:
                on_progress(state)
            if state["status"] == "succeeded":
                return state
            if state["status"] in {"failed", "cancelled"}:
                reason = (state.get("error") or {}).get("message", "no reason given")
                raise OperationFailed(f"{state['kind']} {state['status']}: {reason}")
            if time.monotonic() > deadline:
                raise OperationFailed(
                    f"{state['kind']} {state['uuid']} is still {state['status']}"
                    f" at step {state['step']} after {timeout_s:.0f} s"
                )
            time.sleep(POLL_INTERVAL_S)

    @staticmethod
    def _answer(response: httpx.Response) -> dict[str, Any]:
        try:
            body: Any = response.json()
        except ValueError:
            body = response.text[:500]
        if response.is_error:
            request = response.request
            raise ApiError(f"{request.method} {request.url.path}", response.status_code, body)
        assert isinstance(body, dict)
        return body
