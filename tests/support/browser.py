"""A headless Chromium, driven over its own debugging protocol as far as the tests go.

Source: chromedevtools.github.io/devtools-protocol, domains Page, Runtime, Input and Log.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from websockets.sync.client import ClientConnection, connect

PROGRAM = "chromium"
START_S = 60.0
ANSWER_S = 30.0
SHIFT = {"key": "Shift", "code": "ShiftLeft", "windowsVirtualKeyCode": 16}


def is_installed() -> bool:
    """Whether there is a browser."""
    return shutil.which(PROGRAM) is not None


class Browser:
    """One page. `with Browser() as page: page.open(url); page.until("...")`."""

    def __init__(self, *, width: int = 1024, height: int = 768) -> None:
        self._held = ExitStack()
        self._size = f"--window-size={width},{height}"
        self._calls = 0
        self.complaints: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held.close()

    def open(self, url: str) -> None:
        """Goes to an address."""
        self._call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, timeout_s: float = 30.0) -> Any:
        """The expression's value once it is truthy."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, (
                f"not true after {timeout_s} s: {expression}; the page says {self.complaints}"
            )
            time.sleep(0.1)
        return value

    def type(self, text: str) -> None:
        """Presses the keys of a text of letters, digits, spaces and line ends, as a keyboard would."""
        for char in text:
            if char.isupper():
                self._key("keyDown", SHIFT)
            self._key("keyDown", {**_key_of(char), "text": "\r" if char == "\n" else char})
            self._key("keyUp", _key_of(char))
            if char.isupper():
                self._key("keyUp", SHIFT)

    def _key(self, kind: str, key: dict[str, Any]) -> None:
        self._call("Input.dispatchKeyEvent", type=kind, **key)

    def click(self, x: float, y: float) -> None:
        """Presses and releases the left button."""
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self) -> bytes:
        """What the page looks like, as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])

    def _start(self) -> None:
        profile = Path(
            self._held.enter_context(
                tempfile.TemporaryDirectory(prefix="awan-browser-", ignore_cleanup_errors=True)
            )
        )
        process = subprocess.Popen(
            [
                *(PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-dev-shm-usage", "--disable-background-networking"),
                *("--disable-component-update", "--disable-sync", "--no-proxy-server"),
                *(f"--user-data-dir={profile}", "--remote-debugging-port=0", self._size),
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._held.callback(_end, process)
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + START_S
        while not (port_file.exists() and port_file.read_text().strip()):
            assert process.poll() is None, "the browser ended"
            assert time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.1)
        port = int(port_file.read_text().split()[0])
        pages = httpx.get(f"http://127.0.0.1:{port}/json/list", trust_env=False, timeout=ANSWER_S)
        url = next(page["webSocketDebuggerUrl"] for page in pages.json() if page["type"] == "page")
        self._socket: ClientConnection = self._held.enter_context(
            connect(url, max_size=None, proxy=None, compression=None)
        )
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=ANSWER_S))
            if message.get("id") == self._calls:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        """Keeps what the page complained of: exceptions and errors in its log."""
        if message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(message["params"]["exceptionDetails"]))
        entry = message["params"].get("entry", {})
        if message["method"] == "Log.entryAdded" and entry.get("level") == "error":
            self.complaints.append(f"{entry['text']} {entry.get('url', '')}")


def _key_of(char: str) -> dict[str, Any]:
    if char == "\n":
        return {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    code = "Space" if char == " " else f"Digit{char}" if char.isdigit() else f"Key{char.upper()}"
    return {"key": char, "code": code, "windowsVirtualKeyCode": ord(char.upper())}


def _end(process: subprocess.Popen[bytes]) -> None:
    """The browser and all its helpers, which are the group that it was started as."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
