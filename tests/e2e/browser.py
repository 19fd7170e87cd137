"""Headless Chromium through the DevTools protocol, over its pipe (messages end with a NUL): nothing but the standard library.

One Browser serves a test module; each Page has a context of its own (storage, clipboard), as a private window has.
"""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading

from harness import wait_until

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Keys that tests press: (code, windowsVirtualKeyCode, text)
KEYS = {"Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, "\t"), " ": ("Space", 32, " ")}
SHIFT = 8


def high_end(fd):
    """The same end of a pipe at a number beyond those that the browser uses."""
    high = fcntl.fcntl(fd, fcntl.F_DUPFD, 10)
    os.close(fd)
    return high


class Browser:
    def __init__(self):
        self._directory = tempfile.TemporaryDirectory(prefix="gptd-browser-", ignore_cleanup_errors=True)
        theirs, self._to = os.pipe()
        self._from, answers = os.pipe()
        theirs, answers = high_end(theirs), high_end(answers)
        flags = ["--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--user-data-dir=" + self._directory.name,
                 "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-component-update",
                 "--disable-background-networking", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{answers} {theirs}<&- {answers}>&-', "bash", PROGRAM, *flags],
            pass_fds=(theirs, answers), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(answers)
        self._ids = itertools.count(1)
        self._answers, self._pages, self._changed = {}, {}, threading.Condition()
        self._closed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with os.fdopen(self._from, "rb") as stream:
            rest = b""
            while chunk := stream.read1(1 << 16):
                *messages, rest = (rest + chunk).split(b"\0")
                for message in messages:
                    self._take(json.loads(message))
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take(self, message):
        with self._changed:
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self._pages:
                self._pages[message["sessionId"]].events.append((message["method"], message["params"]))
            self._changed.notify_all()

    def call(self, method, session=None, **params):
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data):]
        with self._changed:
            self._changed.wait_for(lambda: number in self._answers or self._closed, 60)
            answer = self._answers.pop(number, None)
        if not answer or "error" in answer:
            raise AssertionError(f"{method}: {answer and answer['error'] or 'no answer from the browser'}")
        return answer["result"]

    def page(self, url, **keywords):
        return Page(self, url, **keywords)

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        os.close(self._to)
        self._directory.cleanup()


class Page:
    """A tab at url. `events` keeps what the browser told of it, in order."""

    def __init__(self, browser, url, width=1280, height=860, scheme="light", before=None):
        self.browser, self.events = browser, []
        self._context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser._pages[self._session] = self
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            self.call(domain + ".enable")
        self.call("Performance.enable", timeDomain="threadTicks")
        self.size(width, height)
        self.scheme(scheme)
        if before:  # JavaScript that runs before the page's own
            self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.go(url)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.browser._pages.pop(self._session, None)
        self.browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def call(self, method, **params):
        return self.browser.call(method, self._session, **params)

    def size(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, value, motion="no-preference"):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value},
                                                          {"name": "prefers-reduced-motion", "value": motion}])

    def go(self, url):
        loads = lambda: sum(method == "Page.loadEventFired" for method, _ in list(self.events))
        before = loads()
        self.call("Page.navigate", url=url)
        wait_until(lambda: loads() > before, 20, f"{url} is loaded")

    def js(self, expression):
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    def wait(self, expression, seconds=15):
        try:
            wait_until(lambda: self.js(expression), seconds, expression)
        except AssertionError as e:
            raise AssertionError(f"{e}\nthe page says: {self.js('document.body.innerText')[-1500:]}\n{self.problems()}") from None

    def text(self, selector):
        return self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? null")

    def press(self, key, modifiers=0):
        code, number, text = KEYS[key]
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def click(self, selector):
        """A click of the mouse in the middle of what the selector (or an expression in parentheses) gives."""
        element = selector if selector.startswith("(") else f"document.querySelector({json.dumps(selector)})"
        self.wait(f"!!{element}")
        x, y = self.js(f"(e => {{ e.scrollIntoView({{block: 'nearest'}}); const r = e.getBoundingClientRect();"
                       f" return [r.x + r.width / 2, r.y + r.height / 2]; }})({element})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def problems(self):
        """Errors in the console, exceptions, what the policy stopped."""
        found = []
        for method, params in list(self.events):
            if method == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(a.get("value")) for a in params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found

    def requested(self):
        return [p["request"]["url"] for method, p in list(self.events) if method == "Network.requestWillBeSent"]

    def accessibility(self):
        """[(role, name, properties)] of what assistive technology sees."""
        nodes = []
        for node in self.call("Accessibility.getFullAXTree")["nodes"]:
            if not node.get("ignored"):
                properties = {p["name"]: p["value"].get("value") for p in node.get("properties", ())}
                nodes.append((node["role"]["value"], node.get("name", {}).get("value", ""), properties))
        return nodes

    def cpu_seconds(self):
        """The time that the page's own thread has computed: what else the machine does is not in it."""
        metrics = self.call("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    def screenshot(self, path):
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:
            f.write(data)
