"""POST /v1/chat/completions: whole, streamed, what each field does, and templates that are missing, broken or refuse."""

import contextlib
import json
import math
import os
import tempfile
import unittest

import harness
from harness import Server, ServerTest, StreamError, TinyServerTest, parse_events

GREEDY = {"temperature": 0, "max_tokens": 24}
STORY = "Tell me a story about a fox."


def prompt_of(messages, end="<|assistant|>\n"):
    """What the demo's template makes of messages, but for BOS."""
    return "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in messages) + end


def user(content):
    return [{"role": "user", "content": content}]


def join_chunks(events):
    """{choice index: (text, finish_reason, logprobs, token ids)}; checks the order of a choice's chunks."""
    joined = {}
    for event in events:
        for choice in event["choices"]:
            delta, reason = choice["delta"], choice["finish_reason"]
            if choice["index"] not in joined:
                assert delta == {"role": "assistant", "content": ""} and reason is None, choice
                joined[choice["index"]] = ("", None, [], [])
                continue
            text, ended, logprobs, ids = joined[choice["index"]]
            assert ended is None, f"choice {choice['index']} goes on after its end"
            assert set(delta) == (set() if reason else {"content"}), choice
            logprobs = logprobs + (choice["logprobs"] or {"content": []})["content"]
            joined[choice["index"]] = (text + delta.get("content", ""), reason, logprobs, ids + choice.get("token_ids", []))
    return joined


@contextlib.contextmanager
def demo_with(files):
    """The demo with some files replaced ({name: text}) or left out ({name: None})."""
    with tempfile.TemporaryDirectory(prefix="gptd-e2e-") as directory:
        path = os.path.join(directory, "demo")
        os.mkdir(path)
        for name in os.listdir(harness.MODEL):
            if name not in files:
                os.symlink(os.path.join(harness.MODEL, name), os.path.join(path, name))
        for name, text in files.items():
            if text is not None:
                with open(os.path.join(path, name), "w") as f:
                    f.write(text)
        yield path


