"""Chromium without a window, driven over its DevTools protocol with websocket-client, which comes
with JupyterLab: no package more.

``Browser.find()`` names the program, or why tests that need one are skipped.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "msedge",
)
FLAGS = (
    *(
        "--headless=new",
        "--no-first-run",
        "--no-default-browser-check",
        "--disable-gpu",
        "--hide-scrollbars",
        "--mute-audio",
    ),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        "--remote-debugging-port=0",
    ),
)


def find():
    """Path of a Chromium, or None; CHROMIUM names one that is not on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. `errors` collects what its console calls an error, `requests` the addresses that it
    asked for.
    """

    def __init__(self, width=1360, height=900):
        import websocket

        self.errors, self.requests, self._number = [], [], 0
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        sandbox = (
            ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        )  # as root, in a container, there is none
        command = [
            find(),
            *FLAGS,
            *sandbox,
            f"--user-data-dir={self._profile.name}",
            f"--window-size={width},{height}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            port = self._wait_for_port()
            with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                page = next(target for target in json.load(answer) if target["type"] == "page")
            self._socket = websocket.create_connection(
                page["webSocketDebuggerUrl"], timeout=60, suppress_origin=True
            )
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.send("Emulation.setDeviceMetricsOverride", **size)
        except BaseException:
            self.close()
            raise

    def _wait_for_port(self, seconds=30):
        file, end = Path(self._profile.name, "DevToolsActivePort"), time.monotonic() + seconds
        while time.monotonic() < end:
            if file.exists() and (lines := file.read_text().splitlines()):
                return int(lines[0])
            if self._process.poll() is not None:
                raise RuntimeError(f"the browser ended with status {self._process.returncode}")
            time.sleep(0.05)
        raise RuntimeError(f"the browser did not answer within {seconds} s")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if getattr(self, "_socket", None) is not None:
            self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def send(self, method, **params):
        """Call a method of the protocol and return its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in (
            "error",
            "warning",
            "assert",
        ):
            self.errors.append(
                " ".join(str(a.get("value", a.get("description"))) for a in params["args"])
            )
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, url):
        self.send("Page.navigate", url=url)

    def evaluate(self, expression):
        """Value of a JavaScript expression; RuntimeError if it throws."""
        found = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(
                found["exceptionDetails"].get("exception", {}).get("description", "failed")
            )
        return found["result"].get("value")

    def wait(self, expression, seconds=30):
        """Wait until an expression is true, and return the seconds it took."""
        begin = time.monotonic()
        while not self.evaluate(expression):
            if time.monotonic() - begin > seconds:
                raise TimeoutError(
                    f"{expression} did not come true in {seconds} s; console: {self.errors[:3]}"
                )
            time.sleep(0.02)
        return time.monotonic() - begin

    def text(self, selector):
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def point(self, x, y, press=False):
        """Move the mouse to a place in the window, and click there."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if press else ():
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click(self, selector):
        """Click in the middle of an element, scrolled into view."""
        code = f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
          e.scrollIntoView({{block: 'center'}});
          const r = e.getBoundingClientRect();
          return [r.x + r.width / 2, r.y + r.height / 2]; }})()"""
        self.point(*self.evaluate(code), press=True)

    def choose(self, selector, value):
        """Set a select or a range, as a user does."""
        kind = (
            "input"
            if self.evaluate(f"document.querySelector({json.dumps(selector)}).tagName") == "INPUT"
            else "change"
        )
        code = f"(e => {{e.value = {json.dumps(value)}; e.dispatchEvent(new Event('{kind}', {{bubbles: true}}));}})"
        self.evaluate(f"{code}(document.querySelector({json.dumps(selector)}))")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key)

    def screenshot(self, path):
        Path(path).write_bytes(
            base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        )
