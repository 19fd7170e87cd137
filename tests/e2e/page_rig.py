"""What the tests of the chat page share: the browser, and a stand-in for the server that answers as it is told."""

import http.server
import json
import os
import threading
import unittest

from browser import PROGRAM, Browser
from harness import Server

USAGE = {"prompt_tokens": 21, "completion_tokens": 3, "total_tokens": 24, "prompt_tokens_details": {"cached_tokens": 16}}
ANSWERED = "document.querySelectorAll('.figures').length === {}"

MARKDOWN = """# Title
One *em* and **strong** and ***both*** and `co*de*` and ~~gone~~, snake_case_name, 2 * 3 * 4.
Second line \\*plain\\*.

- a
- b `x`
  1. one
  2. two

  more of b
- c

> quoted **words**
> - in a list

```python
def f():
\treturn "<b>"

# not a heading
```

| a | b |
|---|:-:|
| 1 | `2` |
| 3 \\| 4 |

---
[link](https://example.com/a_(b)?q=1) and <https://example.com/x> and https://example.com/y_z. Mail [me](mailto:a@example.com)
Not closed: **a *b `c [d](
~~~
open to the end"""

server = browser = None  # of the module whose tests run


def start():
    global server, browser
    if not PROGRAM:
        # Where CI is set the tests run, and fail for want of it: nobody reads there what was skipped.
        if os.environ.get("CI"):
            raise AssertionError("Chromium is not installed, and CI is set")
        raise unittest.SkipTest("Chromium is not installed (see scripts/setup.sh check)")
    server = Server()
    browser = Browser()


def stop():
    browser.close()
    server.check_stopped()


def chunk(text=None, reason=None, **more):
    delta = {} if text is None else {"content": text}
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more}


def stream(*pieces, reason="stop", usage=USAGE, end=(b"data: [DONE]\n\n",), hold=None, size=None):
    """An answer that streams pieces, in writes of `size` bytes; it waits for the event `hold` before the last of them."""
    def answer(handler):
        handler.head(200, "text/event-stream; charset=utf-8")
        events = [chunk("")] + [chunk(p) for p in pieces] + [chunk(reason=reason), {"choices": [], "usage": usage}]
        lines = [b"data: " + json.dumps(e).encode() + b"\n\n" for e in events] + list(end)
        if hold:
            handler.put(b"".join(lines[:-4]), size)
            while not hold.wait(0.05):
                handler.put(b": keep-alive\n\n", size)  # fails when the page has gone
            lines = lines[-4:]
        handler.put(b"".join(lines), size)
    return answer


def error(status, message="words of the server", param=None, **headers):
    def answer(handler):
        handler.head(status, "application/json", headers)
        handler.put(json.dumps({"error": {"message": message, "type": "t", "param": param, "code": None}}).encode())
    return answer


class StandIn:
    """Serves the page of the real server, with its headers, and then `answers`, one after the other."""

    def __init__(self, *answers, models=("stand-in",)):
        page = server.get("/")
        stand_in = self
        self.answers, self.requests, self.gone = list(answers), [], 0
        self.models = error(503) if models is None else lambda handler: handler.json(
            {"object": "list", "data": [{"id": m, "object": "model", "max_model_len": 4096} for m in models]})

        class Handler(http.server.BaseHTTPRequestHandler):
            def head(self, status, content_type, headers=()):
                self.send_response(status)
                for name, value in {"Content-Type": content_type, "Connection": "close", **dict(headers)}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()

            def put(self, data, size=None):
                for i in range(0, len(data), size or len(data) or 1):
                    self.wfile.write(data[i:i + (size or len(data))])
                    self.wfile.flush()

            def json(self, value):
                self.head(200, "application/json")
                self.put(json.dumps(value).encode())

            def do_GET(self):
                if self.path == "/v1/models":
                    stand_in.models(self)
                    return
                kept = {k: v for k, v in page.headers.items() if k not in ("Date", "Connection", "Content-Length")}
                self.head(200, kept.pop("Content-Type"), kept)
                self.put(page.body)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                stand_in.requests.append((self.path, self.headers, body.decode()))
                try:
                    stand_in.answers.pop(0)(self)
                except (BrokenPipeError, ConnectionResetError):
                    stand_in.gone += 1

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def body(self, i=-1):
        return json.loads(self.requests[i][2])


def url_of(a_server):
    return f"http://127.0.0.1:{a_server.port}/"


def connected(page):
    page.wait("!!model")


def send(page, text):
    page.js("document.getElementById('message').focus()")
    page.type(text)
    page.press("Enter")


def set_control(page, name, value):
    page.js(f"(i => {{ i.value = {json.dumps(value)}; i.dispatchEvent(new Event('input')); }})"
            f"(document.getElementById('control-{name}'))")


def chat(page, text, n=1):
    """Sends text and waits for the end of the n-th answer."""
    connected(page)
    send(page, text)
    page.wait(ANSWERED.format(n))
    return page.text(f".turn:nth-child({n}) .answer")


def button(label):
    return f"([...document.querySelectorAll('button')].find(b => b.textContent === {json.dumps(label)} && b.checkVisibility()))"


class PageCase(unittest.TestCase):
    maxDiff = None

    def check_quiet(self, page, expected=()):
        """Nothing went wrong in the page but what was expected, and it spoke to its own server alone."""
        problems = [p for p in page.problems() if not any(e in p for e in expected)]
        self.assertEqual(problems, [])
        origin = page.js("location.origin")
        for url in page.requested():
            self.assertTrue(url.startswith((origin + "/", "data:image/svg+xml,")), url)
