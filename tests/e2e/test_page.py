"""The chat page in headless Chromium: with the demo model, and with a stand-in for the server that answers as it is told."""

import http.server
import json
import os
import threading
import unittest

import harness
from browser import PROGRAM, SHIFT, Browser
from harness import Server, scale, wait_until

USAGE = {"prompt_tokens": 21, "completion_tokens": 3, "total_tokens": 24, "prompt_tokens_details": {"cached_tokens": 16}}
ANSWERED = "document.querySelectorAll('.figures').length === {}"

server = browser = None


def setUpModule():
    global server, browser
    if not PROGRAM:
        # Where CI is set the tests run, and fail for want of it: nobody reads there what was skipped.
        if os.environ.get("CI"):
            raise AssertionError("Chromium is not installed, and CI is set")
        raise unittest.SkipTest("Chromium is not installed (see scripts/setup.sh check)")
    server = Server()
    browser = Browser()


def tearDownModule():
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


class Served(PageCase):
    """By the real server, with the demo model."""

    def test_headers(self):
        answer = server.get("/")
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.headers["Content-Type"], "text/html; charset=utf-8")
        self.assertEqual(answer.headers["X-Content-Type-Options"], "nosniff")
        self.assertEqual(answer.headers["Referrer-Policy"], "no-referrer")
        self.assertEqual(answer.headers["Cache-Control"], "no-cache")
        policy = answer.headers["Content-Security-Policy"]
        for part in ("default-src 'none'; ", "script-src 'sha256-", "style-src 'sha256-", "connect-src 'self'; ",
                     "base-uri 'none'; ", "form-action 'none'; ", "frame-ancestors 'none'; "):
            self.assertIn(part, policy)
        self.assertNotIn("unsafe", policy)
        head = server.request("HEAD", "/")
        self.assertEqual((head.status, head.body, head.headers["Content-Length"]), (200, b"", str(len(answer.body))))
        self.assertEqual(server.request("POST", "/", b"{}").status, 405)
        self.assertEqual(server.get("/none-such").status, 404)

    def test_completion(self):
        prompt = "Once upon a time"
        with browser.page(url_of(server)) as page:
            connected(page)
            self.assertIn(server.name, page.js("document.title"))
            page.click("input[value=completion]")
            set_control(page, "temperature", "0")
            set_control(page, "max_tokens", "60")
            chat(page, prompt)
            answer = page.js("document.querySelector('.answer').textContent")
            self.assertEqual(answer, server.text(prompt, temperature=0, max_tokens=60))
            self.assertRegex(page.text(".figures"), r"^\d+ tokens · prompt \d+.* · [\d,]+ tokens/s · first token after \d+ ms")
            page.click(button("Regenerate"))
            page.wait(f"{ANSWERED.format(1)} && document.querySelector('.answer').textContent === {json.dumps(answer)}")
            self.check_quiet(page)

    @unittest.skipUnless(os.path.basename(harness.MODEL) == "demo", "another model is served")
    def test_demo(self):
        with browser.page(url_of(server)) as page:
            connected(page)
            page.click(button("12+30="))
            page.wait(ANSWERED.format(1))
            self.assertEqual(page.text(".answer").strip(), "42")
            page.click(button("New chat"))
            page.click(button("Once upon a time"))
            page.wait(ANSWERED.format(1))
            page.screenshot(os.path.join(harness.ROOT, "build", "page.png"))
            self.check_quiet(page)

    def test_stop_frees_the_server(self):
        with browser.page(url_of(server)) as page:
            connected(page)
            page.click("input[value=completion]")
            set_control(page, "max_tokens", "2000")
            for _ in range(5):  # the model may come to an end sooner
                page.js("newChat()")
                send(page, "Once upon a time")
                page.wait("document.querySelector('.answer')?.textContent")
                page.press("Escape")
                page.wait(ANSWERED.format(1))
                if "stopped" in page.text(".figures"):
                    break
            self.assertIn("stopped", page.text(".figures"))
            server.wait_idle()

    def test_key(self):
        keyed = Server("--api-key", "sk-page")
        refused = "Failed to load resource: the server responded with a status of 401"
        with browser.page(url_of(keyed)) as page:
            page.wait("!document.getElementById('key-form').hidden && document.activeElement.id === 'key'")
            page.type("sk-wrong")
            page.press("Enter")
            page.wait("!document.getElementById('key-form').hidden && !key.includes('page')")
            page.js("document.getElementById('key').focus()")
            page.type("sk-page")
            page.press("Enter")
            connected(page)
            page.click("input[value=completion]")
            self.assertTrue(chat(page, "Once"))
            self.assertEqual(page.js("JSON.stringify(localStorage).includes('sk-page')"), False)
            page.go(url_of(keyed))
            connected(page)
            page.click("#forget")
            page.wait("!document.getElementById('key-form').hidden")
            self.assertEqual(page.js("JSON.stringify(sessionStorage).includes('sk-page')"), False)
            self.check_quiet(page, [refused])
        keyed.check_stopped()
        self.assertNotIn("sk-page", json.dumps(keyed.log))


