"""A real browser for tests: Chromium without a window, driven through its DevTools protocol over a pair of pipes."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


PATIENCE = 60
"""Seconds to wait for the browser."""


class Tab:
    """An open page. Every event that the browser reports is kept in ``events``."""

    def __init__(self, commands: int, messages: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._commands, self._messages = os.fdopen(commands, "wb", 0), os.fdopen(messages, "rb")
        self._buffer = b""
        self._number = 0
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters, **self._session}
        self._commands.write(json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, page: Path, width: int, height: int, scheme: str) -> None:
        """Opens a file in a window of this size, for a reader who prefers the ``light`` or ``dark`` scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move_pointer(self, x: float, y: float) -> None:
        """Moves the mouse to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, whole_page: bool = True) -> None:
        """Writes what the page looks like, as a PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole_page)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._messages], [], [], PATIENCE)
            assert ready, f"the browser has not answered for {PATIENCE} s"
            received = os.read(self._messages.fileno(), 1 << 20)
            assert received, "the browser has ended"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """Starts the browser with an empty profile and gives a tab; ends the browser afterwards."""
    assert EXECUTABLE is not None
    commands_in, commands = os.pipe()
    messages, messages_out = os.pipe()
    # The browser expects its commands at descriptor 3 and answers at 4.
    start = f'exec 3<&{commands_in} 4>&{messages_out}; exec "$@"'
    browser = subprocess.Popen(
        ["bash", "-c", start, "bash", EXECUTABLE, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(commands_in, messages_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_in)
    os.close(messages_out)
    try:
        yield Tab(commands, messages)
    finally:
        browser.terminate()
        browser.wait(timeout=30)
