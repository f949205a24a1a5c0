"""A headless Chromium for tests of pages, driven by the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
SECONDS = 60


def find_browser() -> str:
    """Return the path of a Chromium; skip the test where there is none."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"needs a browser, none of {', '.join(NAMES)} is installed (Debian: chromium)")
    return browser


@dataclass
class Page:
    """A page of a browser."""

    connection: ClientConnection
    session: str
    complaints: list[str] = field(default_factory=list)
    """Console messages of the browser: errors, and violations of the page's policy."""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(10))

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        return _command(self, next(self._numbers), method, parameters, self.session)

    def goto(self, url: str) -> None:
        """Open an address and wait until it is loaded."""
        self.command("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression; promises are awaited."""
        answer = self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + SECONDS
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                body = self.evaluate("document.body.innerText")
                raise TimeoutError(f"{condition} never held; the page says: {body}")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        """Return an element's visible text."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def focus(self, selector: str) -> None:
        """Focus an element."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")

    def press(self, key: str) -> None:
        """Press a named key."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "PageDown": 34, "End": 35, "Home": 36}
        codes.update({"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40})
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if (key, kind) == ("Enter", "keyDown") else {}
            self.command(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                **text,
            )

    def type(self, text: str) -> None:
        """Type into the focused element."""
        self.command("Input.insertText", text=text)

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in an input."""
        root = self.command("DOM.getDocument")["root"]["nodeId"]
        node = self.command("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.command("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def set_width(self, width: int, height: int = 800) -> None:
        """Set the size of the screen in pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, color_scheme: str) -> None:
        """Set the preferred color scheme, "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": color_scheme}
        self.command("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def open_page(folder: Path, *, width: int = 1200, height: int = 900) -> Iterator[Page]:
    """Yield a page of a new browser with its profile in a folder."""
    flags = [
        "--headless=new",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        f"--window-size={width},{height}",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # Chromium refuses to run as root with one.
    process = subprocess.Popen(
        [find_browser(), *flags, "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port, path = _address(folder / "DevToolsActivePort", process)
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as connection:
            page = Page(connection, "")
            pages = page.command("Target.getTargets")["targetInfos"]
            target = next(
                candidate["targetId"] for candidate in pages if candidate["type"] == "page"
            )
            attached = page.command("Target.attachToTarget", targetId=target, flatten=True)
            page.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "DOM"):
                page.command(f"{domain}.enable")
            yield page
    finally:
        process.terminate()
        process.wait(SECONDS)


def _address(file: Path, process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Return the port and the path that a browser writes when it is ready."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        lines = file.read_text().split("\n") if file.exists() else []
        if len(lines) == 2:
            return lines[0], lines[1]
        time.sleep(0.05)
    raise RuntimeError(f"the browser did not start, its exit status is {process.poll()}")


def _command(
    page: Page, number: int, method: str, parameters: dict[str, Any], session: str
) -> dict[str, Any]:
    request = {"id": number, "method": method, "params": parameters}
    page.connection.send(json.dumps({**request, "sessionId": session} if session else request))
    while True:
        message = json.loads(page.connection.recv(timeout=SECONDS))
        if message.get("id") == number:
            if "error" in message:
                raise RuntimeError(f"{method}: {message['error']}")
            result: dict[str, Any] = message["result"]
            return result
        if message.get("method") == "Runtime.exceptionThrown":
            page.complaints.append(str(message["params"]["exceptionDetails"]))
        if message.get("method") == "Log.entryAdded":
            entry = message["params"]["entry"]
            if entry["level"] in ("error", "warning"):
                page.complaints.append(f"{entry['text']} ({entry.get('url')})")