class Talk(PageCase):
    def test_chat(self):
        with StandIn(stream("Hello", ", you"), stream("Again")) as s, browser.page(s.url) as page:
            set_control(page, "system", "Be brief.")
            self.assertEqual(chat(page, "One"), "Hello, you")
            self.assertEqual(chat(page, "Two", 2), "Again")
            system = {"role": "system", "content": "Be brief."}
            first = {"model": "stand-in", "stream": True, "stream_options": {"include_usage": True},
                     "messages": [system, {"role": "user", "content": "One"}]}
            self.assertEqual(s.body(0), first)
            self.assertEqual(s.body(1)["messages"], [*first["messages"], {"role": "assistant", "content": "Hello, you"},
                                                     {"role": "user", "content": "Two"}])
            self.assertEqual({path for path, *_ in s.requests}, {"/v1/chat/completions"})
            self.assertIn("3 tokens · prompt 21 (16 cached)", page.text(".figures"))
            self.check_quiet(page)

    def test_settings(self):
        values = {"temperature": "0.5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "7",
                  "repetition_penalty": "1.1", "frequency_penalty": "-0.5", "presence_penalty": "2",
                  "seed": "9007199254740993", "stop": "END\n\\n\n\\\\n"}
        with StandIn(stream("a"), stream("b"), stream("c")) as s, browser.page(s.url) as page:
            for name, value in values.items():
                set_control(page, name, value)
            chat(page, "One")
            fields = {k: v for k, v in s.body().items() if k not in ("model", "messages", "stream", "stream_options")}
            self.assertEqual(fields, {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_completion_tokens": 7,
                                      "repetition_penalty": 1.1, "frequency_penalty": -0.5, "presence_penalty": 2,
                                      "seed": 9007199254740993, "stop": ["END", "\n", "\\n"]})
            page.go(s.url)  # they outlive a reload, and so does the conversation
            connected(page)
            self.assertEqual(page.js("document.getElementById('control-top_k').value"), "40")
            self.assertEqual(page.text(".answer"), "a")
            chat(page, "Two", 2)
            self.assertEqual([m["content"] for m in s.body()["messages"]], ["One", "a", "Two"])
            page.click("#control-temperature + button")
            self.assertEqual(page.js("document.getElementById('control-temperature').value"), "")
            page.click("#reset-all")
            chat(page, "Three", 3)
            self.assertNotIn("top_k", s.body())
            self.check_quiet(page)

    def test_wrong_settings_are_not_sent(self):
        wrong = {"temperature": ("2.1", "-1", "1e999"), "top_p": ("0", "1.01"), "top_k": ("-2", "1.5"), "max_tokens": ("0", "-1"),
                 "seed": ("x", "1.5", "9223372036854775808"), "stop": ("a\nb\nc\nd\ne",), "repetition_penalty": ("0", "2.5")}
        with StandIn() as s, browser.page(s.url) as page:
            connected(page)
            send(page, " \n ")
            for name, values in wrong.items():
                for value in values:
                    with self.subTest(name=name, value=value):
                        set_control(page, name, value)
                        if page.js(f"document.getElementById('control-{name}').value") == "":
                            continue  # the browser knows no such number
                        page.js("document.getElementById('message').value = 'x'")
                        send(page, "y")
                        self.assertEqual(page.js("document.activeElement.id"), "control-" + name)
                        self.assertEqual(page.js("document.activeElement.ariaInvalid"), "true")
                        self.assertTrue(page.text("#notices"))
                set_control(page, name, "")
            self.assertEqual(s.requests, [])

    def test_no_template(self):
        refusal = error(400, "the model has no chat template")
        with StandIn(refusal, stream("and on"), stream("and on again")) as s, browser.page(s.url) as page:
            # The stand-in's chunks are a chat's; text in either shape is taken.
            self.assertEqual(chat(page, "On"), "and on")
            self.assertEqual([path for path, *_ in s.requests], ["/v1/chat/completions", "/v1/completions"])
            self.assertEqual((s.body()["prompt"], s.body()["max_tokens"]), ("On", 256))
            self.assertIn("no chat template", page.text("#notices"))
            chat(page, "More", 2)
            self.assertEqual(s.body()["prompt"], "More")
            # A template's own words are not that.
        with StandIn(error(400, "chat template: roles must alternate", "messages")) as s, browser.page(s.url) as page:
            connected(page)
            send(page, "x")
            page.wait("!!document.querySelector('.failure')")
            self.assertEqual(page.js("mode()"), "chat")

    def test_stop(self):
        hold = threading.Event()
        with StandIn(stream("Some", " of", " it", hold=hold), stream("More")) as s, browser.page(s.url) as page:
            connected(page)
            send(page, "Go")
            page.wait("document.querySelector('.answer')?.innerText.includes('Some of')")
            self.assertEqual(page.js("document.querySelector('.answer').ariaBusy"), "true")
            self.assertEqual(page.text("#status"), "")
            page.click("#stop")
            page.wait(ANSWERED.format(1))
            self.assertIn("stopped", page.text(".figures"))
            self.assertEqual(page.js("document.querySelector('.answer').ariaBusy"), "false")
            wait_until(lambda: s.gone == 1, 10, "the server is told")
            chat(page, "On", 2)
            self.assertEqual(s.body()["messages"][1]["content"], page.text(".turn .answer"))
            self.check_quiet(page)

    def test_regenerate_and_edit(self):
        with StandIn(*(stream(t) for t in ("one", "two", "three", "four"))) as s, browser.page(s.url) as page:
            chat(page, "A")
            chat(page, "B", 2)
            page.click(button("Regenerate"))
            page.wait("document.querySelectorAll('.answer')[1].innerText === 'three'")
            self.assertEqual(s.body(2), s.body(1))
            page.wait(ANSWERED.format(2))
            page.click(button("Edit"))
            self.assertEqual(page.js("document.getElementById('message').value"), "B")
            page.press("Escape")
            self.assertEqual(page.js("document.getElementById('message').value"), "")
            page.click(button("Edit"))
            page.type("2")
            page.press("Enter")
            page.wait("document.querySelectorAll('.answer')[1]?.innerText === 'four'")
            self.assertEqual([m["content"] for m in s.body()["messages"]], ["A", "one", "B2"])
            self.assertEqual(page.js("document.querySelectorAll('.turn').length"), 2)
            self.check_quiet(page)

    def test_new_chat(self):
        with StandIn(stream("one"), stream("two")) as s, browser.page(s.url) as page:
            chat(page, "A")
            page.click("#new")
            self.assertEqual(page.js("document.querySelectorAll('.turn').length"), 0)
            self.assertIsNone(page.js("sessionStorage.getItem('gptd.turns')"))
            page.click(button("Undo"))
            self.assertEqual(page.text(".answer"), "one")
            page.click("#new")
            chat(page, "B")
            self.assertEqual(len(s.body()["messages"]), 1)
            self.assertIsNone(page.js(button("Undo") + "?.textContent ?? null"))

    def test_models(self):
        with StandIn(stream("x"), models=("first", "second")) as s, browser.page(s.url) as page:
            page.wait("!!document.querySelector('#model select')")
            page.js("(e => { e.value = 'second'; e.dispatchEvent(new Event('change')); })(document.querySelector('#model select'))")
            chat(page, "A")
            self.assertEqual(s.body()["model"], "second")


