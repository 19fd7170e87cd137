"""The chat page in headless Chromium: with the demo model, and with a stand-in for the server."""

import json
import os
import threading
import unittest

import harness
import page_rig as rig
from harness import Server, wait_until
from page_rig import ANSWERED, PageCase, StandIn, button, chat, connected, error, send, set_control, stream, url_of

setUpModule, tearDownModule = rig.start, rig.stop


class Served(PageCase):
    """By the real server, with the demo model."""

    def test_headers(self):
        answer = rig.server.get("/")
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
        head = rig.server.request("HEAD", "/")
        self.assertEqual((head.status, head.body, head.headers["Content-Length"]), (200, b"", str(len(answer.body))))
        self.assertEqual(rig.server.request("POST", "/", b"{}").status, 405)
        self.assertEqual(rig.server.get("/none-such").status, 404)

    def test_completion(self):
        prompt = "Once upon a time"
        with rig.browser.page(url_of(rig.server)) as page:
            connected(page)
            self.assertIn(rig.server.name, page.js("document.title"))
            page.click("input[value=completion]")
            set_control(page, "temperature", "0")
            set_control(page, "max_tokens", "60")
            chat(page, prompt)
            answer = page.js("document.querySelector('.answer').textContent")
            self.assertEqual(answer, rig.server.text(prompt, temperature=0, max_tokens=60))
            self.assertRegex(page.text(".figures"), r"^\d+ tokens · prompt \d+.* · [\d,]+ tokens/s · first token after \d+ ms")
            page.click(button("Regenerate"))
            page.wait(f"{ANSWERED.format(1)} && document.querySelector('.answer').textContent === {json.dumps(answer)}")
            self.check_quiet(page)

    @unittest.skipUnless(os.path.basename(harness.MODEL) == "demo", "another model is served")
    def test_demo(self):
        with rig.browser.page(url_of(rig.server)) as page:
            connected(page)
            page.click(button("12+30="))
            page.wait(ANSWERED.format(1))
            self.assertEqual(page.text(".answer").strip(), "42")
            page.click(button("New chat"))
            page.click(button("Once upon a time"))
            page.wait(ANSWERED.format(1))
            self.check_quiet(page)

    @unittest.skipUnless(os.path.basename(harness.MODEL) == "demo", "another model is served")
    def test_demo_chat(self):
        if rig.server.post("/v1/chat/completions", {}).status == 404:
            self.skipTest("there is no chat route")
        with rig.browser.page(url_of(rig.server)) as page:
            connected(page)
            set_control(page, "temperature", "0")
            page.click(button("Tell me a story about a fox."))
            page.wait(ANSWERED.format(1))
            messages = [{"role": "user", "content": "Tell me a story about a fox."}]
            body = {"model": rig.server.name, "messages": messages, "temperature": 0}
            answer = rig.server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
            self.assertEqual(page.js("turns[0].answer"), answer)
            self.assertIn("fox", answer)
            chat(page, "Tell me a story about a bird.", 2)
            page.screenshot(os.path.join(harness.ROOT, "build", "page.png"))
            self.check_quiet(page)

    def test_stop_frees_the_server(self):
        with rig.browser.page(url_of(rig.server)) as page:
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
            rig.server.wait_idle()

    def test_key(self):
        keyed = Server("--api-key", "sk-page")
        refused = "Failed to load resource: the server responded with a status of 401"
        with rig.browser.page(url_of(keyed)) as page:
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
        with StandIn(stream("Hello", ", you"), stream("Again")) as s, rig.browser.page(s.url) as page:
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
        with StandIn(stream("a"), stream("b"), stream("c")) as s, rig.browser.page(s.url) as page:
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
        with StandIn() as s, rig.browser.page(s.url) as page:
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
        refusal = error(400, "this model has no chat template: use /v1/completions")
        with StandIn(refusal, stream("and on"), stream("and on again")) as s, rig.browser.page(s.url) as page:
            # The stand-in's chunks are a chat's; text in either shape is taken.
            self.assertEqual(chat(page, "On"), "and on")
            self.assertEqual([path for path, *_ in s.requests], ["/v1/chat/completions", "/v1/completions"])
            self.assertEqual((s.body()["prompt"], s.body()["max_tokens"]), ("On", 256))
            self.assertIn("no chat template", page.text("#notices"))
            chat(page, "More", 2)
            self.assertEqual(s.body()["prompt"], "More")
            # A template's own words are not that.
        with StandIn(error(400, "chat template: roles must alternate", "messages")) as s, rig.browser.page(s.url) as page:
            connected(page)
            send(page, "x")
            page.wait("!!document.querySelector('.failure')")
            self.assertEqual(page.js("mode()"), "chat")

    def test_stop(self):
        hold = threading.Event()
        with StandIn(stream("Some", " of", " it", hold=hold), stream("More")) as s, rig.browser.page(s.url) as page:
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
        with StandIn(*(stream(t) for t in ("one", "two", "three", "four"))) as s, rig.browser.page(s.url) as page:
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
        with StandIn(stream("one"), stream("two")) as s, rig.browser.page(s.url) as page:
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
        with StandIn(stream("x"), models=("first", "second")) as s, rig.browser.page(s.url) as page:
            page.wait("!!document.querySelector('#model select')")
            page.js("(e => { e.value = 'second'; e.dispatchEvent(new Event('change')); })(document.querySelector('#model select'))")
            chat(page, "A")
            self.assertEqual(s.body()["model"], "second")


class Errors(PageCase):
    failed = "!!document.querySelector('.failure')"

    def test_refusals(self):
        for status, words in ((400, "refused"), (404, "refused"), (500, "failed"), (503, "cannot take this now")):
            with self.subTest(status=status), StandIn(error(status), stream("fine")) as s, rig.browser.page(s.url) as page:
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
            with StandIn(error(status, Retry_After="2"), stream("fine")) as s, rig.browser.page(s.url) as page:
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
            with self.subTest(words=words), StandIn(stream("half", end=end)) as s, rig.browser.page(s.url) as page:
                connected(page)
                send(page, "A")
                page.wait(self.failed)
                self.assertIn(words, page.text(".failure"))
                self.assertEqual(page.text(".answer"), "half")

    def test_no_server(self):
        with StandIn(stream("x")) as s, rig.browser.page(s.url) as page:
            connected(page)
            s.close()
            send(page, "A")
            page.wait(self.failed)
            self.assertIn("cannot be reached", page.text(".failure"))

    def test_not_ready_yet(self):
        with StandIn(models=None) as s, rig.browser.page(s.url) as page:
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
        with StandIn(proxy) as s, rig.browser.page(s.url) as page:
            connected(page)
            send(page, "A")
            page.wait(self.failed)
            self.assertIn("status 502", page.text(".failure"))


if __name__ == "__main__":
    unittest.main()