class Chat(ServerTest):
    flags = ("--deterministic",)

    def refuse(self, answer, param, words=""):
        self.assertEqual(answer.status, 400, answer)
        self.assertEqual(set(answer.error), {"message", "type", "param", "code"})
        self.assertEqual((answer.error["type"], answer.error["param"]), ("invalid_request_error", param))
        self.assertIn(words, answer.error["message"])

    def test_whole(self):
        answer = self.server.chat_completions(STORY, temperature=0)
        self.assertEqual(answer.status, 200, answer)
        self.assertTrue(answer.headers["x-request-id"])
        body = answer.json()
        self.assertEqual(set(body), {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"})
        self.assertEqual((body["object"], body["model"]), ("chat.completion", self.server.name))
        self.assertTrue(body["id"].startswith("chatcmpl-"))
        self.assertGreater(body["created"], 1.7e9)
        choice, usage = body["choices"][0], body["usage"]
        self.assertEqual(set(choice), {"index", "message", "logprobs", "finish_reason"})
        self.assertEqual(set(choice["message"]), {"role", "content", "refusal"})
        self.assertEqual((choice["message"]["role"], choice["message"]["refusal"]), ("assistant", None))
        # No max_tokens: to the end of the story, which the demo's <|end|> is.
        self.assertEqual((choice["index"], choice["logprobs"], choice["finish_reason"]), (0, None, "stop"))
        self.assertIn("fox", choice["message"]["content"])
        self.assertNotIn("<|", choice["message"]["content"])
        self.assertEqual(usage["prompt_tokens"], len(self.server.tokenize(prompt_of(user(STORY)))))
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])

    def test_same_as_its_prompt(self):
        for messages in (user(STORY), [{"role": "system", "content": "You are Pip."}, *user("What is 12+30?")],
                         [*user("My name is Anna."), {"role": "assistant", "content": "Nice to meet you, Anna!"},
                          *user("What is my name?")]):
            text = self.server.text(prompt_of(messages), temperature=0, max_tokens=40)
            self.assertEqual(self.server.chat(messages, temperature=0, max_tokens=40)["choices"][0]["message"]["content"], text)
        self.assertEqual(text, "Your name is Anna.")

    def test_stream_equals_whole(self):
        for fields in ({"temperature": 0}, {"seed": 5, "n": 3}, {"seed": 1, "temperature": 2, "ignore_eos": True},
                       {"temperature": 0, "logprobs": True, "top_logprobs": 3}, {"seed": 8, "stop": ["a", "the"]},
                       {"seed": 2, "return_token_ids": True}, {"seed": 3, "n": 2, "logprobs": True, "return_token_ids": True},
                       {"temperature": 0, "max_tokens": 1}, {"allowed_token_ids": [6]},
                       {"temperature": 0, "skip_special_tokens": False, "max_completion_tokens": 200}):
            with self.subTest(**fields):
                fields = {"max_tokens": 40, **fields}
                whole = self.server.chat(STORY, **fields)
                events = self.server.chat_stream(STORY, **fields)
                for key in ("id", "created", "system_fingerprint"):
                    self.assertEqual({e[key] for e in events}, {events[0][key]})
                self.assertEqual({e["object"] for e in events}, {"chat.completion.chunk"})
                joined = join_chunks(events)
                self.assertEqual(len(joined), fields.get("n", 1))
                for choice in whole["choices"]:
                    text, reason, logprobs, ids = joined[choice["index"]]
                    self.assertEqual((text, reason), (choice["message"]["content"], choice["finish_reason"]))
                    self.assertEqual(logprobs, (choice["logprobs"] or {"content": []})["content"])
                    self.assertEqual(ids, choice.get("token_ids", []))
                if fields.get("return_token_ids"):
                    self.assertEqual([e["prompt_token_ids"] for e in events if "prompt_token_ids" in e],
                                     [whole["prompt_token_ids"]])

    def test_stream_usage(self):
        events = self.server.chat_stream(STORY, stream_options={"include_usage": True}, n=2, seed=1, max_tokens=8)
        self.assertTrue(all(e["usage"] is None for e in events[:-1]))
        self.assertEqual(events[-1]["choices"], [])
        whole = self.server.chat(STORY, n=2, seed=1, max_tokens=8)["usage"]
        for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
            self.assertEqual(events[-1]["usage"][key], whole[key])
        self.assertTrue(all("usage" not in e for e in self.server.chat_stream(STORY, max_tokens=4)))

    def test_n(self):
        choices = self.server.chat(STORY, n=5, seed=21, max_tokens=20, temperature=1.5)["choices"]
        self.assertEqual([c["index"] for c in choices], list(range(5)))
        self.assertGreater(len({c["message"]["content"] for c in choices}), 1)
        one = self.server.chat(STORY, seed=21, max_tokens=20, temperature=1.5)["choices"]
        self.assertEqual(one, choices[:1])

    def test_max_tokens(self):
        for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 9, "max_completion_tokens": 5}):
            body = self.server.chat(STORY, ignore_eos=True, **fields)
            self.assertEqual((body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]), (5, "length"))
        room = self.server.get("/v1/models").json()["data"][0]["max_model_len"]
        body = self.server.chat("7 " * 500, ignore_eos=True)
        self.assertEqual(body["usage"]["total_tokens"], room)
        self.assertEqual(body["choices"][0]["finish_reason"], "length")
        # However many choices and alternatives: a default is no reason to refuse.
        self.assertEqual(self.server.chat_completions("Hi", n=128, logprobs=True, top_logprobs=20, temperature=0,
                                                      stop=[" "]).status, 200)

    def test_logprobs(self):
        for top in (0, 1, 20):
            fields = {"logprobs": True, "top_logprobs": top, "max_tokens": 20, "return_token_ids": True}
            choice = self.server.chat(STORY, seed=2, **fields)["choices"][0]
            self.assertIsNone(choice["logprobs"]["refusal"])
            content = choice["logprobs"]["content"]
            self.assertEqual(len(content), len(choice["token_ids"]))
            for entry in content:
                self.assertEqual(set(entry), {"token", "logprob", "bytes", "top_logprobs"})
                self.assertEqual(len(entry["top_logprobs"]), top)
                self.assertTrue(math.isfinite(entry["logprob"]) and entry["logprob"] <= 0)
                values = [t["logprob"] for t in entry["top_logprobs"]]
                self.assertEqual(values, sorted(values, reverse=True))
                for token in (entry, *entry["top_logprobs"]):
                    if not token["token"].startswith("bytes:"):
                        self.assertEqual(bytes(token["bytes"]).decode(), token["token"])
            raw = b"".join(bytes(entry["bytes"]) for entry in content)
            self.assertTrue(raw.decode(errors="replace").startswith(choice["message"]["content"]))
        for entry in self.server.chat(STORY, logprobs=True, top_logprobs=1, **GREEDY)["choices"][0]["logprobs"]["content"]:
            self.assertEqual(entry["top_logprobs"][0]["logprob"], entry["logprob"])
        self.assertIsNone(self.server.chat(STORY, logprobs=False, **GREEDY)["choices"][0]["logprobs"])

    def test_tokens_that_are_no_text(self):
        # One token of each byte: what is no character alone has its bytes all the same.
        ids = self.server.tokenize("世", add_special_tokens=False)[-3:]
        content = self.server.chat("x", allowed_token_ids=ids, max_tokens=12, seed=1, logprobs=True, top_logprobs=2)
        for entry in content["choices"][0]["logprobs"]["content"]:
            self.assertEqual(len(entry["bytes"]), 1)
            self.assertIn(entry["bytes"][0], "世".encode())
            self.assertEqual(entry["token"], f"bytes:\\x{entry['bytes'][0]:02x}")

    def test_token_ids(self):
        body = self.server.chat(STORY, return_token_ids=True, logprobs=True, return_tokens_as_token_ids=True, **GREEDY)
        self.assertEqual(body["prompt_token_ids"], self.server.tokenize(prompt_of(user(STORY))))
        choice = body["choices"][0]
        self.assertEqual(len(choice["token_ids"]), 24)
        self.assertEqual([e["token"] for e in choice["logprobs"]["content"]], [f"token_id:{i}" for i in choice["token_ids"]])

    def test_prompt_logprobs(self):
        body = self.server.chat(STORY, prompt_logprobs=2, return_token_ids=True, max_tokens=1)
        self.assertEqual(len(body["prompt_logprobs"]), len(body["prompt_token_ids"]))
        self.assertIsNone(body["prompt_logprobs"][0])
        for token, entry in list(zip(body["prompt_token_ids"], body["prompt_logprobs"]))[1:]:
            self.assertIn(str(token), entry)
        self.refuse(self.server.chat_completions(STORY, prompt_logprobs=2, stream=True), "prompt_logprobs")

    def test_stop(self):
        whole = self.server.chat(STORY, temperature=0)["choices"][0]["message"]["content"]
        stop = whole[20:32]
        choice = self.server.chat(STORY, temperature=0, stop=stop)["choices"][0]
        self.assertEqual((choice["message"]["content"], choice["finish_reason"]), (whole[:whole.index(stop)], "stop"))
        kept = self.server.chat(STORY, temperature=0, stop=[stop], include_stop_str_in_output=True)["choices"][0]
        self.assertEqual(kept["message"]["content"], whole[:whole.index(stop)] + stop)

    def test_content_parts(self):
        parts = [{"type": "text", "text": "Say this again:"}, {"type": "text", "text": "red blue"}]
        self.assertEqual(self.server.chat(user(parts), return_token_ids=True, **GREEDY)["prompt_token_ids"],
                         self.server.tokenize(prompt_of(user("Say this again:\nred blue"))))

    def test_continue_final_message(self):
        messages = [*user(STORY), {"role": "assistant", "content": "Once upon a time, a proud fox"}]
        fields = {"add_generation_prompt": False, "continue_final_message": True}
        body = self.server.chat(messages, return_token_ids=True, **fields, **GREEDY)
        prompt = prompt_of(messages[:1]) + messages[1]["content"]
        self.assertEqual(body["prompt_token_ids"], self.server.tokenize(prompt))
        self.assertEqual(body["choices"][0]["message"]["content"], self.server.text(prompt, **GREEDY))
        self.refuse(self.server.chat_completions(messages, continue_final_message=True), "continue_final_message")
        call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
        self.refuse(self.server.chat_completions([{"role": "assistant", "tool_calls": [call]}], **fields),
                    "continue_final_message")

    def test_cached_tokens(self):
        messages = user(" ".join(f"{i} red dogs," for i in range(60)))
        first = self.server.chat(messages, **GREEDY)
        longer = [*messages, {"role": "assistant", "content": first["choices"][0]["message"]["content"]}, *user("What now?")]
        self.assertGreater(self.server.chat(longer, **GREEDY)["usage"]["prompt_tokens_details"]["cached_tokens"], 0)

    def test_a_template_that_refuses(self):
        self.refuse(self.server.chat_completions([{"role": "wizard", "content": "x"}]), "messages",
                    "roles are system, user and assistant, not wizard")

    def test_no_templates_from_requests(self):
        self.refuse(self.server.chat_completions("x", chat_template="{{ messages }}"), "chat_template")
        self.refuse(self.server.chat_completions("x", chat_template_kwargs={"chat_template": "{{ messages }}"}),
                    "chat_template_kwargs")
        # Text that looks like one is text.
        ids = self.server.chat("{{ bos_token }}{% raw %}", return_token_ids=True, max_tokens=1)["prompt_token_ids"]
        self.assertEqual(ids, self.server.tokenize(prompt_of(user("{{ bos_token }}{% raw %}"))))

    def test_refused(self):
        tool = {"type": "function", "function": {"name": "f"}}
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
        for fields, param in (({"tools": [tool]}, "tools"), ({"tool_choice": "auto"}, "tool_choice"),
                              ({"functions": []}, "functions"), ({"modalities": ["audio"]}, "modalities"),
                              ({"response_format": {"type": "json_object"}}, "response_format"),
                              ({"top_logprobs": 1}, "top_logprobs"), ({"logprobs": 1}, "logprobs"),
                              ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"max_tokens": 0}, "max_tokens"),
                              ({"max_completion_tokens": 10**6}, "max_completion_tokens"), ({"n": 0}, "n"),
                              ({"echo": True}, "echo"), ({"reasoning_effort": "high"}, "reasoning_effort"),
                              ({"temperature": 3}, "temperature"), ({"nonsense": 1}, "nonsense"), ({"prompt": "x"}, "prompt")):
            with self.subTest(**fields):
                self.refuse(self.server.chat_completions("x", **fields), param)
        for messages, param in (([], "messages"), (None, "messages"), (user(None), "messages[0].content"),
                                (user([image]), "messages[0].content[0].type"), ([{"content": "x"}], "messages[0].role")):
            with self.subTest(messages=messages):
                self.refuse(self.server.chat_completions(messages), param)
        self.refuse(self.server.post("/v1/chat/completions", {"model": self.server.name}), "messages")
        self.refuse(self.server.post("/v1/chat/completions", {"messages": user("x")}), "model")
        answer = self.server.post("/v1/chat/completions", {"model": "none-such", "messages": user("x")})
        self.assertEqual((answer.status, answer.error["code"]), (404, "model_not_found"))
        self.assertEqual(self.server.get("/v1/chat/completions").status, 405)
        answer = self.server.chat_completions("word " * 3000)
        self.assertEqual((answer.status, answer.error["code"]), (400, "context_length_exceeded"))
        self.server.wait_idle()

    def test_ignored(self):
        plain = self.server.chat(STORY, **GREEDY)["choices"]
        ignored = {"user": "someone", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "tools": [],
                   "tool_choice": "none", "parallel_tool_calls": False, "modalities": ["text"], "safety_identifier": "x",
                   "response_format": {"type": "text"}, "include_reasoning": True, "prompt_cache_key": "k"}
        self.assertEqual(self.server.chat(STORY, **GREEDY, **ignored)["choices"], plain)

    def test_error_in_a_stream(self):
        seven = self.server.tokenize("77", add_special_tokens=False)[-1:]
        answer = self.server.chat_completions("x", allowed_token_ids=seven, bad_words=["77"], max_tokens=5, stream=True)
        self.assertEqual(answer.status, 200)
        with self.assertRaisesRegex(StreamError, "bad_words"):
            parse_events(answer.body)

    def test_long_conversation(self):
        # Over what is parsed on an event loop, and many messages.
        messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} is a number."} for i in range(201)]
        answer = self.server.chat_completions(messages, max_tokens=1)
        self.assertEqual((answer.status, answer.error["param"]), (400, "messages"))
        body = self.server.chat(messages[:101], max_tokens=3, return_token_ids=True)
        self.assertEqual(body["prompt_token_ids"], self.server.tokenize(prompt_of(messages[:101])))