class Errors(PageCase):
    failed = "!!document.querySelector('.failure')"

    def test_refusals(self):
        for status, words in ((400, "refused"), (404, "refused"), (500, "failed"), (503, "cannot take this now")):
            with self.subTest(status=status), StandIn(error(status), stream("fine")) as s, browser.page(s.url) as page:
                connected(page)
                send(page, "A")
                page.wait(self.failed)
                self.assertIn(words, page.text(".failure"))
                self.assertIn("words of the server", page.text(".failure"))
                self.assertEqual(page.js("document.querySelector('.failure').role"), "alert")
                page.click(button("Retry"))
                page.wait("document.querySelector('.answer').innerText === 'fine'")
                self.assertEqual(s.body(0), s.body(1))
                self.assertFalse(page.js(self.failed))

    def test_retry_after(self):
        for status in (429, 503):
            with StandIn(error(status, Retry_After="2"), stream("fine")) as s, browser.page(s.url) as page:
                connected(page)
                send(page, "A")
                page.wait(self.failed)
                self.assertRegex(page.text(".failure button"), r"Retry in [12] s")
                self.assertTrue(page.js("document.querySelector('.failure button').disabled"))
                page.click(button("Retry"))
                page.wait("document.querySelector('.answer').innerText === 'fine'")

    def test_within_the_stream(self):
        for end, words in (([b'data: {"error":{"message":"the device failed"}}\n\n'], "the device failed"),
                           ([], "ended early"), ([b"data: {\n\n"], "not understood")):
            with self.subTest(words=words), StandIn(stream("half", end=end)) as s, browser.page(s.url) as page:
                connected(page)
                send(page, "A")
                page.wait(self.failed)
                self.assertIn(words, page.text(".failure"))
                self.assertEqual(page.text(".answer"), "half")

    def test_no_server(self):
        with StandIn(stream("x")) as s, browser.page(s.url) as page:
            connected(page)
            s.close()
            send(page, "A")
            page.wait(self.failed)
            self.assertIn("cannot be reached", page.text(".failure"))

    def test_not_ready_yet(self):
        with StandIn(models=None) as s, browser.page(s.url) as page:
            page.wait(self.failed)
            self.assertIn("cannot take this now", page.text("#notices"))
            s.models = lambda handler: handler.json({"data": [{"id": "late"}]})
            page.click(button("Retry"))
            page.wait("model === 'late'")
            self.assertEqual(page.text("#notices"), "")

    def test_not_from_gptd(self):
        def proxy(handler):
            handler.head(502, "text/html")
            handler.put(b"<h1>Bad gateway</h1>")
        with StandIn(proxy) as s, browser.page(s.url) as page:
            connected(page)
            send(page, "A")
            page.wait(self.failed)
            self.assertIn("status 502", page.text(".failure"))


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

