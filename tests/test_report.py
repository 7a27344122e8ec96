"""report.html in a real browser: nothing runs but the page's own script, nothing leaves, and every control does its work.

Headless Chromium is driven through its DevTools pipe (one JSON message at a time, ended by a zero byte), so no driver
package is needed. Without Chromium on the PATH these tests are skipped.
"""

import http.server
import json
import os
import shutil
import subprocess
import threading
from itertools import count

import numpy as np
import pytest
from PIL import Image

from rewards import CLASSES
from support.files import BadInput
from support.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

HOSTILE = (
    "</script><script>document.title = 'pwned'</script><img src=x onerror=\"document.title = 'pwned'\"> --> <!-- <script> "
    "\u2028\u2029 ' \" ` \\ & &lt; ${1} {{data}} ]]> <svg onload=\"document.title = 'pwned'\"> \ud800 \0 Lungen-Öl"
)
MODELS, MODES = ("base", "sft", "grpo"), ("direct", "think")


class Browser:
    """One headless Chromium and one tab of it; every event of the tab is kept in `events`."""

    def __init__(self, profile):
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        # The shell puts our ends where Chromium expects them: it reads commands from 3 and writes answers to 4.
        start = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", CHROMIUM, "--headless", "--no-sandbox",
                 "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        self.process = subprocess.Popen(start, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.input, self.numbers, self.events, self.session = os.fdopen(self.read, "rb"), count(1), [], {}
        page = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def _message(self):
        text = bytearray()
        while (byte := self.input.read(1)) != b"\0":
            assert byte, "Chromium ended"
            text += byte
        return json.loads(text)

    def __call__(self, method, **parameters):
        """The result of one DevTools command; events that come before it are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters, **self.session}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, address):
        """Loads a page from scratch (by way of an empty one, since a change after # alone keeps the page) to its end."""
        for place in ("about:blank", address):
            self.events.clear()
            self("Page.navigate", url=place)
            while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
                self.events.append(self._message())

    def js(self, expression):
        """The value of an expression in the page. Commands are not bound by the page's policy; its own code is."""
        done = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def key(self, name):
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def complaints(self):
        """Uncaught exceptions, console messages, and what the browser itself logged (policy violations, failed loads)."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in kinds]

    def requests(self):
        """Addresses that the page asked for, but for pictures that it holds itself."""
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith("data:")]