class ManyAtOnce(ServerTest):
    def test_burst(self):
        # Longer than an event loop takes: each goes to a worker, and none is told that there are too many.
        body = {"model": self.server.name, "max_tokens": 1, "messages": user("word " * 600)}
        answers = harness.in_threads(lambda: self.server.post("/v1/chat/completions", body), [()] * harness.scale(200, 60))
        self.assertEqual({a.status for a in answers}, {200})


class SmallCache(ServerTest):
    flags = ("--kv-cache-memory-bytes", "1M")  # 512 tokens of a context of 2,048

    def test_to_its_end(self):
        body = self.server.chat(STORY, ignore_eos=True)
        self.assertEqual(body["usage"]["total_tokens"], 512)
        answer = self.server.chat_completions("7 " * 400)
        self.assertEqual((answer.status, answer.error["param"]), (400, "messages"))


class Windowed(unittest.TestCase):
    def test_default_length(self):
        # A window frees what lies behind it, unless the cache is smaller than the window, or the context is.
        for window, most in ((64, 2048), (400, 2048), (500, 512), (4096, 512)):
            with self.subTest(window=window), tempfile.TemporaryDirectory() as directory:
                for name in os.listdir(harness.MODEL):
                    os.symlink(os.path.join(os.path.abspath(harness.MODEL), name), os.path.join(directory, name))
                with open(os.path.join(harness.MODEL, "config.json")) as f:
                    config = {**json.load(f), "architectures": ["MistralForCausalLM"], "sliding_window": window}
                os.unlink(os.path.join(directory, "config.json"))
                with open(os.path.join(directory, "config.json"), "w") as f:
                    json.dump(config, f)
                server = Server("--kv-cache-memory-bytes", "1M", "--block-size", "16", "--max-num-seqs", "4",
                                "--max-num-batched-tokens", "64", model=directory)
                answer = server.post("/v1/chat/completions", {"model": server.name, "messages": user("hi"), "ignore_eos": True})
                server.check_stopped()
                self.assertEqual(answer.status, 200, answer)
                self.assertEqual(answer.json()["usage"]["total_tokens"], most)