ATTACKS = ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))",
           "[x](java\tscript:alert(1))", "[x](data:text/html,<script>alert(1)</script>)", "<javascript:alert(1)>",
           "[x](vbscript:x)", "![x](https://example.com/x.png)", "[x](//example.com)", "[x](/v1/models)",
           "[<img src=x onerror=alert(1)>](https://example.com)", "`<svg onload=alert(1)>`", "```<b>\n<i>x</i>\n```",
           "<a href='https://example.com' onclick='alert(1)'>x</a>", "| <b>x</b> | y |\n|---|---|\n| <u>z</u> | w |",
           "# <h1>x</h1>", "> <iframe src=//example.com>", "&lt;b&gt; &#60;b&#62;", "[a](https://a.example \"t\" onclick=x)"]

HOSTILE = ["*a ", "**a ", "_a ", "a*", "a**", "[", "]", "[a](", "[a](b", "![", "`", "``a`", "`a``", "<", "<http://", "http://%% ", "http://a",
           "\\", "> ", ">", "- ", "-", "1. ", "| ", "|", "#", "# ", "~~a", "~~~\n", "```\n", "```a\n", "a\n\n", "- a\n\n", "> a\n", "*a_b",
           "**a*", "***a** ", "*a **b ", " ", "\t", "\n", "|a\n|-\n", "a|b\n-|-\n", "(", "[a](b \"", "- - a\n", "  - a\n", "1. a\n   ",
           "___", "=", "h", "[[a](http://b) ", "[a](http://b)", "`` ` ", " `a", "\u2028", "# \u2028"]


