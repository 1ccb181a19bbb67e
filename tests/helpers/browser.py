"""A headless Chromium, driven over its debugging protocol: what a page logs, asks of the network, and looks like."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A page that is open in the browser.

    Attributes:
        troubles: errors and warnings of the console, and exceptions.
        requests: addresses that were asked for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: Any) -> None:
        self._loop, self._socket, self._numbers = loop, socket, itertools.count(1)
        self.troubles: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        number = next(self._numbers)
        text = json.dumps({"id": number, "method": method, "params": parameters})
        self._run(lambda: self._socket.write_message(text))
        while (message := self._next()).get("id") != number:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def _run(self, begin: Callable[[], Any]) -> Any:
        async def awaited() -> Any:
            return await asyncio.wait_for(begin(), 60)

        return self._loop.run_until_complete(awaited())

    def _next(self) -> dict[str, Any]:
        message = json.loads(self._run(self._socket.read_message))
        method, found = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.troubles.append(" ".join(str(part.get("value", part.get("description"))) for part in found["args"]))
        elif method == "Runtime.exceptionThrown":
            details = found["exceptionDetails"]
            self.troubles.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.troubles.append(found["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.troubles.append(f"a dialog: {found['message']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        return message

    def open(self, path: Path, width: int = 1280, height: int = 800) -> float:
        """Open a file, wait until it says that it is ready, and return the seconds that took."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        begin = time.perf_counter()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while self.value("document.body && document.body.dataset.ready") != "yes":
            if time.perf_counter() - begin > 60:
                raise RuntimeError(f"{path} did not get ready: {self.troubles}")
            time.sleep(0.02)
        return time.perf_counter() - begin

    def value(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def drag(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Press the mouse, move it and release it."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", clickCount=1)
        for part in (0.5, 1.0):
            at = {"x": x + part * (to_x - x), "y": y + part * (to_y - y)}
            self.call("Input.dispatchMouseEvent", type="mouseMoved", button="left", buttons=1, **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=to_x, y=to_y, button="left", clickCount=1)

    def key(self, name: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def picture(self, path: Path, *, whole: bool = False) -> Path:
        """Write a picture of what is seen, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
        return path

    def pdf(self) -> bytes:
        """Print it."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])


@contextmanager
def browser() -> Iterator[Page]:
    """Run a browser of its own, with one page."""
    from tornado.websocket import websocket_connect

    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--hide-scrollbars", "about:blank"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        process = subprocess.Popen([CHROMIUM, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        loop = asyncio.new_event_loop()
        try:
            address = _address(process)
            port = re.findall(r":(\d+)/", address)[0]

            async def connected() -> Any:
                from tornado.httpclient import AsyncHTTPClient

                found = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/json")
                own = next(one for one in json.loads(found.body) if one["type"] == "page")
                return await websocket_connect(own["webSocketDebuggerUrl"], max_message_size=1 << 28)

            yield Page(loop, loop.run_until_complete(connected()))
        finally:
            process.terminate()
            process.wait(20)
            loop.close()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"DevTools listening on (\S+)", line):
            # The pipe is read on, so that the browser never waits for it.
            os.set_blocking(process.stderr.fileno(), False)
            return found[1]
    raise RuntimeError("the browser has not started")