class Templates(unittest.TestCase):
    def serve(self, files):
        with demo_with(files) as path:
            server = Server(model=path)
            self.assertEqual(server.complete(prompt="12+30=", temperature=0, max_tokens=2)["choices"][0]["text"], "42")
            answer = server.chat_completions("What is 12+30?", temperature=0)
            log = "\n".join(e["message"] for e in server.log_entries())
            server.check_stopped()
            return answer, log

    def config(self, **more):
        with open(os.path.join(harness.MODEL, "tokenizer_config.json")) as f:
            return json.dumps({**json.load(f), **more})

    def test_absent(self):
        answer, log = self.serve({"chat_template.jinja": None})
        self.assertEqual(answer.status, 400)
        self.assertIn("no chat template", answer.error["message"])
        self.assertNotIn("broken", log)

    def test_broken(self):
        for files in ({"chat_template.jinja": "{% for m in messages %}"},
                      {"chat_template.jinja": None, "tokenizer_config.json": self.config(chat_template="a\n{{ x | nosuch }}")},
                      {"chat_template.jinja": "x", "special_tokens_map.json": "["}):
            answer, log = self.serve(files)
            self.assertEqual((answer.status, answer.error["param"]), (400, "messages"), answer)
            self.assertIn("its template is broken", log)
            self.assertRegex(answer.error["message"], "line 1|line 2|special_tokens_map.json")

    def test_in_the_configuration(self):
        with open(os.path.join(harness.MODEL, "chat_template.jinja")) as f:
            template = f.read()
        for value in (template, [{"name": "rag", "template": "x"}, {"name": "default", "template": template}]):
            answer, _ = self.serve({"chat_template.jinja": None, "tokenizer_config.json": self.config(chat_template=value)})
            self.assertEqual(answer.json()["choices"][0]["message"]["content"], "12+30=42.")

    def test_one_that_fails(self):
        answer, _ = self.serve({"chat_template.jinja": "{{ messages[0].content + 1 }}"})
        self.assertEqual((answer.status, answer.error["param"]), (400, "messages"))
        self.assertIn("line 1", answer.error["message"])