class Markdown(PageCase):
    def render(self, text, size=None):
        with StandIn(stream(*([text] if isinstance(text, str) else text), size=size)) as s, browser.page(s.url) as page:
            chat(page, "A")
            self.check_quiet(page)
            return page.js("document.querySelector('.answer').innerHTML"), page

    def test_what_is_rendered(self):
        with StandIn(stream(MARKDOWN)) as s, browser.page(s.url) as page:
            chat(page, "A")
            texts = lambda selector: page.js(f"[...document.querySelectorAll('.answer {selector}')].map(e => e.textContent)")
            self.assertEqual(texts("h3"), ["Title"])
            self.assertEqual(texts("p em"), ["em", "both"])
            self.assertEqual(texts("strong"), ["strong", "both", "words"])
            self.assertEqual(texts("p code"), ["co*de*"])
            self.assertEqual(texts("s"), ["gone"])
            self.assertEqual(texts("> p")[0], "One em and strong and both and co*de* and gone, snake_case_name, 2 * 3 * 4.\n"
                                              "Second line *plain*.")
            self.assertEqual(texts("> ul > li")[::2], ["a", "c"])
            self.assertEqual(texts("> ul > li > ol > li"), ["one", "two"])
            self.assertEqual(texts("> ul > li > p"), ["more of b"])
            self.assertEqual(texts("blockquote li"), ["in a list"])
            self.assertEqual(texts("pre")[0], 'def f():\n\treturn "<b>"\n\n# not a heading')
            self.assertEqual(texts("pre")[1], "open to the end")
            self.assertEqual(texts(".code span"), ["python", "code"])
            self.assertEqual(texts("th"), ["a", "b"])
            self.assertEqual(texts("td"), ["1", "2", "3 | 4"])
            self.assertEqual(page.js("document.querySelectorAll('.answer hr').length"), 1)
            links = page.js("[...document.querySelectorAll('.answer a')].map(a => [a.textContent, a.href, a.rel])")
            self.assertEqual(links, [[t, h, "noopener noreferrer"] for t, h in (
                ("link", "https://example.com/a_(b)?q=1"), ("https://example.com/x", "https://example.com/x"),
                ("https://example.com/y_z", "https://example.com/y_z"), ("me", "mailto:a@example.com"))])
            self.assertTrue(texts("> p")[-1].endswith("Not closed: **a *b `c [d]("))
            self.check_quiet(page)

    def test_attacks_stay_text(self):
        allowed = {"P", "A", "CODE", "PRE", "DIV", "SPAN", "BUTTON", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "H3", "BLOCKQUOTE"}
        with StandIn(*(stream(a) for a in ATTACKS)) as s, browser.page(s.url) as page:
            for n, attack in enumerate(ATTACKS, 1):
                with self.subTest(attack=attack):
                    chat(page, attack, n)
                    node = f"document.querySelector('.turn:nth-child({n})')"
                    self.assertLessEqual(set(page.js(f"[...{node}.querySelectorAll('.answer *')].map(e => e.tagName)")), allowed)
                    for href in page.js(f"[...{node}.querySelectorAll('.answer a')].map(e => e.href)"):
                        self.assertRegex(href, r"^https://")
                    for part in ("alert(1)", "<b>", "&lt;", "iframe"):
                        if part in attack:
                            self.assertIn(part, page.js(f"{node}.querySelector('.answer').textContent"))
            self.assertEqual([u for u in page.requested() if "example" in u], [])
            self.check_quiet(page)

    def test_streamed_is_whole(self):
        whole, _ = self.render(MARKDOWN)
        for pieces in ([c for c in MARKDOWN], [MARKDOWN[i:i + 7] for i in range(0, len(MARKDOWN), 7)]):
            self.assertEqual(self.render(pieces)[0], whole)
        text = "Größe 😀 名前 — *ü*"
        self.assertEqual(self.render([text], size=1)[0], self.render(text)[0])
        # However the frames fall: drawn after each character.
        with StandIn() as s, browser.page(s.url) as page:
            drawn = page.js("""(text => {
                const node = document.createElement("div"), view = new AnswerView(node, true);
                for (const c of text) { view.rest += c; view.draw(); }
                return node.innerHTML;
            })(""" + json.dumps(MARKDOWN) + ")")
            self.assertEqual(drawn, whole)

    def test_copy(self):
        with StandIn(stream("```\nsome\n  code\n```")) as s:
            # The clipboard of a headless browser is not everywhere; what is put there is looked at.
            catch = "navigator.clipboard.writeText = async text => { window.copied = text; };"
            with browser.page(s.url, before=catch) as page:
                chat(page, "A")
                page.click(".code button")
                page.wait("window.copied === 'some\\n  code' && document.querySelector('.code button').textContent === 'Copied'")

    def test_hostile_text_takes_linear_time(self):
        """Twice the text takes about twice the time, whatever it is made of."""
        n = scale(60_000, 20_000)
        with StandIn() as s, browser.page(s.url) as page:
            page.js("""window.time = (unit, n) => {
                const text = unit.repeat(n / unit.length), began = performance.now();
                appendBlocks(document.createElement("div"), text.split("\\n"), 0);
                return performance.now() - began;
            }""")
            for unit in HOSTILE:
                with self.subTest(unit=unit):
                    page.js(f"time({json.dumps(unit)}, {n})")
                    once, eight = (min(page.js(f"time({json.dumps(unit)}, {m})") for _ in range(2)) for m in (n, 8 * n))
                    self.assertLess(eight, 24 * once + 200, "eight times the text")

    def test_long_answer(self):
        words = "The quick brown fox jumps over the **lazy** dog. "
        paragraphs = scale(4000, 800)
        pieces = [words * 2 + "\n\n" if i % 3 else words for i in range(paragraphs)]
        with StandIn(stream(*pieces)) as s, browser.page(s.url) as page:
            connected(page)
            page.js("window.made = 0; { const f = document.createElement.bind(document);"
                    " document.createElement = tag => { made++; return f(tag); }; }")
            send(page, "A")
            page.wait(ANSWERED.format(1), 60)
            elements = page.js("document.querySelectorAll('.answer *').length")
            self.assertGreater(elements, paragraphs)
            self.assertLess(page.js("made"), 3 * elements, "blocks are drawn again and again")
            self.assertLess(page.js("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"), 50)


