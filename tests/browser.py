"""A headless Chromium for tests of pages, driven over its own pipe (Chrome DevTools Protocol, `--remote-debugging-pipe`)."""

import base64
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

SECONDS = 60


class Browser:
    """A browser with one page. `requests` are the URLs that it asked for since `open`, `refused` what its policy refused."""

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory()
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        command = ["chromium", "--headless", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        command += ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        # its own sandbox refuses to work for root; the pages are ours
        command += ["--no-sandbox"] if os.getuid() == 0 else []
        wrapper = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", wrapper, str(to_browser), str(from_browser), *command],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._left, self._session = 0, b"", ""
        self.requests: list[str] = []
        self.refused: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def open(self, path: Path, width: int, dark: bool) -> None:
        """Open a file in a window of a width in CSS pixels, with the reader's preference for dark or light."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self.requests, self.refused, self._loaded = [], [], False
        self._call("Page.navigate", url=path.absolute().as_uri())
        while not self._loaded:
            self._receive()

    def ask(self, expression: str) -> object:
        """Return the value of a JavaScript expression, evaluated beside the page (its policy does not hold for it)."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG file."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    @contextmanager
    def without_style(self) -> Iterator[None]:
        """Show the page as a reader has it whose server forbids inline styles, as Jenkins' does by default."""
        self.ask("document.querySelector('style').disabled = true")
        yield
        self.ask("document.querySelector('style').disabled = false")

    def _call(self, method: str, **parameters: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict:
        """Return the next message, and note what it says of the page."""
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._left:
            readable, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, "the browser does not answer"
            block = os.read(self._from, 1 << 20)
            assert block, "the browser has ended"
            self._left += block
        said, self._left = self._left.split(b"\0", 1)
        message = json.loads(said)
        given = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])
            case "Log.entryAdded":
                self.refused.append(given["entry"]["text"])
        return message