class WithoutTokenizer(TinyServerTest):
    def test_refused(self):
        answer = self.server.chat_completions("Hi")
        self.assertEqual(answer.status, 400)
        self.assertIn("no tokenizer", answer.error["message"])


class FillInTheMiddle(ServerTest):
    """The demo's tokenizer with marks as Code Llama has them, over random weights with room for them."""

    flags = ("--load-format", "dummy")
    MARKS = {"1600": "▁<PRE>", "1601": "▁<SUF>", "1602": "▁<MID>", "1603": "▁<EOT>"}

    @classmethod
    def setUpClass(cls):
        read = lambda name: json.load(open(os.path.join(harness.MODEL, name)))
        config = {**read("config.json"), "vocab_size": 1664}
        tokens = read("tokenizer_config.json")
        tokens["added_tokens_decoder"] |= {i: {"content": t, "special": True} for i, t in cls.MARKS.items()}
        cls.folder = demo_with({"config.json": json.dumps(config), "tokenizer_config.json": json.dumps(tokens)})
        cls.model = cls.folder.__enter__()
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        cls.folder.__exit__(None, None, None)

    def test_ids(self):
        prompt = "def f():"
        choice = self.server.complete(prompt=prompt, suffix="    return x", return_token_ids=True, max_tokens=3)["choices"][0]
        ids = choice["prompt_token_ids"]
        plain = self.server.tokenize(prompt)
        self.assertEqual(ids[:len(plain) + 2], [plain[0], 1600, *plain[1:], 1601])
        self.assertEqual(ids[-1], 1602)
        text = self.server.post("/detokenize", {"model": self.server.name, "tokens": ids[len(plain) + 2:-1]}).json()["prompt"]
        self.assertEqual(text, "    return x"[1:])  # the first space of a text is never shown

    def test_ends(self):
        for end in (1600, 1603):
            fields = {"prompt": "a", "suffix": "b", "logit_bias": {str(end): 100}, "max_tokens": 4, "temperature": 0}
            choice = self.server.complete(**fields)["choices"][0]
            self.assertEqual((choice["text"], choice["finish_reason"]), ("", "stop"))
            choice = self.server.complete(ignore_eos=True, **fields)["choices"][0]
            self.assertEqual(choice["finish_reason"], "length")

    def test_echo_and_several(self):
        body = self.server.complete(prompt=["a", "bc"], suffix="z", echo=True, max_tokens=0)
        self.assertEqual([c["text"] for c in body["choices"]], ["a", "bc"])
        for fields in ({"echo": True, "logprobs": 1}, {"prompt": [5, 6]}, {"suffix": 5}):
            answer = self.server.completions(**{"prompt": "a", "suffix": "z", **fields})
            self.assertEqual((answer.status, answer.error["param"]), (400, "suffix"), answer)

    def test_empty_suffix_is_none(self):
        body = self.server.complete(prompt="a", suffix="", return_token_ids=True, max_tokens=1)
        self.assertNotIn(1600, body["choices"][0]["prompt_token_ids"])


if __name__ == "__main__":
    unittest.main()