class Policy(PageCase):
    def test_nothing_else_runs(self):
        with StandIn() as s, StandIn() as other, browser.page(s.url) as page:
            connected(page)
            self.assertEqual(page.js("(() => { try { document.body.innerHTML = '<p>x'; return 'set'; } catch { return 'no'; } })()"), "no")
            page.js("(() => { const e = document.createElement('img'); e.src = 'https://example.com/x.png'; document.body.append(e); })()")
            page.js("(() => { const e = document.createElement('p'); e.setAttribute('onclick', 'window.ran = 1');"
                    " document.body.append(e); e.click(); })()")
            self.assertIsNone(page.js("window.ran ?? null"))
            self.assertEqual(page.js(f"fetch('{other.url}', {{mode: 'no-cors'}}).then(() => 'sent', () => 'no')"), "no")
            self.assertEqual(page.js("fetch('v1/models').then(r => r.status)"), 200)


CONTRAST = """(() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgba = color => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const color = rgba(getComputedStyle(e).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255];
    };
    const found = [];
    for (const e of document.querySelectorAll("body *")) {
        const says = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.placeholder;
        if (!says || !e.checkVisibility() || e.disabled || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
        const a = luminance(rgba(getComputedStyle(e, e.placeholder ? "::placeholder" : null).color)), b = luminance(behind(e));
        found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + "." + e.className + " " + e.textContent.slice(0, 30)]);
    }
    return found;
})()"""


class Looks(PageCase):
    def test_dark_and_light(self):
        background = "getComputedStyle(document.body).backgroundColor"
        with StandIn() as s, browser.page(s.url, scheme="light") as page:
            light = page.js(background)
            page.scheme("dark")
            dark = page.js(background)
            self.assertNotEqual(light, dark)
            for expected in (light, dark, dark):  # the button: light, dark, as the system
                page.click("#theme")
                self.assertEqual(page.js(background), expected, page.text("#theme"))
            page.click("#theme")
            page.go(s.url)
            self.assertEqual(page.js(background), light)
            self.assertEqual(page.text("#theme"), "Theme: light")

    def test_contrast(self):
        for scheme in ("light", "dark"):
            with StandIn(stream(MARKDOWN), error(500)) as s, browser.page(s.url, scheme=scheme) as page:
                chat(page, "A")
                send(page, "B")
                page.wait("!!document.querySelector('.failure')")
                page.js("togglePanel(true); askKey(); note('x'); beginEdit(turns[1])")
                found = page.js(CONTRAST)
                self.assertGreater(len(found), 60)
                self.assertEqual([f for f in found if f[0] < 4.5], [], scheme)

    def test_phone(self):
        with StandIn(stream(MARKDOWN + "\n~~~\n" + "x" * 500)) as s, browser.page(s.url, width=360, height=640) as page:
            chat(page, "A" * 300)
            wide = "document.documentElement.scrollWidth > innerWidth || scroller.scrollWidth > scroller.clientWidth"
            self.assertFalse(page.js(wide))
            page.click("#toggle")
            self.assertTrue(page.js("document.getElementById('settings').getBoundingClientRect().width === innerWidth"))
            self.assertFalse(page.js("document.documentElement.scrollWidth > innerWidth"))
            page.press("Escape")
            self.assertFalse(page.js("document.getElementById('settings').checkVisibility()"))

    def test_motion(self):
        hold = threading.Event()
        running = "document.getAnimations().filter(a => a.playState === 'running').length"
        with StandIn(stream("a", "b", "c", hold=hold)) as s, browser.page(s.url) as page:
            connected(page)
            send(page, "A")
            page.wait(running)
            page.scheme("light", motion="reduce")
            self.assertEqual(page.js(running), 0)
            hold.set()


