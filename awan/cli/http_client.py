"""The HTTP client of the command line: one key, plain answers, refusals as sentences."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import typer
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from awan.cli.screen import errors, printable, say_error

POLL_S = 0.2
UPLOAD_CHUNK_BYTES = 1024 * 1024
UPLOAD_TIMEOUT_S = 3600.0
FINAL = {"succeeded", "failed", "cancelled"}


class OperatorClient:
    """Calls the API at `AWAN_API_URL` with `AWAN_ADMIN_KEY`. A refusal ends the command with status 1."""

    def __init__(self) -> None:
        missing = [name for name in ("AWAN_API_URL", "AWAN_ADMIN_KEY") if not os.environ.get(name)]
        if missing:
            say_error(f"set {' and '.join(missing)}, or run where var/awan.env is.")
            raise typer.Exit(2)
        self._client = httpx.Client(
            base_url=os.environ["AWAN_API_URL"],
            headers={"x-apikey": os.environ["AWAN_ADMIN_KEY"]},
            timeout=60,
            trust_env=False,
        )

    def call(self, method: str, path: str, body: Any = None, **parameters: Any) -> dict[str, Any]:
        """The whole answer: message, data, and perhaps operation."""
        query = {name: value for name, value in parameters.items() if value is not None}
        return _read(self._send(method, path, json=body, params=query))

    def get(self, path: str, **parameters: Any) -> Any:
        """The data of a read."""
        return self.call("GET", path, **parameters)["data"]

    def download(self, path: str) -> bytes:
        """The content of an answer that is a file."""
        response = self._send("GET", path)
        if response.is_error:
            _read(response)
        return response.content

    def _send(self, method: str, path: str, **how: Any) -> httpx.Response:
        try:
            return self._client.request(method, path, **how)
        except httpx.TransportError as err:
            say_error(f"{self._client.base_url} does not answer: {err}")
            raise typer.Exit(2) from err

    def upload(self, path: str, file: Path, **parameters: Any) -> dict[str, Any]:
        """Sends a file as the raw body, with a progress display; the whole answer."""
        size = file.stat().st_size
        columns = (_description(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True) as progress, file.open("rb") as source:
            task = progress.add_task(printable(f"uploading {file.name}"), total=size)

            def chunks() -> Iterator[bytes]:
                while chunk := source.read(UPLOAD_CHUNK_BYTES):
                    yield chunk
                    progress.advance(task, len(chunk))

            response = self._client.post(
                path,
                content=chunks(),
                params=parameters,
                headers={
                    "content-type": "application/octet-stream",
                    "content-length": str(size),
                },
                timeout=UPLOAD_TIMEOUT_S,
            )
        return _read(response)

    def follow(self, operation: dict[str, Any]) -> dict[str, Any]:
        """Shows an operation's progress until it ends; ends the command with status 1 when it failed."""
        columns = (SpinnerColumn(), _description(), TimeElapsedColumn())
        with Progress(*columns, transient=True) as progress:
            task = progress.add_task(operation["kind"], total=None)
            while True:
                state: dict[str, Any] = self.get(f"/operations/{operation['uuid']}")
                step = state["step"] or "..."
                progress.update(task, description=printable(f"{state['kind']}: {step}"))
                if state["status"] in FINAL:
                    break
                time.sleep(POLL_S)
        if state["status"] != "succeeded":
            reason = (state["error"] or {}).get("message", "no reason was given")
            say_error(f"{state['kind']} {state['status']}: {reason}")
            raise typer.Exit(1)
        return state


def _description() -> TextColumn:
    """What is being done; the names of files and steps in it are no markup."""
    return TextColumn("{task.description}", markup=False)


def _read(response: httpx.Response) -> dict[str, Any]:
    try:
        body: dict[str, Any] = response.json()
    except ValueError:
        body = {"message": response.text[:500]}
    if response.is_error:
        message = str(body.get("message", response.status_code))
        path = response.request.url.path
        if response.status_code == httpx.codes.NOT_FOUND and path not in message:
            message = f"{message.rstrip('.')}: {path}"
        say_error(message)
        for field, sentences in (body.get("errors") or {}).items():
            errors.print(f"  {field}: {' '.join(sentences)}", soft_wrap=True)
        raise typer.Exit(1)
    return body
