"""A headless Chromium spoken to over its own pipe, the DevTools protocol: https://chromedevtools.github.io/devtools-protocol/."""

import base64
import json
import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")


def find_browser():
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page in one browser; `seen` holds the events it has reported."""

    def __init__(self, program, profile):
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        quiet = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
        line = [program, *quiet, "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--remote-debugging-pipe"]

        def place():
            # the browser reads commands from 3 and writes to 4, whatever numbers our pipes have
            source, target = os.dup(commands), os.dup(answers)
            os.dup2(source, 3)
            os.dup2(target, 4)

        self._process = subprocess.Popen(
            [*line, "about:blank"], pass_fds=(3, 4), preexec_fn=place, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self._answers = os.fdopen(self._from, "rb")
        self._count, self._rest, self._session = 0, b"", None
        self.seen = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._answers.close()
        os.close(self._to)

    def call(self, method, **parameters):
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return self._until(lambda event: event.get("id") == self._count)

    def _until(self, wanted):
        while True:
            while b"\0" not in self._rest:
                piece = self._answers.read1(65536)
                if not piece:
                    raise EOFError("the browser has gone")
                self._rest += piece
            text, self._rest = self._rest.split(b"\0", 1)
            event = json.loads(text)
            if wanted(event):
                if "error" in event:
                    raise RuntimeError(event["error"])
                return event.get("result")
            self.seen.append(event)

    def show(self, file, *, width=1200, scheme="light", forced=False, media="screen"):
        """Open a file in a window of that width, and forget what was seen before."""
        forced_colors = {"name": "forced-colors", "value": "active" if forced else "none"}
        features = [{"name": "prefers-color-scheme", "value": scheme}, forced_colors]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.seen.clear()
        self.call("Page.navigate", url=file.as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self.seen):
            self._until(lambda event: event.get("method") == "Page.loadEventFired")

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self):
        """What the console and the log hold."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.seen if event.get("method") in kinds]

    def requests(self):
        asked = [event for event in self.seen if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in asked]

    def screenshot(self, file):
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        file.write_bytes(base64.b64decode(picture["data"]))