class Access(PageCase):
    def test_keyboard(self):
        message = "document.getElementById('message')"
        with StandIn(stream("one"), stream("two", "x", "y", hold=threading.Event())) as s, browser.page(s.url) as page:
            connected(page)
            self.assertEqual(page.js("document.activeElement.id"), "message")
            page.type("a")
            page.press("Enter", SHIFT)
            page.type("b")
            self.assertEqual(page.js(message + ".value"), "a\nb")
            self.assertEqual(s.requests, [])
            page.press("Enter")
            page.wait(ANSWERED.format(1))
            self.assertEqual(s.body()["messages"][0]["content"], "a\nb")
            self.assertEqual(page.js(message + ".value"), "")
            self.assertEqual(page.js("document.activeElement.id"), "message")
            send(page, "c")
            page.wait("document.querySelectorAll('.answer')[1]?.innerText")
            page.press("Escape")
            page.wait(ANSWERED.format(2))

    def test_tab_order(self):
        with StandIn(stream("one")) as s, browser.page(s.url) as page:
            chat(page, "A")
            page.js("togglePanel(false); document.activeElement.blur(); window.getSelection().removeAllRanges()")
            page.js("document.body.tabIndex = -1; document.body.focus()")
            seen = []
            for _ in range(9):
                page.press("Tab")
                seen.append(page.js("document.activeElement.id || document.activeElement.textContent"))
                self.assertNotEqual(page.js("getComputedStyle(document.activeElement).outlineStyle"), "none", seen)
            self.assertEqual(seen, ["Skip to the message box", "new", "theme", "toggle", "scroller", "Edit", "Copy", "Regenerate",
                                    "message"])
            page.js("document.body.focus()")
            page.press("Tab")
            page.press("Enter")
            self.assertEqual(page.js("document.activeElement.id"), "message")

    def test_names(self):
        controls = {"button", "textbox", "spinbutton", "radio", "combobox", "link", "searchbox"}
        with StandIn(stream(MARKDOWN), models=("a", "b")) as s, browser.page(s.url) as page:
            chat(page, "A")
            page.js("togglePanel(true); askKey()")
            nodes = page.accessibility()
            named = [(role, name) for role, name, _ in nodes if role in controls]
            self.assertEqual([n for n in named if not n[1].strip()], [])
            self.assertEqual(sum(role == "spinbutton" for role, _ in named), 8)
            names = {name for _, name in named}
            for name in ("Message", "Send", "Temperature", "Reset temperature", "System prompt", "API key", "Model", "Copy the code",
                         "Settings", "New chat"):
                self.assertIn(name, names)
            roles = [(role, name) for role, name, _ in nodes]
            for landmark in (("banner", ""), ("main", ""), ("complementary", "Settings"), ("region", "Conversation")):
                self.assertIn(landmark, roles)

    def test_announced_once(self):
        """What is read aloud is the finished answer, not each token."""
        watch = """window.said = []; new MutationObserver(() => said.push(document.getElementById("status").textContent))
                   .observe(document.getElementById("status"), {childList: true, characterData: true, subtree: true})"""
        with StandIn(stream(*"abcdefgh")) as s, browser.page(s.url) as page:
            page.js(watch)
            chat(page, "A")
            page.wait("said.length")
            self.assertEqual(page.js("said"), ["Answer: abcdefgh"])
            live = page.js("[...document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]')].map(e => e.id)")
            self.assertEqual(live, ["status"])


if __name__ == "__main__":
    unittest.main()
